"""Ctrl-C and SIGTERM are answered at once, in Python, in compiled code and while importing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agentcpm_jax.run.start.document import CHECKOUT
from agentcpm_jax.run.start.signals import GRACE, RESUMABLE, StopSignal

CHILD = """
import sys, time
import numpy
from agentcpm_jax.run.start import signals
signals.GRACE = 0.5
with signals.StopSignal(answer=signals.say) as stop:
    stop.patient = sys.argv[1] == "step"
    try:
        stop.patient = sys.argv[1] == "step"
        print("ready", flush=True)
        if sys.argv[1] == "python":
            time.sleep(60)
        elif sys.argv[1] == "deaf":  # as a compiler: no handler runs until it returns
            numpy.sort(numpy.arange(600_000_000)[::-1] % 9973)
        elif sys.argv[1] == "collecting":  # jax has such a callback
            import gc
            naps = iter([0.3, 0.3, 0.3])
            gc.callbacks.append(lambda *_: time.sleep(next(naps, 0)))
            while True:
                gc.collect()
        elif sys.argv[1] == "cleaning":
            try:
                time.sleep(60)
            finally:
                time.sleep(60)
        elif sys.argv[1] == "importing":  # where nothing may be raised
            import slow_module
        else:
            while not stop.requested:
                time.sleep(0.01)
            time.sleep(1.0)  # the step, which takes longer than the grace
            print("saved", flush=True)
    except KeyboardInterrupt:
        sys.exit(130)
"""

SLOW = """
import time
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("raised", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("doing", ["python", "deaf", "collecting", "cleaning", "importing", "step"])
def test_one_line_at_once_and_an_end(doing: str, number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "slow_module.py").write_text(SLOW)
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, doing],
        stdout=pipe,
        stderr=pipe,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{CHECKOUT}:{tmp_path}"},
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.send_signal(number)
    began = time.monotonic()
    line = process.stderr.readline()
    assert line.startswith(f"interrupted by {number.name}: ") and time.monotonic() - began < 5
    out, rest = process.communicate(timeout=30)
    assert rest == ""
    assert process.returncode == (0 if doing == "step" else RESUMABLE)
    assert "raised" not in out and ("saved" in out) == (doing == "step")
    assert ("after this step" in line) == (doing == "step")


def test_without_an_answer_it_only_asks() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        assert signal.getsignal(signal.SIGTERM) == before, "a second one acts as usual"


def test_the_grace_leaves_ten_seconds_in_all() -> None:
    assert GRACE < 10


RECIPE = """
merge_method: linear
models:
- {model: "shipped:sft", parameters: {weight: 0.5}}
- {model: "shipped:base", parameters: {weight: 0.5}}
"""
STOPPED = [
    *("train.py --config=configs/tiny.py --workdir={out}",),
    *("rollout_worker.py --config=configs/tiny.py --workdir={out}",),
    *("merge.py {recipe} {out}", "convert.py shipped:sft {out}", "serve.py shipped:sft --port=0"),
]


@pytest.mark.parametrize("seconds", [0.15, 0.5, 1.2, 2.5])
@pytest.mark.parametrize("command", STOPPED)
def test_a_launcher_can_be_stopped_while_it_imports(
    command: str, seconds: float, tmp_path: Path
) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(RECIPE)
    script, *words = command.format(recipe=recipe, out=out).split()
    process = subprocess.Popen(
        [sys.executable, str(CHECKOUT / "launch" / script), *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert "Traceback" not in said and "NameError" not in said
    if process.returncode == RESUMABLE:
        assert said.startswith("interrupted") and said.count("\n") == 1
        assert script == "train.py" or not out.exists(), "half of an output is left"
    else:  # before the first line of ours, done, or refused: a worker has no SQLite log
        assert process.returncode in (-signal.SIGTERM, 0, 2)
