"""What the stream is configured with, takes, keeps and raises."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from agentcpm_jax.log.schema import (
    CreditLike,
    Decision,
    DecisionLike,
    Issue,
    ShipEntry,
)
from agentcpm_jax.rollout.config import StreamConfig as StreamConfig
from agentcpm_jax.rollout.staleness import oldest_trained
from agentcpm_jax.types import TrajectoryGroup


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
    credits: Mapping[tuple[int, int], CreditLike] = field(default_factory=dict)
    decisions: Sequence[DecisionLike] = ()


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
