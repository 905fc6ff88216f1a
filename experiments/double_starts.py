"""Two trainers, one workdir: the second is refused, and the run of the first is not harmed.

    python experiments/double_starts.py --n 20

Real in every trial: launch/train.py on configs/tiny.py as its user starts it, twice, the second at
a random moment: both at once, while the first imports, compiles, trains or saves. A life is one
workdir, and the lives go side by side; the owner is killed with SIGKILL and started anew between
some of the trials, and is let run to its end at last. Checked:

    one of the two ends within its first seconds, with exit code 2 and one line that names the other
    one's host and pid; the start after a SIGKILL is never refused; and at the end, by
    `kill_points.broken_accounts`, no task is trained twice, lost, or in two living groups

Writes experiments/results/double_starts.{json,md}; exits 1 when something broke.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "launch"), str(ROOT / "experiments")]

from kill_points import RESULTS, STEPS, broken_accounts

from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.run.observe.metrics import read_metrics

LIVES = ("", "async")  # variants of configs/tiny.py
PER_OWNER = 4  # trials of one process, before it is killed
LONGEST = 12.0  # s between the first start and the second
LIMIT = 900  # s that a process may take


def main() -> int:
    """Run the trials of both lives, check each, write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=20, help="double starts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of double_starts.*")
    args = parser.parse_args()
    began = time.monotonic()
    trials: list[dict[str, Any]] = []
    broken: list[str] = []
    with tempfile.TemporaryDirectory(prefix="double-") as scratch, ThreadPoolExecutor() as pool:
        lives = [Life(Path(scratch) / f"life-{n}", v, args.seed) for n, v in enumerate(LIVES)]
        shares = [len(range(n, args.n, len(LIVES))) for n in range(len(LIVES))]
        for found, ending in pool.map(Life.run, lives, shares):
            trials += found
            broken += [t["broken"] for t in found if t["broken"]] + ending
    report = {"command": f"python experiments/double_starts.py --n {args.n} --seed {args.seed}"}
    report |= {"trials": trials, "broken": broken, "seconds": round(time.monotonic() - began)}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "double_starts.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "double_starts.md").write_text(table(report))
    print(table(report))
    return 1 if broken else 0


class Life:
    """One workdir, and the process that owns it."""

    def __init__(self, workdir: Path, variant: str, seed: int) -> None:
        self.workdir, self._rng = workdir, random.Random(f"{seed}/{variant}")
        config = "configs/tiny.py" + (f":{variant}" if variant else "")
        script = str(ROOT / "launch" / "train.py")
        small = ["--config.episode.max_turns=3", "--config.stage.rl.stream.group_size=3"]
        saves = "--config.stage.rl.shape.checkpoint_every=1"
        flags = [f"--config={config}", f"--workdir={workdir}", saves, *small]
        self._command = [sys.executable, script, *flags]
        cache = str(workdir.parent / "compiled")
        self._env = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def run(self, count: int) -> tuple[list[dict[str, Any]], list[str]]:
        """(`count` double starts, what is wrong with the run at its end).

        Every process has `PER_OWNER` of them: the first at once, the last right behind a step.
        """
        found: list[dict[str, Any]] = []
        while len(found) < count:
            owner = self._start()
            for turn in range(min(PER_OWNER, count - len(found))):
                began = time.monotonic()
                if turn == PER_OWNER - 1:  # it trains, and saves after each step
                    self._wait_for_a_step(owner)
                elif turn:
                    time.sleep(self._rng.uniform(0.0, LONGEST))
                gap, at = time.monotonic() - began, self._steps()
                owner, broken = self._second(owner)
                found.append({"life": self.workdir.name, "gap": round(gap, 1), "step": at})
                found[-1]["broken"] = broken
                print(found[-1], file=sys.stderr, flush=True)
            owner.kill()
            owner.communicate()
        return found, self._conclude()

    def _wait_for_a_step(self, owner: subprocess.Popen[str]) -> None:
        done = self._steps()
        while self._steps() == done and owner.poll() is None:
            time.sleep(0.01)

    def _steps(self) -> int:
        return len(read_metrics(self.workdir / "rl" / "metrics.jsonl"))

    def _conclude(self) -> list[str]:
        """Lets the run end and lists what is wrong with it."""
        last = self._start()
        _, said = last.communicate(timeout=LIMIT)
        if last.returncode:
            return [f"{self.workdir.name}: exit code {last.returncode}: {said[-500:]}"]
        with ExperienceLog.open(self.workdir / "experience.db") as log:
            broken = broken_accounts(log)
        steps = [row["step"] for row in read_metrics(self.workdir / "rl" / "metrics.jsonl")]
        if steps != list(range(1, STEPS + 1)):
            broken.append(f"the curve has the steps {steps}")
        return [f"{self.workdir.name}: {what}" for what in broken]

    def _second(self, owner: subprocess.Popen[str]) -> tuple[subprocess.Popen[str], str]:
        """(the process that goes on, what is wrong) of one more start beside `owner`."""
        second = self._start()
        while owner.poll() is None and second.poll() is None:
            time.sleep(0.05)
        loser, winner = (second, owner) if second.poll() is not None else (owner, second)
        _, said = loser.communicate()
        if loser is owner and loser.returncode == 0:  # it was at its end, and the next one begins
            return winner, ""
        named = f"pid {winner.pid} on {socket.gethostname()} "
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        if loser.returncode == 2 and len(lines) == 1 and named in lines[0]:
            return winner, ""
        return winner, f"exit code {loser.returncode}, {named!r} expected: {said[-500:]!r}"

    def _start(self) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(
            self._command, stdout=subprocess.DEVNULL, stderr=pipe, env=self._env, text=True
        )


def table(report: dict[str, Any]) -> str:
    """Markdown: every double start, and what broke."""
    lines = ["# Two starts in one workdir", "", f"`{report['command']}`", ""]
    lines += ["| life | s between the starts | steps done | second |", "|---|---|---|---|"]
    lines += [
        f"| {t['life']} | {t['gap']} | {t['step']} | {t['broken'] or 'refused'} |"
        for t in report["trials"]
    ]
    lines += ["", f"{len(report['trials'])} double starts, {report['seconds']} s. "]
    lines[-1] += "Broken: " + ("; ".join(report["broken"]) or "none") + "."
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
