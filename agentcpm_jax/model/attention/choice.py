"""Chooses the attention kernel for a configuration and a platform, and gives the reason."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from agentcpm_jax.model.attention import context as attention_context
from agentcpm_jax.model.attention.blockwise import blockwise
from agentcpm_jax.model.attention.reference import Attention, Kernel, by_index, reference_kernel
from agentcpm_jax.model.config import ATTENTIONS, ModelConfig
from agentcpm_jax.types import UserError

#: Where each kernel runs; the others run everywhere.
PLATFORMS = {"splash": "tpu", "cudnn": "gpu"}

#: CUDA's compute capability of Ampere, the first with units for bfloat16.
BFLOAT16_FROM = 8.0


class AttentionChoice(NamedTuple):
    """The kernel's name, and why it is not the platform's fastest ('' when it is)."""

    name: str
    why: str


def make_attention(cfg: ModelConfig, mesh: Mesh | None = None) -> Attention:
    """The attention of `cfg` on `mesh` (None: one device of the default platform).

    Raises:
      UserError: the kernel does not exist or does not run on this platform.
    """
    return attention_context.on_mesh(_kernel(choose(cfg, platform_of(mesh)).name), mesh)


def choose(cfg: ModelConfig, platform: str) -> AttentionChoice:
    """Resolve `cfg.attention`, where 'auto' depends on platform, dtype and head size.

    Raises:
      UserError: the kernel does not exist or does not run on this platform.
    """
    name = cfg.attention
    if name not in ATTENTIONS:
        raise UserError(f"model.attention is {name!r}; use one of {', '.join(ATTENTIONS)}")
    if name != "auto":
        only = PLATFORMS.get(name, platform)
        if only != platform:
            raise UserError(
                f"model.attention is {name!r}, which runs on {only} only, and this is {platform}; "
                "use 'auto', 'blockwise' or 'reference'"
            )
        return AttentionChoice(name, "")
    if platform == "tpu":
        if cfg.head_dim % 128 == 0:
            return AttentionChoice("splash", "")
        return AttentionChoice(
            "blockwise", f"splash needs head_dim of 128 n, this model has {cfg.head_dim}"
        )
    if platform == "gpu":
        if cfg.dtype == "bfloat16":
            return AttentionChoice("cudnn", "")
        return AttentionChoice(
            "blockwise", f"cuDNN's kernel computes in bfloat16, this model in {cfg.dtype}"
        )
    return AttentionChoice("blockwise", "")


def fit_to(
    cfg: ModelConfig, platform: str, capability: float = 0.0
) -> tuple[ModelConfig, list[str]]:
    """`cfg` as a device can compute it, and a line for each change.

    Args:
      platform: cpu, gpu or tpu.
      capability: CUDA's compute capability of a gpu.
    Raises:
      UserError: the kernel does not run on this platform.
    """
    lines = []
    if platform == "gpu" and cfg.dtype == "bfloat16" and capability < BFLOAT16_FROM:
        cfg = dataclasses.replace(cfg, dtype="float32")
        lines.append(
            f"model.dtype: float32 instead of bfloat16, which a GPU of compute capability "
            f"{capability} has no units for (parameters are stored as before)"
        )
    choice = choose(cfg, platform)
    if choice.why:
        lines.append(f"model.attention: {choice.name}, since {choice.why}")
    return cfg, lines


def fit_to_device(cfg: ModelConfig, device: Any) -> tuple[ModelConfig, list[str]]:
    """`fit_to` for an attached `jax.Device`."""
    platform = _family(device.platform)
    return fit_to(cfg, platform, float(getattr(device, "compute_capability", 0) or 0))


def platform_of(mesh: Mesh | None) -> str:
    """cpu, gpu or tpu; the devices of a mesh need not be attached."""
    return _family(jax.default_backend() if mesh is None else mesh.devices.flat[0].platform)


def _family(platform: str) -> str:
    return "gpu" if platform in ("cuda", "rocm") else platform


@functools.cache
def _kernel(name: str) -> Kernel:
    if name == "splash":
        from agentcpm_jax.model.attention.splash import splash_kernel  # Pallas: a second to import

        return splash_kernel()
    if name == "cudnn":
        from agentcpm_jax.model.attention.cudnn import cudnn_kernel

        return cudnn_kernel()
    return by_index(blockwise if name == "blockwise" else reference_kernel)
