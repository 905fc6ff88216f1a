"""Incremental decoding: a key/value cache and the functions that read and write it.

`attend` runs the model on new tokens that attend to past keys and values without changing them;
`extend` also writes the new ones into a cache, with a different number of tokens in each row.
Einsum letters as in `attention/reference.py`; C (as keys: J) new tokens per row, S past ones.

Parameters and caches are either stacked, L first, and scanned, or unstacked (`unstack`): the layers
are then unrolled, which on CPUs saves a copy of every weight in every step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from agentcpm_jax.model import qwen3
from agentcpm_jax.model.attention.reference import MASKED, group_queries
from agentcpm_jax.model.config import ModelConfig


@flax.struct.dataclass
class KVCache:
    """Keys and values in `cfg.dtype`, and how many of the S slots each row has filled.

    The time axis is last in k and second to last in v: both products of one new token then read
    contiguous memory (measured on CPU, 5x faster than S before K).
    """

    # Not typed as arrays: a pytree's leaves may also be shardings, specs or numpy copies.
    k: Any  # [L, B, K, H, S], or a tuple of L [B, K, H, S]
    v: Any  # [L, B, K, S, H], or a tuple of L [B, K, S, H]
    lengths: Any  # i32 [B]

    @property
    def capacity(self) -> int:
        """Tokens a row can hold, S."""
        return jax.tree.leaves(self.k)[0].shape[-1]


@flax.struct.dataclass
class Past:
    """Keys and values that new tokens may attend to, as in `KVCache`; seen: bool [B, S]."""

    k: Any
    v: Any
    seen: Any


@flax.struct.dataclass
class Recent:
    """Buffers shaped as in `KVCache`.

    The new token of each row goes into time column `column` (i32 scalar); the columns before it
    hold the tokens before it.
    """

    k: Any
    v: Any
    column: Any


def init_cache(cfg: ModelConfig, batch: int, capacity: int) -> KVCache:
    """An empty cache for `batch` rows of at most `capacity` tokens."""
    heads = (cfg.num_layers, batch, cfg.num_kv_heads)
    return KVCache(
        k=jnp.zeros((*heads, cfg.head_dim, capacity), cfg.dtype),
        v=jnp.zeros((*heads, capacity, cfg.head_dim), cfg.dtype),
        lengths=jnp.zeros((batch,), jnp.int32),
    )


def unstack(params: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of `params.init` with `layers` as a tuple of one dict per layer."""
    leaves, shape = jax.tree.flatten(params["layers"])
    each = tuple(jax.tree.unflatten(shape, layer) for layer in zip(*leaves, strict=True))
    return {**params, "layers": each}


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

    Jit it with the cache donated: the cache is read first, then written once, in place.

    Args:
      params: the tree of `params.init`, or `unstack` of it.
      cfg: its configuration.
      cache: lengths[b] + counts[b] must not exceed its capacity (tokens beyond it are lost; the
        caller has to check).
      tokens: ids; those at or after counts[b] are ignored.
      counts: 0 leaves the row as it is.
      filled: a static bound on `cache.lengths`. Slots beyond it are not read, which saves most of
        the time with a long, nearly empty cache. Default: the capacity.

    Returns:
      Float32 logits after each row's last new token (undefined where counts is 0), and the cache.
    """
    filled = cache.capacity if filled is None else min(filled, cache.capacity)
    past = prefix(cache, filled, cache.lengths)
    hidden, k_new, v_new = attend(params, cfg, past, tokens, cache.lengths)
    cache = write(cache, jnp.arange(tokens.shape[0]), cache.lengths, counts, k_new, v_new)
    cache = dataclasses.replace(cache, lengths=cache.lengths + counts.astype(jnp.int32))
    last = jnp.take_along_axis(hidden, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
    return qwen3.unembed(params, cfg, last), cache


def prefix(cache: KVCache, filled: int, lengths: Int[Array, " B"]) -> Past:
    """The first `filled` slots of every row, of which `lengths` are seen."""
    return Past(
        k=jax.tree.map(lambda x: x[..., :filled], cache.k),
        v=jax.tree.map(lambda x: x[..., :filled, :], cache.v),
        seen=jnp.arange(filled) < lengths[:, None],
    )


def attend(
    params: Mapping[str, Any],
    cfg: ModelConfig,
    past: Past,
    tokens: Int[Array, "B C"],
    start: Int[Array, " B"],
    *,
    recent: Recent | None = None,
) -> tuple[Float[Array, "B C D"], Any, Any]:
    """Run the model on tokens at positions start[b] onward.

    They attend to `past` and causally to each other; with `recent` it is one token per row, which
    attends to the buffers up to its column.

    Returns:
      The input of `qwen3.unembed`, and the new keys [(L) B, K, H, C] and values [(L) B, K, C, H],
      or the updated buffers.
    """
    offsets = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    rope = qwen3.rope_tables(start[:, None] + offsets, cfg)
    seen = past.seen[:, None]
    if recent is None:
        own_seen = (offsets[:, None] >= offsets[None, :])[None]
        xs = params["layers"], past.k, past.v, None, None
    else:
        own_seen = (jnp.arange(jax.tree.leaves(recent.k)[0].shape[-1]) <= recent.column)[None, None]
        xs = params["layers"], past.k, past.v, recent.k, recent.v

    def own(k: jax.Array, v: jax.Array, buffers: Any) -> tuple[jax.Array, jax.Array]:
        k, v = jnp.moveaxis(k, 1, 3), jnp.moveaxis(v, 1, 2)
        if recent is None:
            return k, v
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=recent.column)
        return put(buffers[0], k, axis=3), put(buffers[1], v, axis=2)

    def body(x: jax.Array, xs: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        layer, k_past, v_past, *buffers = xs
        new = []  # written once, before it is read: else XLA copies the buffers

        def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            new[:] = own(k, v, buffers)
            parts = [(k_past, v_past, seen), (*new, own_seen)]
            parts = [part for part in parts if part[0].shape[-1]]
            return _softmax_sum(group_queries(q, cfg.num_kv_heads), parts).reshape(q.shape)

        x, _ = qwen3.block(layer, cfg, x, rope, attention)
        return x, (new[0], new[1])

    x, (k_new, v_new) = _over_layers(body, qwen3.embed(params, cfg, tokens), xs)
    return qwen3.final_norm(params, cfg, x), k_new, v_new


def write(
    cache: KVCache,
    rows: Int[Array, " B"],
    start: Int[Array, " B"],
    counts: Int[Array, " B"],
    k_new: Any,
    v_new: Any,
) -> KVCache:
    """Puts the first counts[b] new keys and values of `attend` into row rows[b] from start[b] on.

    Rows and slots outside the cache are dropped. `lengths` is not changed.
    """
    offsets = jnp.arange(jax.tree.leaves(k_new)[0].shape[-1], dtype=jnp.int32)
    # Ignored tokens get an index past the end, which mode='drop' does not write.
    slots = jnp.where(offsets < counts[:, None], start[:, None] + offsets, cache.capacity)
    rows = rows[:, None]

    def put_k(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[..., rows, :, :, slots].set(jnp.moveaxis(new, (-4, -1), (0, 1)), mode="drop")

    def put_v(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[..., rows, :, slots, :].set(jnp.moveaxis(new, (-4, -2), (0, 1)), mode="drop")

    return dataclasses.replace(
        cache, k=jax.tree.map(put_k, cache.k, k_new), v=jax.tree.map(put_v, cache.v, v_new)
    )


def _over_layers(
    body: Callable[[jax.Array, Any], tuple[jax.Array, Any]], x: jax.Array, xs: Any
) -> tuple[jax.Array, Any]:
    """`lax.scan` of `body` over stacked layers, or a loop over unstacked ones."""
    if not isinstance(xs[0], tuple):
        return jax.lax.scan(body, x, xs)
    found = []
    for i in range(len(xs[0])):
        x, new = body(x, tuple(None if part is None else part[i] for part in xs))
        found.append(new)
    return x, tuple(zip(*found, strict=True))


def _softmax_sum(
    q: Float[Array, "B C K G H"], parts: Sequence[tuple[jax.Array, jax.Array, jax.Array]]
) -> Float[Array, "B C K G H"]:
    """Attention with one softmax over several parts, without concatenating them.

    A part: keys [B, K, H, S], values [B, K, S, H], seen [B, C, S]. Every query must see a key of
    the last part.
    """
    scores = [jnp.where(seen[:, None, None], _scores(q, k), MASKED) for k, _, seen in parts]
    top = scores[-1].max(axis=-1, keepdims=True)
    for part in scores[:-1]:
        top = jnp.maximum(top, part.max(axis=-1, keepdims=True))
    weights = [jnp.exp(part - top) for part in scores]
    total = sum(w.sum(axis=-1) for w in weights)  # [B, K, G, C]
    out = sum(_values(w.astype(v.dtype), v) for w, (_, v, _) in zip(weights, parts, strict=True))
    return (out / jnp.moveaxis(jnp.asarray(total), 3, 1)[..., None]).astype(q.dtype)


def _scores(q: Float[Array, "B C K G H"], k: Float[Array, "B K H S"]) -> jax.Array:
    """Scores, float32 [B, K, G, C, S].

    For one query they are a product and a sum, which XLA fuses: several times faster on CPUs than
    a batch of tiny matrix products, and memory-bound elsewhere.
    """
    if q.shape[1] > 1:
        return jnp.einsum("BCKGH,BKHS->BKGCS", q, k, preferred_element_type=jnp.float32)
    products = q[:, 0, :, :, :, None].astype(jnp.float32) * k[:, :, None].astype(jnp.float32)
    return jnp.sum(products, axis=3)[:, :, :, None]


def _values(w: Float[Array, "B K G C S"], v: Float[Array, "B K S H"]) -> jax.Array:
    """float32 [B, C, K, G, H]; for one query as in `_scores`."""
    if w.shape[3] > 1:
        return jnp.einsum("BKGCS,BKSH->BCKGH", w, v, preferred_element_type=jnp.float32)
    products = w[:, :, :, 0, :, None].astype(jnp.float32) * v[:, :, None].astype(jnp.float32)
    return jnp.sum(products, axis=3)[:, None]
