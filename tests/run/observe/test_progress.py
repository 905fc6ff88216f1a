"""In a pipe: whole lines, at most one in ten seconds; no compilation in the time that is left."""

from __future__ import annotations

import io
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from agentcpm_jax.run.observe import progress as module
from agentcpm_jax.run.observe.progress import Lines, progress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_lines_are_whole_rare_and_their_rate_begins_after_the_first_step() -> None:
    lines: list[str] = []
    clock = Clock()
    bar = Lines("rl", 100, write=lines.append, clock=clock)
    times = []
    for step in range(40):
        clock.now += 300.0 if step == 0 else 2.0  # the first one compiles
        bar.set_postfix_str(f"loss {step} ")
        before = len(lines)
        bar.update(1)
        times += [clock.now] * (len(lines) - before)
    bar.close()
    assert all(line.endswith("\n") and "\r" not in line for line in lines)
    assert lines[0] == "rl: 1/100, loss 0\n"
    assert lines[1] == "rl: 6/100, 2 s each, 3 min 08 s left, loss 5\n"
    assert min(b - a for a, b in pairwise(times)) >= 10


def test_a_resumed_bar_counts_from_where_it_is() -> None:
    lines: list[str] = []
    clock = Clock()
    bar = Lines("sft", 10, initial=8, write=lines.append, clock=clock)
    bar.update(1)
    clock.now = 11.0
    bar.update(1)
    assert lines == ["sft: 9/10\n", "sft: 10/10, 11 s each, 0 s left\n"]


def test_a_terminal_has_a_bar_whose_rate_leaves_out_the_first_step(monkeypatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    clock, terminal = Clock(), Terminal()
    monkeypatch.setattr(module.sys, "stderr", terminal)
    bar = progress("sft", 10)
    monkeypatch.setattr(bar, "_time", clock)
    for seconds in (500.0, 3.0, 3.0):
        clock.now += seconds
        bar.update(1)
    rate = bar.format_dict["rate"] or 1 / 3
    bar.close()
    assert bar.n == 3 and abs(rate - 1 / 3) < 0.01


def test_a_pipe_gets_no_carriage_return(tmp_path: Path) -> None:
    code = "from agentcpm_jax.run.observe.progress import progress as p; b = p('x', 3); b.update(1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stderr == b"x: 1/3\n"
