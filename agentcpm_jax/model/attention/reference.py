"""Grouped-query attention: the interface, and the reference in plain jnp that kernels must equal.

An `Attention` takes (q, k, v, segment_ids) and is injected into `qwen3.forward`. It is made from a
`Kernel` by `context.on_mesh`: a kernel attends from some positions of the sequence to all of it,
which is what one device of a mesh does.
Einsum letters: B batch, T query time, S key time, N query heads, K kv heads, G = N / K, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

Attention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]

# Finite, so that a row that sees nothing gives a mean instead of NaN (and NaN gradients).
MASKED = -1e30


class Kernel(NamedTuple):
    """Attention of queries at given positions to the whole sequence.

    prepare(order, shards, heads) -> (operands, specs): `order` i32[T] holds the position of every
      query of the row, in `shards` equal parts along time; `heads` query heads on a device. The
      operands are arrays (or trees of them), the specs split them over the mesh axis 'context'.
    attend(operands, q [B,T,N,H], k [B,S,K,H], v, q_segments [B,T], kv_segments [B,S]) -> like q,
      on one device, with its part of the operands.
    """

    prepare: Callable[[np.ndarray, int, int], tuple[Any, Any]]
    attend: Callable[..., jax.Array]


def by_index(attend: Callable[..., jax.Array]) -> Kernel:
    """A kernel from a function whose last argument is the positions of its queries, i32[T]."""

    def prepare(order: np.ndarray, shards: int, heads: int) -> tuple[Any, Any]:
        return jnp.asarray(order, jnp.int32), PartitionSpec("context")

    return Kernel(prepare, lambda index, *arrays: attend(*arrays, index))


def reference(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
) -> Float[Array, "B T N H"]:
    """Causal attention within segments; the score matrix is materialised (T x T).

    A query sees the keys of its own segment at or before its own index. Padding (segment 0) sees
    padding only.
    """
    return reference_kernel(q, k, v, segment_ids, segment_ids, jnp.arange(q.shape[1]))


def reference_kernel(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    q_segments: Int[Array, "B T"],
    kv_segments: Int[Array, "B S"],
    q_index: Int[Array, " T"],
) -> Float[Array, "B T N H"]:
    """`reference` for queries at the positions `q_index` of the sequence that k and v hold."""
    grouped = group_queries(q, k.shape[2])
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, k, preferred_element_type=jnp.float32)
    seen = q_segments[:, :, None] == kv_segments[:, None, :]
    seen &= q_index[:, None] >= jnp.arange(k.shape[1])
    scores = jnp.where(seen[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v.dtype), v).reshape(q.shape)


def group_queries(q: Float[Array, "B T N H"], num_kv_heads: int) -> Float[Array, "B T K G H"]:
    """Queries times H ** -0.5, with the G = N / K heads that share a key grouped."""
    b, t, n, h = q.shape
    return (q * h**-0.5).reshape(b, t, num_kv_heads, n // num_kv_heads, h)
