"""What the stream is configured with, takes, keeps and raises."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from agentcpm_jax.log.schema import (
    Issue,
    ShipEntry,
)
from agentcpm_jax.rollout.staleness import oldest_trained
from agentcpm_jax.types import Credit, Decision, TrajectoryGroup, UserError


@dataclass(frozen=True)
class StreamConfig:
    """How groups are produced and shipped.

    `max_staleness` is eta: a batch trained at version v holds no token older than v - eta.
    `over_age` 'drop' refills what grew too old; 'wait' holds batches back so that nothing does
    (always so when `deterministic`).
    """

    batch_groups: int = 8  # B: groups per batch
    group_size: int = 8  # samples per group
    max_staleness: int = 4
    max_concurrent_groups: int = 32
    deterministic: bool = False  # lockstep: batch n is sampled at version max(0, n - eta)
    over_age: str = "drop"  # drop | wait
    retries: int = 3  # of one failed sample, each in a fresh environment
    retry_delay: float = 0.5  # seconds, times the attempt; asynchronous mode only
    sample_deadline: float = 3600.0  # seconds for one attempt; asynchronous mode only; 0: none
    min_valid: int = 2  # samples with a verdict that a group needs
    reissues: int = 1  # how often a task whose group failed is issued again
    epoch_size: int = 0  # tasks per epoch; failed ones return at its end (0: a batch later)
    breaker: int = 64  # unknown samples in a row that stop the run
    barren_batches: int = 50  # batches' worth of groups dropped in a row that stop the run
    stall_timeout: float = 900.0  # seconds without any finished sample; asynchronous mode; 0: none

    def __post_init__(self) -> None:
        if self.over_age not in ("drop", "wait"):
            raise UserError(f"stream.over_age: {self.over_age!r}; choose 'drop' or 'wait'")
        if not 1 <= self.min_valid <= self.group_size:
            raise UserError(
                f"stream.min_valid: {self.min_valid}; choose 1..group_size ({self.group_size})"
            )
        least = {"batch_groups": 1, "max_concurrent_groups": 1, "breaker": 1, "barren_batches": 1}
        least |= {"max_staleness": 0, "retries": 0, "reissues": 0, "epoch_size": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UserError(f"stream.{name}: {getattr(self, name)}; it is at least {low}")
        for name in ("retry_delay", "sample_deadline", "stall_timeout"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"stream.{name}: {getattr(self, name)}; give seconds, 0 or more")


class StreamError(RuntimeError):
    """The stream cannot deliver."""


class BreakerOpen(StreamError):
    """Too many samples in a row ended without a verdict: engine, tools or judge are down."""


class NoSignal(StreamError):
    """Group after group is dropped: there is nothing to learn from."""


class StreamStalled(StreamError):
    """Groups are running but no sample ends."""


@dataclass(frozen=True)
class GroupOutcome:
    """What filters and credit say about a group.

    credits: (sample, segment) -> credit; segments without one are not shipped. `reason` says why
    a group is not kept, e.g. "zero_variance".
    """

    keep: bool
    reason: str = ""
    credits: Mapping[tuple[int, int], Credit] = field(default_factory=dict)
    decisions: Sequence[Decision] = ()


@dataclass(frozen=True)
class RunningGroup:
    """`start`: lower bound of its oldest version; `since`: monotonic seconds."""

    start: int
    since: float


@dataclass(frozen=True)
class ReadyGroup:
    """A finished, kept group that waits for its batch."""

    issue: Issue
    group: TrajectoryGroup
    outcome: GroupOutcome

    @cached_property
    def versions(self) -> dict[tuple[int, int], int | None]:
        """(sample, segment) -> version of its oldest trained token, of every credited segment."""
        found: dict[tuple[int, int], int | None] = {}
        by_sample = {t.sample: t for t in self.group.trajectories}
        for (sample, index), credit in sorted(self.outcome.credits.items()):
            segment = by_sample[sample].segments[index]
            if not len(segment) == len(credit.keep) == len(credit.advantage):
                raise ValueError(
                    f"issue {self.issue.issue_id} sample {sample} segment {index}: "
                    f"{len(segment)} tokens, {len(credit.keep)} credits"
                )
            found[sample, index] = oldest_trained(segment, credit.keep)
        return found

    @property
    def oldest(self) -> list[int]:
        """The oldest trained version of each segment that trains anything."""
        if not self.outcome.keep:
            return []
        return [v for v in self.versions.values() if v is not None]

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole group, shared prefixes of a trajectory counted once."""
        return sum(t.num_tokens for t in self.group.trajectories)

    def split(self, limit: int) -> tuple[list[ShipEntry], list[Decision]]:
        """Entries of the segments not older than version `limit`; a decision for each other."""
        entries, decisions = [], []
        for (sample, index), version in self.versions.items():
            if version is None or version >= limit:
                credit = self.outcome.credits[sample, index]
                entries.append(ShipEntry(self.issue.issue_id, sample, index, credit))
            else:
                why = f"segment {index}: version {version}, {limit} is the oldest allowed"
                decisions.append(Decision(sample, "over_age", why))
        return entries, decisions


@dataclass
class StreamStats:
    """Running figures of this run; the log holds the permanent ones."""

    dropped: Counter[str] = field(default_factory=Counter)
    shipped_groups: int = 0
    over_age_segments: int = 0
    ages: deque[int] = field(default_factory=lambda: deque(maxlen=4096))  # of shipped groups
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=1024))  # s, of groups
    lengths: deque[tuple[int, bool]] = field(default_factory=lambda: deque(maxlen=4096))

    def figures(self) -> dict[str, float]:
        """Flat figures; `dropped_decile/k`: drop rate of the k-th tenth of groups by length."""
        found: dict[str, float] = {
            "shipped_groups": self.shipped_groups,
            "over_age_segments": self.over_age_segments,
        }
        found |= {f"dropped/{reason}": n for reason, n in list(self.dropped.items())}
        if ages := list(self.ages):
            found |= {"age_mean": float(np.mean(ages)), "age_max": max(ages)}
        if seconds := list(self.latencies):
            found["group_seconds_mean"] = float(np.mean(seconds))
            found["group_seconds_p95"] = float(np.quantile(seconds, 0.95))
        if len(lengths := sorted(self.lengths)) >= 10:
            for k, tenth in enumerate(np.array_split([dropped for _, dropped in lengths], 10)):
                found[f"dropped_decile/{k}"] = float(tenth.mean())
        return found
