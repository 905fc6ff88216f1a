"""Which attention a configuration means on a platform; one line says why where it had to choose."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from agentcpm_jax.model import attention_context
from agentcpm_jax.model.attention import Attention, Kernel, by_index, reference_kernel
from agentcpm_jax.model.attention_blockwise import blockwise
from agentcpm_jax.model.config import ATTENTIONS, ModelConfig
from agentcpm_jax.types import UserError

#: Where each kernel runs; the others run everywhere.
PLATFORMS = {"splash": "tpu", "cudnn": "gpu"}


class Choice(NamedTuple):
    """The kernel's name, and why it is another than was asked for ('' when it is not)."""

    name: str
    why: str


def make_attention(cfg: ModelConfig, mesh: Mesh | None = None) -> Attention:
    """The attention of `cfg` on `mesh` (None: one device of the default platform).

    Raises:
      UserError: the kernel does not exist or does not run on this platform.
    """
    return attention_context.on_mesh(_kernel(choose(cfg, platform_of(mesh)).name), mesh)


def choose(cfg: ModelConfig, platform: str) -> Choice:
    """Resolves 'auto', and what the platform or the dtype cannot do."""
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
        return Choice(name, "")
    if platform == "tpu":
        if cfg.head_dim % 128 == 0:
            return Choice("splash", "")
        return Choice("blockwise", f"splash needs head_dim of 128 n, this model has {cfg.head_dim}")
    if platform == "gpu":
        if cfg.dtype == "bfloat16":
            return Choice("cudnn", "")
        return Choice(
            "blockwise", f"cuDNN's kernel computes in bfloat16, this model in {cfg.dtype}"
        )
    return Choice("blockwise", "")


def platform_of(mesh: Mesh | None) -> str:
    """cpu, gpu or tpu; that of a mesh may be only described, not there."""
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return "gpu" if platform in ("cuda", "rocm") else platform


@functools.cache
def _kernel(name: str) -> Kernel:
    if name == "splash":
        from agentcpm_jax.model.attention_splash import splash_kernel  # Pallas: a second to import

        return splash_kernel()
    if name == "cudnn":
        from agentcpm_jax.model.attention_cudnn import cudnn_kernel

        return cudnn_kernel()
    return by_index(blockwise if name == "blockwise" else reference_kernel)
