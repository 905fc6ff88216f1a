"""Grouped-query attention in plain jnp: what every kernel must equal.

An attention function takes (q, k, v, segment_ids) and is injected into `qwen3.forward`.
Einsum letters: B batch, T query time, S key time, N query heads, K kv heads, G = N / K, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Attention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]

# Finite, so that a row that sees nothing gives a mean instead of NaN (and NaN gradients).
MASKED = -1e30


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
    grouped = group_queries(q, k.shape[2])
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, k, preferred_element_type=jnp.float32)
    scores = jnp.where(segment_mask(segment_ids)[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v.dtype), v).reshape(q.shape)


def segment_mask(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """[b, t, s]: query t may look at key s."""
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    index = jnp.arange(segment_ids.shape[1])
    return same & (index[:, None] >= index[None, :])


def group_queries(q: Float[Array, "B T N H"], num_kv_heads: int) -> Float[Array, "B T K G H"]:
    """Scaled queries, the G = N / K heads that share a key side by side."""
    b, t, n, h = q.shape
    return (q * h**-0.5).reshape(b, t, num_kv_heads, n // num_kv_heads, h)
