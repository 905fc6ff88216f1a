"""The engine's device programs: feed prompt tokens to some rows, decode K tokens for some rows,
copy a prefix from one row to another.

Each program takes a bucketed number of rows, reads the cache up to the static length `filled` and
updates the donated cache in place, so the buckets bound the number of compilations. With a row for
every slot (`whole`) nothing is gathered. The results of a row depend on that row alone.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from agentcpm_jax.engine.config import MAX_STOP_IDS
from agentcpm_jax.engine.sampling import Draw, sample
from agentcpm_jax.model import qwen3
from agentcpm_jax.model.config import ModelConfig
from agentcpm_jax.model.decode import KVCache, Past, Recent, attend, prefix, write
from agentcpm_jax.model.logprobs import logprobs_from_logits


@flax.struct.dataclass
class DecodeRows:
    """Decoding state of R rows; padding rows have index = number of slots and budget 0."""

    index: Any  # i32[R] slot
    length: Any  # i32[R] tokens already in the cache
    token: Any  # i32[R] the one token not yet fed
    budget: Any  # i32[R] tokens still allowed
    generated: Any  # i32[R] tokens sampled so far: folded into the key
    stop: Any  # i32[R, MAX_STOP_IDS] padded with -1
    draw: Draw


def empty_rows(slots: int) -> DecodeRows:
    """Numpy arrays with one row per slot and, last, the padding row."""
    count = slots + 1
    draw = Draw(
        temperature=np.zeros(count, np.float32),
        top_k=np.zeros(count, np.int32),
        top_p=np.ones(count, np.float32),
        min_p=np.zeros(count, np.float32),
        key=np.zeros((count, 2), np.uint32),
    )
    return DecodeRows(
        index=np.full(count, slots, np.int32),
        length=np.zeros(count, np.int32),
        token=np.zeros(count, np.int32),
        budget=np.zeros(count, np.int32),
        generated=np.zeros(count, np.int32),
        stop=np.full((count, MAX_STOP_IDS), -1, np.int32),
        draw=draw,
    )


def prefill(
    params: dict,
    cfg: ModelConfig,
    cache: KVCache,
    index: Any,
    length: Any,
    tokens: Any,
    counts: Any,
    filled: int,
    whole: bool,
) -> KVCache:
    """Feed the first `counts` i32[R] of `tokens` i32[R, C] after the `length` i32[R] cached ones.

    Arrays may be numpy. `filled`: a static bound on length. `whole`: row r is slot r, for all
    slots. Two programs: one that reads and writes the donated cache would copy all of it, as XLA
    does not order the two.
    """
    past = read(cache, index, length, filled, whole)
    return feed(params, cfg, cache, past, index, length, tokens, counts)


@partial(jax.jit, static_argnames=("filled", "whole"))
def read(cache: KVCache, index: jax.Array, length: jax.Array, filled: int, whole: bool) -> Past:
    """A copy of the rows' keys and values."""
    return _past(cache, index, length, filled, whole)


@partial(jax.jit, static_argnames="cfg", donate_argnames="cache")
def feed(
    params: dict,
    cfg: ModelConfig,
    cache: KVCache,
    past: Past,
    index: jax.Array,
    length: jax.Array,
    tokens: jax.Array,
    counts: jax.Array,
) -> KVCache:
    """Run the model on the tokens and write their keys and values into the cache."""
    _, k_new, v_new = attend(params, cfg, past, tokens, length)
    return write(cache, index, length, counts, k_new, v_new)


@partial(jax.jit, static_argnames=("cfg", "steps", "filled", "whole"), donate_argnames="cache")
def decode(
    params: dict,
    cfg: ModelConfig,
    cache: KVCache,
    rows: DecodeRows,
    least: jax.Array,
    steps: int,
    filled: int,
    whole: bool,
) -> tuple[KVCache, jax.Array, jax.Array, jax.Array]:
    """Sample up to `steps` tokens per row; `filled` and `whole` as in `prefill`.

    A row ends when it has sampled a stop id or used its budget. The loop ends when all rows have,
    or, from `least` (i32 scalar) steps on, when any row has. New keys and values collect in a small
    buffer and go to the cache at the end.

    Returns (cache, ids i32[steps, R], log-probabilities f32[steps, R] of the full distribution at
    temperature 1, counts i32[R]: how many of them are valid).
    """
    count = rows.token.shape[0]
    past = _past(cache, rows.index, rows.length, filled, whole)
    k_new, v_new = _buffers(params, cfg, count, steps)

    def running(carry: tuple) -> jax.Array:
        i, _, active, *_ = carry
        ended = jnp.any(~active & (rows.budget > 0))
        return (i < steps) & jnp.any(active) & ((i < least) | ~ended)

    def step(carry: tuple) -> tuple:
        i, token, active, counts, k_new, v_new, ids, logprobs = carry
        hidden, k_new, v_new = attend(
            params, cfg, past, token[:, None], rows.length + i, recent=Recent(k_new, v_new, i)
        )
        logits = qwen3.unembed(params, cfg, hidden[:, 0])
        sampled = sample(logits, rows.draw, rows.generated + i)
        counts = counts + active
        stopped = (sampled[:, None] == rows.stop).any(axis=1)
        ids = ids.at[i].set(sampled)
        logprobs = logprobs.at[i].set(logprobs_from_logits(logits, sampled))
        active = active & ~stopped & (counts < rows.budget)
        return i + 1, sampled, active, counts, k_new, v_new, ids, logprobs

    ids, logprobs = jnp.zeros((steps, count), jnp.int32), jnp.zeros((steps, count), jnp.float32)
    start = (jnp.int32(0), rows.token, rows.budget > 0, jnp.zeros(count, jnp.int32))
    carry = jax.lax.while_loop(running, step, (*start, k_new, v_new, ids, logprobs))
    _, _, _, counts, k_new, v_new, ids, logprobs = carry
    return write(cache, rows.index, rows.length, counts, k_new, v_new), ids, logprobs, counts


@partial(jax.jit, static_argnames="filled", donate_argnames="cache")
def copy_prefix(cache: KVCache, source: jax.Array, target: jax.Array, filled: int) -> KVCache:
    """Copy the first `filled` keys and values of row `source` to row `target` (i32 scalars)."""

    def copy(axis: int, x: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(x, source, 1, axis=x.ndim - 4)
        part = jax.lax.slice_in_dim(part, 0, filled, axis=axis)
        return jax.lax.dynamic_update_slice_in_dim(x, part, target, axis=x.ndim - 4)

    return dataclasses.replace(
        cache,
        k=jax.tree.map(partial(copy, -1), cache.k),
        v=jax.tree.map(partial(copy, -2), cache.v),
    )


def _past(cache: KVCache, index: jax.Array, length: jax.Array, filled: int, whole: bool) -> Past:
    past = prefix(cache, filled, length)
    if whole:
        return past
    take = lambda x: jnp.take(x, index, axis=x.ndim - 4, mode="clip")  # noqa: E731
    return dataclasses.replace(past, k=jax.tree.map(take, past.k), v=jax.tree.map(take, past.v))


def _buffers(params: dict, cfg: ModelConfig, rows: int, steps: int) -> tuple[Any, Any]:
    k = jnp.zeros((rows, cfg.num_kv_heads, cfg.head_dim, steps), cfg.dtype)
    v = jnp.zeros((rows, cfg.num_kv_heads, steps, cfg.head_dim), cfg.dtype)
    if isinstance(params["layers"], tuple):
        return (k,) * cfg.num_layers, (v,) * cfg.num_layers
    layers = cfg.num_layers
    return jnp.broadcast_to(k, (layers, *k.shape)), jnp.broadcast_to(v, (layers, *v.shape))
