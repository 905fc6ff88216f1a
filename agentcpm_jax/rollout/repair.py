"""Group repair: a sample that failed says nothing about the policy, so it is tried again alone.

Each attempt is one fresh call of `run_sample` (a fresh environment). What cannot be repaired stays
`unknown` in the group; N unknown attempts in a row open a breaker.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.log.schema import Issue
from agentcpm_jax.rollout.stream_types import BreakerOpen, StreamConfig
from agentcpm_jax.types import (
    UNKNOWN_STOPS,
    StopReason,
    Task,
    Trajectory,
    TrajectoryGroup,
    Verdict,
)

RunSample = Callable[[Task, int, int, int], Awaitable[Trajectory]]


def is_known(traj: Trajectory) -> bool:
    """Whether the sample says something about the policy."""
    return traj.verdict is not Verdict.UNKNOWN and traj.stop not in UNKNOWN_STOPS


class Repair:
    """Runs the samples of groups. `progress`: monotonic seconds of the last finished attempt.

    Set `stopping` before cancelling: an episode that turns its cancellation into a result is then
    not taken for a finished one.
    """

    def __init__(self, log: ExperienceLog, run_sample: RunSample, cfg: StreamConfig) -> None:
        self._log, self._run_sample, self._cfg = log, run_sample, cfg
        self.stopping = False
        self.progress = time.monotonic()
        self.unknown_samples = 0
        self._unknown_row = 0

    async def group(self, issue: Issue, finished: Mapping[int, Trajectory]) -> TrajectoryGroup:
        """All samples of an issue, those of `finished` not run again; every attempt is recorded.

        Raises `BreakerOpen`, and whatever the log raises; then no sample is left running.
        """
        missing = [s for s in range(self._cfg.group_size) if s not in finished]
        try:
            async with asyncio.TaskGroup() as several:
                tasks = {s: several.create_task(self._sample(issue, s)) for s in missing}
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        samples = dict(finished) | {s: task.result() for s, task in tasks.items()}
        trajectories = tuple(samples[s] for s in sorted(samples))
        return TrajectoryGroup(issue.issue_id, issue.task, trajectories)

    async def _sample(self, issue: Issue, sample: int) -> Trajectory:
        attempt = 0
        while True:
            traj = await self._attempt(issue, sample, attempt)
            self._log.record_trajectory(traj)
            self.progress = time.monotonic()
            if is_known(traj):
                self._unknown_row = 0
                return traj
            self.unknown_samples += 1
            self._unknown_row += 1
            if self._unknown_row >= self._cfg.breaker:
                raise BreakerOpen(
                    f"{self._unknown_row} samples in a row ended without a verdict; the last one: "
                    f"{traj.stop}: {traj.error or 'no message'} (stream.breaker)"
                )
            attempt += 1
            if attempt > self._cfg.retries:
                return traj
            if not self._cfg.deterministic:
                await asyncio.sleep(self._cfg.retry_delay * attempt)

    async def _attempt(self, issue: Issue, sample: int, attempt: int) -> Trajectory:
        limit = None if self._cfg.deterministic else self._cfg.sample_deadline or None
        deadline = asyncio.timeout(limit)
        try:
            async with deadline:
                traj = await self._run_sample(issue.task, issue.issue_id, sample, attempt)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self.stopping or (task is not None and task.cancelling()):
                raise
            traj = Trajectory((), (), StopReason.CANCELLED, error="cancelled from within")
        except Exception as err:
            error = f"{type(err).__name__}: {err}"
            if deadline.expired():  # a tool that hangs must not keep its group's slot for ever
                error = f"no result within {limit:g} s (stream.sample_deadline)"
            traj = Trajectory((), (), StopReason.INFRA_ERROR, error=error)
        if self.stopping:
            raise asyncio.CancelledError
        return replace(traj, issue_id=issue.issue_id, sample=sample, attempt=attempt)
