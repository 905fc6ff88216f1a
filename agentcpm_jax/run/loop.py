"""The RL loop on one page: tasks become trajectories, gradients, weights, and tasks again."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agentcpm_jax.checkpoint import Checkpointer
from agentcpm_jax.config import RLStage, Stage, to_json
from agentcpm_jax.data.batch import Batch
from agentcpm_jax.data.loader import StepIterator
from agentcpm_jax.data.pack import forward_fill
from agentcpm_jax.data.rows import Row, RowStats, count_rows, merge_prefixes, rows_from_segment
from agentcpm_jax.log.schema import ShippedSegment
from agentcpm_jax.rewards.advantages import for_loss
from agentcpm_jax.rollout.episode import check_prompt
from agentcpm_jax.rollout.groups import ClaimedGroups
from agentcpm_jax.rollout.policy import Engine
from agentcpm_jax.rollout.stream import Stream
from agentcpm_jax.run.context import RunContext
from agentcpm_jax.run.custom import make_reward, make_tools
from agentcpm_jax.run.engines import engine_metrics, open_engine
from agentcpm_jax.run.follower import follow
from agentcpm_jax.run.learner import Learner, make_batches, make_learner
from agentcpm_jax.run.multihost import Interrupted, any_process, is_main, on_main, share_batch
from agentcpm_jax.run.observe import machine
from agentcpm_jax.run.observe.alerts import Alerts
from agentcpm_jax.run.observe.health import is_lockstep, stop_if_not_finite
from agentcpm_jax.run.observe.meter import RolloutMeter
from agentcpm_jax.run.observe.metrics import MetricsWriter
from agentcpm_jax.run.observe.profile import watched
from agentcpm_jax.run.observe.staleness import age_metrics, drop_metrics, stale_drops
from agentcpm_jax.run.sampling import make_finish, make_run_sample, task_sequence
from agentcpm_jax.run.worker import WorkerThread, make_worker
from agentcpm_jax.train.step import TrainState
from agentcpm_jax.weights.versions import VersionStore


def train(ctx: RunContext, stage: Stage) -> None:
    """Asynchronous RL: the engine samples in its own thread while this one steps.

    Batch n is recorded in the experience log before step n runs, so a killed run recomputes its
    steps bit for bit. Version v = number of completed batches. Of several processes the first one
    holds log, engine and stream; the others take the same steps on the batches that it sends.
    """
    rl = _section(stage)
    opened = _open(ctx, stage, rl) if is_main() else follow(ctx, stage, rl)
    with opened as trainer, _watched(ctx, stage, rl, trainer.version) as on_phase:
        for version in range(trainer.version, rl.shape.steps):
            step, started = version + 1, time.monotonic()
            on_phase(step, "waiting for the batch")
            name = f"{stage.name}/batch/{step}"
            batch = share_batch(name, lambda: next(trainer.batches))
            waited = time.monotonic() - started
            on_phase(step, "train step")
            trainer.state, values = trainer.learner.step(trainer.state, batch, jnp.int32(version))
            jax.block_until_ready(values)  # so that its time is its own; publishing needs it
            on_phase(step, "publishing the weights")
            trainer.publish(step)
            trainer.record(step, values, batch, waited, time.monotonic() - started)
            last, stopping = step == rl.shape.steps, any_process(ctx.stop.requested)
            if step % rl.shape.checkpoint_every == 0 or last or stopping:
                on_phase(step, "saving the checkpoint")
                trainer.save(step)
            if stopping and not last:
                raise Interrupted(
                    f"stopped after step {step} of {stage.name}; same command resumes"
                )
        ctx.save_model(ctx.directory(stage) / "hf", trainer.learner.plain(trainer.state))
        if ctx.cfg.model.lora_rank:
            adapters = ctx.directory(stage) / "adapter"
            ctx.save_adapters(adapters, trainer.state.params, stage.init_from)


def shipped_rows(shipped: Sequence[ShippedSegment]) -> list[Row]:
    """Rows in shipped order; the segments of one trajectory are merged as a trie."""
    return [row for rows, _ in _by_trajectory(shipped) for row in rows]


def row_metrics(shipped: Sequence[ShippedSegment]) -> dict[str, float]:
    """`data/...`: what the forward passes of a batch are spent on (see `RowStats`)."""
    stats = sum((count_rows(*found) for found in _by_trajectory(shipped)), RowStats())
    return {
        "data/rows": stats.rows,
        "data/rows_merged": stats.segments - stats.rows,
        "data/token_efficiency": stats.efficiency,
        "data/shared_prefix": stats.shared,
    }


def _by_trajectory(shipped: Sequence[ShippedSegment]) -> Iterator[tuple[list[Row], int]]:
    """(rows, recorded segments) of each trajectory."""
    for _, found in itertools.groupby(shipped, key=lambda s: (s.issue_id, s.sample)):
        segments = list(found)
        rows = [row for s in segments for row in rows_from_segment(s.segment, s.credit)]
        yield merge_prefixes(rows), len(segments)


def _watched(ctx: RunContext, stage: Stage, rl: RLStage, start: int) -> AbstractContextManager:
    return watched(ctx, ctx.directory(stage), start, rl.shape.rows, rl.shape.row_length)


@dataclass
class RLTrainer:
    """What `train` works with: made by `_open`, closed by it on every exit path."""

    ctx: RunContext
    stage: str
    rl: RLStage
    state: TrainState
    version: int
    learner: Learner
    batches: StepIterator
    stream: Stream
    engine: Engine
    store: VersionStore
    checkpoints: Checkpointer
    metrics: MetricsWriter
    bar: Any
    meter: RolloutMeter
    alerts: Alerts
    shipped: dict[int, list[ShippedSegment]]

    def publish(self, version: int) -> None:
        """Hand the new weights to the engine and the new version to admission."""
        params = on_main(self.learner.plain(self.state))
        self.store.put(version, params)
        if self.ctx.log.shared:
            self.ctx.log.announce("version")
        if not self.rl.stream.deterministic:  # there the stream asks for versions itself
            self.engine.set_params(params, version)
        self.stream.set_version(version)

    def record(
        self, step: int, values: dict[str, Any], batch: Batch, waited: float, seconds: float
    ) -> None:
        """Metrics of one step: losses, rewards, staleness, filters, time."""
        values = dict(jax.device_get(values))
        shipped = self.shipped.pop(step - 1)
        where = self.ctx.directory(self.stage), self.stage, step
        stop_if_not_finite(values, batch, *where, (s.issue_id for s in shipped))
        values |= self.meter.drain() | self.stream.snapshot()
        values |= age_metrics(shipped, step - 1) | row_metrics(shipped)
        values |= drop_metrics(stale_drops(self.ctx.log, self.stage))
        values |= {
            "data/fill": forward_fill(np.asarray(batch.segment_ids), self.rl.shape.micro_rows),
            "time/step_seconds": seconds,
            "time/waited_seconds": waited,
            "time/trainer_idle": waited / seconds,
        }
        values |= engine_metrics(self.engine)
        self.alerts.observe(self.metrics.write(step, values))
        reward = values.get("reward/mean")
        shown = "" if reward is None else f"reward {reward:.2f}  "
        self.bar.set_postfix_str(f"{shown}age {values['stale/age_mean']:.1f}")
        self.bar.update(1)

    def save(self, step: int) -> None:
        """Checkpoint `step` and forget versions that no resume can ask for."""
        self.checkpoints.save(
            step,
            state=self.state,
            loader_state=self.batches.get_state(),
            config=to_json(self.ctx.cfg),
            log=self.ctx.log,
        )
        self.checkpoints.wait()
        self.store.collect_garbage(step - self.rl.stream.max_staleness)


@contextmanager
def _open(ctx: RunContext, stage: Stage, rl: RLStage) -> Iterator[RLTrainer]:
    """Restore, start the engine and the stream; stop them whatever happens."""
    directory = ctx.directory(stage)
    learner = make_learner(ctx, stage, rl)
    state = learner.state
    checkpoints = Checkpointer(directory / "checkpoints", keep=2)
    shipped: dict[int, list[ShippedSegment]] = {}

    def rows(step: int) -> list[Row]:
        shipped[step] = stream.next_step_segments(step)
        return shipped_rows(shipped[step])

    batches = iter(make_batches(rl, rows))
    restored = checkpoints.restore(abstract_state=state, loader=batches, log=ctx.log)
    version = restored.step if restored is not None else 0
    state = restored.state if restored is not None else state

    open_tools, schemas = make_tools(ctx.cfg.tools)
    check_prompt(ctx.chat, ctx.cfg.episode, schemas)
    params = on_main(learner.plain(state))
    engine = open_engine(ctx, stage, rl, params, version)
    deterministic = rl.stream.deterministic
    store = VersionStore(directory, ctx.cfg.model, enabled=deterministic or ctx.log.shared)
    store.put(version, params)

    async def use_version(wanted: int) -> None:
        engine.set_params(await store.wait(wanted), wanted)

    meter = RolloutMeter()
    run_sample = make_run_sample(
        meter.watching_policy(engine),
        ctx.chat,
        ctx.cfg.episode,
        open_tools,
        seed=ctx.cfg.seed,
        reward=make_reward(rl.grader, rl.judge, ctx.workdir),
        deadline=0.0 if deterministic else rl.judge.deadline,
    )
    groups = worker = None
    if ctx.log.shared and not deterministic:  # others may claim, and so does this process
        groups = ClaimedGroups(ctx.log, stage.name, lambda: engine.version, meter.on_sample)
        own = rl.workers.trainer_groups
        own = rl.stream.max_concurrent_groups if own < 0 else own
        claims = make_worker(ctx, stage, rl, engine, own, run_sample)
        worker = WorkerThread(claims, groups.fail)
    stream = Stream(
        ctx.log,
        stage.name,
        task_sequence(rl, ctx.cfg.train_tasks, ctx.cfg.seed),
        meter.watching(run_sample),
        make_finish(rl.denoise, for_loss(rl.advantages, rl.loss.name)),
        rl.stream,
        use_version=use_version,
        groups=groups,
    )
    metrics = MetricsWriter(directory / "metrics.jsonl", version)
    machine.record(directory, version)
    trainer = RLTrainer(
        ctx=ctx,
        stage=stage.name,
        rl=rl,
        state=state,
        version=version,
        learner=learner,
        batches=batches,
        stream=stream,
        engine=engine,
        store=store,
        checkpoints=checkpoints,
        metrics=metrics,
        bar=ctx.progress(stage.name, rl.shape.steps, version),
        meter=meter,
        alerts=Alerts(ctx.announce, metrics.kept, lockstep=is_lockstep(stage)),
        shipped=shipped,
    )
    with ExitStack() as closing:  # whatever fails to close, the rest is closed; last one first
        for close in (trainer.bar.close, checkpoints.close, engine.close):
            closing.callback(close)
        if worker is not None:
            closing.callback(worker.stop)
            worker.start()
        closing.callback(stream.stop)
        stream.start(version)
        yield trainer


def _section(stage: Stage) -> RLStage:
    assert stage.rl is not None, "checked by config.from_config_dict"
    return stage.rl
