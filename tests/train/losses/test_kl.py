"""KL estimators: what they estimate, and which way their gradients point."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentcpm_jax.train.losses.config import KINDS
from agentcpm_jax.train.losses.kl import kl_per_token
from agentcpm_jax.types import UserError

P, Q = np.array([0.7, 0.2, 0.1]), np.array([0.3, 0.3, 0.4])


@pytest.mark.parametrize("kind", ["k1", "k3", "k1+", "k3+"])
def test_the_value_is_unbiased(kind: str) -> None:
    each = kl_per_token(jnp.log(P), jnp.log(Q), kind)
    exact = float((P * np.log(P / Q)).sum())
    assert float((P * np.asarray(each)).sum()) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize(("kind", "right"), [("k2", 1), ("k1+", 1), ("k3+", 1), ("k1", 0)])
def test_k2_and_plus_have_the_gradient_of_the_divergence(kind: str, right: int) -> None:
    """Under samples of the policy itself; k1's is zero on average, k3's is biased."""
    logits, q = jnp.asarray([0.3, -0.2, 1.0]), jax.nn.log_softmax(jnp.asarray([-0.5, 0.1, 0.4]))

    def exact(x: jax.Array) -> jax.Array:
        p = jax.nn.log_softmax(x)
        return jnp.sum(jnp.exp(p) * (p - q))

    def sampled(x: jax.Array) -> jax.Array:  # the expectation over samples of the frozen policy
        p = jax.nn.log_softmax(x)
        return jnp.sum(jax.lax.stop_gradient(jnp.exp(p)) * kl_per_token(p, q, kind))

    expected = right * jax.grad(exact)(logits)
    np.testing.assert_allclose(jax.grad(sampled)(logits), expected, atol=1e-6)


def test_k3_is_never_negative() -> None:
    x = jnp.linspace(-3.0, 3.0, 31)
    assert (np.asarray(kl_per_token(x, jnp.zeros_like(x), "k3")) >= 0).all()


def test_clamps_freeze_the_value_and_stop_the_gradient() -> None:
    def k3(x: float, **clamps: float) -> tuple[float, float]:
        fn = jax.value_and_grad(lambda logp: kl_per_token(logp, jnp.zeros(()), "k3", **clamps))
        value, grad = fn(jnp.asarray(x))
        return float(value), float(grad)

    assert k3(-50.0, exponent_clamp=20.0)[1] == 0.0
    assert k3(-5.0, value_clamp=10.0) == (10.0, 0.0)
    value, grad = k3(-1.0, exponent_clamp=20.0, value_clamp=10.0)
    assert (value, grad) == pytest.approx((np.e - 2, 1 - np.e), rel=1e-5)


def test_unknown_estimators_are_user_errors() -> None:
    assert "k3+" in KINDS
    with pytest.raises(UserError, match=r"'k4'.*k1, k2"):
        kl_per_token(jnp.zeros(1), jnp.zeros(1), "k4")
