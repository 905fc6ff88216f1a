"""Qwen3 as functions of a parameter dict: tokens in, logits out.

Layers are stacked on axis 0 and scanned, so that compile time does not grow with depth.
Einsum letters: B batch, T time, N query heads, K key/value heads, H head dim, D width, F ffw,
V vocab.
Architecture: arXiv 2505.09388 (pre-norm, grouped queries, qk-norm, rotary positions, SwiGLU).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from agentcpm_jax.model.attention.choice import make_attention
from agentcpm_jax.model.attention.context import reorder
from agentcpm_jax.model.attention.reference import Attention
from agentcpm_jax.model.config import ModelConfig
from agentcpm_jax.model.gather import embedding_rows, gather, gather_layer
from agentcpm_jax.model.lora import adapted
from agentcpm_jax.model.remat import ATTENTION_OUT, RESIDUAL, named, rematerialise
from agentcpm_jax.sharding import constrain

Rope = tuple[jax.Array, jax.Array]


def forward(
    params: Mapping[str, Any],
    cfg: ModelConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    *,
    attention: Attention | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "B T V"]:
    """Next-token logits, float32.

    Args:
      params: the tree of `params.init`; adapters in its entry "adapters" are added (`lora.py`).
      cfg: its configuration.
      tokens: ids; any valid id at padding.
      positions: rotary positions, from 0 within each segment.
      segment_ids: 0 is padding; tokens of one row see only their own segment.
      attention: a function of (q, k, v, segment_ids); default that of `cfg.attention` on `mesh`.
      mesh: of the parameters and the batch; None: one device.
    """
    inputs = [reorder(x, mesh) for x in (tokens, positions, segment_ids)]
    hidden = hidden_states(params, cfg, *inputs, attention=attention, mesh=mesh)
    return unembed(params, cfg, reorder(hidden, mesh, back=True))


def hidden_states(
    params: Mapping[str, Any],
    cfg: ModelConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    *,
    attention: Attention | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "B T D"]:
    """The input of `unembed`: the residual stream after the final norm, in `cfg.dtype`.

    Arguments as in `forward`, but time is in the order of the attention: on a mesh with a context
    axis inputs and output are in `attention.context.time_order`.
    """
    attention = attention or make_attention(cfg, mesh)
    rope = rope_tables(positions, cfg)

    def body(x: jax.Array, xs: Any) -> tuple[jax.Array, None]:
        layer, adapters = xs
        layer = gather_layer(layer, cfg, mesh)
        if adapters is not None:
            layer = adapted(layer, adapters, cfg)
        x = named(constrain(x, mesh, "batch", "time", None), RESIDUAL)
        x, _ = block(layer, cfg, x, rope, lambda q, k, v: attention(q, k, v, segment_ids), mesh)
        return constrain(x, mesh, "batch", "time", None), None

    stacked = (params["layers"], params.get("adapters"))
    x = embed(params, cfg, tokens, mesh)
    x, _ = jax.lax.scan(rematerialise(body, cfg.remat), x, stacked)
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


def output_matrix(
    params: Mapping[str, Any], cfg: ModelConfig, mesh: Mesh | None = None
) -> Float[Array, "V D"]:
    """The matrix of `unembed`, in the dtype of its product, gathered over the token axes."""
    dtype = "float32" if cfg.lm_head_fp32 else cfg.dtype
    if cfg.tied_embeddings:
        return gather(params["embed"], dtype, mesh, ("vocab", "width"))
    return gather(params["lm_head"], dtype, mesh, ("width", "vocab")).T


def embed(
    params: Mapping[str, Any],
    cfg: ModelConfig,
    tokens: Int[Array, "B T"],
    mesh: Mesh | None = None,
) -> Float[Array, "B T D"]:
    """The embeddings of `tokens`, in `cfg.dtype`."""
    with jax.named_scope("embed"):
        if mesh is None or mesh.size == 1:
            return params["embed"][tokens].astype(cfg.dtype)
        return embedding_rows(params["embed"], tokens, cfg.dtype, mesh)


def block(
    layer: Mapping[str, Any],
    cfg: ModelConfig,
    x: Float[Array, "B T D"],
    rope: Rope,
    attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "B T D"], tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]]:
    """One layer (parameters without L) with `attend(q, k, v)`; also returns its keys and values."""
    with jax.named_scope("attention"):
        h = rms_norm(x, layer["attn_norm"], cfg.norm_eps)
        q, k, v = qkv(layer["attn"], cfg, h, rope)
        q = constrain(q, mesh, "batch", "time", "heads", None)
        k, v = (constrain(y, mesh, "batch", "time", "kv_heads", None) for y in (k, v))
        out = named(attend(q, k, v), ATTENTION_OUT)
        # Not an einsum: it contracts H before N, for which XLA transposes the matrix every time.
        x = x + jnp.tensordot(out, layer["attn"]["o"].astype(x.dtype), 2)
    with jax.named_scope("mlp"):
        h = rms_norm(x, layer["mlp_norm"], cfg.norm_eps)
        return x + swiglu(layer["mlp"], h), (k, v)


def final_norm(
    params: Mapping[str, Any], cfg: ModelConfig, x: Float[Array, "*B D"]
) -> Float[Array, "*B D"]:
    """The norm before the output matrix."""
    with jax.named_scope("final_norm"):
        return rms_norm(x, params["final_norm"], cfg.norm_eps)


def rms_norm(
    x: Float[Array, "*B D"], scale: Float[Array, " D"], eps: float
) -> Float[Array, "*B D"]:
    """x / rms(x) * scale over the last axis, in float32, back in x's dtype (arXiv 1910.07467)."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * inverse * scale.astype(jnp.float32)).astype(x.dtype)


def rope_tables(positions: Int[Array, "B T"], cfg: ModelConfig) -> Rope:
    """cos and sin of position * theta^(-2i/H), each float32 [B, T, H/2] (arXiv 2104.09864)."""
    exponents = jnp.arange(0, cfg.head_dim, 2, dtype=jnp.float32) / cfg.head_dim
    angles = positions[..., None].astype(jnp.float32) / cfg.rope_theta**exponents
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: Float[Array, "B T N H"], rope: Rope) -> Float[Array, "B T N H"]:
    """Rotates the pairs (x_i, x_{i+H/2}), the pairing of the published checkpoints."""
    cos, sin = (table[:, :, None, :] for table in rope)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def qkv(
    attn: Mapping[str, Any], cfg: ModelConfig, x: Float[Array, "B T D"], rope: Rope
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Projections; queries and keys are normalised per head, then rotated."""
    q = jnp.einsum("BTD,DNH->BTNH", x, attn["q"].astype(x.dtype))
    k = jnp.einsum("BTD,DKH->BTKH", x, attn["k"].astype(x.dtype))
    v = jnp.einsum("BTD,DKH->BTKH", x, attn["v"].astype(x.dtype))
    q = apply_rope(rms_norm(q, attn["q_norm"], cfg.norm_eps), rope)
    k = apply_rope(rms_norm(k, attn["k_norm"], cfg.norm_eps), rope)
    return q, k, v


def swiglu(mlp: Mapping[str, Any], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """(silu(x gate) * x up) down (arXiv 2002.05202)."""
    gate = jnp.einsum("BTD,DF->BTF", x, mlp["gate"].astype(x.dtype))
    up = jnp.einsum("BTD,DF->BTF", x, mlp["up"].astype(x.dtype))
    return jnp.einsum("BTF,FD->BTD", jax.nn.silu(gate) * up, mlp["down"].astype(x.dtype))
