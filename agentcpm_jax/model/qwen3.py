"""Qwen3 as functions of a parameter dict: tokens in, logits out.

Layers are stacked on axis 0 and scanned, so that compile time does not grow with depth.
Einsum letters: B batch, T time, N query heads, H head dim, D width, V vocab.
Architecture: arXiv 2505.09388 (pre-norm, grouped queries, qk-norm, rotary positions, SwiGLU).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from agentcpm_jax.model import layers
from agentcpm_jax.model.attention import Attention, reference
from agentcpm_jax.model.config import ModelConfig


def forward(
    params: Mapping[str, Any],
    cfg: ModelConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    *,
    attention: Attention | None = None,
) -> Float[Array, "B T V"]:
    """Next-token logits, float32.

    Args:
      params: the tree of `params.init`.
      cfg: its configuration.
      tokens: ids; any valid id at padding.
      positions: rotary positions, from 0 within each segment.
      segment_ids: 0 is padding; tokens of one row see only their own segment.
      attention: a function of (q, k, v, segment_ids); default `attention.reference`.
    """
    hidden = hidden_states(params, cfg, tokens, positions, segment_ids, attention=attention)
    return unembed(params, cfg, hidden)


def hidden_states(
    params: Mapping[str, Any],
    cfg: ModelConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    *,
    attention: Attention | None = None,
) -> Float[Array, "B T D"]:
    """What `unembed` reads: the residual stream after the final norm, in `cfg.dtype`."""
    attention = attention or reference
    rope = layers.rope_tables(positions, cfg)

    def body(x: jax.Array, layer: Mapping[str, Any]) -> tuple[jax.Array, None]:
        x, _ = block(layer, cfg, x, rope, lambda q, k, v: attention(q, k, v, segment_ids))
        return x, None

    if cfg.remat == "full":
        body = jax.checkpoint(body, prevent_cse=False)
    x, _ = jax.lax.scan(body, embed(params, cfg, tokens), params["layers"])
    return final_norm(params, cfg, x)


def unembed(
    params: Mapping[str, Any], cfg: ModelConfig, hidden: Float[Array, "*B D"]
) -> Float[Array, "*B V"]:
    """Float32 logits; with `cfg.lm_head_fp32` from float32 operands at full precision."""
    with jax.named_scope("unembed"):
        tied = cfg.tied_embeddings
        matrix = params["embed"] if tied else params["lm_head"]
        dtype = jnp.float32 if cfg.lm_head_fp32 else jnp.dtype(cfg.dtype)
        return jnp.einsum(
            "...D,VD->...V" if tied else "...D,DV->...V",
            hidden.astype(dtype),
            matrix.astype(dtype),
            precision=jax.lax.Precision.HIGHEST if cfg.lm_head_fp32 else None,
            preferred_element_type=jnp.float32,
        )


def embed(
    params: Mapping[str, Any], cfg: ModelConfig, tokens: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Rows of the embedding in `cfg.dtype`."""
    with jax.named_scope("embed"):
        return params["embed"][tokens].astype(cfg.dtype)


def block(
    layer: Mapping[str, Any],
    cfg: ModelConfig,
    x: Float[Array, "B T D"],
    rope: layers.Rope,
    attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
) -> tuple[Float[Array, "B T D"], tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]]:
    """One layer (parameters without L) around `attend(q, k, v)`; also its new keys and values."""
    with jax.named_scope("attention"):
        h = layers.rms_norm(x, layer["attn_norm"], cfg.norm_eps)
        q, k, v = layers.qkv(layer["attn"], cfg, h, rope)
        out = attend(q, k, v)
        x = x + jnp.einsum("BTNH,NHD->BTD", out, layer["attn"]["o"].astype(x.dtype))
    with jax.named_scope("mlp"):
        h = layers.rms_norm(x, layer["mlp_norm"], cfg.norm_eps)
        return x + layers.swiglu(layer["mlp"], h), (k, v)


def final_norm(
    params: Mapping[str, Any], cfg: ModelConfig, x: Float[Array, "*B D"]
) -> Float[Array, "*B D"]:
    """The norm before the output matrix."""
    with jax.named_scope("final_norm"):
        return layers.rms_norm(x, params["final_norm"], cfg.norm_eps)
