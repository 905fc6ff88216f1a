"""kill -9 at named and random points of real runs: nothing lost, nothing doubled, bit for bit.

    python experiments/kill_points.py --kills=40 --seed=1  # of every process; make test-kills N=40
    python experiments/kill_points.py --kills=40 --seed=1 --only=pool        # those lives anew
    python experiments/kill_points.py --named --pooled       # points of `make test-faults`

Real in every trial: launch/train.py on configs/tiny.py (engine, tools, world, log, optimiser,
checkpoints, weight versions), killed with SIGKILL as a process and started again by the same
command; in `shared` lives also PostgreSQL and launch/rollout_worker.py, in `pool` lives two
launch/serve.py and launch/pool_agent.py, of which one is killed while all others run on. Small: the
model (the shipped tiny agent), six steps of two groups. The trials of one life share a workdir: it
is killed again and again until it is let run to its end, and then checked:

    R1  every version's weights, whenever they were computed, have one SHA-256; steps are recomputed
        bit for bit from the log, and no step is missing in the metrics
    R2  steps complete, no issue id skipped, no issue or segment twice, none without a state; what
        the log held at a kill, batches and samples, it holds at the end; no sample is too old
    R3  in lockstep: the SHA-256s of all versions are those of an uninterrupted run
    R4  the log-prob of every trained token is that of the version it names
    R5  the run ends, and leaves no process

`crash`, `witness` and `watch_*` replace methods in the child's memory alone; the package holds no
fault code. Writes experiments/results/kill_points.{json,md}; exits 1 when a promise is broken.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "launch"), str(ROOT / "experiments")]

import kill_children as children
import pooled_life
import run_accounts

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


#: A server, the agent and the trainer of one run: phase:after:seconds
POOLED = [
    ("pool", "server", "loading:after:0.0"),
    ("pool", "agent", "copying:after:0.0"),
    ("pool", "trainer", "publishing the weights:after:0.05"),
]
#: Lives of random kills in their order, and whom they kill in turn.
LIVES = ("pool", "shared", "pool", "lockstep", "pool", "shared", "async")
VICTIMS = {
    "pool": ["server", "agent", "trainer"],
    "shared": ["worker", "database"] * 6 + ["trainer"] * 3,
    "lockstep": ["trainer"],
    "async": ["trainer"],
}
AGAIN = "moment:after:1.00"  # where a random point was not reached
ETA = 1  # of configs/tiny.py

OWED = ("steps", "steps_lost", "samples", "samples_lost", "samples_repeated", "samples_too_old")

#: (kind, its trials: victim and point)
Plan = list[tuple[str, list[tuple[str, str]]]]


def main() -> int:
    """Run the trials, check every life, write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=0, help="random kills")
    parser.add_argument("--named", action="store_true", help="the named points, SQLite")
    parser.add_argument("--shared", action="store_true", help="the named points, PostgreSQL")
    parser.add_argument("--pooled", action="store_true", help="the named points, servers and agent")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-life", type=int, default=6, help="kills before a run may end")
    parser.add_argument(
        "--only", default="", help="a kind or number of lives; the table keeps others"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of kill_points.*")
    args = parser.parse_args()
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: what a child leaves becomes ours
    listed = NAMED * args.named + SHARED * args.shared + POOLED * args.pooled
    lives = planned(listed, args.per_life) + drawn(args.kills, args.seed, args.per_life)
    only = [n for n, (kind, _) in enumerate(lives) if args.only in ("", kind, str(n))]
    if not only:
        parser.error("nothing to kill: give --kills, or a kind or number of its lives to --only")
    path, done = args.out / "kill_points.json", []
    asked = [a for a in sys.argv[1:] if not a.startswith(("--only", "--out"))]
    command = " ".join(["python", "experiments/kill_points.py", *asked])
    if args.only and path.exists() and (old := json.loads(path.read_text()))["command"] == command:
        done = [life for life in old["lives"] if life["life"] not in only]
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="kills-") as scratch:
        os.chmod(scratch, 0o755)
        for life in run(lives, only, Path(scratch), bool(listed)):
            done = sorted([*done, life], key=lambda found: found["life"])
            report = {"command": command, "cores": os.cpu_count(), "lives": done}
            path.write_text(json.dumps(report, indent=1) + "\n")
            (args.out / "kill_points.md").write_text(table(report))
            print(f"life {life['life']}: {life['kind']}, {life['seconds']} s", flush=True)
    print(table(report))
    return int(any(life["broken"] for life in done))


def planned(trials: list[tuple[str, str, str]], per_life: int) -> Plan:
    """Listed trials as lives: a new one for another kind, and after `per_life`."""
    lives: Plan = []
    for kind, victim, spec in trials:
        if not lives or lives[-1][0] != kind or len(lives[-1][1]) == per_life:
            lives.append((kind, []))
        lives[-1][1].append((victim, spec))
    return lives


def drawn(kills: int, seed: int, per_life: int) -> Plan:
    """Random kills: the victims of a kind take turns, points and moments are drawn."""
    rng, turns, lives = random.Random(seed), Counter[str](), []
    for n in range(0, kills, per_life):
        kind, trials = LIVES[len(lives) % len(LIVES)], []
        for _ in range(min(per_life, kills - n)):
            victim = VICTIMS[kind][turns[kind] % len(VICTIMS[kind])]
            turns[kind] += 1
            trials.append((victim, point(rng, kind, victim)))
        rng.shuffle(trials)
        lives.append((kind, trials))
    return lives


def point(rng: random.Random, kind: str, victim: str) -> str:
    """Where a victim is killed: half of the time at a random moment."""
    if victim != "database" and rng.random() < 0.5:
        return f"moment:after:{rng.uniform(0.0, 6.0):.2f}"
    if kind == "pool":
        phase, most = rng.choice([*pooled_life.PHASES[victim].items()])
        return f"{phase}:after:{rng.uniform(0.0, most):.3f}"
    names = WORKER if victim == "worker" else ["record", "settle", "ship"]
    names = names if kind == "shared" else TRAINER
    when = rng.choice(["before", "inside", "after"])
    return f"{rng.choice(names)}:{when}:{rng.randint(1, 3)}"


def run(lives: Plan, only: list[int], scratch: Path, listed: bool) -> Iterator[dict[str, Any]]:
    """Each life with its trials: what was killed, what was owed, and which promises broke."""
    cache, expected = scratch / "compiled", {}
    if any(lives[n][0] == "lockstep" for n in only):
        whole = children.Life("lockstep", scratch / "whole", cache)
        whole.finish()
        expected = children.witnessed(whole.workdir)
    for number in only:
        began, (kind, trials) = time.monotonic(), lives[number]
        found: dict[str, Any] = {"life": number, "kind": kind, "kills": [], "checks": []}
        left, broken = list(trials), []
        while left and not broken:
            name = f"{number}-{kind}-{len(found['checks'])}"
            life = (pooled_life.PooledLife if kind == "pool" else children.Life)(
                kind, scratch / name, cache
            )
            try:
                kills = kill(life, left, fallback="" if listed else AGAIN)
                checks, broken = conclude(life, kills, expected, cache)
            except Exception as error:
                kills, checks, broken = [], {}, [f"{type(error).__name__}: {error}"]
            broken += end(life)
            broken = [f"{name}: {what}" for what in broken]
            found["kills"] += kills
            found["checks"].append(checks)
        seconds = round(time.monotonic() - began)
        yield found | {"broken": broken, "seconds": seconds}


def kill(life: Any, left: list[tuple[str, str]], fallback: str) -> list[dict[str, Any]]:
    """Takes trials from `left` until there are none, or the run is over: what was killed.

    A trial that comes too late begins the next life; there it is not put off again.
    """
    kills: list[dict[str, Any]] = []
    while left:
        victim, spec = left[0]
        began = time.monotonic()
        outcome = life.trial(victim, spec)
        if outcome == "killed":
            record = {"victim": victim, "point": spec, "phase": life.phase, "outcome": outcome}
            record |= {"seconds": round(time.monotonic() - began, 2)}
            kills.append(record | {"held": run_accounts.held(life.log_url)})
            left.pop(0)
        elif kills:
            return kills
        else:
            left.pop(0)
            if fallback and spec != fallback:
                left.insert(0, (victim, fallback))
            else:
                kills.append({"victim": victim, "point": spec, "outcome": outcome})
            return kills
    return kills


def conclude(
    life: Any, kills: list[dict[str, Any]], expected: dict[int, set[str]], cache: Path
) -> tuple[dict[str, Any], list[str]]:
    """Lets a life run to its end: what was checked of it, and the promises it broke."""
    life.finish()
    found, end = children.witnessed(life.workdir), run_accounts.held(life.log_url)
    with ExperienceLog.open(life.log_url) as log:
        broken = broken_accounts(log)
    for each in kills:
        owed = each.pop("held", run_accounts.Held()).owed(end, ETA)
        each |= owed
        if any(owed[name] for name in owed if name.endswith(("lost", "repeated"))):
            broken.append(f"R2: {each['victim']} killed at {each['point']}: {owed}")
    broken += [f"R1: version {v} has {len(s)} results" for v, s in found.items() if len(s) > 1]
    if set(range(1, STEPS + 1)) - found.keys():
        broken.append(f"R1: versions {sorted(found)} were computed, {STEPS} wanted")
    if life.kind == "lockstep" and found != expected:
        broken.append("R3: the weights are not those of the uninterrupted run")
    answer, output = life.workdir.with_suffix(".verified"), life.workdir.with_suffix(".out")
    asked = [str(life.workdir), life.log_url, str(STEPS), str(ETA), str(answer)]
    if code := children.wait(children.spawn(run_accounts.verify, asked, output, cache)):
        raise RuntimeError(f"the run cannot be verified, {code}:\n{output.read_text()[-3000:]}")
    checks = json.loads(answer.read_text())
    return checks, broken + checks.pop("broken")


def end(life: Any) -> list[str]:
    """Ends a life's processes: what is wrong with that, and which ones it leaves."""
    broken = []
    try:
        life.close()
    except Exception as error:
        broken.append(f"R5: {error}")
    deadline = time.monotonic() + 10
    task = Path(f"/proc/self/task/{os.getpid()}/children")
    while (left := task.read_text().split()) and time.monotonic() < deadline:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        time.sleep(0.05)
    for pid in left:
        said = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:200]
        broken.append(f"R5: a process is left: {said}")
        children.send(int(pid), signal.SIGKILL)
        os.waitpid(int(pid), 0)
    return broken


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
    """Markdown: kills and what was owed by kind and victim, the lives, and what broke."""
    lives = report["lives"]
    what = "\n\n".join([*str(__doc__).split("\n\n")[2:4], ""])
    lines = ["# kill -9", "", f"`{report['command']}`", "", what]
    lines += [*victims_table(lives), "", *lives_table(lives), ""]
    outcomes = Counter(k["outcome"] for life in lives for k in life["kills"])
    lines.append(f"{outcomes['killed']} kills, {outcomes['finished']} points never reached, ")
    lines[-1] += f"{sum(life['seconds'] for life in lives)} s on {report['cores']} cores."
    broken = [what for life in lives for what in life["broken"]]
    lines += ["", "Broken promises: " + ("; ".join(broken) or "none") + "."]
    return "\n".join(lines) + "\n"


def victims_table(lives: list[dict[str, Any]]) -> list[str]:
    """A row per kind of life and victim: where it was killed, and what of the log came to an end.

    `held` is what the log held at the kills; what is too old at a resume is rightly drawn anew.
    """
    head = ["life", "victim", "kills", "where", "s", "steps held", "lost", "samples held", "lost"]
    rows = [[*head, "repeated", "too old"], ["---"] * 11]
    by: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for life in lives:
        for each in life["kills"]:
            if each["outcome"] == "killed":
                by[life["kind"], each["victim"]].append(each)
    for (kind, victim), kills in sorted(by.items()):
        where = Counter(k["phase"] or ":".join(k["point"].split(":")[:2]) for k in kills)
        said = ", ".join(f"{name} {n}" for name, n in sorted(where.items()))
        seconds = round(sum(k["seconds"] for k in kills))
        owed = [sum(k[name] for k in kills) for name in OWED]
        rows.append([kind, victim, len(kills), said, seconds, *owed])
    return ["| " + " | ".join(map(str, row)) + " |" for row in rows]


def lives_table(lives: list[dict[str, Any]]) -> list[str]:
    """A row per life. Nats: the largest from the version named, the median from the next one."""
    head = ["life", "kind", "kills", "runs", "tokens compared", "nats from their version"]
    rows = [[*head, "from the next", "oldest sample", "s"], ["---"] * 9]
    for life in lives:
        checks = [c for c in life["checks"] if c]
        kills = sum(k["outcome"] == "killed" for k in life["kills"])
        gap, other, age = (max((c[k] for c in checks), default=0) for k in ("gap", "other", "age"))
        tokens = f"{sum(c['tokens'] for c in checks):,}"
        row = [life["life"], life["kind"], kills, len(life["checks"]), tokens]
        rows.append([*row, f"{gap:.1e}", f"{other:.1e}", age, life["seconds"]])
    return ["| " + " | ".join(map(str, row)) + " |" for row in rows]


if __name__ == "__main__":
    sys.exit(main())
