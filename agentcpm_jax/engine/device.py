"""The engine's two device programs: feed prompt tokens to some rows, decode K tokens for some rows.

Both gather the rows they work on, as far as they are `filled`, run on a bucketed shape and scatter
back into the donated cache, so the number of compilations is bounded by the buckets. With a row for
every slot (`whole`) nothing is copied. Numbers of a row depend on that row alone.
"""

from __future__ import annotations

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp

from agentcpm_jax.model.config import ModelConfig
from agentcpm_jax.model.decode import KVCache, extend


@flax.struct.dataclass
class DecodeRows:
    """What decoding needs of R rows; padding rows have index = number of slots and budget 0."""

    index: jax.Array  # i32[R] slot
    length: jax.Array  # i32[R] tokens already in the cache
    token: jax.Array  # i32[R] the one token not yet fed
    budget: jax.Array  # i32[R] tokens still allowed
    generated: jax.Array  # i32[R] tokens sampled so far: the token index of the key
    temperature: jax.Array  # f32[R] 0 = greedy
    key: jax.Array  # u32[R, 2]
    stop: jax.Array  # i32[R, 4] padded with -1


@partial(jax.jit, static_argnames=("cfg", "filled", "whole"), donate_argnames="cache")
def prefill(
    params: dict,
    cfg: ModelConfig,
    cache: KVCache,
    index: jax.Array,
    length: jax.Array,
    tokens: jax.Array,
    counts: jax.Array,
    filled: int,
    whole: bool,
) -> KVCache:
    """Feed `tokens` i32[R, C] (the first `counts` i32[R] of each row) behind `length` i32[R].

    `filled`: a static bound on length + counts. `whole`: row r is slot r, for all slots.
    """
    rows = _gather(cache, index, length, filled, whole)
    _, rows = extend(params, cfg, rows, tokens, counts, filled=filled)
    return _scatter(cache, rows, index, filled, whole)


@partial(jax.jit, static_argnames=("cfg", "steps", "filled", "whole"), donate_argnames="cache")
def decode(
    params: dict,
    cfg: ModelConfig,
    cache: KVCache,
    rows: DecodeRows,
    steps: int,
    filled: int,
    whole: bool,
) -> tuple[KVCache, jax.Array, jax.Array, jax.Array]:
    """Sample up to `steps` tokens per row; `filled` and `whole` as in `prefill`.

    Returns (cache, ids i32[steps, R], log-probabilities f32[steps, R] at temperature 1,
    valid bool[steps, R]); a row is valid until it has sampled a stop id or used its budget.
    """

    def step(carry, _):
        local, token, active, generated, budget = carry
        counts = active.astype(jnp.int32)
        logits, local = extend(params, cfg, local, token[:, None], counts, filled=filled)
        logits = logits.astype(jnp.float32)
        sampled = _sample(logits, rows, generated)
        logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), sampled[:, None], axis=1)[:, 0]
        stopped = (sampled[:, None] == rows.stop).any(axis=1)
        out = (sampled, logprob, active)
        generated = generated + active
        budget = budget - active
        still = active & ~stopped & (budget > 0)
        return (local, jnp.where(active, sampled, token), still, generated, budget), out

    local = _gather(cache, rows.index, rows.length, filled, whole)
    start = (local, rows.token, rows.budget > 0, rows.generated, rows.budget)
    (local, *_), (ids, logprobs, valid) = jax.lax.scan(step, start, length=steps)
    return _scatter(cache, local, rows.index, filled, whole), ids, logprobs, valid


def _sample(logits: jax.Array, rows: DecodeRows, generated: jax.Array) -> jax.Array:
    """Gumbel-max with one key per row and token index; temperature 0 is the argmax."""
    keys = jax.vmap(lambda k, t: jax.random.fold_in(jax.random.wrap_key_data(k), t))(
        rows.key, generated
    )
    noise = jax.vmap(lambda k: jax.random.gumbel(k, logits.shape[1:], jnp.float32))(keys)
    greedy = rows.temperature <= 0
    scaled = logits / jnp.where(greedy, 1.0, rows.temperature)[:, None]
    return jnp.argmax(scaled + jnp.where(greedy[:, None], 0.0, noise), axis=1).astype(jnp.int32)


def _gather(
    cache: KVCache, index: jax.Array, length: jax.Array, filled: int, whole: bool
) -> KVCache:
    if whole:
        return KVCache(k=cache.k, v=cache.v, lengths=length)
    take = partial(jnp.take, indices=index, axis=1, mode="clip")
    return KVCache(k=take(cache.k[..., :filled]), v=take(cache.v[..., :filled, :]), lengths=length)


def _scatter(cache: KVCache, rows: KVCache, index: jax.Array, filled: int, whole: bool) -> KVCache:
    if whole:
        return KVCache(k=rows.k, v=rows.v, lengths=cache.lengths)
    return KVCache(
        k=cache.k.at[:, index, :, :, :filled].set(rows.k, mode="drop"),
        v=cache.v.at[:, index, :, :filled].set(rows.v, mode="drop"),
        lengths=cache.lengths,
    )
