"""Groups: all samples of an issue, run in this process or by the workers that claim them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Protocol

from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.log.schema import Issue
from agentcpm_jax.log.signals import POLL
from agentcpm_jax.rewards.grade import unknown_reason
from agentcpm_jax.rollout.config import StreamConfig
from agentcpm_jax.types import (
    UNKNOWN_STOPS,
    StopReason,
    Task,
    Trajectory,
    TrajectoryGroup,
    Verdict,
)

#: (task, issue_id, sample, attempt) -> graded trajectory
RunSample = Callable[[Task, int, int, int], Awaitable[Trajectory]]
#: Seconds before the first retry of a sample, twice that before the second, and so on; asynchronous
#: mode only. What fails at once (a server that restarts) would use up its retries at once.
RETRY_DELAY = 0.5


class Groups(Protocol):
    """Runs the groups of a stage.

    stopping: set it before cancelling, so that an episode which turns its cancellation into a
        result does not count as finished.
    progress: monotonic seconds of the last sign of life.
    unknown: reason -> attempts so far that ended without a verdict.
    """

    stopping: bool
    progress: float
    unknown: Counter[str]

    async def group(self, issue: Issue, finished: Mapping[int, Trajectory]) -> TrajectoryGroup:
        """Sample a whole group and record every attempt.

        finished: sample -> trajectory, for the samples in the log that need not be run again.
        """
        ...


class Records(Protocol):
    """Where attempts are recorded: the experience log, or a worker's access to it."""

    def record_trajectory(self, traj: Trajectory) -> None: ...


class StreamError(RuntimeError):
    """The stream cannot produce a batch."""


class BreakerOpen(StreamError):
    """Too many samples in a row ended without a verdict: engine, tools or judge are down."""


class StreamStalled(StreamError):
    """Groups are running but no sample ends."""


def is_known(traj: Trajectory) -> bool:
    """Whether the sample has a verdict and no failure outside the policy."""
    return traj.verdict is not Verdict.UNKNOWN and traj.stop not in UNKNOWN_STOPS


class OwnGroups:
    """Runs groups in this process; a failed sample is retried without its group.

    A failed sample says nothing about the policy. Each attempt is one fresh call of `run_sample` (a
    fresh environment). After `cfg.retries` the sample stays `unknown` in its group; `cfg.breaker`
    unknown attempts in a row raise `BreakerOpen`. `progress` is when the last attempt ended.
    """

    def __init__(self, records: Records, run_sample: RunSample, cfg: StreamConfig) -> None:
        self._records, self._run_sample, self._cfg = records, run_sample, cfg
        self.stopping = False
        self.progress = time.monotonic()
        self.unknown: Counter[str] = Counter()
        self._unknown_row = 0

    async def group(self, issue: Issue, finished: Mapping[int, Trajectory]) -> TrajectoryGroup:
        """Run the samples of an issue that are not in `finished`, recording every attempt.

        Raises `BreakerOpen` and the log's errors; no sample is left running then.
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
            self._records.record_trajectory(traj)
            self.progress = time.monotonic()
            if is_known(traj):
                self._unknown_row = 0
                return traj
            self.unknown[unknown_reason(traj)] += 1
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
                await asyncio.sleep(RETRY_DELAY * attempt)

    async def _attempt(self, issue: Issue, sample: int, attempt: int) -> Trajectory:
        limit = self._cfg.sample_deadline
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
                error = f"no result within {limit:g} s (stream.stall_timeout)"
            traj = Trajectory((), (), StopReason.INFRA_ERROR, error=error)
        if self.stopping:
            raise asyncio.CancelledError
        return replace(traj, issue_id=issue.issue_id, sample=sample, attempt=attempt)


class ClaimedGroups:
    """Groups of one stage that are run by the workers that claim them, in any process.

    Issuing, admission, staleness, filters and shipping stay with the trainer; sampling and the
    repair of failed samples move to workers, one of which usually lives in the trainer's process.
    `progress` is when a worker last held a claim, or handed one in.

    Args:
        log: shared by several processes.
        version: the oldest weights that an issue offered now may be sampled with.
        on_group: called in the event loop whenever a group was handed in.
    """

    def __init__(
        self,
        log: ExperienceLog,
        stage: str,
        version: Callable[[], int],
        on_group: Callable[[], None] = lambda: None,
    ) -> None:
        self._log, self._stage, self._version = log, stage, version
        self._on_group = on_group
        self._awaited: dict[int, asyncio.Future[None]] = {}
        self._watch: asyncio.Task[None] | None = None
        self.stopping = False
        self.progress = time.monotonic()
        self.unknown: Counter[str] = Counter()
        self.error: BaseException | None = None  # of this process's worker: fails all groups

    async def group(self, issue: Issue, finished: Mapping[int, Trajectory]) -> TrajectoryGroup:
        """Offers an issue and returns its group once a worker has handed it in.

        The worker reads `finished` from the log itself. Cancellation leaves the claim in the log
        for the next run of the trainer.
        """
        self._log.claims.offer(self._stage, issue.issue_id, self._version())
        done = self._awaited[issue.issue_id] = asyncio.get_running_loop().create_future()
        if self._watch is None:
            self._watch = asyncio.create_task(self._wake())
        try:
            await done
        finally:
            self._awaited.pop(issue.issue_id, None)
            if not self._awaited and self._watch is not None:
                self._watch.cancel()
                self._watch = None
        self.progress = time.monotonic()
        group = self._log.load_group(issue.issue_id)
        self._on_group()
        self.unknown.update(unknown_reason(t) for t in group.trajectories if not is_known(t))
        return group

    def fail(self, error: BaseException) -> None:
        """Fail all waiting groups with `error`; from any thread."""
        self.error = error
        self._log.signals.announce("delivered")

    async def _wake(self) -> None:
        """Resolve the groups that were handed in; a failure of the log fails all waiting ones."""
        mark = 0
        while True:
            try:
                if self.error is not None:
                    raise self.error
                for issue_id in self._log.claims.delivered(self._stage) & self._awaited.keys():
                    if not self._awaited[issue_id].done():
                        self._awaited[issue_id].set_result(None)
                if self._log.claims.live(self._stage):
                    self.progress = time.monotonic()
            except BaseException as err:
                if isinstance(err, asyncio.CancelledError):
                    raise
                for done in self._awaited.values():
                    if not done.done():
                        done.set_exception(err)
                return
            mark = await asyncio.to_thread(self._log.wait, "delivered", POLL, mark)
