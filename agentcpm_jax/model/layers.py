"""The pieces of a Qwen3 block. Einsum letters: B batch, T time, N query heads, K key/value heads,
H head dim, D width, F ffw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from agentcpm_jax.model.config import ModelConfig

Rope = tuple[jax.Array, jax.Array]


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
