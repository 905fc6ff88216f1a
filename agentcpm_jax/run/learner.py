"""The trainer's half of an RL stage: first state and compiled step, for the loop and its replay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax

from agentcpm_jax.config import RLStage, Stage
from agentcpm_jax.data.loader import StepBatches
from agentcpm_jax.data.rows import Row
from agentcpm_jax.run.context import RunContext
from agentcpm_jax.train.optimizer import make_optimizer
from agentcpm_jax.train.placement import place, step_shardings
from agentcpm_jax.train.state import TrainState
from agentcpm_jax.train.step import make_rl_step, needs_reference
from agentcpm_jax.types import UserError


class Learner(NamedTuple):
    """The state before the first step, and (state, batch, version i32[]) -> (state, metrics)."""

    state: TrainState
    step: Callable[..., tuple[TrainState, dict[str, Any]]]


def make_learner(ctx: RunContext, stage: Stage, rl: RLStage) -> Learner:
    """Loads the stage's initial parameters and builds its step on the run's mesh.

    Raises `UserError` when the parameters are missing or do not fit the configuration, or a batch's
    rows cannot be shared out.
    """
    rows, updates = rl.shape.rows, rl.loss.updates
    if rows % (updates * max(rl.shape.micro_rows, 1)):
        raise UserError(
            f"shape.rows={rows} is not a multiple of loss.updates={updates} x "
            f"shape.micro_rows={rl.shape.micro_rows}; change one of them"
        )
    optimizer = rl.optimizer
    if not optimizer.total_steps:
        optimizer = replace(optimizer, total_steps=rl.shape.steps * updates)
    tx, schedule = make_optimizer(optimizer)
    shardings = step_shardings(ctx.mesh, ctx.cfg.model, tx, rl.shape.micro_rows or rows // updates)
    state = place(TrainState.create(ctx.load_params(stage.init_from), tx), shardings)
    step = make_rl_step(
        ctx.cfg.model,
        rl.loss,
        tx,
        schedule,
        micro_rows=rl.shape.micro_rows,
        shardings=shardings,
    )
    if not needs_reference(rl.loss):
        return Learner(state, step)
    # The policy that kl_coef pulls to: the stage's first parameters, kept apart from the state.
    reference = ctx.load_params(stage.init_from)
    if shardings is not None:
        reference = jax.device_put(reference, shardings.state.params)
    return Learner(state, lambda *args: step(*args, reference))


def make_batches(rl: RLStage, rows: Callable[[int], Sequence[Row]]) -> StepBatches:
    """The stage's packing of `rows(n)`: those that the log recorded for batch n."""
    shape = rl.shape
    return StepBatches(rows, shape.row_length, row_multiple=shape.rows, micro_rows=shape.micro_rows)
