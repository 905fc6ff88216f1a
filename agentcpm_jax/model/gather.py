"""Weights as a product takes them: cast, then gathered over the mesh axes that split tokens.

Written out rather than left to the partitioner, so that the cast precedes the gather (half the
bytes in bfloat16) and the gradient is reduce-scattered in the parameter's own dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from agentcpm_jax import tree
from agentcpm_jax.model.config import ModelConfig
from agentcpm_jax.model.params import param_specs
from agentcpm_jax.sharding import RULES, TOKEN_AXES, WIDTH_AXES, constrain, splits_tokens


def gather_layer(
    layer: Mapping[str, Any], cfg: ModelConfig, mesh: Mesh | None
) -> Mapping[str, Any]:
    """One layer's parameters (no L); matrices in `cfg.dtype`, split over heads and ffw only."""
    if mesh is None or mesh.size == 1:
        return layer

    def one(_: str, w: jax.Array, spec: Any) -> jax.Array:
        return gather(w, cfg.dtype, mesh, spec.axes[1:]) if spec.hf_inputs else w

    return tree.map_with_path(one, layer, param_specs(cfg)["layers"])


def gather(w: jax.Array, dtype: str, mesh: Mesh | None, axes: tuple[str, ...]) -> jax.Array:
    """`w` (logical `axes`) in `dtype`, gathered over the mesh axes that split tokens."""
    if mesh is None or mesh.size == 1:
        return w.astype(dtype)
    return _gather(str(w.dtype), dtype, mesh, axes, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _gather(stored: str, dtype: str, mesh: Mesh, axes: tuple[str, ...], w: Any) -> Any:
    whole = [axis if RULES[axis] == "tensor" else None for axis in axes]
    return constrain(constrain(w.astype(dtype), mesh, *axes), mesh, *whole)


def _forward(stored: str, dtype: str, mesh: Mesh, axes: tuple[str, ...], w: Any) -> Any:
    return _gather(stored, dtype, mesh, axes, w), None


def _backward(stored: str, dtype: str, mesh: Mesh, axes: Any, _: Any, grad: Any) -> tuple[Any]:
    return (constrain(grad.astype(jnp.dtype(stored)), mesh, *axes),)


_gather.defvjp(_forward, _backward)


def embedding_rows(w: jax.Array, tokens: jax.Array, dtype: str, mesh: Mesh) -> jax.Array:
    """w[tokens] in `dtype` on a mesh of several devices: [B,T,D], split like the tokens.

    Each device looks up its own tokens in the gathered table and sums their gradients in its own
    float32 table; the tables are then reduce-scattered.
    """
    return _rows(jax.ShapeDtypeStruct(w.shape, w.dtype), dtype, mesh, w, tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _rows(like: Any, dtype: str, mesh: Mesh, w: Any, tokens: Any) -> Any:
    table = gather(w, dtype, mesh, ("vocab", "width"))
    if not splits_tokens(mesh):
        return table[tokens]
    split = PartitionSpec(RULES["batch"], RULES["time"])
    return jax.shard_map(
        lambda table, tokens: table[tokens],
        mesh=mesh,
        in_specs=(PartitionSpec(), split),
        out_specs=PartitionSpec(*split, None),
        axis_names=set(TOKEN_AXES),
        check_vma=False,
    )(table, tokens)


def _rows_forward(like: Any, dtype: str, mesh: Mesh, w: Any, tokens: Any) -> Any:
    return _rows(like, dtype, mesh, w, tokens), tokens


def _rows_backward(like: Any, dtype: str, mesh: Mesh, tokens: Any, grad: Any) -> Any:
    split = PartitionSpec(RULES["batch"], RULES["time"])

    def local(tokens: Any, grad: Any) -> Any:
        table = jnp.zeros(like.shape, jnp.float32)
        total = table.at[tokens].add(grad.astype(jnp.float32))
        if not splits_tokens(mesh):
            return total
        total = jax.lax.psum_scatter(total, WIDTH_AXES, scatter_dimension=1, tiled=True)
        return jax.lax.psum(total, "data")

    spread = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(split, PartitionSpec(*split, None)),
        out_specs=PartitionSpec(None, WIDTH_AXES),
        axis_names=set(TOKEN_AXES),
        check_vma=False,
    )
    summed = (spread if splits_tokens(mesh) else local)(tokens, grad)
    return constrain(summed, mesh, "vocab", "width").astype(like.dtype), None


_rows.defvjp(_rows_forward, _rows_backward)
