"""Incremental decoding: a key/value cache and one function that feeds it tokens.

`extend` serves prefill (C > 1) and decoding (C = 1), with its own number of tokens in each row.
Einsum letters as in `attention.py`; C (as keys: J) new tokens per row, S the cache's capacity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from agentcpm_jax.model import layers, qwen3
from agentcpm_jax.model.attention import MASKED, group_queries
from agentcpm_jax.model.config import ModelConfig


@flax.struct.dataclass
class KVCache:
    """Keys and values in `cfg.dtype`, and how many of the S slots each row has filled.

    Every array but `lengths` has rows on axis 1. The time axis is last in k and second to last in
    v: both products of one new token then read contiguous memory (measured on CPU, 5x faster than
    S before K).
    """

    # Not typed as arrays: a pytree's leaves may also be shardings, specs or numpy copies.
    k: Any  # [L, B, K, H, S]
    v: Any  # [L, B, K, S, H]
    lengths: Any  # i32 [B]

    @property
    def capacity(self) -> int:
        """Tokens a row can hold, S."""
        return self.k.shape[-1]


def init_cache(cfg: ModelConfig, batch: int, capacity: int) -> KVCache:
    """An empty cache for `batch` rows of at most `capacity` tokens."""
    heads = (cfg.num_layers, batch, cfg.num_kv_heads)
    return KVCache(
        k=jnp.zeros((*heads, cfg.head_dim, capacity), cfg.dtype),
        v=jnp.zeros((*heads, capacity, cfg.head_dim), cfg.dtype),
        lengths=jnp.zeros((batch,), jnp.int32),
    )


def extend(
    params: Mapping[str, Any],
    cfg: ModelConfig,
    cache: KVCache,
    tokens: Int[Array, "B C"],
    counts: Int[Array, " B"],
    *,
    filled: int | None = None,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Appends tokens[b, :counts[b]] to row b, at positions lengths[b] onward.

    Jit it with the cache donated: the cache is only read inside the layer scan and written once
    after it, in place.

    Args:
      params: the tree of `params.init`.
      cfg: its configuration.
      cache: lengths[b] + counts[b] must not exceed its capacity (tokens past it would be lost;
        the caller knows the lengths).
      tokens: ids; those at or after counts[b] are ignored.
      counts: 0 leaves the row as it is.
      filled: a static bound on `cache.lengths`; the slots behind it are not read, and reading is
        most of the time of a long, nearly empty cache. Default: the capacity.

    Returns:
      Float32 logits after each row's last new token (undefined where counts is 0), and the cache.
    """
    batch, chunk = tokens.shape
    offsets = jnp.arange(chunk, dtype=jnp.int32)
    positions = cache.lengths[:, None] + offsets
    rope = layers.rope_tables(positions, cfg)
    filled = cache.capacity if filled is None else min(filled, cache.capacity)
    stored = jnp.arange(filled) < cache.lengths[:, None]  # [B, S]
    causal = offsets[:, None] >= offsets[None, :]  # [C, C]
    f32 = jnp.float32

    def body(x: jax.Array, xs: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        layer, k_old, v_old = xs
        k_old, v_old = k_old[..., :filled], v_old[..., :filled, :]

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            # One softmax over the cache and the chunk, without joining their keys.
            grouped = group_queries(q, cfg.num_kv_heads)
            old = _scores(grouped, k_old)
            new = jnp.einsum("BCKGH,BJKH->BKGCJ", grouped, k, preferred_element_type=f32)
            old = jnp.where(stored[:, None, None, None], old, MASKED)
            new = jnp.where(causal, new, MASKED)
            weights = jax.nn.softmax(jnp.concatenate([old, new], axis=-1), axis=-1)
            w_old, w_new = jnp.split(weights.astype(v.dtype), [filled], axis=-1)
            out = _values(w_old, v_old)
            out = out + jnp.einsum("BKGCJ,BJKH->BCKGH", w_new, v)
            return out.reshape(q.shape)

        return qwen3.block(layer, cfg, x, rope, attend)

    x = qwen3.embed(params, cfg, tokens)
    x, (k_new, v_new) = jax.lax.scan(body, x, (params["layers"], cache.k, cache.v))

    # Ignored tokens get an index past the end, which mode='drop' does not write.
    slots = jnp.where(offsets < counts[:, None], positions, cache.capacity)
    rows = jnp.arange(batch)[:, None]
    k_new, v_new = (jnp.transpose(new, (1, 2, 0, 3, 4)) for new in (k_new, v_new))
    cache = KVCache(
        k=cache.k.at[:, rows, :, :, slots].set(k_new, mode="drop"),
        v=cache.v.at[:, rows, :, slots].set(v_new, mode="drop"),
        lengths=cache.lengths + counts.astype(jnp.int32),
    )
    last = jnp.take_along_axis(x, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
    return qwen3.unembed(params, cfg, qwen3.final_norm(params, cfg, last)), cache


def _scores(q: Float[Array, "B C K G H"], k: Float[Array, "B K H S"]) -> jax.Array:
    """float32 [B, K, G, C, S]. One query is a product and a sum, which fuses: several times faster
    on CPUs than a batch of tiny matrix products, and bound by memory elsewhere."""
    if q.shape[1] > 1:
        return jnp.einsum("BCKGH,BKHS->BKGCS", q, k, preferred_element_type=jnp.float32)
    products = q[:, 0, :, :, :, None].astype(jnp.float32) * k[:, :, None].astype(jnp.float32)
    return jnp.sum(products, axis=3)[:, :, :, None]


def _values(w: Float[Array, "B K G C S"], v: Float[Array, "B K S H"]) -> jax.Array:
    """[B, C, K, G, H] in v's dtype; as `_scores`."""
    if w.shape[3] > 1:
        return jnp.einsum("BKGCS,BKSH->BCKGH", w, v)
    products = w[:, :, :, 0, :, None].astype(jnp.float32) * v[:, :, None].astype(jnp.float32)
    return jnp.sum(products, axis=3)[:, None].astype(v.dtype)
