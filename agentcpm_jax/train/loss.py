"""Losses of reinforcement learning and of supervised training: pure functions of log-probabilities.

With l = log pi(y), b = log mu(y) of the engine that sampled, o = log pi_old(y), A the advantage
and sg the stop-gradient:

MiniRL (Zheng et al. 2025, arXiv 2512.01374, in the form that AgentCPM-Explore trains with)
    rho = exp(l - b);  L = -M sg(rho) A l
    M = 0 where (A > 0 and rho > U) or (A < 0 and rho < D), else 1
    U = 1 + (clip_low + clip_high) cap g,  D = 1 - clip_low cap g
    g = 1/cap if strict, else exp(-decay age) if decay is set, else 1
GRPO / PPO (Shao et al. 2024, arXiv 2402.03300; Schulman et al. 2017)
    r = exp(l - o);  L = w max(-A r, -A clip(r, 1 - clip_low, 1 + clip_low + clip_high))
    dual clip: where A < 0, L = min(L, -dual_clip A);  w = sg(min(exp(o - b), tis_cap))
    and M as above with rho = r when `cap` is set.

Deviations from the original implementation:
1. Denominators count the tokens before M (`denominator="all"`). The original counts what M leaves,
   which inflates the survivors of a heavy mask; `denominator="kept"` reproduces it.
2. Denominators are global counts: the original averages micro-batches and ranks, so its loss
   depends on their number.
3. A missing behaviour log-probability is an error of the caller, never ratio 1.
4. The log ratio is clamped to +-20 (value frozen): exp cannot overflow. `log_ratio_clamp=None`
   reproduces the original.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from agentcpm_jax.train.aggregate import MODES, aggregate, count_sequences, trained_mask
from agentcpm_jax.train.kl import kl_per_token
from agentcpm_jax.types import UserError


@dataclass(frozen=True)
class LossConfig:
    """Which loss, and its constants (the defaults are the original's released recipe)."""

    name: str = "minirl"  # minirl | grpo
    clip_low: float = 0.2
    clip_high: float = 0.1  # added to clip_low: the band is [1 - low, 1 + low + high]
    cap: float | None = 4.0  # widens the band of the bound mask; None: no bound mask
    strict: bool = True  # the bound mask's band is the clip band itself
    decay: float | None = None  # per version of age; tightens the bound mask (not when strict)
    dual_clip: float | None = None  # grpo only; e.g. 3.0
    tis_cap: float | None = None  # grpo with its own `old` log-probabilities; e.g. 2.0
    log_ratio_clamp: float | None = 20.0
    kl_coef: float = 0.0
    kl: str = "k3"
    aggregation: str = "seq-mean-token-sum"
    norm: float | None = None  # C of "seq-mean-token-sum-norm"
    denominator: str = "all"  # "kept": count only what the bound mask leaves (see the module)

    def __post_init__(self) -> None:
        for key, allowed in (
            ("name", ("minirl", "grpo")),
            ("aggregation", MODES),
            ("denominator", ("all", "kept")),
            ("kl", ("k1", "k2", "k3")),
        ):
            if getattr(self, key) not in allowed:
                value = getattr(self, key)
                raise UserError(f"unknown loss.{key} {value!r}; use one of {', '.join(allowed)}")


def policy_loss(
    logprobs: Float[Array, "B T"],
    behavior: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
    age: Float[Array, "B T"] | None,
    num_tokens: Float[Array, ""] | float | None,
    num_sequences: Float[Array, ""] | float | None,
    cfg: LossConfig,
    *,
    old: Float[Array, "B T"] | None = None,
    reference: Float[Array, "B T"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss to minimise, and what to watch.

    Args:
      logprobs: log pi of each token under the current parameters, nats; the one differentiated.
      behavior: log mu of each token, from the engine that sampled it.
      advantages: of each token.
      mask: 1 where the token is trained. Where it is 0 every float input may hold NaN.
      segment_ids: 1..K within a packed row, 0 = padding; None: one sequence per row.
      age: current version minus the version that sampled the token; None: 0 everywhere.
      num_tokens, num_sequences: counts over the whole optimizer batch; None: counted here.
      cfg: which loss, and its constants.
      old: log-probabilities of the proximal policy (grpo only); None: `behavior`.
      reference: log-probabilities of the policy that `kl_coef` pulls to.
    Returns:
      (loss, metrics): scalars named `loss/...`. With the global counts given, losses and metrics
      of micro-batches add up to those of the batch, except `loss/ratio_max`: take the maximum.
    Raises:
      UserError: `kl_coef` without `reference`, `tis_cap` without `old`.
    """
    mask = trained_mask(mask.astype(logprobs.dtype), segment_ids)
    with jax.named_scope("policy_loss"):
        if cfg.name == "minirl":
            per_token, keep, seen = minirl(logprobs, behavior, advantages, mask, cfg, age)
        else:
            per_token, keep, seen = grpo(logprobs, behavior, advantages, mask, cfg, age, old)
        if num_sequences is None:
            num_sequences = count_sequences(mask, segment_ids)
        if num_tokens is None:
            num_tokens = jnp.sum(mask)
        reduce = functools.partial(
            aggregate,
            segment_ids=segment_ids,
            mode=cfg.aggregation,
            num_sequences=num_sequences,
            norm=cfg.norm,
        )
        if cfg.denominator == "kept":
            policy = reduce(per_token, jnp.where(keep, mask, 0.0))
        else:
            policy = reduce(per_token, mask, num_tokens=num_tokens)
        loss, metrics = policy, {"loss/policy": policy} | _watch(seen, keep, mask, num_tokens)
        if cfg.kl_coef:
            if reference is None:
                raise UserError(f"kl_coef={cfg.kl_coef} needs reference log-probabilities; set 0")
            current, pulled_to = _clean(mask, logprobs, reference)
            kl = kl_per_token(current, pulled_to, cfg.kl)
            metrics["loss/kl_reference"] = reduce(kl, mask, num_tokens=num_tokens)
            loss = policy + cfg.kl_coef * metrics["loss/kl_reference"]
    return loss, jax.lax.stop_gradient(metrics)


def minirl(
    logprobs: Float[Array, "B T"],
    behavior: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    cfg: LossConfig,
    age: Float[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"], dict[str, Float[Array, "B T"]]]:
    """MiniRL: REINFORCE weighted by the (stopped) ratio to the behaviour policy.

    Returns:
      (per-token loss, 0 where masked or out of bounds; keep: the token lies within the bounds;
      per-token diagnostics, see `_seen`).
    """
    logprobs, behavior, advantages = _clean(mask, logprobs, behavior, advantages)
    ratio = jnp.exp(jax.lax.stop_gradient(_log_ratio(logprobs, behavior, cfg)))
    keep = _within_bounds(ratio, advantages, mask, cfg, age)
    per_token = jnp.where(keep & (mask > 0), -ratio * advantages * logprobs, 0.0)
    return per_token, keep, _seen(logprobs, behavior, advantages, ratio, mask, cfg, age)


def grpo(
    logprobs: Float[Array, "B T"],
    behavior: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    cfg: LossConfig,
    age: Float[Array, "B T"] | None = None,
    old: Float[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"], dict[str, Float[Array, "B T"]]]:
    """The clipped surrogate of PPO and GRPO; returns as `minirl`.

    Without `old` the behaviour policy is the proximal one (two policies). With it, the ratio is
    pi/pi_old and `tis_cap` corrects for pi_old/mu.

    Raises:
      UserError: `tis_cap` without `old`.
    """
    if cfg.tis_cap is not None and old is None:
        raise UserError(f"tis_cap={cfg.tis_cap} needs a proximal policy's log-probabilities (old)")
    proximal = behavior if old is None else old
    logprobs, behavior, advantages, proximal = _clean(
        mask, logprobs, behavior, advantages, proximal
    )
    ratio = jnp.exp(_log_ratio(logprobs, proximal, cfg))
    keep = _within_bounds(jax.lax.stop_gradient(ratio), advantages, mask, cfg, age)
    clipped = jnp.clip(ratio, 1.0 - cfg.clip_low, 1.0 + cfg.clip_low + cfg.clip_high)
    per_token = jnp.maximum(-advantages * ratio, -advantages * clipped)
    if cfg.dual_clip is not None:
        ceiling = jnp.minimum(per_token, -cfg.dual_clip * advantages)
        per_token = jnp.where(advantages < 0, ceiling, per_token)
    seen = _seen(logprobs, behavior, advantages, ratio, mask, cfg, age)
    if cfg.tis_cap is not None:
        weight = jnp.minimum(jnp.exp(_log_ratio(proximal, behavior, cfg)), cfg.tis_cap)
        seen["tis_weight"] = jnp.where(mask > 0, jax.lax.stop_gradient(weight), 0.0)
        per_token = per_token * seen["tis_weight"]
    return jnp.where(keep & (mask > 0), per_token, 0.0), keep, seen


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
    """Zeros where masked, before any arithmetic: NaN there reaches neither value nor gradient."""
    return tuple(jnp.where(mask > 0, x, 0.0) for x in arrays)


def _log_ratio(top: Array, bottom: Array, cfg: LossConfig) -> Array:
    if cfg.log_ratio_clamp is None:
        return top - bottom
    return jnp.clip(top - bottom, -cfg.log_ratio_clamp, cfg.log_ratio_clamp)


def _within_bounds(
    ratio: Array, advantages: Array, mask: Array, cfg: LossConfig, age: Array | None
) -> Bool[Array, "B T"]:
    """M of the module's equations."""
    if cfg.cap is None:
        return jnp.ones(ratio.shape, bool)
    scale: Array | float = 1.0 if cfg.strict else cfg.cap
    if cfg.decay is not None and not cfg.strict and age is not None:
        scale = cfg.cap * jnp.exp(-cfg.decay * jnp.maximum(_clean(mask, age)[0], 0.0))
    too_high = ratio > 1.0 + (cfg.clip_low + cfg.clip_high) * scale
    too_low = ratio < 1.0 - cfg.clip_low * scale
    return ~((too_high & (advantages > 0)) | (too_low & (advantages < 0)))


def _seen(
    logprobs: Array,
    behavior: Array,
    advantages: Array,
    ratio: Array,
    mask: Array,
    cfg: LossConfig,
    age: Array | None,
) -> dict[str, Float[Array, "B T"]]:
    """Per-token diagnostics, finite everywhere, meaningful where trained; not differentiated."""
    high = (ratio > 1.0 + cfg.clip_low + cfg.clip_high) & (advantages > 0)
    low = (ratio < 1.0 - cfg.clip_low) & (advantages < 0)
    drift = _log_ratio(logprobs, behavior, cfg)
    seen = {
        "ratio": ratio,
        "clipped": (high | low).astype(ratio.dtype),
        "kl_behavior_k1": -drift,
        "kl_behavior_k3": jnp.expm1(drift) - drift,
        "advantage": advantages,
        "logprob": logprobs,
        "age": jnp.zeros_like(ratio) if age is None else _clean(mask, age)[0],
    }
    return jax.lax.stop_gradient(seen)


def _watch(
    seen: dict[str, Array], keep: Array, mask: Array, num_tokens: Array | float
) -> dict[str, Float[Array, ""]]:
    """Token means (over the global count) of the diagnostics, the largest ratio, what M removed."""

    def mean(x: Array) -> Array:
        return jnp.sum(jnp.where(mask > 0, x, 0.0)) / jnp.maximum(num_tokens, 1.0)

    return {
        "loss/kl_behavior_k1": mean(seen["kl_behavior_k1"]),
        "loss/kl_behavior_k3": mean(seen["kl_behavior_k3"]),
        "loss/ratio_mean": mean(seen["ratio"]),
        "loss/ratio_max": jnp.max(jnp.where(mask > 0, seen["ratio"], 0.0)),
        "loss/bound_fraction": mean(~keep),
        "loss/clip_fraction": mean(seen["clipped"]),
        "loss/advantage_mean": mean(seen["advantage"]),
        "loss/logprob_mean": mean(seen["logprob"]),
        "loss/age_mean": mean(seen["age"]),
    }
