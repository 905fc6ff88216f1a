"""One description per parameter; shapes, initial values, shardings and file keys derive from it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from agentcpm_jax import tree
from agentcpm_jax.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """The description of one parameter.

    Attributes:
      shape: sizes; parameters of layers are stacked, L first.
      axes: the logical name of each axis; `sharding.py` maps names to the mesh.
      init: 'ones', or the standard deviation of a normal.
      hf_key: key in Hugging Face files; '{}' is the layer number.
      hf_inputs: number of input axes (after L), which are the inputs of the file's matrix
        [outputs, inputs]; the other axes are its outputs. 0: stored unchanged.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Literal["ones"] | float
    hf_key: str
    hf_inputs: int = 0


def param_specs(cfg: ModelConfig) -> dict[str, Any]:
    """The nested dict of ParamSpec that `init` fills with arrays.

    Matrices have standard deviation fan_in ** -0.5, divided by sqrt(2 L) where they write into the
    residual stream, so that its variance does not grow with depth.
    """
    d, n, k, h, f = cfg.width, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, cfg.ffw
    residual = (2 * cfg.num_layers) ** -0.5

    def layer(
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        init: Literal["ones"] | float,
        key: str,
        inputs: int = 0,
    ) -> ParamSpec:
        shape, axes = (cfg.num_layers, *shape), ("layers", *axes)
        return ParamSpec(shape, axes, init, f"model.layers.{{}}.{key}.weight", inputs)

    into, out_of = d**-0.5, residual * (n * h) ** -0.5
    head, kv_head, mlp = ("width", "heads", "head"), ("width", "kv_heads", "head"), ("width", "ffw")
    specs: dict[str, Any] = {
        "embed": ParamSpec(
            (cfg.vocab_size, d), ("vocab", "width"), 0.02, "model.embed_tokens.weight"
        ),
        "layers": {
            "attn_norm": layer((d,), ("width",), "ones", "input_layernorm"),
            "attn": {
                "q": layer((d, n, h), head, into, "self_attn.q_proj", 1),
                "k": layer((d, k, h), kv_head, into, "self_attn.k_proj", 1),
                "v": layer((d, k, h), kv_head, into, "self_attn.v_proj", 1),
                "o": layer((n, h, d), ("heads", "head", "width"), out_of, "self_attn.o_proj", 2),
                "q_norm": layer((h,), ("head",), "ones", "self_attn.q_norm"),
                "k_norm": layer((h,), ("head",), "ones", "self_attn.k_norm"),
            },
            "mlp_norm": layer((d,), ("width",), "ones", "post_attention_layernorm"),
            "mlp": {
                "gate": layer((d, f), mlp, into, "mlp.gate_proj", 1),
                "up": layer((d, f), mlp, into, "mlp.up_proj", 1),
                "down": layer((f, d), ("ffw", "width"), residual * f**-0.5, "mlp.down_proj", 1),
            },
        },
        "final_norm": ParamSpec((d,), ("width",), "ones", "model.norm.weight"),
    }
    if not cfg.tied_embeddings:
        specs["lm_head"] = ParamSpec(
            (d, cfg.vocab_size), ("width", "vocab"), into, "lm_head.weight", 1
        )
    return specs


def count(cfg: ModelConfig) -> int:
    """Number of parameters; a tied embedding counts once."""
    return sum(math.prod(spec.shape) for spec in tree.flatten(param_specs(cfg)).values())
