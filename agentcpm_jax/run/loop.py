"""The circle on one page: tasks become trajectories, gradients, weights, and tasks again."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agentcpm_jax.checkpoint import Checkpointer
from agentcpm_jax.config import RLStage, Stage, to_json
from agentcpm_jax.data.batch import Batch
from agentcpm_jax.data.loader import StepBatches, StepIterator
from agentcpm_jax.data.rows import Row, merge_prefixes, rows_from_segment
from agentcpm_jax.engine.local import LocalEngine, check_capacity
from agentcpm_jax.rollout.episode import check_prompt
from agentcpm_jax.rollout.experience_schema import ShippedSegment
from agentcpm_jax.rollout.staleness import oldest_trained
from agentcpm_jax.rollout.stream import Stream
from agentcpm_jax.run.context import RunContext
from agentcpm_jax.run.interrupt import Interrupted
from agentcpm_jax.run.meter import Meter
from agentcpm_jax.run.metrics import MetricsWriter
from agentcpm_jax.run.placement import place, step_shardings
from agentcpm_jax.run.sampling import make_finish, make_run_sample, task_sequence
from agentcpm_jax.run.versions import VersionStore
from agentcpm_jax.train.optimizer import make_optimizer
from agentcpm_jax.train.state import TrainState
from agentcpm_jax.train.step import make_rl_step
from agentcpm_jax.world.tools import SCHEMAS, open_toolbox


def train(ctx: RunContext, stage: Stage) -> None:
    """Asynchronous RL: the engine samples in its own thread while this one steps.

    Batch n is recorded in the experience log before step n runs, so a killed run recomputes its
    steps bit for bit. Version v = number of completed batches.
    """
    rl = _section(stage)
    with _open(ctx, stage, rl) as circle:
        for version in range(circle.version, rl.shape.steps):
            started = time.monotonic()
            batch = next(circle.batches)
            waited = time.monotonic() - started
            circle.state, values = circle.step(circle.state, batch, jnp.int32(version))
            circle.publish(version + 1)
            circle.record(version + 1, values, batch, waited, time.monotonic() - started)
            last = version + 1 == rl.shape.steps
            if (version + 1) % rl.shape.checkpoint_every == 0 or last or ctx.stop.requested:
                circle.save(version + 1)
            if ctx.stop.requested and not last:
                raise Interrupted(
                    f"stopped after step {version + 1} of {stage.name}; same command resumes"
                )
        ctx.save_model(ctx.directory(stage) / "hf", circle.state.params)


def shipped_rows(shipped: Sequence[ShippedSegment]) -> list[Row]:
    """Rows in shipped order; segments of one trajectory that prefix one another share a row."""
    rows: list[Row] = []
    for _, segments in itertools.groupby(shipped, key=lambda s: (s.issue_id, s.sample)):
        own = [row for s in segments for row in rows_from_segment(s.segment, s.credit)]
        rows += merge_prefixes(own)
    return rows


@dataclass
class _Circle:
    """The parts that `train` turns: made by `_open`, closed by it on every exit path."""

    ctx: RunContext
    rl: RLStage
    state: TrainState
    version: int
    step: Any
    batches: StepIterator
    stream: Stream
    engine: LocalEngine
    store: VersionStore
    checkpoints: Checkpointer
    metrics: MetricsWriter
    bar: Any
    meter: Meter
    shipped: dict[int, list[ShippedSegment]]

    def publish(self, version: int) -> None:
        """Hand the new weights to the engine and the new version to admission."""
        self.store.publish(version, self.state.params)
        if not self.rl.stream.deterministic:  # there the stream asks for versions itself
            self.engine.set_params(self.state.params, version)
        self.stream.set_version(version)

    def record(
        self, step: int, values: dict[str, Any], batch: Batch, waited: float, seconds: float
    ) -> None:
        """Metrics of one step: losses, rewards, staleness, filters, time."""
        values = dict(jax.device_get(values))
        oldest = (oldest_trained(s.segment, s.credit.keep) for s in self.shipped.pop(step - 1))
        ages = [step - 1 - version for version in oldest if version is not None]
        values |= self.meter.drain() | self.stream.snapshot()
        values |= {
            "stale/age_mean": float(np.mean(ages)),
            "stale/age_max": max(ages, default=0),
            "data/fill": float((np.asarray(batch.segment_ids) > 0).mean()),
            "time/step_seconds": seconds,
            "time/waited_seconds": waited,
            "engine/tokens_sampled": self.engine.tokens_sampled,
            "engine/tokens_prefilled": self.engine.tokens_prefilled,
        }
        self.metrics.write(step, values)
        reward = values.get("reward/mean")
        shown = "" if reward is None else f"reward {reward:.2f}  "
        self.bar.set_postfix_str(f"{shown}age {values['stale/age_mean']:.1f}")
        self.bar.update(1)

    def save(self, step: int) -> None:
        """Checkpoint `step` and forget versions that no resume can ask for."""
        config = to_json(self.ctx.cfg)
        self.checkpoints.save(step, state=self.state, loader=self.batches, config=config)
        self.checkpoints.wait()
        self.store.collect_garbage(step - self.rl.stream.max_staleness)


@contextmanager
def _open(ctx: RunContext, stage: Stage, rl: RLStage) -> Iterator[_Circle]:
    """Restore, start the engine and the stream; stop them whatever happens."""
    directory = ctx.directory(stage)
    optimizer = rl.optimizer
    if not optimizer.total_steps:
        optimizer = replace(optimizer, total_steps=rl.shape.steps)
    tx, schedule = make_optimizer(optimizer)
    shardings = step_shardings(ctx.mesh, ctx.cfg.model, tx, rl.shape.micro_rows or rl.shape.rows)
    state = place(TrainState.create(ctx.load_params(stage.init_from), tx), shardings)
    checkpoints = Checkpointer(directory / "checkpoints", keep=2)
    shipped: dict[int, list[ShippedSegment]] = {}

    def rows(step: int) -> list[Row]:
        shipped[step] = stream.next_step_segments(step)
        return shipped_rows(shipped[step])

    batches = iter(StepBatches(rows, rl.shape.row_length, row_multiple=rl.shape.rows))
    restored = checkpoints.restore(abstract_state=state, loader=batches)
    version = restored.step if restored is not None else 0
    state = restored.state if restored is not None else state

    check_capacity(rl.engine, ctx.cfg.episode.max_context)
    check_prompt(ctx.chat, ctx.cfg.episode, SCHEMAS)
    engine_cfg = replace(rl.engine, deterministic=rl.stream.deterministic)
    engine = LocalEngine(state.params, ctx.cfg.model, engine_cfg, version=version)
    store = VersionStore(directory, ctx.cfg.model, enabled=rl.stream.deterministic)
    store.publish(version, state.params)

    async def use_version(wanted: int) -> None:
        engine.set_params(await store.wait(wanted), wanted)

    meter = Meter()
    stream = Stream(
        ctx.log,
        stage.name,
        task_sequence(rl, ctx.cfg.train_tasks, ctx.cfg.seed),
        meter.watching(
            make_run_sample(engine, ctx.chat, ctx.cfg.episode, open_toolbox, seed=ctx.cfg.seed)
        ),
        make_finish(rl.denoise, rl.advantages),
        rl.stream,
        use_version=use_version,
    )
    circle = _Circle(
        ctx=ctx,
        rl=rl,
        state=state,
        version=version,
        step=make_rl_step(
            ctx.cfg.model,
            rl.loss,
            tx,
            schedule,
            micro_rows=rl.shape.micro_rows,
            shardings=shardings,
        ),
        batches=batches,
        stream=stream,
        engine=engine,
        store=store,
        checkpoints=checkpoints,
        metrics=MetricsWriter(directory / "metrics.jsonl", version),
        bar=ctx.progress(stage.name, rl.shape.steps, version),
        meter=meter,
        shipped=shipped,
    )
    try:
        stream.start(version)
        yield circle
    finally:
        stream.stop()
        engine.close()
        checkpoints.close()
        circle.bar.close()


def _section(stage: Stage) -> RLStage:
    assert stage.rl is not None, "checked by config.from_config_dict"
    return stage.rl
