"""Whole runs on a pool of which three answers in ten are odd: progress, and nothing untrue trained.

    python experiments/hostile_pool.py --n 1000

Real in every life: launch/train.py on configs/tiny.py:async, and a server with the package's own
engine and routes behind `hostile_answers.py`, which spoils three answers in ten on every route:
information, probes, pauses, weight updates and samples alike. Small: the model (the shipped agent)
and the groups. A life is one workdir. Its trainer is stopped or killed once on the way, and started
again by the same command; a life ends with its last step, and lives follow each other until there
were enough odd answers. Checked:

    progress: each start ends with exit code 0, or with one line that begins with `error:` and no
        traceback, and goes on when it is started again, until the run is done
    truth: every sampled token that was shipped to a step has the id, the log-probability and the
        version that the engine wrote down, bit for bit
    accounts: no issue lost, none trained twice (`kill_points.broken_accounts`)

Writes experiments/results/hostile_pool.{json,md}; exits 1 when something broke.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "launch"), str(ROOT / "experiments")]

import hostile_answers
import jax
import numpy as np
import train as launch_train  # pyright: ignore[reportMissingImports]
from kill_points import RESULTS, broken_accounts

from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.run.observe.metrics import read_metrics

SHARE = 0.3
STARTS = 6  # of a life, the one that is ended on the way included
LIMIT = 3600  # s that a start may take, on the busiest machine
FLAGS = (
    "--config=configs/tiny.py:async",
    "--nodoctor",  # it checks the pool once; the start does it patiently
    "--config.episode.max_turns=3",
    "--config.stage.rl.stream.group_size=3",
    "--config.stage.rl.pool.health_every=1.0",
    "--config.stage.rl.pool.attempt_timeout=20.0",
    "--config.stage.rl.pool.control_timeout=20.0",
    "--config.stage.rl.pool.update_timeout=120.0",
)


def main() -> int:
    """Lives until there were enough odd answers; check each; write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=1000, help="odd answers in all")
    parser.add_argument("--steps", type=int, default=24, help="steps of a life")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of hostile_pool.*")
    args = parser.parse_args()
    began, rng = time.monotonic(), random.Random(args.seed)
    lives: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="hostile-") as scratch:
        jax.config.update("jax_compilation_cache_dir", str(Path(scratch) / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        while sum(life["odd"] for life in lives) < args.n and not any(x["broken"] for x in lives):
            folder = Path(scratch) / f"life-{len(lives)}"
            folder.mkdir()
            lives.append(live(folder, args.steps, rng))
            print(json.dumps({k: lives[-1][k] for k in ("odd", "ends", "broken")}), flush=True)
    kinds: Counter[str] = Counter()
    for life in lives:
        kinds.update(life.pop("kinds"))
    report = {"command": " ".join(["python", "experiments/hostile_pool.py", *sys.argv[1:]])}
    report |= {"lives": lives, "kinds": dict(sorted(kinds.items()))}
    report |= {"seconds": round(time.monotonic() - began), "cores": os.cpu_count()}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "hostile_pool.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "hostile_pool.md").write_text(table(report))
    print(table(report))
    return int(any(life["broken"] for life in lives))


def live(folder: Path, steps: int, rng: random.Random) -> dict[str, Any]:
    """One life: its odd answers by kind, how its starts ended, what broke."""
    server = spawn(
        folder / "server.out", hostile_answers.serve, SHARE, rng.randrange(2**31), folder
    )
    try:
        while not (folder / "url").exists():
            time.sleep(0.1)
        flags = [*FLAGS, f"--workdir={folder / 'run'}", f"--config.stage.rl.shape.steps={steps}"]
        flags += [f"--config.stage.rl.pool.urls=({(folder / 'url').read_text()!r},)"]
        ends = run(folder, flags, rng.randrange(1, steps - 1), rng)
        broken = [] if ends[-1] == "done" else [f"not done after {len(ends)} starts: {ends}"]
        broken += [end for end in ends if end.startswith("broken")]
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
    with ExperienceLog.open(folder / "run" / "experience.db") as log:
        tokens, untrue = compare(log, folder / "truth.jsonl")
        broken += untrue + (broken_accounts(log, steps) if not broken else [])
    rows = read_metrics(folder / "run" / "rl" / "metrics.jsonl")
    if [row["step"] for row in rows] != list(range(1, len(rows) + 1)):
        broken.append("the curve has holes")
    odd = [json.loads(line)[0] for line in (folder / "odd.jsonl").read_text().splitlines()]
    found = {"odd": len(odd), "kinds": Counter(odd), "steps": len(rows), "tokens": tokens}
    return found | {"ends": ends, "broken": broken}


def run(folder: Path, flags: list[str], due: int, rng: random.Random) -> list[str]:
    """Starts a trainer, ends it once after `due` steps, until its run is done; how each ended."""
    ends: list[str] = []
    workdir = folder / "run"
    how = rng.choice([signal.SIGTERM, signal.SIGKILL])
    while len(ends) < STARTS and (not ends or ends[-1] != "done"):
        output = folder / f"start-{len(ends)}.out"
        child = spawn(output, launch_train.main, flags)
        deadline = time.monotonic() + LIMIT
        while (found := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.2)
            if due and len(read_metrics(workdir / "rl" / "metrics.jsonl")) >= due:
                due = 0
                os.kill(child, how)
        if found[0] == 0:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return [*ends, f"broken: no end within {LIMIT} s"]
        ends.append(ended(os.waitstatus_to_exitcode(found[1]), output.read_text()))
    return ends


def ended(code: int, said: str) -> str:
    """How a start ended: done, stopped, killed, or the error that it named."""
    if "Traceback" in said:
        return f"broken: {said[-1500:]}"
    if code in (0, 130, -signal.SIGKILL):
        return {0: "done", 130: "stopped"}.get(code, "killed")
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    return errors[0][:300] if len(errors) == 1 else f"broken: exit code {code}: {said[-1500:]}"


def compare(log: ExperienceLog, truth: Path) -> tuple[int, list[str]]:
    """(tokens shipped, what of them the engine did not say) of a life."""
    said: defaultdict[str, list[list[tuple[int, float, int]]]] = defaultdict(list)
    for line in truth.read_text().splitlines():
        answer = json.loads(line)
        _, sample, turn, *_ = answer["rid"].split("/")  # nonce/sample/turn/chunk/
        said[f"{sample}/{turn}"].append(tokens_of(answer))
    count, untrue = 0, []
    for step in range(log.last_shipped_step("rl") + 1):
        for shipped in log.shipped("rl", step):
            issue = {t.sample: t for t in log.load_group(shipped.issue_id).trajectories}
            trajectory = issue[shipped.sample]
            segment = shipped.segment
            for number, turn in enumerate(trajectory.turns):
                span = slice(turn.sample_start, turn.end)
                columns = (segment.ids, segment.logprob, segment.version)
                mine = list(zip(*(c[span].tolist() for c in columns), strict=True))
                count += len(mine)
                key = f"{shipped.issue_id}-{shipped.sample}-{trajectory.attempt}/{number}"
                if not is_made_of(mine, said[key]):
                    untrue.append(f"step {step}: {key}: the engine did not say {mine[:3]}...")
    return count, untrue[:5]


def tokens_of(answer: dict[str, Any]) -> list[tuple[int, float, int]]:
    """(id, float32 log-probability, version) of each token of an answer."""
    versions = [
        int(span["version"].rpartition("-")[2]) if span["version"] != "default" else -1
        for span in answer["versions"]
        for _ in range(span["start"], span["end"])
    ]
    return [
        (row[1], float(np.float32(row[0])), version)
        for row, version in zip(answer["rows"], versions, strict=True)
    ]


def is_made_of(tokens: list[Any], chunks: list[list[Any]]) -> bool:
    """Whether `tokens` are some of the chunks, whole, one after the other in their order."""
    if not tokens:
        return True
    return any(
        chunk
        and tokens[: len(chunk)] == chunk
        and is_made_of(tokens[len(chunk) :], chunks[at + 1 :])
        for at, chunk in enumerate(chunks)
    )


def spawn(output: Path, program: Any, *args: Any) -> int:
    """Forks: the parent has imported everything and never touches a device."""
    if pid := os.fork():
        return pid
    code = 70
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        code = program(*args) or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def table(report: dict[str, Any]) -> str:
    """Markdown: the lives, the odd answers by kind, what broke."""
    lines = ["# A hostile pool", "", f"`{report['command']}`", "", *str(__doc__).split("\n\n")[2:4]]
    lines += ["", "| life | odd answers | steps | tokens compared | starts ended |"]
    lines += ["|---|---|---|---|---|"]
    lines += [
        f"| {n} | {x['odd']} | {x['steps']} | {x['tokens']:,} | {'; '.join(x['ends'])} |"
        for n, x in enumerate(report["lives"])
    ]
    odd = sum(x["odd"] for x in report["lives"])
    lines += ["", f"{odd} odd answers, {report['seconds']} s on {report['cores']} cores; by kind:"]
    lines += ["", ", ".join(f"{kind} {n}" for kind, n in report["kinds"].items()) + "."]
    broken = [what for x in report["lives"] for what in x["broken"]]
    return "\n".join([*lines, "", "Broken: " + ("; ".join(broken) or "none") + "."]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
