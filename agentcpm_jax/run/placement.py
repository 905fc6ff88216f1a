"""Where a train step's arrays live: the config's mesh applied to state and batch."""

from __future__ import annotations

from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from agentcpm_jax.data.batch import Batch
from agentcpm_jax.model.config import ModelConfig
from agentcpm_jax.model.params import abstract_params, param_specs
from agentcpm_jax.sharding import batch_sharding, param_shardings
from agentcpm_jax.train.state import TrainState
from agentcpm_jax.train.step import StepShardings
from agentcpm_jax.types import UserError


def step_shardings(
    mesh: Mesh, model: ModelConfig, tx: optax.GradientTransformation, rows: int
) -> StepShardings | None:
    """Shardings of (state, batch) on the mesh; None on one device.

    Optimiser moments are split like their parameters. Raises `UserError` when `rows` of a
    (micro-)batch cannot be split over the data and fsdp axes.
    """
    if mesh.size == 1:
        return None
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % split:
        raise UserError(
            f"{rows} rows of a batch do not split over mesh data x fsdp = {split} devices; "
            f"use a multiple of {split}"
        )
    params = param_shardings(param_specs(model), mesh)
    everywhere: Any = NamedSharding(mesh, PartitionSpec())
    abstract = jax.eval_shape(lambda p: TrainState.create(p, tx), abstract_params(model))
    moments = optax.tree.map_params(
        tx,
        lambda _, sharding: sharding,
        abstract.opt_state,
        params,
        transform_non_params=lambda _: everywhere,
    )
    state = TrainState(everywhere, everywhere, params, moments)
    tokens = batch_sharding(mesh)
    fields: dict[str, Any] = dict.fromkeys(Batch.__dataclass_fields__, tokens)
    fields |= {"num_tokens": everywhere, "num_sequences": everywhere}
    fields["proximal_logprobs"] = None  # made within the step
    return StepShardings(state, Batch(**fields))


def place(state: Any, shardings: StepShardings | None) -> Any:
    """The state on its devices."""
    return state if shardings is None else jax.device_put(state, shardings.state)
