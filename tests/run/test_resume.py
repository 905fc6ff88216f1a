"""A run that is killed, in a step or in a save, stopped or started twice, and started again.

R1: recorded steps are recomputed bit for bit. R2: every issue ends in exactly one state and nothing
is trained twice. R3: the whole loss curve equals that of an uninterrupted run.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from agentcpm_jax.hf.files import Checkpoint
from agentcpm_jax.run.commandline import CHECKOUT
from agentcpm_jax.run.observe.metrics import CLOCK, read_metrics
from agentcpm_jax.tasks.world import WorldTasks

STEPS = 6
# Of an asynchronous run; in lockstep everything but the clock's figures is the same.
COMPUTED = ("train/loss", "train/grad_norm", "train/entropy", "loss/ratio_max", "stale/age_mean")
SAMPLED = ("reward/mean", "episode/turns")


def command(workdir: Path, variant: str, *flags: str) -> list[str]:
    config = "configs/tiny.py" + (f":{variant}" if variant else "")
    script = str(CHECKOUT / "launch" / "train.py")
    return [sys.executable, script, f"--config={config}", f"--workdir={workdir}", *flags]


def environment(workdir: Path) -> dict[str, str]:
    """Runs of one test session share compiled programs: most of a short run is compiling."""
    cache = str(workdir.parent.parent / "compiled")
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def finish(workdir: Path, variant: str = "", *flags: str) -> None:
    done = subprocess.run(
        command(workdir, variant, *flags),
        capture_output=True,
        text=True,
        env=environment(workdir),
    )
    assert done.returncode == 0, done.stderr[-2000:]


def kill_when(workdir: Path, condition: Callable[[], bool], variant: str = "", *flags: str) -> None:
    """Start a run and kill -9 it as soon as `condition` holds."""
    log = workdir.with_suffix(".log")
    started = command(workdir, variant, *flags)
    with log.open("w") as output:
        process = subprocess.Popen(started, stdout=output, stderr=output, env=environment(workdir))
    try:
        deadline = time.monotonic() + 240
        while not condition():
            assert process.poll() is None, f"the run ended by itself: {log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, "the moment to kill never came"
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def curve(workdir: Path, names: Sequence[str] = (*COMPUTED, *SAMPLED)) -> list[tuple]:
    rows = read_metrics(workdir / "rl" / "metrics.jsonl")
    return [(row["step"], *(row[name] for name in names)) for row in rows]


def whole_rows(workdir: Path) -> list[dict]:
    """The file of metrics without the figures that measure the clock."""
    rows = read_metrics(workdir / "rl" / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k.split("/")[0] not in CLOCK} for row in rows]


def weights(workdir: Path) -> dict[str, bytes]:
    with Checkpoint(workdir / "rl" / "hf") as found:
        return {name: np.asarray(found.read(name)).tobytes() for name in found.tensors}


def steps_done(workdir: Path) -> int:
    return len(read_metrics(workdir / "rl" / "metrics.jsonl"))


def saving(workdir: Path) -> bool:
    return any((workdir / "rl" / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def assert_exactly_once(workdir: Path) -> None:
    """R2, read from the database itself."""
    with sqlite3.connect(workdir / "experience.db") as log:
        states = dict(log.execute("select issue_id, state from issue where kind = 'train'"))
        shipped = log.execute("select step, issue_id, sample, segment from shipped").fetchall()
    assert len({row[1:] for row in shipped}) == len(shipped)
    assert {row[0] for row in shipped} == set(range(STEPS))
    assert {i for i, state in states.items() if state == "shipped"} == {r[1] for r in shipped}
    assert set(states.values()) <= {"shipped", "dropped", "ready", "issued"}


def lose_the_disk(workdir: Path) -> None:
    """The live log is gone; checkpoints are elsewhere."""
    for part in ("", "-wal", "-shm"):
        (workdir / f"experience.db{part}").unlink(missing_ok=True)


@pytest.mark.runs
def test_deterministic_runs_resume_bit_for_bit(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    finish(whole)
    expected = curve(whole)
    assert [row[0] for row in expected] == list(range(1, STEPS + 1))
    assert len({row[1] for row in expected}) == STEPS, "the steps must differ to prove anything"

    killed = tmp_path / "killed"
    kill_when(killed, lambda: steps_done(killed) >= 1)  # in a step, before any checkpoint
    kill_when(killed, lambda: steps_done(killed) >= 2 and saving(killed))  # in a save
    kill_when(killed, lambda: steps_done(killed) >= 5)  # in a step, behind a checkpoint
    lose_the_disk(killed)
    finish(killed)

    assert whole_rows(killed) == whole_rows(whole)
    assert all(row["reward/mean"] is not None for row in whole_rows(killed))
    assert {"reward/max", "reward/hop2", "episode/tokens"} <= whole_rows(whole)[0].keys()
    assert weights(killed) == weights(whole)
    assert_exactly_once(killed)
    assert_exactly_once(whole)


@pytest.mark.runs
def test_asynchronous_runs_recompute_recorded_steps(tmp_path: Path) -> None:
    workdir = tmp_path / "async"
    kill_when(workdir, lambda: steps_done(workdir) >= 3, "async")
    before = curve(workdir)
    kill_when(workdir, lambda: steps_done(workdir) >= 5, "async")
    again = curve(workdir)
    assert again[: len(before)] == before
    lose_the_disk(workdir)  # what is recorded in the snapshot of step 4 is recomputed
    finish(workdir, "async")
    assert curve(workdir)[:4] == again[:4]
    assert_exactly_once(workdir)


@pytest.mark.runs
def test_ctrl_c_leaves_a_resumable_workdir(tmp_path: Path) -> None:
    workdir = tmp_path / "interrupted"
    process = subprocess.Popen(
        command(workdir, ""),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(workdir),
    )
    while steps_done(workdir) < 1:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "same command resumes" in stderr and "Traceback" not in stderr
    finish(workdir)
    assert steps_done(workdir) == STEPS


@pytest.mark.runs
def test_two_trainers_do_not_share_a_workdir(tmp_path: Path) -> None:
    workdir = tmp_path / "double"
    first = subprocess.Popen(
        command(workdir, "async"), stderr=subprocess.DEVNULL, env=environment(workdir)
    )
    try:
        while steps_done(workdir) < 1:
            assert first.poll() is None
            time.sleep(0.01)
        second = subprocess.run(command(workdir, "async"), capture_output=True, text=True)
        assert second.returncode == 2 and second.stderr.count("\n") == 1, second.stderr
        assert f"pid {first.pid} on {os.uname().nodename}" in second.stderr
        assert first.poll() is None, "it goes on"
    finally:
        first.kill()
        first.wait()
    finish(workdir, "async")  # nothing is left to remove
    assert [row[0] for row in curve(workdir)] == list(range(1, STEPS + 1))
    assert_exactly_once(workdir)


#: What changes nothing that was computed, and what the messages of a run tell to change.
FREE = {
    "shape": ("steps=8", "checkpoint_every=2", "log_every=2", "row_length=512"),
    "stream": ("stall_timeout=1800.0", "breaker=128"),
    "engine": ("slots=8",),
    "pool": ("api_key_env=ABSENT",),
}


@pytest.mark.runs
def test_edited_tasks_are_refused_and_what_is_free_may_change(tmp_path: Path) -> None:
    workdir, tasks = tmp_path / "edited", tmp_path / "tasks.jsonl"
    rows = [json.dumps(task.to_json()) + "\n" for task in WorldTasks().take(30)]
    tasks.write_text("".join(rows))
    flags = [f"--config.stage.rl.tasks_path={tasks}"]
    often = [*flags, "--config.stage.rl.shape.checkpoint_every=1"]
    kill_when(workdir, lambda: steps_done(workdir) >= 3, "async", *often)

    tasks.write_text("".join(reversed(rows[15:])))
    again = command(workdir, "async", *often)
    done = subprocess.run(again, capture_output=True, text=True, env=environment(workdir))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"row 1 of {tasks} is not what it was" in done.stderr and "--accept_data" in done.stderr

    free = [f"--config.stage.rl.{key}.{value}" for key in FREE for value in FREE[key]]
    finish(workdir, "async", *flags, *free, "--accept_data")
    assert [row[0] for row in curve(workdir)][-1] == 8
    assert f"row 1 of {tasks}" in (workdir / "report.html").read_text()


MERGED = [
    *("--config=configs/quickstart.py:smoke", "--config.stages=('merge', 'eval')"),
    *("--config.stage.merge.init_from=shipped:sft", "--config.stage.merge.general=shipped:base"),
    *("--config.stage.eval.models=('merge',)", "--config.stage.eval.tasks=64"),
]


@pytest.mark.runs
def test_merge_and_evaluation_are_stopped_at_once_and_go_on(tmp_path: Path) -> None:
    workdir = tmp_path / "merged"
    asked = [*command(workdir, "")[:2], *MERGED, f"--workdir={workdir}"]
    for begun, over in ("merge/search.db", "merge/hf"), ("merge/DONE", "eval/merge.json"):
        process = subprocess.Popen(
            asked,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(workdir),
        )
        while not (workdir / begun).exists():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(1.0)
        process.terminate()
        stopped = time.monotonic()
        _, said = process.communicate(timeout=60)
        assert time.monotonic() - stopped < 20  # 10 where the machine is its own
        assert process.returncode == 130 and "Traceback" not in said, said[-2000:]
        assert "interrupted by SIGTERM: the same command resumes" in said
        assert not (workdir / over).exists(), "it was over before it was stopped"
    subprocess.run(asked, check=True, capture_output=True, env=environment(workdir))
    assert (workdir / "eval" / "merge.json").is_file() and (workdir / "report.html").is_file()


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    workdir = tmp_path / "other"
    kill_when(workdir, (workdir / "config.json").exists)
    done = subprocess.run(command(workdir, "", "--config.seed=1"), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "seed" in done.stderr
    assert "Traceback" not in done.stderr
