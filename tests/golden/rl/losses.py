"""The reference losses in our words: inputs and parameters of a case -> our function's outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agentcpm_jax.train.losses.config import Correction, LossConfig, resolve
from agentcpm_jax.train.losses.correction import correct
from agentcpm_jax.train.losses.objectives import OBJECTIVES, Tokens
from agentcpm_jax.train.losses.policy import Counts, filled_in, policy_loss

Arrays = dict[str, Any]
Params = dict[str, Any]
ROWS, SLOTS = 8, 16  # cases are padded to multiples: few compilations, and padding is proved inert


def pad(x: np.ndarray) -> jax.Array:
    full = [-(-x.shape[0] // ROWS) * ROWS, -(-x.shape[1] // SLOTS) * SLOTS]
    return jnp.asarray(np.pad(x, [(0, n - k) for n, k in zip(full, x.shape, strict=True)]))


def loss(
    config: Callable[[Params], LossConfig],
    behavior: str = "old",
    reference: str = "ref",
    all_rows: Callable[[Params], bool] = lambda p: False,
) -> Callable[[Arrays, Params], Arrays]:
    """policy_loss and its gradient; `behavior` names the array in the sampler's place."""

    def fn(raw: Arrays, params: Params) -> Arrays:
        cfg = config(params)
        rows, slots = raw["mask"].shape
        x = {k: pad(v) for k, v in raw.items()}
        mu = x[behavior]
        age = (params["now"] - x["step"]).astype(jnp.float32) if "step" in x else None
        counts = Counts(x["mask"].sum(), float(rows)) if all_rows(params) else None
        tokens = Tokens(
            x["cur"],
            mu,
            x["adv"],
            x["mask"],
            age=age,
            proximal=x.get("old"),
            reference=x.get(reference),
        )

        def one(cur: jax.Array) -> Any:
            return policy_loss(tokens._replace(logprobs=cur), cfg, counts)

        (value, metrics), grad = jax.value_and_grad(one, has_aux=True)(x["cur"])
        assert all(np.isfinite(v) for v in metrics.values()), metrics
        tokens = filled_in(tokens, resolve(cfg))
        each = OBJECTIVES[resolve(cfg).objective](tokens, resolve(cfg)).per_token
        weights = x["mask"]
        for c in resolve(cfg).corrections:
            done = correct(tokens.proximal - tokens.behavior, x["mask"], None, c.rule)
            weights = weights * done.weight
        return {
            "loss": value,
            "grad": grad[:rows, :slots],
            "token_loss": jnp.where(x["mask"] > 0, each, 0.0)[:rows, :slots],
            "weights": weights[:rows, :slots],
            "behave_weight": weights[:rows, :slots],
        }

    return fn


def tunix_rows(fn: Callable[[Arrays, Params], Arrays]) -> Callable[[Arrays, Params], Arrays]:
    """Tunix takes one advantage per row; the recorded runs read it at slot 0, where a masked NaN
    had been replaced by 0."""

    def wrapped(x: Arrays, params: Params) -> Arrays:
        per_row = np.nan_to_num(x["adv"][:, :1])
        return fn(x | {"adv": np.broadcast_to(per_row, x["adv"].shape)}, params)

    return wrapped


def verl(name: str, **more: Any) -> Callable[[Params], LossConfig]:
    def config(p: Params) -> LossConfig:
        options: dict[str, Any] = {
            "eps_low": p["clip_ratio_low"],
            "eps_high": p["clip_ratio_high"],
            "aggregation": p["agg"],
            "norm": float(p.get("scale", 0.0)),
        }
        if name == "ppo":
            options["dual_clip"] = p["clip_ratio_c"]
        if name == "gspo":
            options["log_ratio_clamp"] = 0.0
        if name.startswith("dppo"):
            options["ratio_cap"] = p["clip_ratio_c"]
        if "tis_cap" in p:
            options["proximal"] = "recompute"
            options["corrections"] = (Correction("token_tis", high=p["tis_cap"]),)
        return LossConfig(name, **options | more)

    return config


def verl_bypass(p: Params) -> LossConfig:
    assert (p["loss_type"], p["tis"], p["rs"]) == ("reinforce", "token", "seq_mean_k3")
    rules = (
        Correction("token_tis", high=p["tis_cap"]),
        Correction("mean_k3", 0.0, p["rs_threshold"]),
    )
    return LossConfig("reinforce", corrections=rules, aggregation=p["agg"], denominator="kept")


def areal(p: Params) -> LossConfig:
    options: dict[str, Any] = {
        "eps_low": p["eps_clip"],
        "eps_high": p["eps_clip_higher"],
        "dual_clip": p.get("c_clip") or 0.0,
        "aggregation": "token-mean",
        "log_ratio_clamp": 0.0,
    }
    if p["level"] == "sequence":
        return LossConfig("gspo", **options)
    if "rejection" not in p:
        return LossConfig("ppo", **options)
    return LossConfig("decoupled_ppo", corrections=areal_rejection(p["rejection"]), **options)


def areal_rejection(r: Params) -> tuple[Correction, ...]:
    low = 0.0 if r["lower"] is None else r["lower"]
    if r["metric"] == "ratio":
        names = {
            ("token", "clamp"): "token_tis",
            ("token", "mask"): "icepop",
            ("sequence", "clamp"): "geometric_tis",
            ("sequence", "mask"): "geometric_icepop",
        }
        return (Correction(names[r["level"], r["action"]], low, r["upper"]),)
    level = "token" if r["level"] == "token" else r["agg"]
    metric = {"kl_k2": "k2", "kl_k3": "k3_back"}[r["metric"]]
    return (Correction("token_tis", 0.0, 0.0), Correction(f"{level}_{metric}", low, r["upper"]))


def skyrl(name: str, **more: Any) -> Callable[[Params], LossConfig]:
    def config(p: Params) -> LossConfig:
        by_token = p["reduction"] == "token_mean"
        options: dict[str, Any] = {
            "eps_low": p["lo"],
            "eps_high": p["hi"],
            "aggregation": "token-mean" if by_token else "seq-mean-token-mean",
        }
        if name == "ppo":
            options["dual_clip"] = p.get("c", 0.0)
        if name == "gspo":
            options["log_ratio_clamp"] = 0.0
        if "opc" in p:
            high = p["opc"].get("sequence_tis_ratio_clip_high", 2.0)
            options["proximal"] = "recompute"
            options["corrections"] = (Correction("sequence_tis", high=high),)
        return LossConfig(name, **options | more)

    return config


def skyrl_rollout_is(p: Params) -> LossConfig:
    rules = (Correction("token_mask", 1 - p["lo"], 1 + p["hi"]),)
    return LossConfig("cispo", eps_high=p["hi"], corrections=rules)


def by_mean_of_rows(p: Params) -> bool:
    return p["reduction"] == "sequence_mean"


def tunix(p: Params) -> LossConfig:
    name = {"grpo": "ppo", "gspo-token": "gspo"}[p["algo"]]
    cap = p["tis_cap"]
    return LossConfig(
        name,
        eps_low=p["lo"],
        eps_high=p["hi"],
        dual_clip=p["c"] or 0.0,
        proximal="recompute" if cap else "bypass",
        corrections=(Correction("token_tis", high=cap),) if cap else (),
        kl_coef=p["beta"],
        kl="k3",
        kl_clamp=0.0,
        aggregation=p["agg"].replace("sequence-", "seq-"),
    )


def slime(name: str) -> Callable[[Params], LossConfig]:
    return lambda p: LossConfig(
        name,
        eps_low=p["lo"],
        eps_high=p["hi"],
        dual_clip=p["c"] or 0.0,
        aggregation=p["agg"],
        log_ratio_clamp=0.0,
    )


def skyrl_jax(name: str, **more: Any) -> Callable[[Params], LossConfig]:
    return lambda p: LossConfig(
        name,
        eps_low=1 - p["ratio_lo"],
        eps_high=p["ratio_hi"] - 1,
        aggregation=p["agg"],
        log_ratio_clamp=0.0,
        **more,
    )


def prime(p: Params) -> LossConfig:
    assert p["adv_tau"] == 1.0
    return LossConfig(
        "dppo_tv",
        objective="importance",
        eps_low=p["dppo_mask_low"],
        eps_high=p["dppo_mask_high"],
        kl_coef=2 * p["kl_tau"],  # k2 is half the square
        kl="k2",
        aggregation="token-mean",
        log_ratio_clamp=0.0,
    )


def agentcpm(p: Params) -> LossConfig:
    """Its length-normalised cases count what the region leaves."""
    summed = p["skip_length_normalization"]
    return LossConfig(
        {"minirl": "minirl", "grpo": "ppo"}[p["loss"]],
        region="ratio",
        eps_low=p["eps"],
        eps_high=p["eps"] + p["eps_higher"],
        widen=1.0 if p["strict"] else p["cap"],
        decay=0.0 if p["strict"] else p["decay"] or 0.0,
        dual_clip=0.0,
        aggregation="seq-mean-token-sum" if summed else "seq-mean-token-mean",
        denominator="all" if summed else "kept",
        log_ratio_clamp=0.0,
    )
