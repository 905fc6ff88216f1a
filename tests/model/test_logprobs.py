from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from agentcpm_jax.model import qwen3
from agentcpm_jax.model.config import TINY
from agentcpm_jax.model.logprobs import (
    entropy_from_logits,
    token_logprobs,
    token_logprobs_and_entropy,
)
from agentcpm_jax.model.params import init

CFG = dataclasses.replace(TINY, vocab_size=61, width=32, num_layers=2, head_dim=8, ffw=48)


def test_entry_t_speaks_of_token_t():
    # As peaked as a trained model: initial distributions are nearly uniform and hide errors.
    params = jax.jit(init, static_argnums=1)(jax.random.key(0), CFG)
    params["embed"] = params["embed"] * 20
    segments = np.array([[1, 1, 1, 1, 2, 2, 3, 0], [4, 4, 4, 4, 4, 4, 4, 4]], np.int32)
    positions = np.array([[0, 1, 2, 3, 0, 1, 0, 0], range(8)], np.int32)
    tokens = np.random.default_rng(0).integers(0, CFG.vocab_size, segments.shape)
    batch = [jnp.asarray(x) for x in (tokens, positions, segments)]

    logits = np.asarray(jax.jit(qwen3.forward, static_argnums=1)(params, CFG, *batch), np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected, entropies = np.zeros((2, *segments.shape))
    for b, t in np.ndindex(segments.shape):
        if t and segments[b, t] and segments[b, t] == segments[b, t - 1]:
            expected[b, t] = logp[b, t - 1, tokens[b, t]]
            entropies[b, t] = -(np.exp(logp) * logp)[b, t - 1].sum()

    logprobs, entropy = jax.jit(token_logprobs_and_entropy, static_argnums=1)(params, CFG, *batch)
    alone = jax.jit(token_logprobs, static_argnums=1)(params, CFG, *batch)
    np.testing.assert_allclose(logprobs, expected, atol=1e-5)
    np.testing.assert_allclose(alone, expected, atol=1e-5)
    np.testing.assert_allclose(entropy, entropies, atol=1e-5)
    assert entropies.max() < 0.9 * np.log(CFG.vocab_size)
    assert (logprobs[0, [0, 4, 6, 7]] == 0).all() and logprobs[1, 0] == 0


def test_entropy_of_known_distributions():
    logits = jnp.array([[0.0] * 4, [7.0, 7.0, -jnp.inf, -jnp.inf], [90.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(
        entropy_from_logits(logits), [np.log(4), np.log(2), 0], rtol=1e-6, atol=1e-6
    )


def test_entropy_gradient_is_its_closed_form():
    """dH/dz_i = -p_i (log p_i + H)."""
    logits = jax.random.normal(jax.random.key(0), (7,))
    p = jax.nn.softmax(logits)
    closed = -p * (jnp.log(p) + entropy_from_logits(logits))
    np.testing.assert_allclose(jax.grad(entropy_from_logits)(logits), closed, atol=1e-6)
