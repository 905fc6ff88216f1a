"""Attention on a mesh: rows and heads split, and time too for contexts that no device can hold.

Context parallelism: each device holds T / C queries, gathers the keys and values of the whole
row (small with grouped queries: 2 K H elements per token) and attends to them. Under a causal
mask the last of C contiguous parts would do nearly twice the mean work, so the row is cut into 2 C
chunks and device r holds chunks r and 2 C - 1 - r ("zig-zag", as in arXiv 2310.03294 and Megatron's
context parallelism): every device then sees the same number of unmasked pairs. Segment ids travel
with their tokens, so packed rows need nothing more.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from agentcpm_jax.model.attention.reference import Attention, Kernel
from agentcpm_jax.sharding import RULES, axis_size
from agentcpm_jax.types import UserError


def on_mesh(kernel: Kernel, mesh: Mesh | None = None) -> Attention:
    """The attention of (q, k, v, segment_ids) whose time axis is in `time_order`.

    Raises (when it is traced):
      UserError: the mesh does not divide rows, heads or time.
    """

    def whole(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
        operands, _ = kernel.prepare(np.arange(q.shape[1], dtype=np.int32), 1, q.shape[2])
        return kernel.attend(operands, q, k, v, segment_ids, segment_ids)

    def split(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
        assert mesh is not None
        _check(q.shape, mesh)
        shards, tensor = mesh.shape["context"], mesh.shape["tensor"]
        # A device needs the key heads of its query heads: repeat them until both split evenly.
        repeats = math.lcm(k.shape[2], tensor) // k.shape[2]
        if repeats > 1:
            k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
        order = time_order(q.shape[1], shards)
        operands, specs = kernel.prepare(order, shards, q.shape[2] // tensor)
        tokens = PartitionSpec(RULES["batch"], RULES["time"])
        heads = PartitionSpec(*tokens, RULES["heads"], None)

        def local(operands: Any, q: Any, k: Any, v: Any, segments: Any) -> jax.Array:
            keys = [gather_time(x, shards) for x in (k, v, segments)]
            return kernel.attend(operands, q, *keys[:2], segments, keys[2])

        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(specs, heads, heads, heads, tokens),
            out_specs=heads,
            check_vma=False,  # a Pallas call does not say over which axes it varies
        )(operands, q, k, v, segment_ids)

    return whole if mesh is None or mesh.size == 1 else split


def time_order(length: int, shards: int) -> np.ndarray:
    """i32[T]: the position in the row at each index of the zig-zag order over `shards`.

    Raises:
      UserError: the row does not split into 2 x `shards` chunks.
    """
    order = np.arange(length, dtype=np.int32)
    if shards == 1:
        return order
    if length % (2 * shards):
        fit = -(-length // (2 * shards)) * 2 * shards
        raise UserError(
            f"rows of {length} tokens do not split over mesh axis context of {shards} devices "
            f"(two chunks each); the nearest length that fits is {fit}"
        )
    chunks = order.reshape(2 * shards, -1)
    return np.concatenate([chunks[[r, 2 * shards - 1 - r]].ravel() for r in range(shards)])


def time_multiple(mesh: Mesh | None) -> int:
    """The length of a row must be a multiple of this on `mesh`; on TPUs every chunk of 128."""
    if mesh is None:
        return 1
    shards = mesh.shape["context"]
    chunks = 2 * shards if shards > 1 else 1
    return chunks * (128 if mesh.devices.flat[0].platform == "tpu" else 1)


def reorder(x: jax.Array, mesh: Mesh | None, *, back: bool = False) -> jax.Array:
    """x [B,T,...] in `time_order` of the mesh, or `back` from it."""
    if mesh is None or mesh.shape["context"] == 1:
        return x
    order = time_order(x.shape[1], mesh.shape["context"])
    return x[:, np.argsort(order) if back else order]


def gather_time(x: jax.Array, shards: int) -> jax.Array:
    """Inside a shard_map: gather all of x [B,T,...], in the order of the row."""
    if shards == 1:
        return x
    x = jax.lax.all_gather(x, "context", axis=1, tiled=True)
    size = x.shape[1] // (2 * shards)
    # Chunk c is the first on device c or the second on device 2 C - 1 - c. Slices, not a gather.
    places = [2 * c if c < shards else 2 * (2 * shards - 1 - c) + 1 for c in range(2 * shards)]
    return jnp.concatenate([x[:, p * size : (p + 1) * size] for p in places], axis=1)


def _check(shape: tuple[int, ...], mesh: Mesh) -> None:
    rows, _, heads, _ = shape
    for size, what, logical in ((rows, "rows", "batch"), (heads, "query heads", "heads")):
        devices = axis_size(mesh, RULES[logical])
        if size % devices:
            raise UserError(
                f"{size} {what} do not split over mesh axis {RULES[logical]} of {devices} devices; "
                f"the nearest that fits is {-(-size // devices) * devices} {what}"
            )
