"""Asynchronous against synchronous RL: the same start, recipe and number of steps, eta 1 and 0.

    python experiments/quickstart_async.py --start runs/quickstart/merge/hf

Writes experiments/results/quickstart_async.json: wall and CPU seconds per step (the first two left
out: they compile), the share of the time in which the trainer waited, rewards. On two shared cores
rollouts and training compete for the same cores, so little is to be gained; on separate machines
the wait is what asynchrony hides.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from agentcpm_jax.run.metrics import read_metrics

COMPILING = 2


def main() -> None:
    """Run both, one after the other, and write the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--start", type=Path, default=ROOT / "runs" / "quickstart" / "merge" / "hf")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "quickstart_async")
    args = parser.parse_args()
    table = {f"eta {eta}": run(eta, args) for eta in (0, 1)}
    for name, row in table.items():
        print(name, row)
    content = {"command": "python experiments/quickstart_async.py", "runs": table}
    out = ROOT / "experiments" / "results" / "quickstart_async.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n")


def run(eta: int, args: argparse.Namespace) -> dict[str, float]:
    """One RL stage at this bound on staleness."""
    workdir = args.runs / str(eta)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [
        sys.executable,
        str(ROOT / "launch" / "train.py"),
        "--config=configs/quickstart.py",
        "--config.stages=('rl',)",
        f"--config.stage.rl.init_from={args.start.resolve()}",
        f"--config.stage.rl.stream.max_staleness={eta}",
        f"--config.stage.rl.shape.steps={args.steps}",
        f"--workdir={workdir}",
    ]
    subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    rows = read_metrics(workdir / "rl" / "metrics.jsonl")[COMPILING:]
    step_seconds = sum(row["time/step_seconds"] for row in rows)
    return {
        "steps": float(len(rows)),
        "wall_seconds_per_step": step_seconds / len(rows),
        "share_waiting": sum(row["time/waited_seconds"] for row in rows) / step_seconds,
        "cpu_seconds_with_start_up": after.ru_utime - before.ru_utime,
        "mean_reward": sum(row["reward/mean"] for row in rows) / len(rows),
        "age_mean": sum(row["stale/age_mean"] for row in rows) / len(rows),
    }


if __name__ == "__main__":
    main()
