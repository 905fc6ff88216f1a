"""Log-probabilities and entropies: aligned, and equal to the dense ones without all logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentcpm_jax.model import qwen3
from agentcpm_jax.model.config import TINY
from agentcpm_jax.model.logprobs import (
    chunk_tokens,
    label_logprobs,
    logprobs_from_logits,
    predicted,
    token_logprobs,
    token_logprobs_and_entropy,
)
from agentcpm_jax.model.params import init
from tests.model.attention.test_kernels import sizes

CFG = dataclasses.replace(TINY, vocab_size=61, width=32, num_layers=2, head_dim=8, ffw=48)
B, T, D, V = 2, 11, 8, 37


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


def test_no_token_of_the_padding_is_predicted():
    segments = jnp.asarray([[1, 1, 2, 2, 0, 0], [0, 0, 0, 1, 1, 1]])
    expected = [[0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 1, 1]]
    assert predicted(segments).astype(int).tolist() == expected


def entropy_of(logits: jax.Array) -> jax.Array:
    """Of one position: hidden states are the logits of a vocabulary of unit vectors."""
    labels = jnp.zeros((1, 1), jnp.int32)
    return label_logprobs(logits[None, None], jnp.eye(len(logits)), labels, entropy=True)[1][0, 0]


def test_entropy_of_known_distributions():
    found = [entropy_of(jnp.asarray(z)) for z in ([0.0] * 4, [7.0, 7.0, -1e4, -1e4], [90.0, 0, 0])]
    np.testing.assert_allclose(found, [np.log(4), np.log(2), 0], rtol=1e-6, atol=1e-6)


def test_entropy_gradient_is_its_closed_form():
    """dH/dz_i = -p_i (log p_i + H)."""
    logits = jax.random.normal(jax.random.key(0), (7,))
    p = jax.nn.softmax(logits)
    closed = -p * (jnp.log(p) + entropy_of(logits))
    np.testing.assert_allclose(jax.grad(entropy_of)(logits), closed, atol=1e-6)


def inputs() -> tuple[Any, Any, Any]:
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = 2 * jax.random.normal(keys[0], (B, T, D))
    matrix = jax.random.normal(keys[1], (V, D))
    return hidden, matrix, jax.random.randint(keys[2], (B, T), 0, V)


def dense(hidden: Any, matrix: Any, labels: Any) -> tuple[Any, Any]:
    logits = jnp.einsum("BTD,VD->BTV", hidden, matrix, precision="highest")
    return logprobs_from_logits(logits, labels), -jnp.sum(
        jax.nn.softmax(logits) * jax.nn.log_softmax(logits), -1
    )


@pytest.mark.parametrize("chunk", [4, 22])
def test_values_and_gradients_are_those_of_all_logits(chunk: int) -> None:
    hidden, matrix, labels = inputs()
    weights = jax.random.normal(jax.random.key(1), (2, B, T))

    def loss(head: Any) -> Any:
        def of(hidden: Any, matrix: Any) -> Any:
            logp, entropy = head(hidden, matrix, labels)
            return jnp.sum(weights[0] * logp + weights[1] * entropy), (logp, entropy)

        return jax.jit(jax.value_and_grad(of, (0, 1), has_aux=True))

    def chunked(*args: Any) -> Any:
        return label_logprobs(*args, chunk=chunk, entropy=True)

    (_, expected), grads = loss(dense)(hidden, matrix)
    (_, found), ours = loss(chunked)(hidden, matrix)
    for x, y in zip((*found, *ours), (*expected, *grads), strict=True):
        assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y)


def test_without_entropy_it_is_zero_and_the_rest_is_equal() -> None:
    hidden, matrix, labels = inputs()
    logp, none = jax.jit(lambda *x: label_logprobs(*x, chunk=5))(hidden, matrix, labels)
    np.testing.assert_allclose(logp, dense(hidden, matrix, labels)[0], rtol=1e-5)
    assert not none.any()


def test_no_array_holds_the_logits_of_all_positions() -> None:
    hidden, matrix, labels = inputs()

    def loss(hidden: Any, matrix: Any) -> Any:
        logp, entropy = label_logprobs(hidden, matrix, labels, chunk=4, entropy=True)
        return jnp.sum(logp + 0.1 * entropy)

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(hidden, matrix)
    over_vocabulary = [s for s in sizes(jaxpr.jaxpr) if V in s and D not in s]
    assert over_vocabulary and max(int(np.prod(s)) for s in over_vocabulary) == 4 * V


def test_large_vocabularies_get_few_rows_but_not_too_few() -> None:
    assert chunk_tokens(151_936) == 512
    assert chunk_tokens(4096) == 1024
