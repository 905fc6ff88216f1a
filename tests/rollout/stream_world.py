"""A world of fake episodes for the stream's tests: latencies, failures, tiny segments."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable

import numpy as np

from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.rollout.config import StreamConfig
from agentcpm_jax.rollout.stream import (
    GroupOutcome,
    Stream,
)
from agentcpm_jax.types import (
    Credit,
    Decision,
    Provenance,
    Segment,
    ShippedSegment,
    StopReason,
    Task,
    Trajectory,
    TrajectoryGroup,
    Verdict,
)

#: issue, sample, segment, and the bytes of its arrays and of its credit
Flat = tuple[int | bytes, ...]
SMALL = StreamConfig(
    batch_groups=2,
    group_size=3,
    max_staleness=1,
    max_concurrent_groups=6,
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


def flat(batch: list[ShippedSegment]) -> list[Flat]:
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


def train(
    stream: Stream, world: World, first: int, steps: int, pause: float = 0.0
) -> list[list[Flat]]:
    batches = []
    for step in range(first, first + steps):
        batches.append(flat(stream.next_step_segments(step)))
        time.sleep(pause)
        world.version = step + 1
        stream.set_version(step + 1)
    return batches


def with_(cfg: StreamConfig, **changes: object) -> StreamConfig:
    return StreamConfig(**{**vars(cfg), **changes})  # pyright: ignore[reportArgumentType]
