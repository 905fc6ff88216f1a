"""Splash attention, the Pallas kernel for TPUs: grouped queries, segments, block-sparse causality.

The kernel visits only blocks of scores that the mask does not hide. To find them the stock causal
mask evaluates every element of every block (T^2 / 2 of them, minutes at 128k tokens); here its
corners show whether a block is wholly visible or wholly hidden, so that only the T / b blocks on
the diagonal are evaluated: O(T b) elements.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from agentcpm_jax.model.attention.reference import Kernel
from agentcpm_jax.model.remat import ATTENTION_OUT
from agentcpm_jax.types import UserError

LANES = 128  # of a TPU's vector registers: the smallest block


def splash_kernel(*, block: int = 512, interpret: bool = False) -> Kernel:
    """The kernel with blocks of at most `block` queries and keys.

    Args:
      interpret: run the kernel's own program on any platform (slowly; for tests).
    Raises (when it is prepared):
      UserError: the row is not a multiple of 128 tokens on every device.
    """

    def prepare(order: np.ndarray, shards: int, heads: int) -> tuple[Any, Any]:
        size = block_size(len(order), shards, block)
        mask = masks.MultiHeadMask([CausalOrder(order)] * heads)
        kernel = splash.make_splash_mha(
            mask,
            block_sizes=splash.BlockSizes(
                block_q=size,
                block_kv=size,
                block_kv_compute=min(size, 512),
                block_q_dkv=size,
                block_kv_dkv=size,
                block_kv_dkv_compute=min(size, 512),
                block_q_dq=size,
                block_kv_dq=size,
            ),
            head_shards=1,
            q_seq_shards=shards,
            residual_checkpoint_name=ATTENTION_OUT,
            interpret=interpret,
        )
        return kernel, _specs(kernel, shards)

    return Kernel(prepare, _attend)


def block_size(length: int, shards: int, largest: int) -> int:
    """The largest block size whose queries are contiguous in the row, also in zig-zag order."""
    run = length // (2 * shards) if shards > 1 else length
    size = largest
    while run % size and size > LANES:
        size //= 2
    if run % size:
        step = LANES * (2 * shards if shards > 1 else 1)
        raise UserError(
            f"rows of {length} tokens do not suit splash attention on {shards} context devices; "
            f"the nearest length that fits is {-(-length // step) * step}"
        )
    return size


class CausalOrder(masks.CausalMask):
    """A causal mask for queries at the positions `order`, consecutive within a block."""

    def __init__(self, order: np.ndarray):
        super().__init__((len(order), len(order)))
        self.q_sequence = np.asarray(order, np.int32)

    def __getitem__(self, idx: Any) -> np.ndarray:
        rows, columns = idx
        first, last = self.q_sequence[rows][[0, -1]]
        start, stop, _ = columns.indices(self.shape[1])
        if stop - 1 <= first:
            return np.ones((1, 1), np.bool_)
        if start > last:
            return np.zeros((1, 1), np.bool_)
        return super().__getitem__(idx)

    # Kernels with equal masks are shared: the parent's equality and hash compare the order.
    __hash__ = masks.CausalMask.__hash__


def _attend(
    kernel: Any, q: jax.Array, k: jax.Array, v: jax.Array, q_segments: Any, kv_segments: Any
) -> jax.Array:
    scaled = q * q.shape[-1] ** -0.5
    segments = splash.SegmentIds(q=q_segments, kv=kv_segments)
    heads_first = [jnp.swapaxes(x, 1, 2) for x in (scaled, k, v)]
    out = jax.vmap(kernel)(*heads_first, segment_ids=segments)
    return jnp.swapaxes(out, 1, 2).astype(q.dtype)


def _specs(kernel: Any, shards: int) -> Any:
    """Only time is split: the mask's arrays have one row for all heads."""
    mesh = AbstractMesh((shards,), ("context",))
    return kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, "context")))
