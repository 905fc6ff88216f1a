"""The stream: bounded staleness, exactly once, and R3 in lockstep."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.rollout import producer
from agentcpm_jax.rollout.stream import (
    Stream,
)
from agentcpm_jax.types import (
    Task,
    Trajectory,
)
from tests.rollout.stream_world import SMALL, World, check_bounds, finish, flat, task, train, with_


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("eta", [0, 1, 3])
@pytest.mark.parametrize("over_age", ["drop", "wait"])
def test_bounds_hold_whatever_the_latencies(
    tmp_path: Path, seed: int, eta: int, over_age: str
) -> None:
    rnd = random.Random(seed)
    cfg = with_(SMALL, max_staleness=eta, over_age=over_age)
    world = World(lambda: rnd.lognormvariate(-6.5, 1.0), faults=0.2)
    with ExperienceLog.open(tmp_path / "e.db") as log:
        stream = Stream(log, "rl", task, world.run, finish, cfg)
        admission = stream._producer.admission
        admit, budgets = admission.submit, []

        def submit() -> None:
            admit()
            limit = (eta + admission.version + 1) * cfg.batch_groups
            budgets.append(limit - admission.accepted - admission.running)

        admission.submit = submit
        with stream:
            stream.start()
            train(stream, world, 0, 6, pause=0.005)
            figures = stream.snapshot()
        assert min(budgets) >= 0
        check_bounds(log, cfg, 6)
        if cfg.over_age == "wait":
            assert figures.get("stream/dropped/over_age", 0) == 0
        assert figures["stream/age_max"] <= eta
        assert world.peak <= cfg.max_concurrent_groups * cfg.group_size
        # Every slot came back, and accepted is what the log says is ready or shipped.
        states = log.counts("rl")["state"]
        accepted, running, rejected, _ = admission.stats()
        assert running == 0 and world.running == 0 and not stream._producer.running
        assert accepted == states["ready"] + states["shipped"]
        late = log.counts("rl")["reason"]["over_age"]  # these had been accepted
        assert rejected + late == states["dropped"] + states["issued"]


def test_a_restart_re_issues_what_was_in_flight_and_trains_nothing_twice(tmp_path: Path) -> None:
    rnd = random.Random(5)
    world = World(lambda: rnd.uniform(0, 0.004), faults=0.1)
    batches: list = []
    with ExperienceLog.open(tmp_path / "e.db") as log:
        for _ in range(4):
            with Stream(log, "rl", task, world.run, finish, SMALL) as stream:
                stream.start(version=len(batches))
                batches += train(stream, world, len(batches), 2)
                time.sleep(rnd.uniform(0, 0.01))
            before = {i.issue_id for i in log.issues("rl", states=["issued"])}
            last = log.next_ordinal("rl")
        check_bounds(log, SMALL, 8)
        # A trainer that fell back to an older checkpoint gets the same batches again (R1).
        with Stream(log, "rl", task, world.run, finish, SMALL) as stream:
            world.version = 5
            stream.start(version=5)
            assert [flat(stream.next_step_segments(k)) for k in range(5, 8)] == batches[5:8]
            time.sleep(0.05)  # behind the budget: no flood of new groups
            assert stream.snapshot()["stream/running"] == 0 and log.next_ordinal("rl") == last
            train(stream, world, 5, 6)
        check_bounds(log, SMALL, 11)
        assert not before & {i.issue_id for i in log.issues("rl", states=["issued"])}
        ordinals = [i.ordinal for i in log.issues("rl")]
        assert sorted(set(ordinals)) == list(range(max(ordinals) + 1))  # no task skipped


def test_a_restart_samples_anew_what_grew_too_old_to_be_trained(tmp_path: Path) -> None:
    calls: list[int] = []
    resumed = threading.Event()
    world = World()

    async def run(task: Task, issue_id: int, sample: int, attempt: int) -> Trajectory:
        if issue_id == 1:
            calls.append(sample)
            if sample == 2:
                resumed.set()
        return await world.run(task, issue_id, sample, attempt)

    with ExperienceLog.open(tmp_path / "e.db") as log:
        issue = log.issue("rl", "train", task(0), 0, 0)
        for sample, world.version in ((0, 3), (1, 4)):
            traj = asyncio.run(world.run(task(0), issue, sample, 0))
            log.record_trajectory(replace(traj, issue_id=issue, sample=sample))
        world.version = 5
        with Stream(log, "rl", task, run, finish, SMALL) as stream:  # eta = 1
            stream.start(version=5)
            assert resumed.wait(20)
    assert calls == [0, 2]


# ---- lockstep (R3)

LOCKSTEP = with_(SMALL, deterministic=True, max_staleness=1, retries=1)


def run_lockstep(where: Path, first: int, steps: int, latency: Callable[[], float]) -> list:
    world = World(latency, faults=0.25)

    async def run(task: Task, issue_id: int, sample: int, attempt: int) -> Trajectory:
        return await world.run(task, issue_id, sample, attempt)

    whole_groups = mock.patch.object(producer, "MIN_VALID", LOCKSTEP.group_size)
    with ExperienceLog.open(where) as log:
        with (
            whole_groups,
            Stream(log, "rl", task, run, finish, LOCKSTEP, world.use_version) as stream,
        ):
            stream.start(version=first)
            batches = []
            for step in range(first, first + steps):
                batches.append(flat(stream.next_step_segments(step)))
                stream.set_version(step + 1)
        reasons = log.counts("rl")["reason"]
        assert reasons["zero_variance"] and reasons["too_few_valid"]
    return batches


def test_lockstep_does_not_depend_on_latencies(tmp_path: Path) -> None:
    slow, rnd = run_lockstep(tmp_path / "a.db", 0, 6, lambda: 0.0), random.Random(1)
    assert run_lockstep(tmp_path / "b.db", 0, 6, lambda: rnd.uniform(0, 0.01)) == slow
    for step, batch in enumerate(slow):
        versions = {v for s in batch for v in np.frombuffer(s[5], np.int32) if v >= 0}
        assert versions == {max(0, step - 1)}


LOCKSTEP_RUN = """
import sys
sys.path.insert(0, {root!r})
import random
from pathlib import Path
from tests.rollout.test_stream import *
rnd = random.Random(int(sys.argv[2]))
where = Path(sys.argv[1])
with ExperienceLog.open(where) as log:
    first = max(0, log.last_shipped_step("rl") - 1)
run_lockstep(where, first, 400, lambda: rnd.uniform(0, 0.02))
"""


def test_lockstep_survives_kill_9_bit_for_bit(tmp_path: Path) -> None:
    """R3: batches after any number of kills equal those of the run that was never killed."""
    root, rnd, where = Path(__file__).parents[2], random.Random(0), tmp_path / "killed.db"
    code = LOCKSTEP_RUN.format(root=str(root))
    done = unfinished = 0
    for seed in range(3):
        worker = subprocess.Popen([sys.executable, "-c", code, str(where), str(seed)])
        with ExperienceLog.open(where) as log:
            while log.last_shipped_step("rl") < done:
                assert worker.poll() is None
                time.sleep(0.02)
            time.sleep(rnd.uniform(0.0, 0.3))
            os.kill(worker.pid, signal.SIGKILL)
            worker.wait()
            done = log.last_shipped_step("rl") + 1
            states = log.counts("rl")["state"]
            unfinished += states["issued"] + states["ready"]
    assert unfinished
    whole = run_lockstep(tmp_path / "whole.db", 0, done + 4, lambda: 0.0)
    assert run_lockstep(where, 0, done + 4, lambda: 0.0) == whole


def test_issues_left_of_the_next_batch_wait_for_their_version(tmp_path: Path) -> None:
    """Batch 1 is complete and not asked for, batch 2 in flight: both are left by the same kill."""
    where = tmp_path / "left.db"
    world = World(faults=0.25)

    async def run(task: Task, issue_id: int, sample: int, attempt: int) -> Trajectory:
        if world.version == 1:  # batch 2: never ends before the stream is stopped
            await asyncio.sleep(60)
        return await world.run(task, issue_id, sample, attempt)

    def batches(log: ExperienceLog) -> set[int | None]:
        return {issue.batch for issue in log.issues("rl", states=["issued"])}

    with ExperienceLog.open(where) as log:
        with Stream(log, "rl", task, run, finish, LOCKSTEP, world.use_version) as stream:
            stream.start(version=0)
            stream.next_step_segments(0)
            stream.set_version(1)
            deadline = time.monotonic() + 30
            while batches(log) != {2} and time.monotonic() < deadline:
                time.sleep(0.01)
        assert batches(log) == {2} and log.last_shipped_step("rl") == 0
    whole = run_lockstep(tmp_path / "whole.db", 0, 6, lambda: 0.0)
    assert run_lockstep(where, 0, 6, lambda: 0.0) == whole
