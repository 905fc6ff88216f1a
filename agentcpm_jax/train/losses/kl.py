"""Per-token estimates of a KL divergence.

With x = log pi(y) - log ref(y) under samples y of pi (Schulman, "Approximating KL divergence"):
    k1  = x                   unbiased, high variance, may be negative; its mean gradient is 0
    k2  = x^2 / 2             biased value; its gradient is that of KL(pi || ref)
    k3  = exp(-x) - 1 + x     unbiased, never negative; its gradient is biased
    k1+ = k1 in value, k2 in gradient
    k3+ = k3 in value, k2 in gradient: k2 - sg(k2) + sg(k3)
Under samples of another policy mu, each token's estimate is weighted by sg(pi/mu).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from agentcpm_jax.train.losses.config import KINDS
from agentcpm_jax.types import UserError


def kl_per_token(
    logprobs: Float[Array, "*shape"],
    reference: Float[Array, "*shape"],
    kind: str = "k3",
    *,
    exponent_clamp: float = 0.0,
    value_clamp: float = 0.0,
) -> Float[Array, "*shape"]:
    """KL(pi || ref) estimated at each token, in nats.

    Args:
      logprobs: log pi of the token.
      reference: log ref of the same token.
      kind: one of `KINDS`.
      exponent_clamp: x of k3 is clamped to +- this (no gradient beyond); 0: off.
      value_clamp: the estimate is clamped to +- this (no gradient beyond); 0: off.
    Raises:
      UserError: unknown `kind`.
    """
    if kind not in KINDS:
        raise UserError(f"unknown KL estimator {kind!r}; use one of {', '.join(KINDS)}")
    if kind.endswith("+"):
        bounds = {"exponent_clamp": exponent_clamp, "value_clamp": value_clamp}
        value = kl_per_token(logprobs, reference, kind[:-1], **bounds)
        k2 = 0.5 * jnp.square(logprobs - reference)
        return k2 + jax.lax.stop_gradient(value - k2)
    x = logprobs - reference
    if kind == "k1":
        value = x
    elif kind == "k2":
        value = 0.5 * x * x
    else:
        if exponent_clamp:
            x = jnp.clip(x, -exponent_clamp, exponent_clamp)
        value = jnp.expm1(-x) + x
    return jnp.clip(value, -value_clamp, value_clamp) if value_clamp else value
