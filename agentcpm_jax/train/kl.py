"""Per-token estimates of a KL divergence.

With x = log pi(y) - log ref(y) under samples y of pi (Schulman, "Approximating KL divergence"):
    k1 = x                    unbiased, high variance, may be negative
    k2 = x^2 / 2              biased value; its gradient is that of KL(pi || ref)
    k3 = exp(-x) - 1 + x      unbiased, never negative
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from agentcpm_jax.types import UserError


def kl_per_token(
    logprobs: Float[Array, "*shape"], reference: Float[Array, "*shape"], kind: str = "k3"
) -> Float[Array, "*shape"]:
    """KL(pi || ref) estimated at each token, in nats.

    Args:
      logprobs: log pi of the token.
      reference: log ref of the same token.
      kind: "k1", "k2" or "k3".
    Raises:
      UserError: unknown `kind`.
    """
    x = logprobs - reference
    if kind == "k1":
        return x
    if kind == "k2":
        return 0.5 * x * x
    if kind == "k3":
        return jnp.expm1(-x) + x
    raise UserError(f"unknown KL estimator {kind!r}; use 'k1', 'k2' or 'k3'")
