"""The experience log's state machine in dicts, for schedules by the thousand.

Holds what the stream asks of `ExperienceLog`, with the same guards; the same schedules are run
against both in `tests/rollout/test_stream_schedules.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from agentcpm_jax.log.schema import Issue, ShipEntry
from agentcpm_jax.types import Decision, ShippedSegment, Task, Trajectory, TrajectoryGroup


class MemoryLog:
    """One stage, kind 'train'."""

    def __init__(self) -> None:
        self.issue_of: dict[int, Issue] = {}
        self.samples: dict[int, dict[int, Trajectory]] = {}
        self.batches: dict[int, list[ShipEntry]] = {}

    def issue_round(
        self, stage: str, kind: str, tasks: Sequence[tuple[Task, int, int]], batch: int | None
    ) -> list[int]:
        ids = list(range(len(self.issue_of) + 1, len(self.issue_of) + 1 + len(tasks)))
        for i, (task, epoch, ordinal) in zip(ids, tasks, strict=True):
            self.issue_of[i] = Issue(i, stage, kind, task, epoch, ordinal, batch, "issued")
            self.samples[i] = {}
        return ids

    def next_ordinal(self, stage: str) -> int:
        return 1 + max((issue.ordinal for issue in self.issue_of.values()), default=-1)

    def drop_counts(self, stage: str, kind: str, reason: str) -> dict[int, tuple[int, int]]:
        issued = Counter(i.ordinal for i in self.issue_of.values())
        hits = Counter(
            i.ordinal for i in self.issue_of.values() if (i.state, i.reason) == ("dropped", reason)
        )
        return {ordinal: (n, issued[ordinal]) for ordinal, n in hits.items()}

    def record_trajectory(self, traj: Trajectory) -> None:
        if self.issue_of[traj.issue_id].state != "issued":
            raise ValueError(f"issue {traj.issue_id} is not in flight: nothing stored")
        self.samples[traj.issue_id][traj.sample] = traj

    def finish_group(
        self, issue_id: int, state: str, reason: str, decisions: Iterable[Decision]
    ) -> None:
        self._move(issue_id, ("issued",), state, reason)

    def drop(self, issue_id: int, reason: str) -> None:
        self._move(issue_id, ("issued", "ready"), "dropped", reason)

    def ship(
        self,
        stage: str,
        step: int,
        entries: Sequence[ShipEntry],
        decisions: Sequence[tuple[int, Decision]],
    ) -> None:
        if not entries or step in self.batches:
            raise ValueError(f"step {step} is empty or shipped already")
        for issue_id in dict.fromkeys(e.issue_id for e in entries):
            self._move(issue_id, ("ready",), "shipped", "")
        self.batches[step] = list(entries)

    def issues(self, stage: str, states: Sequence[str]) -> list[Issue]:
        return [issue for _, issue in sorted(self.issue_of.items()) if issue.state in states]

    def load_group(self, issue_id: int) -> TrajectoryGroup:
        samples = self.samples[issue_id]
        trajectories = tuple(samples[s] for s in sorted(samples))
        return TrajectoryGroup(issue_id, self.issue_of[issue_id].task, trajectories)

    def last_shipped_step(self, stage: str) -> int:
        return max(self.batches, default=-1)

    def shipped(self, stage: str, step: int) -> list[ShippedSegment]:
        return [
            ShippedSegment(
                e.issue_id,
                e.sample,
                e.segment_index,
                self.samples[e.issue_id][e.sample].segments[e.segment_index],
                e.credit,
            )
            for e in self.batches.get(step, ())
        ]

    def _move(self, issue_id: int, old: Sequence[str], new: str, reason: str) -> None:
        issue = self.issue_of[issue_id]
        if issue.state not in old:
            raise ValueError(f"issue {issue_id} is {issue.state}: it cannot become {new}")
        self.issue_of[issue_id] = replace(issue, state=new, reason=reason)
