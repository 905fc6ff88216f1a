"""Reference advantages, aggregations, corrections and KL estimates in our words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from agentcpm_jax.model.logprobs import label_logprobs, logprobs_from_logits
from agentcpm_jax.rewards import advantages as advantages_module
from agentcpm_jax.rewards.advantages import AdvantageConfig, estimate, grpo, soft_overlong
from agentcpm_jax.train.losses.aggregate import aggregate, count_sequences
from agentcpm_jax.train.losses.config import Rule
from agentcpm_jax.train.losses.correction import correct, log_linear
from agentcpm_jax.train.losses.kl import kl_per_token
from agentcpm_jax.train.losses.policy import normalize_advantages

Arrays = dict[str, Any]
Params = dict[str, Any]
INF = float("inf")

# ---------------------------------------------------------------------------------- advantages


def by_group(
    scores: np.ndarray, group: np.ndarray, one: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    out = np.zeros(len(scores))
    for g in np.unique(group):
        out[group == g] = one(scores[group == g])
    return out


def scores_of(x: Arrays) -> np.ndarray:
    return np.nansum(np.where(x["mask"] > 0, x["token_rewards"], 0.0), axis=1)


def advantages(
    estimator: str, singleton: str = "zero", whiten: bool = False
) -> Callable[[Arrays, Params], Arrays]:
    cfg = AdvantageConfig(estimator=estimator, singleton=singleton)

    def fn(x: Arrays, params: Params) -> Arrays:
        if "mask" not in x:
            return {"advantages": by_group(x["rewards"], x["group"], lambda s: estimate(s, cfg))}
        group = x.get("group", np.arange(len(x["mask"])))
        each = by_group(scores_of(x), group, lambda s: estimate(s, cfg))
        dense = np.where(x["mask"] > 0, each[:, None], 0.0)
        if not whiten:
            return {"advantages": dense, "returns": dense}
        mask = jnp.asarray(x["mask"])
        whitened = np.asarray(normalize_advantages(jnp.asarray(dense, mask.dtype), mask))
        returns = dense if estimator == "raw" else whitened
        return {"advantages": whitened, "returns": returns}

    return fn


def areal_norm(x: Arrays, p: Params) -> Arrays:
    """Group mean and group deviation with AReaL's epsilon; or the mean of the others."""
    if p["mean_leave1out"]:
        assert p["std_level"] is None
        cfg = AdvantageConfig(estimator="leave_one_out")
        return {"advantages": by_group(x["rewards"], x["group"], lambda s: estimate(s, cfg))}
    assert (p["mean_level"], p["std_level"], p["std_unbiased"]) == ("group", "group", True)
    with mock.patch.object(advantages_module, "EPS", p["eps"]):
        return {"advantages": by_group(x["rewards"], x["group"], grpo)}


# --------------------------------------------------------------------------------- aggregation


def aggregation(x: Arrays, p: Params) -> Arrays:
    segments = jnp.asarray(x["segment_ids"]) if "segment_ids" in x else None
    matrix = x["loss_matrix"] if "loss_matrix" in x else np.nan_to_num(x["adv"] * x["cur"])
    mask, norm = jnp.asarray(x["mask"]), None if p["norm"] is None else float(p["norm"])
    mode = p["mode"].replace("sequence-", "seq-")
    counts: dict[str, Any] = {
        "num_tokens": jnp.sum(mask if segments is None else mask * (segments > 0)),
        "num_sequences": count_sequences(mask, segments),
    }
    if p["mode"] == "sequence-mean-token-scale":
        mode = "seq-mean-token-sum-norm"
    elif p["mode"] == "sequence-mean-token-sum-norm":  # tunix's namesake: the total over norm
        mode, counts["num_tokens"] = "token-mean", norm

    def total(values: jax.Array, rows: slice = slice(None)) -> jax.Array:
        where = None if segments is None else segments[rows]
        return aggregate(values[rows], mask[rows], where, mode, norm=norm, **counts)

    value, grad = jax.value_and_grad(total)(jnp.asarray(matrix))
    split = p.get("micro_split", 0)
    parts = [total(jnp.asarray(matrix), r) for r in (slice(0, split), slice(split, None))]
    return {"loss": value, "grad": grad, "micro_losses": np.asarray(parts)}


# ----------------------------------------------------------------------- off-policy corrections


def drift(x: Arrays) -> jax.Array:
    return jnp.asarray(x["old"]) - jnp.asarray(x["beh"])


def rules(config: Callable[[Params], list[Rule]]) -> Callable[[Arrays, Params], Arrays]:
    """The product of the rules' weights; what is kept is what lies within all of them."""

    def fn(x: Arrays, p: Params) -> Arrays:
        mask = jnp.asarray(x["mask"])
        weights, kept = mask, mask
        for rule in config(p):
            done = correct(drift(x), mask, None, rule)
            weights = weights * done.weight
            kept = jnp.where(done.inside, kept, 0.0)
        return {"weights": weights, "keep_mask": kept}

    return fn


LEVELS = {"token": "token", "sequence": "sum"}


def verl_weights(p: Params) -> list[Rule]:
    assert not p["batch_normalize"]
    level, bounds = LEVELS[p["level"]], p["threshold"]
    if isinstance(bounds, str):
        low, high = map(float, bounds.split("_"))
        return [Rule("ratio", level, "zero", low, high)]
    return [Rule("ratio", level, "truncate", 0.0, bounds)]


def verl_masks(p: Params) -> list[Rule]:
    """verl's k1 is log(beh / old): its bounds are those of the inverse ratio."""
    found = []
    for option, bounds in zip(p["option"].split(","), str(p["threshold"]).split(","), strict=True):
        level, metric = option.removeprefix("seq_").rsplit("_", 1)
        if metric == "k1":
            low, high = map(float, bounds.split("_"))
            found.append(Rule("ratio", level, "mask", 1 / high, 1 / low))
        else:
            found.append(Rule(metric, level, "mask", 0.0, float(bounds)))
    return found


def skyrl_rules(p: Params) -> list[Rule]:
    def bounds(name: str) -> tuple[float, float]:
        return p.get(f"{name}_low") or 0.0, p.get(f"{name}_high") or INF

    for key, (level, action) in {
        "token_tis_ratio_clip": ("token", "truncate"),
        "sequence_tis_ratio_clip": ("sum", "truncate"),
        "geo_mask": ("mean", "mask"),
        "product_mask": ("sum", "mask"),
        "outlier_token_is_threshold": ("every", "mask"),
        "token_mask_is_threshold": ("token", "mask"),
    }.items():
        if f"{key}_high" in p:
            return [Rule("ratio", level, action, *bounds(key))]
    raise AssertionError(p)


def areal_rules(x: Arrays, p: Params) -> Arrays:
    """A sequence rule of the ratio weights by the geometric mean, whatever it compares; k1 bounds
    are those of the log ratio, all others are ours as they are."""
    level = "token" if p["level"] == "token" else p["agg"]
    low = 0.0 if p["lower"] is None else p["lower"]
    metric, high = p["metric"], p["upper"]
    weight_level = "mean" if p["level"] == "sequence" and metric == "ratio" else "token"
    if metric == "kl_k1":
        metric, low, high = "ratio", float(np.exp(low)), float(np.exp(high))
    metric = {"kl_k2": "k2", "kl_k3": "k3_back"}.get(metric, metric)
    mask = jnp.asarray(x["mask"])
    if p["action"] == "clamp":
        rule = Rule("ratio", weight_level, "truncate", low, high)
        return {"weights": correct(drift(x), mask, None, rule).weight, "keep_mask": mask}
    free = correct(drift(x), mask, None, Rule("ratio", weight_level, "truncate", 0.0, INF))
    kept = correct(drift(x), mask, None, Rule(metric, level, "mask", low, high))
    return {"weights": free.weight * kept.weight, "keep_mask": kept.weight}


def prox_loglinear(x: Arrays, p: Params) -> Arrays:
    cur, beh = jnp.asarray(x["cur"]), jnp.asarray(x["beh"])
    age = (p["current_version"] - jnp.asarray(x["versions"])).astype(cur.dtype)
    return {"prox": jnp.where(x["mask"] > 0, log_linear(cur, beh, age), 0.0)}


# ------------------------------------------------------------------------------------ KL, misc


def kl(kind: str, exponent: float = 0.0, value: float = 0.0, ratio: bool = False) -> Any:
    def fn(x: Arrays, p: Params) -> Arrays:
        mask = jnp.asarray(x["mask"])
        clean = {k: jnp.where(mask > 0, v, 0.0) for k, v in x.items()}

        def each(cur: jax.Array) -> jax.Array:
            cur = jnp.where(mask > 0, cur, 0.0)
            clamps = {"exponent_clamp": exponent, "value_clamp": value}
            out = kl_per_token(cur, clean["ref"], kind, **clamps)
            if ratio:
                out = out * jax.lax.stop_gradient(jnp.exp(cur - clean["old"]))
            return jnp.where(mask > 0, out, 0.0)

        return {"kl": each(x["cur"]), "grad": jax.grad(lambda c: each(c).sum())(x["cur"])}

    return fn


def entropy(x: Arrays, p: Params) -> Arrays:
    logits = jnp.asarray(x["logits"])
    out: Arrays = {"entropy": _entropy(logits)}
    if "mask" in x:
        mask = jnp.asarray(x["mask"])

        def mean(z: jax.Array) -> jax.Array:
            return aggregate(_entropy(z), mask, mode="token-mean")

        out["loss"], out["grad_logits"] = jax.value_and_grad(mean)(logits)
    return out


def _entropy(logits: jax.Array) -> jax.Array:
    """As the step computes it; hidden states are the logits of a vocabulary of unit vectors.

    The largest logit is 0: the step's formula loses 2e-6 to cancellation at logits of 40, and the
    entropy does not depend on a shift.
    """
    labels = jnp.zeros(logits.shape[:-1], jnp.int32)
    logits = logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    return label_logprobs(logits, jnp.eye(logits.shape[-1]), labels, entropy=True)[1]


def token_logps(x: Arrays, p: Params) -> Arrays:
    logits, targets = jnp.asarray(x["logits"]), jnp.asarray(x["targets"])

    def total(z: jax.Array) -> jax.Array:
        return jnp.sum(logprobs_from_logits(z, targets) * x["mask"])

    return {
        "logps": logprobs_from_logits(logits, targets),
        "grad_logits_of_masked_sum": jax.grad(total)(logits),
    }


def overlong(x: Arrays, p: Params) -> Arrays:
    penalty = soft_overlong(x["lengths"], p["max_len"], p["buffer"], p["factor"])
    return {"rewards": x["rewards"] + penalty}
