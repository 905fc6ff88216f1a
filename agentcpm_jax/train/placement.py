"""Where a train step's arrays live: the config's mesh applied to state and batch."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey, tree_leaves_with_path

from agentcpm_jax import tree
from agentcpm_jax.data.batch import Batch
from agentcpm_jax.model.config import ModelConfig
from agentcpm_jax.model.lora import adapter_specs
from agentcpm_jax.model.params import abstract_params, param_specs
from agentcpm_jax.sharding import RULES, axis_size, batch_sharding, param_shardings
from agentcpm_jax.train.step import StepShardings, TrainState
from agentcpm_jax.types import UserError


def step_shardings(
    mesh: Mesh | AbstractMesh, model: ModelConfig, tx: optax.GradientTransformation, rows: int
) -> StepShardings | None:
    """Shardings of (state, batch) on the mesh; None on one device.

    Optimiser moments are split like their parameters; optimiser state of another shape than its
    parameter (Adafactor's factors) is small and replicated. Raises `UserError` when `rows` of a
    (micro-)batch cannot be split over the data and fsdp axes.
    """
    if mesh.size == 1 and _platform(mesh) == jax.default_backend():
        return None
    split = axis_size(mesh, RULES["batch"])
    if rows % split:
        axes = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in ("data", "fsdp"))
        raise UserError(
            f"{rows} rows of a batch do not split over mesh {axes} = {split} devices; "
            f"use a multiple of {split}, the nearest is {max(round(rows / split), 1) * split}"
        )
    base = param_shardings(param_specs(model), mesh)
    params = param_shardings(adapter_specs(model), mesh) if model.lora_rank else base
    everywhere: Any = NamedSharding(mesh, PartitionSpec())
    shapes = trained_shapes(model)
    abstract = jax.eval_shape(lambda p: TrainState.create(p, tx), shapes)
    known = {_keys(path): sharding for path, sharding in tree_leaves_with_path(params)}
    sizes = {_keys(path): leaf.shape for path, leaf in tree_leaves_with_path(shapes)}

    def of_parameter(path: Any, leaf: Any) -> Any:
        keys = _keys(path)
        for start in range(len(keys)):  # skips the optimiser's own keys before it
            if sizes.get(keys[start:]) == leaf.shape:
                return known[keys[start:]]
        return everywhere

    moments = jax.tree_util.tree_map_with_path(of_parameter, abstract.opt_state)
    state = TrainState(everywhere, everywhere, params, moments)
    tokens = batch_sharding(mesh)
    fields: dict[str, Any] = dict.fromkeys(Batch.__dataclass_fields__, tokens)
    fields |= {"num_tokens": everywhere, "num_sequences": everywhere}
    fields["proximal_logprobs"] = None  # made within the step
    return StepShardings(state, Batch(**fields), mesh, base if model.lora_rank else None)


def _keys(path: Any) -> tuple[Any, ...]:
    return tuple(part.key for part in path if isinstance(part, DictKey))


def _platform(mesh: Mesh | AbstractMesh) -> str:
    return mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else ""


def trained_shapes(model: ModelConfig) -> Any:
    """The trained parameters as jax.ShapeDtypeStruct: all of them, or the adapters (float32)."""
    if not model.lora_rank:
        return abstract_params(model)
    return tree.map_with_path(
        lambda _, spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), adapter_specs(model)
    )


def abstract_base(model: ModelConfig, shardings: StepShardings | None = None) -> Any:
    """The frozen parameters that adapters are added to, as jax.ShapeDtypeStruct."""
    shapes = abstract_params(model)
    if shardings is None:
        return shapes
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings.base,
    )


def place(state: Any, shardings: StepShardings | None) -> Any:
    """Move the state to its devices."""
    return state if shardings is None else jax.device_put(state, shardings.state)


def abstract_inputs(
    model: ModelConfig,
    tx: optax.GradientTransformation,
    rows: int,
    row_length: int,
    shardings: StepShardings | None = None,
) -> tuple[TrainState, Batch]:
    """(state, batch) of a step as jax.ShapeDtypeStruct, for compiling ahead of time."""
    state = jax.eval_shape(lambda p: TrainState.create(p, tx), trained_shapes(model))
    batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, Batch.empty(rows, row_length)))
    if shardings is None:
        return state, batch

    def placed(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(placed, (state, batch), (shardings.state, shardings.batch))


class Placed(NamedTuple):
    """One array of the sharding report."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: str
    device_bytes: int


def sharding_report(arrays: Any) -> list[Placed]:
    """The sharding and the bytes on one device of every leaf of a tree of (abstract) arrays."""

    def one(path: tuple, leaf: Any) -> Placed:
        sharding = getattr(leaf, "sharding", None)
        shard = sharding.shard_shape(leaf.shape) if sharding is not None else leaf.shape
        spec = getattr(sharding, "spec", None)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return Placed(
            name,
            tuple(leaf.shape),
            str(leaf.dtype),
            "one device" if spec is None else _spec_text(spec),
            math.prod(shard) * leaf.dtype.itemsize,
        )

    return [one(path, leaf) for path, leaf in tree_leaves_with_path(arrays)]


def report_text(rows: list[Placed]) -> str:
    """A table: path, shape, dtype, spec, MiB per device; largest first, the total at the end."""
    rows = sorted(rows, key=lambda row: (-row.device_bytes, row.path))
    cells = [
        (r.path, "x".join(map(str, r.shape)) or "-", r.dtype, r.spec, _mib(r.device_bytes))
        for r in rows
    ]
    cells.append(("total", "", "", "", _mib(sum(r.device_bytes for r in rows))))
    cells.insert(0, ("path", "shape", "dtype", "spec", "MiB/device"))
    widths = [max(len(row[i]) for row in cells) for i in range(5)]
    return "\n".join(
        "  ".join(
            cell.rjust(w) if i == 4 else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )


def _spec_text(spec: Any) -> str:
    parts = ["+".join(p) if isinstance(p, tuple) else str(p or "-") for p in spec]
    return ",".join(parts) or "replicated"


def _mib(count: int) -> str:
    return f"{count / 2**20:.2f}"
