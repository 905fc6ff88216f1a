"""kill -9 at named and random points of real runs: nothing lost, nothing doubled, bit for bit.

    python experiments/kill_points.py --n 200        # make test-kills N=200
    python experiments/kill_points.py --named        # the points of `make test-faults`

Real in every trial: launch/train.py on configs/tiny.py (engine, tools, world, log, optimiser,
checkpoints, weight versions), killed with SIGKILL as a process and started again by the same
command; in `shared` lives also PostgreSQL and launch/rollout_worker.py. Small: the model (the
shipped tiny agent), six steps of two groups. The trials of one life share a workdir: it is killed
again and again until it is let run to its end, and then checked:

    R1  every version's weights, whenever they were computed, have one SHA-256
    R2  steps complete, no issue id skipped, no issue or segment twice, none without a state
    R3  in lockstep: the SHA-256s of all versions are those of an uninterrupted run

`crash` and `witness` replace methods in the child's memory alone; the package holds no fault code.
Writes experiments/results/kill_points.{json,md}; exits 1 when a promise is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "launch"), str(ROOT / "experiments")]

import kill_children as children

from agentcpm_jax.log.experience import ExperienceLog

STEPS, GROUPS = 6, 2
RESULTS = ROOT / "experiments" / "results"
TRAINER = ["issue", "record", "settle", "ship", "publish", "weights", "metrics", "save", "snapshot"]
WORKER = ["take", "record", "deliver"]
#: (life, victim, point:when:count): a point is a method, `inside` is before its commit
NAMED = [
    ("lockstep", "trainer", "issue:inside:1"),
    ("lockstep", "trainer", "record:inside:5"),
    ("lockstep", "trainer", "ship:inside:2"),  # the batch is not recorded
    ("lockstep", "trainer", "ship:after:1"),  # recorded, the step did not run
    ("lockstep", "trainer", "publish:before:2"),  # the step ran, its weights are nowhere
    ("lockstep", "trainer", "weights:before:2"),  # half written
    ("lockstep", "trainer", "snapshot:after:1"),  # within a checkpoint
    ("lockstep", "trainer", "save:after:1"),
    ("async", "trainer", "settle:inside:3"),
    ("async", "trainer", "record:after:4"),
    ("async", "trainer", "ship:after:2"),
    ("async", "trainer", "save:after:1"),
]
SHARED = [
    ("shared", "worker", "take:after:1"),
    ("shared", "worker", "record:inside:2"),
    ("shared", "worker", "deliver:inside:1"),
    ("shared", "trainer", "ship:after:1"),
    ("shared", "trainer", "settle:inside:2"),
    ("shared", "database", "record:after:3"),
    ("shared", "database", "ship:inside:1"),
]


def main() -> int:
    """Run the trials, check every life, write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=0, help="random kills")
    parser.add_argument("--named", action="store_true", help="the named points, SQLite")
    parser.add_argument("--shared", action="store_true", help="the named points, PostgreSQL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-life", type=int, default=8, help="kills before a run may end")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of kill_points.*")
    args = parser.parse_args()
    began, rng = time.monotonic(), random.Random(args.seed)
    trials = (NAMED if args.named else []) + (SHARED if args.shared else [])
    trials += [drawn(rng, n, args.per_life) for n in range(args.n)]
    with tempfile.TemporaryDirectory(prefix="kills-") as scratch:
        os.chmod(scratch, 0o755)
        report = run(trials, Path(scratch), args.per_life)
    report |= {"command": " ".join(["python", "experiments/kill_points.py", *sys.argv[1:]])}
    report |= {"seconds": round(time.monotonic() - began), "cores": os.cpu_count()}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "kill_points.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "kill_points.md").write_text(table(report))
    print(table(report))
    return 1 if report["broken"] else 0


def drawn(rng: random.Random, n: int, per_life: int) -> tuple[str, str, str]:
    """A random kill: three lives in four on SQLite, half of the kills at a random moment."""
    life = ("lockstep", "async", "lockstep", "shared")[n // per_life % 4]
    victim = rng.choice(["trainer", "worker", "database"]) if life == "shared" else "trainer"
    if victim != "database" and rng.random() < 0.5:
        return life, victim, f"moment:after:{rng.uniform(0.0, 6.0):.2f}"
    names = WORKER if victim == "worker" else ["record", "settle", "ship"]
    names = names if life == "shared" else TRAINER
    when = rng.choice(["before", "inside", "after"])
    return life, victim, f"{rng.choice(names)}:{when}:{rng.randint(1, 3)}"


def run(trials: list[tuple[str, str, str]], scratch: Path, per_life: int) -> dict[str, Any]:
    """All trials, a life after the other; what was killed, and which promises broke."""
    cache, kills, broken = scratch / "compiled", [], []
    whole = children.Life("lockstep", scratch / "whole", cache)
    whole.finish()
    expected = {v: shas.copy() for v, shas in whole.witnessed().items()}
    life: children.Life | None = None
    count = 0
    for number, (kind, victim, spec) in enumerate(trials):
        if life is None or life.kind != kind or count == per_life:
            broken += conclude(life, expected)
            life, count = children.Life(kind, scratch / f"{number}-{kind}", cache), 0
        outcome = life.trial(victim, spec)
        if outcome == "finished":  # the run was over before the point came: one more life for it
            broken += conclude(life, expected)
            life, count = children.Life(kind, scratch / f"{number}-{kind}-again", cache), 0
            outcome = life.trial(victim, spec)
        count += 1
        kills.append({"life": kind, "victim": victim, "point": spec, "outcome": outcome})
    broken += conclude(life, expected)
    return {"kills": kills, "broken": broken}


def conclude(life: children.Life | None, expected: dict[int, set[str]]) -> list[str]:
    """Lets a life run to its end and lists the promises it broke."""
    if life is None:
        return []
    try:
        life.finish()
        found = life.witnessed()
        with ExperienceLog.open(life.log_url) as log:
            broken = broken_accounts(log)
    except Exception as error:
        return [f"{life.workdir.name}: {type(error).__name__}: {error}"]
    finally:
        life.close()
    broken += [f"R1: version {v} has {len(s)} results" for v, s in found.items() if len(s) > 1]
    if set(range(1, STEPS + 1)) - found.keys():
        broken.append(f"R1: versions {sorted(found)} were computed, {STEPS} wanted")
    if life.kind == "lockstep" and found != expected:
        broken.append("R3: the weights are not those of the uninterrupted run")
    return [f"{life.workdir.name}: {what}" for what in broken]


def broken_accounts(log: ExperienceLog, steps: int = STEPS) -> list[str]:
    """R2 of a finished run of `steps` steps, from the log alone."""
    issues, broken = log.issues("rl"), []
    if [i.issue_id for i in issues] != list(range(1, len(issues) + 1)):
        broken.append("R2: an issue id is missing")
    live = Counter(i.ordinal for i in issues if i.state != "dropped")
    if max(live.values()) > 1:
        broken.append("R2: a task is in two living groups")
    if {i.ordinal for i in issues} != set(range(max(i.ordinal for i in issues) + 1)):
        broken.append("R2: a task was lost")
    if unknown := {i.state for i in issues} - {"issued", "ready", "shipped", "dropped"}:
        broken.append(f"R2: states {unknown}")
    rows: Counter[tuple[int, int, int]] = Counter()
    groups: Counter[int] = Counter()
    for step in range(steps):
        batch = log.shipped("rl", step)
        rows.update((s.issue_id, s.sample, s.segment_index) for s in batch)
        mine = {s.issue_id for s in batch}
        groups.update(mine)
        if len(mine) != GROUPS:
            broken.append(f"R2: step {step} holds {len(mine)} groups")
    if max([*rows.values(), *groups.values()], default=0) > 1:
        broken.append("R2: trained twice")
    if groups.keys() != {i.issue_id for i in issues if i.state == "shipped"}:
        broken.append("R2: shipped issues are not those of the steps")
    if log.last_shipped_step("rl") != steps - 1:
        broken.append("R2: not all steps are recorded")
    return broken


def table(report: dict[str, Any]) -> str:
    """Markdown: kills by life, victim and point, and what broke."""
    kills = report["kills"]
    lines = ["# kill -9", "", f"`{report['command']}`", "", str(__doc__).split("\n\n")[2], ""]
    lines += ["| life | victim | point | kills |", "|---|---|---|---|"]
    count = Counter(
        (k["life"], k["victim"], ":".join(k["point"].split(":")[:2]))
        for k in kills
        if k["outcome"] == "killed"
    )
    lines += [f"| {life} | {who} | {at} | {n} |" for (life, who, at), n in sorted(count.items())]
    missed = sum(k["outcome"] != "killed" for k in kills)
    lines += ["", f"{sum(count.values())} kills, {missed} points never reached, "]
    lines[-1] += f"{report['seconds']} s on {report['cores']} cores."
    lines += ["", "Broken promises: " + ("; ".join(report["broken"]) or "none") + "."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
