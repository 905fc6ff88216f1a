"""Off-policy corrections: weights and masks from the ratio of the trained policy to the sampler's.

With d_t = log pi_old(y_t) - log mu(y_t), clamped to +- 20 (sg(log pi) replaces log pi_old where
there are only two policies), a rule measures each token or sequence and then weights or masks it.
[low, high] are the rule's bounds.

name              measure               effect                                bounds     source
token_tis         exp d_t               w = clip(measure, low, high)          0, 2       [1]
sequence_tis      exp sum_t d_t         as token_tis                          0, 2       [2]
geometric_tis     exp mean_t d_t        as token_tis                          0, 2
icepop            exp d_t               w = measure within the bounds, or 0   0.5, 5     [3]
sequence_icepop   exp sum_t d_t         as icepop                             0.5, 2     [2]
geometric_icepop  exp mean_t d_t        as icepop                             0.5, 2
token_mask        exp d_t               kept within the bounds, w = 1         0.5, 2     [2]
mis               exp sum_t d_t         as token_mask, for whole sequences    0.5, 2     [2]
geometric         exp mean_t d_t        as mis, independent of the length     0.99, 1.01 [2]
veto              every exp d_t         as mis                                1e-4, 1e4  [2]
<level>_k2        d^2 / 2               kept up to high                       0, 0.1     [2]
<level>_k3        exp d - 1 - d         kept up to high                       0, 0.01    [2]
<level>_k3_back   exp -d - 1 + d        kept up to high                       0, 0.01    AReaL
with <level> = token, sum, mean or max over the sequence.

[1] Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training".
[2] Liu et al. 2025, "When speed kills stability" (sequence-level truncated and masked importance
    sampling); bounds as in the frameworks that offer them. [3] Ling team 2025, arXiv 2510.18855.

k3 estimates KL(mu || pi_old) under samples of mu; k3_back is its mirror image, with the two
policies exchanged.

Deviations:
1. A sequence is a segment of a packed row (`aggregate`); the product over a forked trajectory's
   segments is never taken, its variance grows with every edit.
2. The loss is not renormalised by the number of tokens that a mask keeps, nor by the mean weight of
   a micro-batch.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from agentcpm_jax.train.losses.aggregate import sequence_max, sequence_mean, sequence_sum
from agentcpm_jax.train.losses.config import Rule

CLAMP = 20.0  # of log ratios, so that exp cannot overflow


class Corrected(NamedTuple):
    """weight: factor of each token's loss, 0 where not trained; inside: within the bounds."""

    weight: Float[Array, "B T"]
    inside: Bool[Array, "B T"]


def correct(
    log_ratio: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
    rule: Rule,
) -> Corrected:
    """Apply one rule; no gradient flows through it.

    Args:
      log_ratio: d of each token, nats; may hold NaN where `mask` is 0.
      mask: 1 where the token is trained.
      segment_ids: 1..K within a packed row, 0 = padding; None: one sequence per row.
    """
    d = jnp.where(mask > 0, jnp.clip(jax.lax.stop_gradient(log_ratio), -CLAMP, CLAMP), 0.0)
    measured = _measure(d, mask, segment_ids, rule)
    inside = (measured >= rule.low) & (measured <= rule.high)
    if rule.level == "every":
        outside = (~inside & (mask > 0)).astype(d.dtype)
        inside = sequence_sum(outside, segment_ids) == 0
    if rule.action == "truncate":
        weight = jnp.clip(measured, rule.low, rule.high)
    elif rule.action == "zero":
        weight = jnp.where(inside, measured, 0.0)
    else:
        weight = inside.astype(d.dtype)
    return Corrected(jnp.where(mask > 0, weight, 0.0), inside)


def log_linear(
    logprobs: Float[Array, "B T"], behavior: Float[Array, "B T"], age: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """log pi_old without a forward pass (AReaL): between the sampler and the current policy.

    o = b + alpha (l - b), alpha = (v_prox - v) / (v_now - v) with v_prox = v_now - 1, that is
    (age - 1) / age, and 0 for tokens of the last two versions. It carries no gradient.
    """
    alpha = jnp.clip((age - 1.0) / jnp.maximum(age, 1.0), 0.0, 1.0)
    return jax.lax.stop_gradient(behavior + alpha * (logprobs - behavior))


def _measure(
    d: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
    rule: Rule,
) -> Float[Array, "B T"]:
    per_token = {
        "ratio": d,
        "k2": 0.5 * d * d,
        "k3": jnp.expm1(d) - d,
        "k3_back": jnp.expm1(-d) + d,
    }[rule.metric]
    if rule.level == "sum":
        per_token = sequence_sum(per_token, segment_ids)
    elif rule.level == "mean":
        per_token = sequence_mean(per_token, mask, segment_ids)
    elif rule.level == "max":
        per_token = sequence_max(per_token, mask, segment_ids)
    if rule.metric == "ratio":
        return jnp.exp(jnp.clip(per_token, -CLAMP, CLAMP))
    return per_token
