"""The objectives: per-token losses, pure functions of log-probabilities.

With l = log pi(y), o = log pi_old(y), b = log mu(y) of the engine that sampled, A the advantage,
r = exp(l - o), [D, U] = [1 - eps_low, 1 + eps_high] and sg the stop-gradient:

reinforce    L = -A l
importance   L = -A r
minirl       L = -sg(min(exp(l - b), cap)) A l
dppo         L = -sg(min(r, cap)) A l
cispo        L = -sg(clip(r, D, U)) A l
clip         L = max(-A r, -A clip(r, D, U));  dual clip c: where A < 0, L = min(L, -c A)
gspo         as clip, with r = sg(s) exp(l - sg(l)) and s = exp(mean over the sequence of l - o)

A region then removes the tokens that the gradient would push further away (`in_trust_region`):
ratio        A > 0 and r > 1 + eps_high w g, or A < 0 and r < 1 - eps_low w g
tv           A > 0 and p - q > eps_high w g, or A < 0 and p - q < -eps_low w g;  p = e^l, q = e^o
kl           as tv, with KL(Bernoulli(q) || Bernoulli(p)) in the place of |p - q|
with w = `widen` and g = exp(-decay age).

Deviations:
1. The log ratio of a token is clamped to +-20 (no gradient beyond): exp cannot overflow, and one
   token cannot dominate a sequence. GSPO's mean is clamped at +10. `log_ratio_clamp=0` switches the
   first clamp off.
2. AgentCPM-Explore's GSPO divides by log pi, which flips the gradient's sign: not copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from agentcpm_jax.train.losses.aggregate import sequence_mean
from agentcpm_jax.train.losses.config import Method

GSPO_CLAMP = 10.0


class Tokens(NamedTuple):
    """The inputs of a loss for each token; `policy_loss` fills in the fields that are None.

    Objectives get it filled in: every float is finite, and 0 where not trained.
    """

    logprobs: Float[Array, "B T"]  # log pi in nats, of the current parameters: differentiated
    behavior: Float[Array, "B T"]  # log mu, of the engine that sampled the token
    advantages: Float[Array, "B T"]
    mask: Float[Array, "B T"]  # 1 where trained; where it is 0 every float may hold NaN
    segment_ids: Int[Array, "B T"] | None = None  # 1..K in a packed row; None: one sequence per row
    age: Any = None  # f32[B,T]: current version minus the sampler's; None: 0 everywhere
    proximal: Any = None  # f32[B,T]: log pi_old, needed by `proximal="recompute"` only
    reference: Any = None  # f32[B,T]: log-probabilities of the policy that `kl_coef` pulls to


class Scored(NamedTuple):
    """per_token: the loss; ratio: what it bounds; clipped: where that leaves the clip's band."""

    per_token: Float[Array, "B T"]
    ratio: Float[Array, "B T"]
    clipped: Bool[Array, "B T"]


def reinforce(x: Tokens, cfg: Method) -> Scored:
    """L = -A l."""
    return Scored(-x.advantages * x.logprobs, _ratio(x, cfg), jnp.zeros(x.mask.shape, bool))


def importance(x: Tokens, cfg: Method) -> Scored:
    """L = -A r."""
    ratio = _ratio(x, cfg)
    return Scored(-x.advantages * ratio, ratio, jnp.zeros(x.mask.shape, bool))


def minirl(x: Tokens, cfg: Method) -> Scored:
    """L = -sg(min(exp(l - b), cap)) A l: REINFORCE weighted by the whole ratio pi/mu."""
    whole = jnp.exp(log_ratio(x.logprobs, x.behavior, cfg))
    ratio = _ratio(x, cfg)
    return Scored(_weighted(x, _capped(whole, cfg)), ratio, _beyond(ratio, x.advantages, cfg))


def dppo(x: Tokens, cfg: Method) -> Scored:
    """L = -sg(min(r, cap)) A l."""
    ratio = _ratio(x, cfg)
    return Scored(_weighted(x, _capped(ratio, cfg)), ratio, ~in_trust_region(x, ratio, cfg))


def cispo(x: Tokens, cfg: Method) -> Scored:
    """L = -sg(clip(r, D, U)) A l: clipped, yet every token keeps a gradient."""
    ratio = _ratio(x, cfg)
    bounded = jnp.clip(ratio, 1.0 - cfg.eps_low, 1.0 + cfg.eps_high)
    return Scored(_weighted(x, bounded), ratio, bounded != ratio)


def clip(x: Tokens, cfg: Method) -> Scored:
    """L = max(-A r, -A clip(r, D, U)), with the dual clip: PPO, GRPO, DAPO."""
    return _surrogate(x, _ratio(x, cfg), cfg)


def gspo(x: Tokens, cfg: Method) -> Scored:
    """The clipped surrogate of the length-normalised ratio of whole sequences.

    The token form: the value is the sequence's, the gradient flows through each token's log pi.
    """
    of_sequence = sequence_mean(log_ratio(x.logprobs, x.proximal, cfg), x.mask, x.segment_ids)
    log_s = x.logprobs + jax.lax.stop_gradient(of_sequence - x.logprobs)
    return _surrogate(x, jnp.exp(jnp.minimum(log_s, GSPO_CLAMP)), cfg)


OBJECTIVES: dict[str, Callable[[Tokens, Method], Scored]] = {
    "reinforce": reinforce,
    "importance": importance,
    "minirl": minirl,
    "dppo": dppo,
    "cispo": cispo,
    "clip": clip,
    "gspo": gspo,
}


def in_trust_region(x: Tokens, ratio: Float[Array, "B T"], cfg: Method) -> Bool[Array, "B T"]:
    """False where the configured region takes a token out of the loss."""
    if cfg.region == "none":
        return jnp.ones(ratio.shape, bool)
    scale = cfg.widen * jnp.exp(-cfg.decay * jnp.maximum(x.age, 0.0))
    high, low = cfg.eps_high * scale, cfg.eps_low * scale
    p, q = jnp.exp(x.logprobs), jnp.exp(x.proximal)
    if cfg.region == "ratio":
        too_high, too_low = ratio > 1.0 + high, ratio < 1.0 - low
    elif cfg.region == "tv":
        too_high, too_low = p - q > high, p - q < -low
    else:
        divergence = _binary_kl(q, p)
        too_high, too_low = (p > q) & (divergence > high), (p < q) & (divergence > low)
    return ~((too_high & (x.advantages > 0)) | (too_low & (x.advantages < 0)))


def log_ratio(
    top: Float[Array, "B T"], bottom: Float[Array, "B T"], cfg: Method
) -> Float[Array, "B T"]:
    """top - bottom, clamped to +-`cfg.log_ratio_clamp` (0: off)."""
    if not cfg.log_ratio_clamp:
        return top - bottom
    return jnp.clip(top - bottom, -cfg.log_ratio_clamp, cfg.log_ratio_clamp)


def _ratio(x: Tokens, cfg: Method) -> Float[Array, "B T"]:
    return jnp.exp(log_ratio(x.logprobs, x.proximal, cfg))


def _capped(ratio: Float[Array, "B T"], cfg: Method) -> Float[Array, "B T"]:
    return jnp.minimum(ratio, cfg.ratio_cap) if cfg.ratio_cap else ratio


def _weighted(x: Tokens, weight: Float[Array, "B T"]) -> Float[Array, "B T"]:
    return -jax.lax.stop_gradient(weight) * x.advantages * x.logprobs


def _surrogate(x: Tokens, ratio: Float[Array, "B T"], cfg: Method) -> Scored:
    bounded = jnp.clip(ratio, 1.0 - cfg.eps_low, 1.0 + cfg.eps_high)
    per_token = jnp.maximum(-x.advantages * ratio, -x.advantages * bounded)
    if cfg.dual_clip:
        ceiling = jnp.minimum(per_token, -cfg.dual_clip * x.advantages)
        per_token = jnp.where(x.advantages < 0, ceiling, per_token)
    return Scored(per_token, ratio, _beyond(ratio, x.advantages, cfg))


def _beyond(
    ratio: Float[Array, "B T"], advantages: Float[Array, "B T"], cfg: Method
) -> Bool[Array, "B T"]:
    """Outside the clip's band, on the side that the gradient pushes to."""
    too_high, too_low = ratio > 1.0 + cfg.eps_high, ratio < 1.0 - cfg.eps_low
    return (too_high & (advantages > 0)) | (too_low & (advantages < 0))


def _binary_kl(q: Float[Array, "B T"], p: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """KL(Bernoulli(q) || Bernoulli(p)), in nats."""
    tiny = jnp.finfo(q.dtype).tiny
    rest = (1.0 - q) * (jnp.log(jnp.maximum(1.0 - q, tiny)) - jnp.log(jnp.maximum(1.0 - p, tiny)))
    return q * (jnp.log(jnp.maximum(q, tiny)) - jnp.log(jnp.maximum(p, tiny))) + rest
