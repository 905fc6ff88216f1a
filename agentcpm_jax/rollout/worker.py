"""A worker: claims issues of a stage, runs their groups with its own policy and hands them in.

Its lease is renewed only while samples keep ending, so a worker that hangs loses its claims like
one that died. It keeps no state: recorded samples are in the log, and the next worker that takes
the issue continues from them.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
import uuid
from collections.abc import Awaitable, Callable

from agentcpm_jax.log.claims import Claim, ClaimLost
from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.log.schema import Issue
from agentcpm_jax.log.signals import POLL
from agentcpm_jax.rollout.config import StreamConfig
from agentcpm_jax.rollout.groups import OwnGroups, RunSample, StreamStalled, is_known
from agentcpm_jax.types import Trajectory


class ClaimWorker:
    """Claims issues and runs at most `groups` groups at a time.

    Args:
        run_sample: as for `Stream`.
        cfg: only group size, retries, breaker, staleness and stall time-out are used.
        lease: seconds after which a claim that is not renewed is lost.
        have_version: awaited before a group begins; returns once the policy samples with weights
            of at least that version.
    """

    def __init__(
        self,
        log: ExperienceLog,
        stage: str,
        run_sample: RunSample,
        cfg: StreamConfig,
        *,
        groups: int,
        lease: float,
        have_version: Callable[[int], Awaitable[None]],
    ) -> None:
        self.name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self.delivered = 0
        self._log, self._stage, self._cfg = log, stage, cfg
        self._limit, self._lease, self._have_version = groups, lease, have_version
        self._groups = OwnGroups(_WorkerRecords(log, self.name), run_sample, cfg)
        self._running: dict[int, asyncio.Task[None]] = {}
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """Makes `run` check for changes at once; from any thread."""
        self._log.signals.announce("offered")

    async def run(self, over: Callable[[], bool] = lambda: False) -> None:
        """Works until `over()`, checked at least once a second, or until it is cancelled.

        Raises:
            BreakerOpen, StreamStalled: engine or tools are down; LogUnavailable: the database is.
        """
        self._woken.set()
        try:
            async with asyncio.TaskGroup() as tasks:
                aides = [tasks.create_task(self._watch()), tasks.create_task(self._beat())]
                while not over():
                    await self._woken.wait()
                    self._woken.clear()
                    free = self._limit - len(self._running)
                    if free > 0:
                        taken = self._log.claims.take(self._stage, self.name, free, self._lease)
                        for claim in taken:
                            task = tasks.create_task(self._group(claim))
                            self._running[claim.issue_id] = task
                self._groups.stopping = True
                for task in [*aides, *self._running.values()]:
                    task.cancel()
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        finally:
            self._groups.stopping = True
            self._log.claims.release(self.name)

    async def _group(self, claim: Claim) -> None:
        issue_id = claim.issue_id
        issue = Issue(issue_id, self._stage, "train", claim.task, 0, 0, None, "issued")
        try:
            await self._have_version(claim.version)
            await self._groups.group(issue, self._reusable(claim))
            self._log.claims.deliver(issue_id, self.name)
            self.delivered += 1
        except ClaimLost:
            pass  # another worker has it, or the trainer does not want it any more
        finally:
            self._running.pop(issue_id, None)
            self._woken.set()

    def _reusable(self, claim: Claim) -> dict[int, Trajectory]:
        """Samples that an earlier holder finished and that are recent enough to be trained."""
        limit = claim.version - self._cfg.max_staleness
        return {
            t.sample: t
            for t in self._log.load_group(claim.issue_id).trajectories
            if is_known(t) and t.sample < self._cfg.group_size and t.versions[0] >= limit
        }

    async def _watch(self) -> None:
        mark = 0
        while True:
            mark = await asyncio.to_thread(self._log.wait, "offered", POLL, mark)
            self._woken.set()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._lease / 3)
            idle = time.monotonic() - self._groups.progress
            if not self._running:
                self._groups.progress = time.monotonic()
            elif self._cfg.stall_timeout and idle > self._cfg.stall_timeout:
                raise StreamStalled(
                    f"no sample of {len(self._running)} claimed groups ended for {idle:.0f} s; "
                    "does the engine or a tool hang? (stream.stall_timeout)"
                )
            held = self._log.claims.renew(self.name, self._lease)
            for issue_id in self._running.keys() - held:
                self._running[issue_id].cancel()


class _WorkerRecords:
    """Records attempts under a worker's name; raises ClaimLost when it has lost the claim."""

    def __init__(self, log: ExperienceLog, worker: str) -> None:
        self._log, self._worker = log, worker

    def record_trajectory(self, traj: Trajectory) -> None:
        self._log.record_trajectory(traj, self._worker)
