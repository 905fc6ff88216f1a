"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): W' = W + (alpha / r) A B, A and B trained.

Adapters are a separate tree, stacked like the layers: {"attn": {"q": {"a", "b"}}}. The layer scan
adds `params["adapters"]`, if present, to the frozen matrices one layer at a time, so that neither a
second copy of all weights nor their whole gradient ever exists.

Deviations:
1. A B is added to the matrix instead of being applied as a separate product: the same function, but
   the gradient of one layer's matrix is formed while that layer is differentiated.
2. A starts normal with the variance of PEFT's uniform, 1 / (3 inputs); B starts at 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from agentcpm_jax import tree
from agentcpm_jax.model.config import ModelConfig
from agentcpm_jax.model.params import Params, ParamSpec, draw, param_specs


def adapter_specs(cfg: ModelConfig) -> dict[str, Any]:
    """The nested dict of ParamSpec of the adapters: every matrix of a layer has a pair."""
    flat: dict[str, Any] = {}
    for path, spec in tree.flatten(param_specs(cfg)["layers"]).items():
        if not spec.hf_inputs:
            continue
        cut = 1 + spec.hf_inputs
        fan_in = math.prod(spec.shape[1:cut])
        name = spec.hf_key.removesuffix(".weight")
        down = (*spec.shape[:cut], cfg.lora_rank), (*spec.axes[:cut], "rank")
        up = (spec.shape[0], cfg.lora_rank, *spec.shape[cut:])
        up_axes = (spec.axes[0], "rank", *spec.axes[cut:])
        flat[f"{path}/a"] = ParamSpec(
            *down, (3 * fan_in) ** -0.5, f"{name}.lora_A.weight", spec.hf_inputs
        )
        flat[f"{path}/b"] = ParamSpec(up, up_axes, 0.0, f"{name}.lora_B.weight", 1)
    return tree.unflatten(flat)


def init_adapters(rng: jax.Array, cfg: ModelConfig) -> Params:
    """Fresh adapters in float32; with them the model still equals the base model."""
    return draw(rng, adapter_specs(cfg), "float32")


def adapted(layer: Mapping[str, Any], adapters: Mapping[str, Any], cfg: ModelConfig) -> Params:
    """One layer (no L axis) with its adapters added, in the dtype of its matrices."""
    flat, pairs = tree.flatten(layer), tree.flatten(adapters)
    for path in {p.rpartition("/")[0] for p in pairs}:
        flat[path] = _added(flat[path], pairs[f"{path}/a"], pairs[f"{path}/b"], cfg)
    return tree.unflatten(flat)


def merge(params: Mapping[str, Any], adapters: Mapping[str, Any], cfg: ModelConfig) -> Params:
    """Parameters of a plain model that computes the same as the adapted one."""
    one = jax.vmap(lambda layer, pair: adapted(layer, pair, cfg))
    return {**params, "layers": one(params["layers"], adapters)}


def _added(w: jax.Array, a: jax.Array, b: jax.Array, cfg: ModelConfig) -> jax.Array:
    product = jnp.tensordot(a, b, axes=1) * (cfg.lora_alpha / cfg.lora_rank)
    return (w.astype(jnp.float32) + product).astype(w.dtype)
