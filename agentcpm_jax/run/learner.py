"""The trainer's half of an RL stage: first state and compiled step, for the loop and its replay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from agentcpm_jax.config import ExperimentConfig, RLStage, Stage, TrainShape
from agentcpm_jax.data.batch import Batch
from agentcpm_jax.data.loader import StepBatches
from agentcpm_jax.data.rows import Row
from agentcpm_jax.model.attention.context import time_multiple
from agentcpm_jax.model.config import ModelConfig
from agentcpm_jax.model.lora import init_adapters, merge
from agentcpm_jax.run.context import RunContext
from agentcpm_jax.run.multihost import on_devices
from agentcpm_jax.train.buckets import check_lengths, trim
from agentcpm_jax.train.optimizer import make_optimizer
from agentcpm_jax.train.placement import step_shardings
from agentcpm_jax.train.step import (
    Frozen,
    StepShardings,
    TrainState,
    make_rl_step,
    needs_reference,
)
from agentcpm_jax.types import UserError


class Start(NamedTuple):
    """The state before the first step; with adapters, also the frozen parameters."""

    state: TrainState
    base: Any = None


class Learner(NamedTuple):
    """The training half of a stage.

    The state before the first step, (state, batch, version i32[]) -> (state, metrics), and the
    plain parameters of a state (adapters are merged into them).
    """

    state: TrainState
    step: Callable[..., tuple[TrainState, dict[str, Any]]]
    plain: Callable[[TrainState], Any]


def make_learner(ctx: RunContext, stage: Stage, rl: RLStage) -> Learner:
    """Loads the stage's initial parameters and builds its step on the run's mesh.

    Raises `UserError` when the parameters are missing or do not fit the configuration, or a batch's
    rows cannot be split.
    """
    rows, updates = rl.shape.rows, rl.loss.updates
    if rows % (updates * (rl.shape.micro_rows or 1)):
        raise UserError(
            f"shape.rows={rows} is not a multiple of loss.updates={updates} x "
            f"shape.micro_rows={rl.shape.micro_rows}; change one of them"
        )
    tx, schedule = make_optimizer(rl.optimizer, rl.shape.steps * updates)
    shardings = step_shardings(ctx.mesh, ctx.cfg.model, tx, rl.shape.micro_rows or rows // updates)
    load = partial(ctx.load_params, stage.init_from)
    state, base = first_state(load, tx, shardings, ctx.cfg)
    step = make_rl_step(
        ctx.cfg.model,
        rl.loss,
        tx,
        schedule,
        micro_rows=rl.shape.micro_rows or 0,
        shardings=shardings,
    )
    frozen = Frozen(base)
    if needs_reference(rl.loss):
        # kl_coef pulls to the stage's first parameters, kept apart from the state. Adapters begin
        # at zero: with them the reference is their base.
        first = shardings and shardings.state.params
        frozen = replace(frozen, reference=load(first) if base is None else base)

    cut = make_cut(rl.shape, ctx.mesh)

    def placed(state: TrainState, batch: Batch, version: Any) -> tuple[TrainState, dict[str, Any]]:
        batch = on_devices(cut(batch), shardings and shardings.batch, batch.shape[0])
        return step(state, batch, version, frozen)

    return Learner(state, placed, lambda state: plain(state.params, base, ctx.cfg.model))


def make_cut(shape: TrainShape, mesh: Mesh) -> Callable[[Batch], Batch]:
    """A function that cuts a batch to the shortest of `shape.buckets` that holds its rows.

    Raises `UserError` for a bucket that the mesh does not split, or with several processes, each
    of which sees only its own rows.
    """
    if shape.buckets and jax.process_count() > 1:
        raise UserError("shape.buckets need a job of one process; leave them empty")
    check_lengths(shape.buckets, shape.row_length, time_multiple(mesh))
    return lambda batch: trim(batch, shape.buckets)


def first_state(
    load: Callable[[Any], Any],
    tx: optax.GradientTransformation,
    shardings: StepShardings | None,
    cfg: ExperimentConfig,
) -> Start:
    """The first state, created on its devices; `load`: shardings or None -> parameters."""
    if cfg.model.lora_rank:
        base = load(shardings and shardings.base)
        make = jax.jit(init_adapters, static_argnums=1, **_out(shardings, "params"))
        params = make(jax.random.key(cfg.seed), cfg.model)
    else:
        base = None
        params = load(shardings and shardings.state.params)
    if shardings is None:
        return Start(TrainState.create(params, tx), base)
    opt_state = jax.jit(tx.init, **_out(shardings, "opt_state"))(params)
    zeros = jax.jit(lambda: (jnp.int32(0), jnp.int32(0)), **_out(shardings, "step"))()
    return Start(TrainState(zeros[0], zeros[1], params, opt_state), base)


def plain(trained: Any, base: Any, model: ModelConfig) -> Any:
    """The parameters of a plain model, adapters merged."""
    if base is None:
        return trained
    return jax.jit(merge, static_argnums=2)(base, trained, model)


def _out(shardings: StepShardings | None, part: str) -> dict[str, Any]:
    return {} if shardings is None else {"out_shardings": getattr(shardings.state, part)}


def make_batches(rl: RLStage, rows: Callable[[int], Sequence[Row]]) -> StepBatches:
    """Batches in the stage's shape; batch n packs `rows(n)`, which the log recorded for it."""
    shape = rl.shape
    micro_rows = shape.micro_rows or 0
    return StepBatches(rows, shape.row_length, row_multiple=shape.rows, micro_rows=micro_rows)
