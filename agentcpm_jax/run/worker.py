"""A rollout worker's process: follows a run's published weights and samples for its trainer."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agentcpm_jax.config import ExperimentConfig, RLStage, Stage
from agentcpm_jax.database import LogUnavailable
from agentcpm_jax.disk import refusals
from agentcpm_jax.engine.config import check_capacity
from agentcpm_jax.engine.local import LocalEngine
from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.log.signals import POLL
from agentcpm_jax.rollout.groups import RunSample
from agentcpm_jax.rollout.policy import Engine, TokenPolicy
from agentcpm_jax.rollout.worker import ClaimWorker
from agentcpm_jax.run.context import RunContext, open_context
from agentcpm_jax.run.custom import make_reward, make_tools
from agentcpm_jax.run.observe.metrics import silent
from agentcpm_jax.run.sampling import make_run_sample
from agentcpm_jax.run.start.limits import check_worker
from agentcpm_jax.run.start.signals import StopSignal
from agentcpm_jax.types import UserError
from agentcpm_jax.weights.publish import load_version
from agentcpm_jax.weights.store import versions

PATIENCE = 120  # times POLL seconds: how long a worker waits for an unreachable database


def run_worker(
    cfg: ExperimentConfig,
    workdir: Path,
    *,
    groups: int = 0,
    announce: Callable[[str], None] = lambda line: None,
) -> int:
    """Works for the run in `workdir` until its RL stages are done; returns the number of groups.

    Args:
      workdir: the trainer's, on a file system that both see (weights are read from it).
      groups: at a time; 0: as many as fill the engine's slots.

    Raises:
      UserError: the log is not shared, the run is deterministic, or there is no such run.
      BreakerOpen, StreamStalled: engine or tools are down.
    """
    check_worker(cfg, workdir)
    handed_in = 0
    with StopSignal() as stop, refusals(workdir):
        ctx = open_context(cfg, workdir, silent, stop, announce)
        with ctx.log:
            for stage in cfg.stages:
                if stage.rl is None or (ctx.directory(stage) / "DONE").exists():
                    continue
                if _first_weights(ctx, stage):
                    handed_in += _work(ctx, stage, stage.rl, groups)
                if stop.requested:
                    break
    return handed_in


def _first_weights(ctx: RunContext, stage: Stage) -> bool:
    """Waits until the stage has weights; False when the stage or the worker ends before."""
    mark = 0
    while not versions(ctx.directory(stage)):
        if ctx.stop.requested or (ctx.directory(stage) / "DONE").exists():
            return False
        mark = ctx.log.wait("version", POLL, mark)
    return True


def _work(ctx: RunContext, stage: Stage, rl: RLStage, groups: int) -> int:
    check_capacity(rl.engine, ctx.cfg.episode.max_context)
    weights = PublishedWeights(ctx.log, ctx.directory(stage))
    version, params = weights.newest()
    engine = LocalEngine(params, ctx.cfg.model, rl.engine, version=version)
    delivered, patience = 0, PATIENCE
    groups = groups or max(1, rl.engine.slots // rl.stream.group_size)
    try:
        while True:
            run = _run_sample(ctx, rl, engine)  # its judge's clients belong to one event loop
            worker = make_worker(ctx, stage, rl, engine, groups, run)
            try:
                asyncio.run(_until_over(ctx, stage, worker, weights.follow(engine)))
                return delivered + worker.delivered
            except LogUnavailable as gone:
                # The claimed issues go to other workers, or to this one after it reconnects.
                patience = patience - 1 if not worker.delivered else PATIENCE
                delivered += worker.delivered
                if not patience:
                    raise
                ctx.announce(f"{gone}")
                time.sleep(POLL)
    finally:
        engine.close()


def make_worker(
    ctx: RunContext, stage: Stage, rl: RLStage, engine: Engine, groups: int, run: RunSample
) -> ClaimWorker:
    """A worker that samples with `engine`, whose weights the caller keeps up to date."""

    async def have_version(version: int) -> None:
        while engine.version < version:
            await asyncio.sleep(0.02)  # the engine swaps between two decode chunks

    return ClaimWorker(
        ctx.log,
        stage.name,
        run,
        rl.stream,
        groups=groups,
        lease=rl.workers.lease,
        have_version=have_version,
    )


def _run_sample(ctx: RunContext, rl: RLStage, policy: TokenPolicy) -> RunSample:
    open_tools, _ = make_tools(ctx.cfg.tools)
    return make_run_sample(
        policy,
        ctx.chat,
        ctx.cfg.episode,
        open_tools,
        seed=ctx.cfg.seed,
        reward=make_reward(rl.grader, rl.judge, ctx.workdir),
        deadline=rl.judge.deadline,
    )


async def _until_over(ctx: RunContext, stage: Stage, worker: ClaimWorker, follow: Any) -> None:
    def over() -> bool:
        return ctx.stop.requested or (ctx.directory(stage) / "DONE").exists()

    both = [asyncio.create_task(worker.run(over)), asyncio.create_task(follow)]
    try:  # `follow` ends only by failing
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in both:
            task.cancel()
        await asyncio.wait(both)
    for task in both:
        if not task.cancelled():
            task.result()


class WorkerThread:
    """A worker in the trainer's process, with its own thread and event loop."""

    def __init__(self, worker: ClaimWorker, failed: Callable[[BaseException], None]) -> None:
        self._worker, self._failed = worker, failed
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="claim-worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Cancels its groups, gives its claims back, and waits for the thread."""
        self._stopped.set()
        self._worker.wake()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(self._worker.run(self._stopped.is_set))
        except BaseException as error:
            self._failed(error)


class PublishedWeights:
    """The weights that the trainer of a stage publishes in its directory."""

    def __init__(self, log: ExperienceLog, directory: Path) -> None:
        self._log, self._directory = log, directory

    def newest(self) -> tuple[int, Any]:
        """(version, parameters) of the newest version."""
        while True:
            version = versions(self._directory)[-1]
            try:
                return version, load_version(self._directory, version)
            except (UserError, OSError):  # removed while it was read: then there is a newer one
                if versions(self._directory)[-1] == version:
                    raise

    async def follow(self, engine: Engine) -> None:
        """Loads every new version into the engine, until cancelled."""
        loaded, mark = engine.version, 0
        while True:
            if versions(self._directory)[-1] > loaded:
                loaded, params = await asyncio.to_thread(self.newest)
                engine.set_params(params, loaded)
            mark = await asyncio.to_thread(self._log.wait, "version", POLL, mark)
