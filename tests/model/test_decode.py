from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentcpm_jax.model import decode, qwen3
from agentcpm_jax.model.config import TINY
from agentcpm_jax.model.params import init

CFG = dataclasses.replace(TINY, vocab_size=61, width=32, num_layers=3, head_dim=8, ffw=48)
ROWS, LENGTH = 4, 20


@pytest.fixture(scope="module")
def model():
    """(params, tokens [B, T], logits of `forward` on them)."""
    params = jax.jit(init, static_argnums=1)(jax.random.key(0), CFG)
    tokens = jax.random.randint(jax.random.key(1), (ROWS, LENGTH), 0, CFG.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    forward = jax.jit(qwen3.forward, static_argnums=1)
    logits = forward(params, CFG, tokens, positions, jnp.ones_like(tokens))
    return params, np.asarray(tokens), np.asarray(logits)


@functools.partial(jax.jit, donate_argnums=1, static_argnames="filled")
def extend(params, cache, tokens, counts, filled=None):
    return decode.extend(params, CFG, cache, tokens, counts, filled=filled)


def test_ragged_prefill_then_decoding_equals_forward(model):
    params, tokens, expected = model
    cache = decode.init_cache(CFG, ROWS, LENGTH)  # the longest row fills it to the last slot
    lengths = np.zeros(ROWS, int)
    rng = np.random.default_rng(0)
    for width in (6, 6, 6, 6) + (1,) * 20:
        counts = np.minimum(rng.integers(0, width + 1, ROWS), LENGTH - lengths)
        chunk = rng.integers(0, CFG.vocab_size, (ROWS, width))  # rubbish where ignored
        for b, n in enumerate(counts):
            chunk[b, :n] = tokens[b, lengths[b] : lengths[b] + n]
        logits, cache = extend(params, cache, jnp.asarray(chunk), jnp.asarray(counts))
        lengths += counts
        assert (np.asarray(cache.lengths) == lengths).all()
        for b in np.flatnonzero(counts):
            np.testing.assert_allclose(logits[b], expected[b, lengths[b] - 1], atol=1e-5)
    assert lengths.max() == LENGTH and len(set(lengths)) > 1


def test_rows_with_count_zero_keep_every_bit(model):
    params, tokens, _ = model
    chunk = jnp.asarray(tokens[:, :5])
    _, cache = extend(params, decode.init_cache(CFG, ROWS, 8), chunk, jnp.array([5, 3, 5, 0]))
    before = jax.tree.map(np.array, cache)
    _, cache = extend(params, cache, chunk[:, :1], jnp.array([1, 0, 0, 1]))
    for name in ("k", "v"):
        old, new = getattr(before, name), np.asarray(getattr(cache, name))
        assert (old[:, 1:3] == new[:, 1:3]).all()
        assert (old[:, 0] != new[:, 0]).any() and (old[:, 3] != new[:, 3]).any()


def test_a_reset_row_forgets(model):
    params, tokens, expected = model
    cache = decode.init_cache(CFG, ROWS, LENGTH)
    full = jnp.full(ROWS, 9)
    _, cache = extend(params, cache, jnp.asarray(tokens[:, ::-1][:, :9]), full)
    cache = cache.replace(lengths=jnp.zeros_like(cache.lengths))
    logits, _ = extend(params, cache, jnp.asarray(tokens[:, :9]), full)
    np.testing.assert_allclose(logits, expected[:, 8], atol=1e-5)


def test_reading_only_the_filled_slots_changes_nothing(model):
    params, tokens, expected = model
    cache = decode.init_cache(CFG, ROWS, 64)
    _, cache = extend(params, cache, jnp.asarray(tokens[:, :7]), jnp.full(ROWS, 7), filled=0)
    logits, cache = extend(
        params, cache, jnp.asarray(tokens[:, 7:8]), jnp.ones(ROWS, int), filled=8
    )
    assert cache.capacity == 64
    np.testing.assert_allclose(logits, expected[:, 7], atol=1e-5)


def test_the_cache_is_updated_in_place(model):
    """A donated cache needs no second one: temporaries stay below one layer's share of both."""
    params, *_ = model
    cache = decode.init_cache(CFG, 64, 256)
    tokens, counts = jnp.zeros((64, 1), jnp.int32), jnp.ones(64, jnp.int32)
    memory = extend.lower(params, cache, tokens, counts).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= cache.k.nbytes + cache.v.nbytes
    assert memory.temp_size_in_bytes < 1.5 * (cache.k.nbytes + cache.v.nbytes) / CFG.num_layers
