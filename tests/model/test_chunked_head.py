"""Chunked log-probabilities and entropies equal the dense ones, without ever holding all logits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentcpm_jax.model.chunked_head import chunk_tokens, label_logprobs
from agentcpm_jax.model.logprobs import entropy_from_logits, logprobs_from_logits
from tests.model.attention.test_kernels import sizes

B, T, D, V = 2, 11, 8, 37


def inputs() -> tuple[Any, Any, Any]:
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = 2 * jax.random.normal(keys[0], (B, T, D))
    matrix = jax.random.normal(keys[1], (V, D))
    return hidden, matrix, jax.random.randint(keys[2], (B, T), 0, V)


def dense(hidden: Any, matrix: Any, labels: Any) -> tuple[Any, Any]:
    logits = jnp.einsum("BTD,VD->BTV", hidden, matrix, precision="highest")
    return logprobs_from_logits(logits, labels), entropy_from_logits(logits)


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
