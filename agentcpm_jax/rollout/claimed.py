"""Groups run by whoever claims them: the trainer offers issues and reads the results from the log.

Stands where `Repair` stands when one process does everything. Issuing, admission, staleness,
filters and shipping stay with the trainer; sampling and the repair of failed samples move to
workers (`claim_worker`), one of which usually lives in the trainer's own process.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.log.schema import Issue
from agentcpm_jax.log.signals import POLL
from agentcpm_jax.rollout.repair import is_known
from agentcpm_jax.types import Task, Trajectory, TrajectoryGroup


class ClaimedGroups:
    """Awaits groups of one stage.

    Args:
        log: shared by several processes.
        version: the weights that an issue offered now must at least be sampled with.
        see: called with every sample of a group that was handed in.
    """

    def __init__(
        self,
        log: ExperienceLog,
        stage: str,
        version: Callable[[], int],
        see: Callable[[Task, Trajectory], None] = lambda task, trajectory: None,
    ) -> None:
        self._log, self._stage, self._version, self._see = log, stage, version, see
        self._awaited: dict[int, asyncio.Future[None]] = {}
        self._watch: asyncio.Task[None] | None = None
        self.stopping = False
        self.progress = time.monotonic()  # a worker held a claim, or handed one in
        self.unknown_samples = 0
        self.error: BaseException | None = None  # of the worker in this process: it fails everyone

    async def group(self, issue: Issue, finished: Mapping[int, Trajectory]) -> TrajectoryGroup:
        """Offers an issue and returns its group once a worker handed it in.

        Cancelled, it leaves the claim as it is: the next run of the trainer finds it there.
        finished: not used; the worker sees for itself what an earlier one has left.
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
        for trajectory in group.trajectories:
            self._see(issue.task, trajectory)
            self.unknown_samples += not is_known(trajectory)
        return group

    def fail(self, error: BaseException) -> None:
        """Whoever waits gets `error`; from any thread."""
        self.error = error
        self._log.signals.announce("delivered")

    async def _wake(self) -> None:
        """Resolves what was handed in. A failure of the log fails everybody who waits."""
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
