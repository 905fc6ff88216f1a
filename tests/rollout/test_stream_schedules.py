"""A thousand random schedules of the stream, in virtual time: what holds for every one of them.

A schedule draws latencies, faults of every kind (errors, hangs, cancellations from within, samples
without a verdict, engines that lag behind), the trainer's pace, and moments at which the run is
stopped and started again from an earlier checkpoint.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.rollout.config import StreamConfig
from agentcpm_jax.rollout.groups import BreakerOpen, OwnGroups
from agentcpm_jax.rollout.producer import OVER_AGE, NoSignal, Producer
from agentcpm_jax.types import (
    Provenance,
    Segment,
    StopReason,
    Task,
    Trajectory,
    Verdict,
)
from tests.doubles.memory_log import MemoryLog
from tests.doubles.virtual_time import run_virtual
from tests.rollout.stream_world import chance, finish, task

FAULTS = ("error", "hang", "cancelled", "unverified")
LONG = 1e6  # seconds after which whatever can happen has happened


@dataclass(frozen=True)
class Schedule:
    """Everything random about a run follows from it."""

    seed: int
    cfg: StreamConfig
    faults: float  # share of the attempts
    lag: int  # versions by which some engines are behind
    steps: int
    stops: int  # times the run is stopped and started again
    min_valid: int  # what the producer's constants are for this run
    reissues: int
    barren_batches: int

    @classmethod
    def draw(cls, seed: int) -> Schedule:
        rnd = random.Random(seed)
        size = rnd.randint(2, 3)
        cfg = StreamConfig(
            batch_groups=rnd.randint(1, 3),
            group_size=size,
            max_staleness=rnd.randint(0, 4),
            max_concurrent_groups=rnd.randint(1, 8),
            over_age=rnd.choice(("drop", "wait")),
            deterministic=rnd.random() < 0.15,
            retries=rnd.randint(0, 2),
            breaker=rnd.choice((4, 64, 64, 64)),
            stall_timeout=5.0,
        )
        lag = 0 if cfg.deterministic or rnd.random() < 0.6 else rnd.randint(1, 3)
        faults = rnd.choice((0.0, 0.2, 0.4))
        return cls(
            seed,
            cfg,
            faults,
            lag,
            steps=rnd.randint(2, 5),
            stops=rnd.choice((0, 0, 1, 2)),
            min_valid=rnd.randint(1, size),
            reissues=rnd.randint(0, 2),
            barren_batches=rnd.choice((4, 50, 50, 50)),
        )


class Episodes:
    """Results depend on (schedule, issue, sample, attempt, version) alone; so do latencies."""

    def __init__(self, schedule: Schedule) -> None:
        self._s = schedule
        self.version = self.running = 0

    async def use_version(self, version: int) -> None:
        assert self.running == 0
        self.version = version

    async def run(self, task: Task, issue_id: int, sample: int, attempt: int) -> Trajectory:
        self.running += 1
        try:
            return await self._run((self._s.seed, issue_id, sample, attempt))
        finally:
            self.running -= 1

    async def _run(self, key: tuple[int, ...]) -> Trajectory:
        rnd = random.Random(repr(key))
        first = max(0, self.version - rnd.randint(0, self._s.lag))
        await asyncio.sleep(rnd.lognormvariate(0.0, 1.0))
        fault = rnd.choice(FAULTS) if rnd.random() < self._s.faults else ""
        if fault == "error":
            raise ConnectionError("the tool server went away")
        if fault == "cancelled":
            raise asyncio.CancelledError
        if fault == "hang" and not self._s.cfg.deterministic:  # lockstep knows no wall clock
            await asyncio.sleep(LONG)
        kinds = [Provenance.TEMPLATE, Provenance.SAMPLED, Provenance.SAMPLED]
        segment = Segment(
            np.array([key[1], key[2], int(1e6 * chance(*key))], np.int32),
            np.array(kinds, np.uint8),
            np.array([np.nan, -0.1, -0.2], np.float32),
            np.array([-1, first, max(first, self.version - rnd.randint(0, 1))], np.int32),
        )
        verdict = Verdict.RIGHT if rnd.random() < 0.5 else Verdict.WRONG
        reward: float | None = float(verdict is Verdict.RIGHT)
        if fault:
            verdict, reward = Verdict.UNKNOWN, None
        return Trajectory((segment,), (), StopReason.ANSWERED, verdict=verdict, reward=reward)


@settings(max_examples=1000, derandomize=True, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_no_schedule_breaks_a_bound_or_loses_a_slot(seed: int) -> None:
    schedule = Schedule.draw(seed)
    log = MemoryLog()
    play(schedule, log)
    check_log(schedule, log)


def test_the_schedules_reach_what_they_are_meant_to_reach() -> None:
    """Else the thousand would prove little: each kind of ending and of drop occurs."""
    seen: dict[str, int] = {}
    for seed in range(60):
        log = MemoryLog()
        ending = play(Schedule.draw(seed), log)
        reasons = {issue.reason for issue in log.issue_of.values() if issue.reason}
        for name in reasons | {ending}:
            seen[name] = seen.get(name, 0) + 1
    expected = {"zero_variance", "too_few_valid", "over_age", "BreakerOpen", "NoSignal", "finished"}
    assert expected <= set(seen), seen
    assert seen["finished"] >= 40


@pytest.mark.parametrize("seed", range(12))
def test_the_real_log_ends_in_the_same_states(seed: int, tmp_path: Path) -> None:
    schedule, memory = Schedule.draw(seed), MemoryLog()
    ending = play(schedule, memory)
    with ExperienceLog.open(tmp_path / "e.db") as log:
        assert play(schedule, log) == ending
        assert history(log, schedule.steps) == history(memory, schedule.steps)


def history(log: Any, steps: int) -> tuple[list, list]:
    """Every issue with its end, every batch with its segments."""
    issues = log.issues("rl", states=["issued", "ready", "shipped", "dropped"])
    return (
        [(i.issue_id, i.ordinal, i.epoch, i.batch, i.state, i.reason) for i in issues],
        [
            [(s.issue_id, s.sample, s.segment.ids.tolist(), s.segment.version.tolist()) for s in b]
            for b in (log.shipped("rl", step) for step in range(steps))
        ],
    )


def play(schedule: Schedule, log: Any) -> str:
    """Runs a schedule to its end; returns 'finished' or the name of the error that ended it."""
    with mock.patch.multiple(
        "agentcpm_jax.rollout.producer",
        MIN_VALID=schedule.min_valid,
        REISSUES=schedule.reissues,
        BARREN_BATCHES=schedule.barren_batches,
    ):
        return _play(schedule, log)


def _play(schedule: Schedule, log: Any) -> str:
    rnd = random.Random(schedule.seed + 1)
    for left in range(schedule.stops, -1, -1):
        # A checkpoint may lie one step behind the last recorded batch.
        version = max(0, log.last_shipped_step("rl") + 1 - rnd.randint(0, 1))
        episodes = Episodes(schedule)
        episodes.version = version
        producer = make_producer(schedule, log, episodes)
        stop_after = rnd.lognormvariate(1.5, 1.0) if left else None
        ending = run_virtual(one_run(schedule, producer, episodes, version, stop_after))
        check_slots(schedule, producer, episodes, log)
        if ending not in ("finished", "stopped"):
            return ending
    return ending


def make_producer(schedule: Schedule, log: Any, episodes: Episodes) -> Producer:
    """With its admissions and shipments watched."""
    cfg = schedule.cfg
    use_version = episodes.use_version if cfg.deterministic else None
    groups = OwnGroups(log, episodes.run, cfg)
    producer = Producer(log, "rl", task, groups, finish, cfg, use_version)
    admission, submit, ship = producer.admission, producer.admission.submit, log.ship

    def watched_submit() -> None:
        submit()
        if not cfg.deterministic:  # lockstep is bounded by its rounds
            budget = (cfg.max_staleness + admission.version + 1) * cfg.batch_groups
            assert admission.accepted + admission.running <= budget
        assert admission.running <= cfg.max_concurrent_groups

    def watched_ship(stage: str, step: int, entries: list, decisions: list) -> None:
        limit, pool = step - cfg.max_staleness, producer.ready.items()
        if cfg.deterministic:
            pool = [(i, r) for i, r in pool if r.issue.batch == step]
        oldest_first = sorted((min(v for v in r.oldest if v >= limit), i) for i, r in pool)
        assert groups_of(entries) == [i for _, i in oldest_first[: cfg.batch_groups]]
        ship(stage, step, entries, decisions)

    producer.admission.submit = watched_submit
    producer._log = Watched(log, watched_ship)  # pyright: ignore[reportAttributeAccessIssue]
    return producer


def groups_of(entries: list) -> list[int]:
    return list(dict.fromkeys(entry.issue_id for entry in entries))


class Watched:
    """A log whose `ship` is looked at first."""

    def __init__(self, log: Any, ship: Callable[..., None]) -> None:
        self._log, self.ship = log, ship

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)


async def one_run(
    schedule: Schedule,
    producer: Producer,
    episodes: Episodes,
    version: int,
    stop_after: float | None,
) -> str:
    loop = asyncio.get_running_loop()
    main = loop.create_task(producer.run(version, lambda: None))
    trainer = loop.create_task(train(schedule, producer, episodes, version))
    ended, _ = await asyncio.wait(
        [main, trainer], timeout=stop_after, return_when=asyncio.FIRST_COMPLETED
    )
    producer.cancel()
    trainer.cancel()
    results = await asyncio.gather(main, trainer, return_exceptions=True)
    if isinstance(producer.error, BreakerOpen | NoSignal):
        return type(producer.error).__name__
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
            raise result
    return "finished" if trainer in ended else "stopped"


async def train(schedule: Schedule, producer: Producer, episodes: Episodes, version: int) -> None:
    rnd = random.Random(schedule.seed + 2)
    for step in range(version, schedule.steps):
        future: concurrent.futures.Future[None] = concurrent.futures.Future()
        producer.want(step, future)
        await asyncio.wrap_future(future)
        await asyncio.sleep(rnd.lognormvariate(-0.5, 1.0))
        if not schedule.cfg.deterministic:  # lockstep asks for versions itself
            episodes.version = step + 1
        producer.set_version(step + 1)
    await asyncio.sleep(LONG)
    check_refill(schedule, producer)


def check_refill(schedule: Schedule, producer: Producer) -> None:
    """With the trainer at rest, exactly what may be ready is ready: every drop was refilled."""
    cfg, admission = schedule.cfg, producer.admission
    assert not producer.running
    if not cfg.deterministic:
        budget = (cfg.max_staleness + admission.version + 1) * cfg.batch_groups
        assert admission.accepted == budget


def check_slots(schedule: Schedule, producer: Producer, episodes: Episodes, log: Any) -> None:
    """However a run ended: nothing runs, and the counts are those of the log."""
    accepted, running, _, _ = producer.admission.stats()
    assert running == 0 and not producer.running and episodes.running == 0
    states = [issue.state for issue in log.issues("rl", states=["ready", "shipped"])]
    assert accepted == len(states)
    assert sum(state == "ready" for state in states) == len(producer.ready)


def check_log(schedule: Schedule, log: MemoryLog) -> None:
    """Each issue ends once, no task is skipped, no token of a batch is older than eta."""
    cfg, shipped = schedule.cfg, []
    for step, entries in log.batches.items():
        groups = groups_of(entries)
        assert len(groups) == cfg.batch_groups
        shipped += groups
        for s in log.shipped("rl", step):
            trained = s.segment.version[s.credit.keep & s.segment.sampled]
            assert step - trained.min() <= cfg.max_staleness and trained.max() <= step
            if cfg.deterministic:
                assert set(trained) == {max(0, step - cfg.max_staleness)}
    if cfg.over_age == "wait" and not schedule.lag and not schedule.stops:
        assert not any(issue.reason == OVER_AGE for issue in log.issue_of.values())
    assert sorted(log.batches) == list(range(len(log.batches)))
    by_state = {i: issue.state for i, issue in log.issue_of.items()}
    assert sorted(shipped) == [i for i, state in sorted(by_state.items()) if state == "shipped"]
    assert set(by_state.values()) <= {"issued", "ready", "shipped", "dropped"}
    ordinals = {issue.ordinal for issue in log.issue_of.values()}
    assert ordinals == set(range(len(ordinals)))
