"""Groups of rollouts, produced while the trainer trains, handed over batch by batch.

A thread runs the event loop in which the producer lives; the trainer's thread only posts versions
and asks for the batch of a step. A restarted stream rebuilds its counts from the experience log,
keeps finished groups and runs unfinished ones again under the same issue_id: no group is lost or
duplicated.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial

from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.rollout.config import StreamConfig
from agentcpm_jax.rollout.groups import (
    BreakerOpen,
    Groups,
    OwnGroups,
    RunSample,
    StreamError,
    StreamStalled,
)
from agentcpm_jax.rollout.producer import GroupOutcome, NoSignal, Producer
from agentcpm_jax.types import ShippedSegment, Task, TrajectoryGroup

__all__ = [
    "BreakerOpen",
    "GroupOutcome",
    "NoSignal",
    "Stream",
    "StreamError",
    "StreamStalled",
]


class Stream:
    """Produces groups, retries their failed samples, and ships batches of `cfg.batch_groups`.

    Args:
        tasks: ordinal -> task; endless and deterministic; `Task.meta` JSON-able.
        run_sample: async (task, issue_id, sample, attempt) -> graded trajectory. An exception
            (except its own cancellation) counts as one sample with infra_error.
        finish: filters and credits a complete group; pure, since a restart calls it again.
        use_version: awaited before a round of rollouts, while nothing runs; deterministic mode
            only. After a restart it must still load versions from (first unrecorded step) - eta.
        groups: runs the groups; None: this process does, with `run_sample`.

    Raises:
        ValueError: `cfg.deterministic` without `use_version`.
    """

    def __init__(
        self,
        log: ExperienceLog,
        stage: str,
        tasks: Callable[[int], Task],
        run_sample: RunSample,
        finish: Callable[[TrajectoryGroup], GroupOutcome],
        cfg: StreamConfig,
        use_version: Callable[[int], Awaitable[None]] | None = None,
        groups: Groups | None = None,
    ) -> None:
        if cfg.deterministic and use_version is None:
            raise ValueError("a deterministic stream needs `use_version`")
        self._log, self._stage, self._cfg = log, stage, cfg
        groups = groups or OwnGroups(log, run_sample, cfg)
        self._producer = Producer(log, stage, tasks, groups, finish, cfg, use_version)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._begun, self._over = threading.Event(), threading.Event()

    # ---- the trainer's thread

    def start(self, version: int = 0) -> None:
        """Recovers from the log and starts producing; `version` = completed batches."""
        if self._thread is not None:
            raise ValueError("a stream starts once")
        run = partial(self._run, version)
        self._thread = threading.Thread(target=run, name=f"stream-{self._stage}", daemon=True)
        self._thread.start()
        self._begun.wait()

    def stop(self, timeout: float = 30.0) -> None:
        """Cancels running episodes and waits for them (s); the log stays resumable."""
        if self._thread is None:
            return
        self._post(self._producer.cancel)
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise StreamError(f"an episode ignored its cancellation for {timeout:g} s")

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def set_version(self, version: int) -> None:
        """Tells admission that `version` batches are completed. Returns at once."""
        self._post(partial(self._producer.set_version, version))

    def next_step_segments(self, step: int) -> list[ShippedSegment]:
        """The ordered segments of batch `step`, committed to the log; blocks until there are B.

        A recorded step is returned as recorded, bit for bit.

        Raises:
            StreamError: `BreakerOpen`, `NoSignal`, `StreamStalled`, or the stream was stopped.
            ValueError: `step` is neither recorded nor the next one.
            Exception: any other error that ended the producer.
        """
        if recorded := self._log.shipped(self._stage, step):
            return recorded
        future: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._post(partial(self._producer.want, step, future))
        while not concurrent.futures.wait([future], timeout=0.2).done:
            if self._over.is_set() and not future.done():
                raise self._producer.error or StreamError("the stream is not running")
            self._check_stall()
        future.result()
        return self._log.shipped(self._stage, step)

    def snapshot(self) -> dict[str, float]:
        """`stream/...` metrics: current counts; ages, latencies (s), drop rates of this run."""
        p = self._producer
        accepted, running, rejected, _ = p.admission.stats()
        now: dict[str, float] = {"running": running, "ready": len(p.ready), "accepted": accepted}
        now |= {"rejected": rejected, "version": p.admission.version}
        now |= {"unknown_samples": p.groups.unknown.total()} | p.stats.figures()
        return {f"stream/{name}": float(value) for name, value in now.items()}

    def _check_stall(self) -> None:
        limit, p = self._cfg.stall_timeout, self._producer
        if self._cfg.deterministic or not limit or not p.running:
            return
        idle = time.monotonic() - p.groups.progress
        if idle > limit:
            raise StreamStalled(
                f"no sample of {len(p.running)} running groups ended for {idle:.0f} s; does "
                "the engine or a tool hang? (stream.stall_timeout)"
            )

    def _post(self, call: Callable[[], None]) -> None:
        """Run `call` in the loop; does nothing once that has ended, which waiting calls check."""
        if self._loop is None or self._over.is_set():
            return
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:  # closed since the check
            self._over.wait()

    def _run(self, version: int) -> None:
        try:
            asyncio.run(self._main(version))
        except BaseException as err:
            self._producer.error = self._producer.error or err
        finally:
            self._over.set()
            self._begun.set()

    async def _main(self, version: int) -> None:
        self._loop = asyncio.get_running_loop()
        await self._producer.run(version, self._begun.set)
