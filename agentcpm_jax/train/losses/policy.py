"""Losses of reinforcement learning and of supervised training: pure functions of log-probabilities.

    L = aggregate(w M L_objective) + kl_coef aggregate(KL(pi || ref))

The objective and the region M are defined in `objectives`, the off-policy factor w in `correction`,
the aggregation in `aggregate`, and the published combinations of them in `config`.

Deviations from the original implementation (AgentCPM-Explore):
1. Denominators count the tokens before M and w (`denominator="all"`). The original counts only the
   tokens that M keeps, which gives them more weight; `denominator="kept"` reproduces it.
2. Denominators are global counts: the original averages micro-batches and ranks, so its loss
   depends on their number.
3. A missing behaviour log-probability is an error of the caller, never ratio 1.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from agentcpm_jax.train.losses.aggregate import aggregate, count_sequences, trained_mask
from agentcpm_jax.train.losses.config import LossConfig, Method, resolve
from agentcpm_jax.train.losses.correction import correct, log_linear
from agentcpm_jax.train.losses.kl import kl_per_token
from agentcpm_jax.train.losses.objectives import (
    OBJECTIVES,
    Scored,
    Tokens,
    in_trust_region,
    log_ratio,
)
from agentcpm_jax.types import UserError

Metrics = dict[str, Float[Array, ""]]


class Counts(NamedTuple):
    """Counts over an optimizer batch: trained tokens, and sequences with at least one."""

    tokens: Float[Array, ""] | float
    sequences: Float[Array, ""] | float


def policy_loss(
    x: Tokens, cfg: LossConfig | Method, counts: Counts | None = None
) -> tuple[Float[Array, ""], Metrics]:
    """The loss to minimise and its metrics.

    Args:
      x: the tokens of a (micro-)batch.
      cfg: the method and its constants.
      counts: over the whole optimizer batch; None: counted in `x`.
    Returns:
      (loss, metrics): f32[], and f32[] named `loss/...`. With the global counts given, losses and
      metrics of micro-batches add up to those of the batch, except `loss/ratio_max`: take the
      maximum. `finish_metrics` turns the sums into the reported metrics.
    Raises:
      UserError: `kl_coef` without `reference`, `proximal="recompute"` without `proximal`.
    """
    cfg = resolve(cfg)
    with jax.named_scope("policy_loss"):
        x = filled_in(x, cfg)
        if counts is None:
            counts = Counts(jnp.sum(x.mask), count_sequences(x.mask, x.segment_ids))
        scored = OBJECTIVES[cfg.objective](x, cfg)
        inside = in_trust_region(x, jax.lax.stop_gradient(scored.ratio), cfg)
        weight, kept, seen = _corrections(x, cfg)
        per_token = jnp.where(inside & (x.mask > 0), weight * scored.per_token, 0.0)
        reduce = partial(
            aggregate,
            segment_ids=x.segment_ids,
            mode=cfg.aggregation,
            num_sequences=counts.sequences,
            norm=cfg.norm,
        )
        if cfg.denominator == "kept":
            loss = reduce(per_token, jnp.where(inside & kept, x.mask, 0.0))
        else:
            loss = reduce(per_token, x.mask, num_tokens=counts.tokens)
        seen |= _watch(x, scored, cfg)
        seen["loss/bound_fraction"] = ~inside
        metrics = {"loss/policy": loss} | _means(seen, x.mask, counts.tokens)
        metrics["loss/ratio_max"] = jnp.max(jnp.where(x.mask > 0, scored.ratio, 0.0))
        if cfg.kl_coef:
            kl = reduce(_kl_to_reference(x, cfg), x.mask, num_tokens=counts.tokens)
            metrics["loss/kl_reference"] = kl
            loss = loss + cfg.kl_coef * kl
    return loss, jax.lax.stop_gradient(metrics)


def filled_in(x: Tokens, cfg: Method) -> Tokens:
    """`x` as the objectives read it: masked floats are 0, and pi_old is that of `cfg.proximal`.

    Raises `UserError` as `policy_loss` does.
    """
    if cfg.proximal == "recompute" and x.proximal is None:
        raise UserError("proximal='recompute' needs the log-probabilities of pi_old (proximal)")
    if cfg.kl_coef and x.reference is None:
        raise UserError(f"kl_coef={cfg.kl_coef} needs reference log-probabilities; set 0")
    mask = trained_mask(x.mask.astype(x.logprobs.dtype), x.segment_ids)
    logprobs, behavior, advantages = _clean(mask, x.logprobs, x.behavior, x.advantages)
    (age,) = _clean(mask, jnp.zeros_like(logprobs) if x.age is None else x.age)
    proximal = behavior
    if cfg.proximal == "loglinear":
        proximal = log_linear(logprobs, behavior, age)
    elif cfg.proximal == "recompute":
        (proximal,) = _clean(mask, x.proximal)
    reference = None if x.reference is None else _clean(mask, x.reference)[0]
    return Tokens(logprobs, behavior, advantages, mask, x.segment_ids, age, proximal, reference)


def finish_metrics(metrics: Metrics) -> Metrics:
    """The reported metrics, from metrics summed over micro-batches.

    `loss/ess` in [0, 1] is the normalised effective sample size (sum w)^2 / (N sum w^2) of the
    importance weights w = pi/mu; it replaces their mean square.
    """
    if "loss/importance_square" not in metrics:
        return metrics
    square = jnp.maximum(metrics["loss/importance_square"], jnp.finfo(jnp.float32).tiny)
    rest = {k: v for k, v in metrics.items() if k != "loss/importance_square"}
    return rest | {"loss/ess": metrics["loss/importance_mean"] ** 2 / square}


def normalize_advantages(
    advantages: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """Advantages of mean 0 and (unbiased) variance 1 over the trained tokens; 0 elsewhere.

    REINFORCE++ (arXiv 2501.03262): the statistics are those of the whole batch, so call this
    before it is split into micro-batches.
    """
    mask = trained_mask(mask, segment_ids)
    (clean,) = _clean(mask, advantages)
    count = jnp.maximum(jnp.sum(mask), 1.0)
    centred = jnp.where(mask > 0, clean - jnp.sum(clean) / count, 0.0)
    variance = jnp.sum(centred * centred) / jnp.maximum(count - 1.0, 1.0)
    return centred * jax.lax.rsqrt(variance + 1e-8)


def cross_entropy(
    logprobs: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    weights: Float[Array, "B T"] | None = None,
    num_tokens: Float[Array, ""] | float | None = None,
) -> Float[Array, ""]:
    """Weighted next-token loss -sum_t w m log pi / num_tokens, in nats.

    Args:
      logprobs: log pi of each token; may hold NaN where `mask` is 0.
      mask: 1 where the token is trained.
      weights: weight of each token; None: 1.
      num_tokens: trained tokens of the whole optimizer batch; None: counted from `mask`.
    """
    (nll,) = _clean(mask, -logprobs)
    if weights is not None:
        nll = nll * jnp.where(mask > 0, weights, 0.0)
    mask = mask.astype(logprobs.dtype)
    return aggregate(nll, mask, mode="token-mean", num_tokens=num_tokens)


def _clean(mask: Float[Array, "B T"], *arrays: Float[Array, "B T"]) -> tuple[Array, ...]:
    """`arrays` with 0 where masked: a NaN there then reaches neither the loss nor its gradient."""
    return tuple(jnp.where(mask > 0, x, 0.0) for x in arrays)


def _corrections(
    x: Tokens, cfg: Method
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"], dict[str, Array]]:
    """(factor of each token, whether masks keep it, per-token diagnostics of the rules)."""
    # With two policies one ratio covers both the engine's mismatch and the staleness.
    top = x.logprobs if cfg.proximal == "bypass" else x.proximal
    weight, kept = jnp.ones_like(x.mask), jnp.ones(x.mask.shape, bool)
    seen: dict[str, Array] = {}
    for correction in cfg.corrections:
        done = correct(top - x.behavior, x.mask, x.segment_ids, correction.rule)
        weight = weight * done.weight
        seen[f"loss/{correction.name}_fraction"] = ~done.inside
        if not correction.weights:
            kept = kept & done.inside
    if seen:
        seen |= {"loss/mask_fraction": weight == 0, "loss/weight_mean": weight}
    return weight, kept, seen


def _kl_to_reference(x: Tokens, cfg: Method) -> Float[Array, "B T"]:
    kl = kl_per_token(
        x.logprobs,
        x.reference,
        cfg.kl,
        exponent_clamp=cfg.log_ratio_clamp,
        value_clamp=cfg.kl_clamp if cfg.kl.startswith("k3") else 0.0,
    )
    if cfg.kl_ratio:
        kl = kl * jax.lax.stop_gradient(jnp.exp(log_ratio(x.logprobs, x.proximal, cfg)))
    return kl


def _watch(x: Tokens, scored: Scored, cfg: Method) -> dict[str, Array]:
    """Per-token diagnostics, finite everywhere, meaningful where trained."""
    drift = log_ratio(x.logprobs, x.behavior, cfg)
    importance = jnp.exp(drift)
    return {
        "loss/kl_behavior_k1": -drift,
        "loss/kl_behavior_k3": jnp.expm1(drift) - drift,
        "loss/importance_mean": importance,
        "loss/importance_square": importance * importance,
        "loss/ratio_mean": scored.ratio,
        "loss/clip_fraction": scored.clipped,
        "loss/advantage_mean": x.advantages,
        "loss/logprob_mean": x.logprobs,
        "loss/age_mean": x.age,
    }


def _means(seen: dict[str, Array], mask: Array, num_tokens: Array | float) -> Metrics:
    """Means over the trained tokens of the whole batch."""
    return {
        name: jnp.sum(jnp.where(mask > 0, value, 0.0)) / jnp.maximum(num_tokens, 1.0)
        for name, value in seen.items()
    }
