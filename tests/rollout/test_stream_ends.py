"""The stream: repair of groups, and every way in which it ends, by name."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.rollout import config, producer
from agentcpm_jax.rollout.config import StreamConfig
from agentcpm_jax.rollout.stream import (
    BreakerOpen,
    GroupOutcome,
    NoSignal,
    Stream,
    StreamError,
    StreamStalled,
)
from agentcpm_jax.types import (
    Segment,
    StopReason,
    Task,
    Trajectory,
    TrajectoryGroup,
    UserError,
    Verdict,
)
from tests.rollout.stream_world import SMALL, World, check_bounds, finish, task, train, with_


def test_a_failed_sample_is_retried_alone(tmp_path: Path) -> None:
    """Up to `retries` times: sample 1 needs them all, sample 2 would need one more."""
    calls: list[tuple[int, int, int]] = []
    world = World()

    async def run(task: Task, issue_id: int, sample: int, attempt: int) -> Trajectory:
        calls.append((issue_id, sample, attempt))
        if attempt < (0, 2, 3)[sample]:
            raise OSError("no sandbox")
        traj = await world.run(task, issue_id, sample, attempt)
        reward = float(sample == 0)
        return Trajectory(traj.segments, (), traj.stop, verdict=Verdict.RIGHT, reward=reward)

    with ExperienceLog.open(tmp_path / "e.db") as log:
        cfg = with_(SMALL, max_staleness=0, retries=2)
        with Stream(log, "rl", task, run, finish, cfg) as stream:
            stream.start()
            shipped = stream.next_step_segments(0)
        assert {s.sample for s in shipped} == {0, 1}
        for issue_id in (1, 2):
            mine = sorted(c[1:] for c in calls if c[0] == issue_id)
            assert mine == [(0, 0), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]
            tries = [t for t in log.attempts(issue_id) if t.sample == 1]
            assert [t.stop for t in tries] == ["infra_error", "infra_error", "answered"]
            assert tries[0].error == "OSError: no sandbox" and tries[0].reward is None


def test_a_hopeless_group_is_dropped_and_its_task_comes_back_later(tmp_path: Path) -> None:
    world = World()

    async def run(task: Task, issue_id: int, sample: int, attempt: int) -> Trajectory:
        if task.meta["ordinal"] == 1:
            return Trajectory((), (), StopReason.JUDGE_ERROR, error="judge down")
        return await world.run(task, issue_id, sample, attempt)

    cfg = with_(SMALL, retries=1)
    with ExperienceLog.open(tmp_path / "e.db") as log:
        with Stream(log, "rl", task, run, finish, cfg) as stream:
            stream.start()
            train(stream, world, 0, 5)
        issues = [i for i in log.issues("rl") if i.ordinal == 1]
        assert [i.reason for i in issues] == ["too_few_valid"] * 2  # once more, not for ever
        between = [i for i in log.issues("rl") if issues[0].issue_id < i.issue_id]
        before = [i.ordinal for i in between if i.issue_id < issues[1].issue_id]
        assert 2 in before  # after a batch of others


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


def test_tasks_without_signal_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(producer, "BARREN_BATCHES", 3)

    def all_equal(group: TrajectoryGroup) -> GroupOutcome:
        return GroupOutcome(False, "zero_variance")

    with (
        ExperienceLog.open(tmp_path / "e.db") as log,
        Stream(log, "rl", task, World().run, all_equal, SMALL) as stream,
    ):
        stream.start()
        with pytest.raises(NoSignal, match=r"6 groups .*'zero_variance': 6"):
            stream.next_step_segments(0)


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ((0.0, 0.05), r"rewards from 0 to 0\.05, within a group at most 0\.05 apart.*min_spread"),
        ((0.5, 0.5), r"every reward was 0\.5: does the grader tell right from wrong"),
        ((0.0, 0.0), "too easy or too hard"),
        ((1.0, None), r"attempts ended without a verdict; of all: {'non_finite_reward': "),
    ],
)
def test_rewards_of_another_scale_stop_the_run_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rewards, said
) -> None:
    """Long before `BARREN_BATCHES`, where the rewards say why."""
    monkeypatch.setattr(producer, "BARREN_BATCHES", 9)
    monkeypatch.setattr("agentcpm_jax.rollout.groups.RETRY_DELAY", 0.0)
    world = World()

    async def run(task: Task, issue_id: int, sample: int, attempt: int) -> Trajectory:
        traj = await world.run(task, issue_id, sample, attempt)
        reward = rewards[(issue_id + sample + attempt) % 2]
        if reward is None:
            return replace(traj, verdict=Verdict.UNKNOWN, reward=float("nan"))
        return replace(traj, reward=reward, verdict=Verdict.WRONG)

    def all_equal(group: TrajectoryGroup) -> GroupOutcome:
        return GroupOutcome(False, "zero_variance")

    with (
        ExperienceLog.open(tmp_path / "e.db") as log,
        Stream(log, "rl", task, run, all_equal, SMALL) as stream,
    ):
        stream.start()
        with pytest.raises(NoSignal, match=said) as error:
            stream.next_step_segments(0)
    dropped = int(str(error.value).split()[0])
    assert dropped == 18 if "too easy" in said else producer.SURE_GROUPS <= dropped < 18


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
        (*flying,) = log.issues("rl", states=["issued"])
        assert len(flying) == 4 and not any(log.attempts(i.issue_id) for i in flying)
        assert stream._producer.admission.running == 0


def test_a_hanging_tool_costs_an_attempt_and_not_the_slot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World()
    monkeypatch.setattr(config, "DEADLINE_STALLS", 0.05 / SMALL.stall_timeout)

    async def run(task: Task, issue_id: int, sample: int, attempt: int) -> Trajectory:
        if sample == 0 and attempt == 0:
            await asyncio.sleep(3600)
        traj = await world.run(task, issue_id, sample, attempt)
        return replace(traj, verdict=Verdict.RIGHT, reward=float(sample == 0))

    with ExperienceLog.open(tmp_path / "e.db") as log:
        with Stream(log, "rl", task, run, finish, SMALL) as stream:
            stream.start()
            shipped = stream.next_step_segments(0)
        assert {s.sample for s in shipped} == {0, 1, 2}
        for issue_id in {s.issue_id for s in shipped}:
            first, second = (t for t in log.attempts(issue_id) if t.sample == 0)
            assert first.stop == "infra_error" and "no result within 0.05 s" in first.error
            assert second.stop == "answered" and second.attempt == 1


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
    with pytest.raises(UserError, match=r"stream\.over_age 'ignore'; use one of drop, wait"):
        StreamConfig(over_age="ignore")
    with pytest.raises(UserError, match=r"stream\.batch_groups=0; it is at least 1"):
        StreamConfig(batch_groups=0)
    with pytest.raises(UserError, match=r"stream\.stall_timeout=-1\.0; give seconds"):
        StreamConfig(stall_timeout=-1.0)
