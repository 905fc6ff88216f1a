from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentcpm_jax.model import qwen3
from agentcpm_jax.model.config import REMATS, TINY
from agentcpm_jax.model.params import init

CFG = dataclasses.replace(TINY, vocab_size=61, width=32, num_layers=2, head_dim=8, ffw=48)
forward = jax.jit(qwen3.forward, static_argnums=1)


def visible(segments):
    """[b, t, s]: query t may look at key s."""
    same = segments[:, :, None] == segments[:, None, :]
    return same & jnp.tril(jnp.ones(same.shape[1:], bool))


@pytest.fixture(scope="module")
def params():
    return jax.jit(init, static_argnums=1)(jax.random.key(0), CFG)


def test_no_logit_depends_on_a_later_token_or_another_segment(params):
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 2, 0, 0]])
    positions = jnp.array([[0, 1, 2, 3, 0, 1, 2, 0, 0]])
    tokens = jnp.array([[5, 6, 7, 8, 9, 10, 11, 12, 13]])  # distinct: one embedding row per index

    def logit_sums(embedding):
        logits = qwen3.forward({**params, "embed": embedding}, untied, tokens, positions, segments)
        return logits[0].sum(-1)

    untied = dataclasses.replace(CFG, tied_embeddings=False)
    params = {**params, "lm_head": params["embed"].T}
    jacobian = jax.jit(jax.jacrev(logit_sums))(params["embed"])  # [T, V, D]
    influence = np.abs(np.asarray(jacobian)[:, np.asarray(tokens[0])]).sum(-1)  # [T, T]
    allowed = np.asarray(visible(segments))[0]
    assert (influence[~allowed] == 0).all()
    assert (influence[allowed] > 0).all()
    assert not allowed[4:, :4].any() and not allowed[:7, 7:].any()


def test_packed_segments_equal_separate_rows(params):
    rng = np.random.default_rng(0)
    lengths = (5, 9, 1, 6)
    rows = [rng.integers(0, CFG.vocab_size, n) for n in lengths]
    width = 24
    packed = np.zeros((3, 1, width), np.int32)  # tokens, positions, segments
    padded = np.zeros((3, len(rows), width), np.int32)
    start = 0
    for i, row in enumerate(rows):
        n = len(row)
        packed[:, 0, start : start + n] = row, np.arange(n), np.full(n, i + 1)
        padded[:, i, :n] = row, np.arange(n), np.ones(n)
        start += n
    one = forward(params, CFG, *map(jnp.asarray, packed))[0]
    many = forward(params, CFG, *map(jnp.asarray, padded))
    start = 0
    for i, n in enumerate(lengths):
        np.testing.assert_allclose(one[start : start + n], many[i, :n], atol=2e-6)
        start += n
    assert bool(jnp.isfinite(one).all())


def test_remat_changes_no_gradient(params):
    tokens, positions, segments = _row(12)

    def loss(params, cfg):
        return jnp.square(qwen3.forward(params, cfg, tokens, positions, segments)).mean()

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    plain = grad(params, CFG)
    for policy in REMATS:
        remat = grad(params, dataclasses.replace(CFG, remat=policy))
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(remat), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_bfloat16_follows_float32_and_returns_float32(params):
    inputs = _row(16)
    exact = forward(params, CFG, *inputs)
    for fp32_head in (True, False):
        cfg = dataclasses.replace(CFG, dtype="bfloat16", lm_head_fp32=fp32_head)
        rough = forward(params, cfg, *inputs)
        assert rough.dtype == jnp.float32
        error = jnp.linalg.norm(rough - exact) / jnp.linalg.norm(exact)
        assert 1e-5 < error < 3e-2


def test_attention_is_injected_and_equals_repeated_heads(params):
    inputs = _row(10)

    def repeated(q, k, v, segment_ids):
        groups = q.shape[2] // k.shape[2]
        k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
        mask = visible(segment_ids)[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask)

    ours = forward(params, CFG, *inputs)
    theirs = jax.jit(qwen3.forward, static_argnames=("cfg", "attention"))(
        params, CFG, *inputs, attention=repeated
    )
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_only_relative_positions_matter(params):
    tokens, positions, segments = _row(12)
    there = forward(params, CFG, tokens, positions + 37, segments)
    np.testing.assert_allclose(forward(params, CFG, tokens, positions, segments), there, atol=2e-5)
    stretched = forward(params, CFG, tokens, positions * 2, segments)
    assert float(jnp.abs(there - stretched).max()) > 1e-3


def _row(length):
    tokens = jax.random.randint(jax.random.key(1), (2, length), 0, CFG.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    return tokens, positions, jnp.ones_like(tokens)
