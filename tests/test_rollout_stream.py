"""The stream: bounded staleness, exactly once, repair, named ends, and R3 in lockstep."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from agentcpm_jax.rollout.experience import ExperienceLog
from agentcpm_jax.rollout.experience_codec import Credit
from agentcpm_jax.rollout.experience_schema import Decision, ShippedSegment
from agentcpm_jax.rollout.stream import (
    BreakerOpen,
    GroupOutcome,
    NoSignal,
    Stream,
    StreamConfig,
    StreamError,
    StreamStalled,
)
from agentcpm_jax.types import (
    Provenance,
    Segment,
    StopReason,
    Task,
    Trajectory,
    TrajectoryGroup,
    UserError,
    Verdict,
)

SMALL = StreamConfig(
    batch_groups=2,
    group_size=3,
    max_staleness=1,
    max_concurrent_groups=6,
    retry_delay=0.0,
    stall_timeout=20.0,
)


def task(ordinal: int) -> Task:
    return Task(f"question {ordinal}", ("yes",), meta={"ordinal": ordinal})


def chance(*key: object) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return int(hashlib.sha256(repr(key).encode()).hexdigest()[:8], 16) / 2**32


def finish(group: TrajectoryGroup) -> GroupOutcome:
    """Leave-one-out in its simplest form; unknown samples get no credit."""
    known = [t for t in group.trajectories if t.verdict is not Verdict.UNKNOWN]
    rewards = np.array([t.reward for t in known], np.float32)
    if not rewards.std():
        return GroupOutcome(False, "zero_variance", decisions=[Decision(-1, "zero_variance", "")])
    credits = {
        (t.sample, n): Credit(np.full(len(s), t.reward - rewards.mean(), np.float32), s.sampled)
        for t in known
        for n, s in enumerate(t.segments)
    }
    return GroupOutcome(True, credits=credits)


class World:
    """A policy whose result depends on (issue, sample, attempt, version), never on the clock."""

    def __init__(self, latency: Callable[[], float] = lambda: 0.0, faults: float = 0.0) -> None:
        self.version = 0
        self.latency, self.faults = latency, faults
        self.running = self.peak = 0

    async def use_version(self, version: int) -> None:
        assert self.running == 0
        self.version = version

    async def run(self, task: Task, issue_id: int, sample: int, attempt: int) -> Trajectory:
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            first = self.version
            await asyncio.sleep(self.latency())
            key = (task.question, issue_id, sample, attempt)
            luck = chance("fault", *key)
            if luck < self.faults / 2:
                raise ConnectionError("the tool server went away")
            if luck < self.faults:
                return Trajectory((), (), StopReason.ENGINE_ERROR, error="engine")
            versions = [-1, first, self.version]
            ids = [issue_id, sample, int(1000 * chance(*key, first))]
            kinds = [Provenance.TEMPLATE, Provenance.SAMPLED, Provenance.SAMPLED]
            seg = Segment(
                np.array(ids, np.int32),
                np.array(kinds, np.uint8),
                np.array([np.nan, -chance(*key), -0.5], np.float32),
                np.array(versions, np.int32),
            )
            right = chance("right", *key) < 0.4
            return Trajectory(
                (seg,),
                (),
                StopReason.ANSWERED,
                verdict=Verdict.RIGHT if right else Verdict.WRONG,
                reward=float(right),
            )
        finally:
            self.running -= 1


def flat(batch: list[ShippedSegment]) -> list[tuple]:
    return [
        (
            s.issue_id,
            s.sample,
            s.segment_index,
            *(getattr(s.segment, n).tobytes() for n in ("ids", "logprob", "version")),
            s.credit.advantage.tobytes(),
            s.credit.keep.tobytes(),
        )
        for s in batch
    ]


def check_bounds(log: ExperienceLog, cfg: StreamConfig, steps: int) -> None:
    """No shipped token older than eta; B groups a step; each issue and segment at most once."""
    seen: set[tuple[int, int, int]] = set()
    groups: set[int] = set()
    for step in range(steps):
        batch = log.shipped("rl", step)
        ids = {s.issue_id for s in batch}
        assert len(ids) == cfg.batch_groups and not ids & groups
        groups |= ids
        for s in batch:
            key = (s.issue_id, s.sample, s.segment_index)
            assert key not in seen
            seen.add(key)
            trained = s.segment.version[s.credit.keep & s.segment.sampled]
            assert step - trained.min() <= cfg.max_staleness
            assert trained.max() <= step
    assert {i.issue_id for i in log.issues("rl", states=["shipped"])} == groups


def train(stream: Stream, world: World, first: int, steps: int, pause: float = 0.0) -> list:
    batches = []
    for step in range(first, first + steps):
        batches.append(flat(stream.next_step_segments(step)))
        time.sleep(pause)
        world.version = step + 1
        stream.set_version(step + 1)
    return batches


def with_(cfg: StreamConfig, **changes: object) -> StreamConfig:
    return StreamConfig(**{**vars(cfg), **changes})  # pyright: ignore[reportArgumentType]


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
            before = {i.issue_id for i in log.in_flight("rl")}
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
        assert not before & {i.issue_id for i in log.in_flight("rl")}
        ordinals = [i.ordinal for i in log.issues("rl")]
        assert sorted(set(ordinals)) == list(range(max(ordinals) + 1))  # no task skipped


# ---- lockstep (R3)

LOCKSTEP = with_(SMALL, deterministic=True, max_staleness=1, reissues=1, retries=1, min_valid=3)


def run_lockstep(where: Path, first: int, steps: int, latency: Callable[[], float]) -> list:
    world = World(latency, faults=0.25)

    async def run(task: Task, issue_id: int, sample: int, attempt: int) -> Trajectory:
        return await world.run(task, issue_id, sample, attempt)

    with ExperienceLog.open(where) as log:
        with Stream(log, "rl", task, run, finish, LOCKSTEP, world.use_version) as stream:
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
sys.path[:0] = [{root!r}, {tests!r}]
import random
from pathlib import Path
from test_rollout_stream import *
rnd = random.Random(int(sys.argv[2]))
where = Path(sys.argv[1])
with ExperienceLog.open(where) as log:
    first = max(0, log.last_shipped_step("rl") - 1)
run_lockstep(where, first, 400, lambda: rnd.uniform(0, 0.02))
"""


def test_lockstep_survives_kill_9_bit_for_bit(tmp_path: Path) -> None:
    """R3: batches after any number of kills equal those of the run that was never killed."""
    root, rnd, where = Path(__file__).parent.parent, random.Random(0), tmp_path / "killed.db"
    code = LOCKSTEP_RUN.format(root=str(root), tests=str(root / "tests"))
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


# ---- repair, ends, errors


def test_a_failed_sample_is_retried_alone(tmp_path: Path) -> None:
    calls: list[tuple[int, int, int]] = []
    world = World()

    async def run(task: Task, issue_id: int, sample: int, attempt: int) -> Trajectory:
        calls.append((issue_id, sample, attempt))
        if sample == 1 and attempt < 2:
            raise OSError("no sandbox")
        traj = await world.run(task, issue_id, sample, attempt)
        reward = float(sample == 0)
        return Trajectory(traj.segments, (), traj.stop, verdict=Verdict.RIGHT, reward=reward)

    with ExperienceLog.open(tmp_path / "e.db") as log:
        with Stream(log, "rl", task, run, finish, with_(SMALL, max_staleness=0)) as stream:
            stream.start()
            stream.next_step_segments(0)
        for issue_id in (1, 2):
            mine = sorted(c[1:] for c in calls if c[0] == issue_id)
            assert mine == [(0, 0), (1, 0), (1, 1), (1, 2), (2, 0)]
            tries = [t for t in log.attempts(issue_id) if t.sample == 1]
            assert [t.stop for t in tries] == ["infra_error", "infra_error", "answered"]
            assert tries[0].error == "OSError: no sandbox" and tries[0].reward is None


def test_a_hopeless_group_is_dropped_and_its_task_comes_back_later(tmp_path: Path) -> None:
    world = World()

    async def run(task: Task, issue_id: int, sample: int, attempt: int) -> Trajectory:
        if task.meta["ordinal"] == 1:
            return Trajectory((), (), StopReason.JUDGE_ERROR, error="judge down")
        return await world.run(task, issue_id, sample, attempt)

    cfg = with_(SMALL, epoch_size=4, retries=1)
    with ExperienceLog.open(tmp_path / "e.db") as log:
        with Stream(log, "rl", task, run, finish, cfg) as stream:
            stream.start()
            train(stream, world, 0, 5)
        issues = [i for i in log.issues("rl") if i.ordinal == 1]
        assert [i.reason for i in issues] == ["too_few_valid"] * 2  # once more, not for ever
        between = [i for i in log.issues("rl") if issues[0].issue_id < i.issue_id]
        before = [i.ordinal for i in between if i.issue_id < issues[1].issue_id]
        assert set(range(2, 4)) <= set(before)  # after the rest of its epoch
        assert {i.epoch for i in log.issues("rl") if i.ordinal < 4} == {0}


def test_the_breaker_stops_the_run_with_the_last_error(tmp_path: Path) -> None:
    async def run(*_: object) -> Trajectory:
        raise ConnectionError("port 30000 refused")

    with ExperienceLog.open(tmp_path / "e.db") as log:
        with Stream(log, "rl", task, run, finish, with_(SMALL, breaker=10)) as stream:
            stream.start()
            for _ in range(2):  # it stays broken, and never hangs
                with pytest.raises(BreakerOpen, match=r"10 samples.*ConnectionError: port 30000"):
                    stream.next_step_segments(0)
        admission = stream._producer.admission
        assert admission.running == 0 and admission.accepted == 0
        assert log.counts("rl")["state"]["issued"] > 0  # resumable


def test_tasks_without_signal_stop_the_run(tmp_path: Path) -> None:
    def all_equal(group: TrajectoryGroup) -> GroupOutcome:
        return GroupOutcome(False, "zero_variance")

    cfg = with_(SMALL, barren_batches=3)
    with (
        ExperienceLog.open(tmp_path / "e.db") as log,
        Stream(log, "rl", task, World().run, all_equal, cfg) as stream,
    ):
        stream.start()
        with pytest.raises(NoSignal, match=r"6 groups .*'zero_variance': 6"):
            stream.next_step_segments(0)


def test_bugs_in_any_part_reach_the_trainer(tmp_path: Path) -> None:
    def broken(*_: object) -> GroupOutcome:
        raise ZeroDivisionError("in the filters")

    def no_task(ordinal: int) -> Task:
        raise UserError("tasks.jsonl: no usable line")

    with ExperienceLog.open(tmp_path / "e.db") as log:
        with Stream(log, "rl", task, World().run, broken, SMALL) as stream:
            stream.start()
            with pytest.raises(ZeroDivisionError, match="in the filters"):
                stream.next_step_segments(0)
        with Stream(log, "other", no_task, World().run, finish, SMALL) as stream:
            stream.start()
            with pytest.raises(UserError, match="no usable line"):
                stream.next_step_segments(0)
        with Stream(log, "third", task, World().run, finish, SMALL) as stream:
            stream.start()
            with pytest.raises(ValueError, match="step 3 was asked for, 0 is next"):
                stream.next_step_segments(3)
            assert stream.next_step_segments(0)
        with pytest.raises(StreamError, match="not running"):
            stream.next_step_segments(1)


def test_stop_frees_a_waiting_trainer_and_stubborn_episodes_are_not_recorded(
    tmp_path: Path,
) -> None:
    async def stubborn(*_: object) -> Trajectory:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        return Trajectory((), (), StopReason.CANCELLED)

    seen: list[BaseException] = []
    with ExperienceLog.open(tmp_path / "e.db") as log:
        stream = Stream(log, "rl", task, stubborn, finish, SMALL)
        stream.start()

        def wait() -> None:
            try:
                stream.next_step_segments(0)
            except StreamError as err:
                seen.append(err)

        trainer = threading.Thread(target=wait)
        trainer.start()
        time.sleep(0.05)
        stream.stop()
        trainer.join(5)
        assert len(seen) == 1
        (*flying,) = log.in_flight("rl")
        assert len(flying) == 4 and not any(log.attempts(i.issue_id) for i in flying)
        assert stream._producer.admission.running == 0


def test_a_stall_is_named(tmp_path: Path) -> None:
    async def hang(*_: object) -> Trajectory:
        await asyncio.sleep(60)
        raise AssertionError

    cfg = with_(SMALL, stall_timeout=0.3)
    with (
        ExperienceLog.open(tmp_path / "e.db") as log,
        Stream(log, "rl", task, hang, finish, cfg) as stream,
    ):
        stream.start()
        with pytest.raises(StreamStalled, match="4 running groups"):
            stream.next_step_segments(0)


def test_a_lagging_engine_costs_drops_or_segments_but_never_the_bound(tmp_path: Path) -> None:
    """Tokens older than admission believes: over-age segments leave first, then whole groups."""
    world = World()

    async def run(task: Task, issue_id: int, sample: int, attempt: int) -> Trajectory:
        # Half of the samples, and every fourth group, come from an engine two versions behind.
        newest, behind = world.version, sample == 0 or issue_id % 4 == 0
        traj = await world.run(task, issue_id, sample, attempt)
        old = np.full(2, max(0, newest - 3 * behind), np.int32)
        s = traj.segments[0]
        seg = Segment(s.ids, s.provenance, s.logprob, np.concatenate([s.version[:1], old]))
        reward = float(sample == 1)
        return Trajectory((seg,), (), traj.stop, verdict=Verdict.RIGHT, reward=reward)

    with ExperienceLog.open(tmp_path / "e.db") as log:
        with Stream(log, "rl", task, run, finish, SMALL) as stream:
            stream.start()
            train(stream, world, 0, 8)
            figures = stream.snapshot()
        check_bounds(log, SMALL, 8)
        assert figures["stream/dropped/over_age"] > 0 and figures["stream/over_age_segments"] > 0
        dropped = [i for i in log.issues("rl", states=["dropped"]) if i.reason == "over_age"]
        assert {i.issue_id % 4 for i in dropped} == {0}
        left = {s.sample for step in range(6, 8) for s in log.shipped("rl", step)}
        assert left == {1, 2}
        named = [d for s in log.shipped("rl", 7) for d in log.decisions(s.issue_id)]
        assert {(d.sample, d.filter) for d in named} == {(0, "over_age")}


def test_bad_settings_name_the_value() -> None:
    with pytest.raises(UserError, match=r"over_age: 'ignore'"):
        StreamConfig(over_age="ignore")
    with pytest.raises(UserError, match="min_valid: 9"):
        StreamConfig(min_valid=9)
    with pytest.raises(UserError, match="batch_groups: 0"):
        StreamConfig(batch_groups=0)
