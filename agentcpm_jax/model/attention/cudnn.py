"""cuDNN's flash attention, for NVIDIA GPUs from Ampere on, in bfloat16.

Its causal mask alone is correct for rows of one segment followed by padding, since no token sees
later ones. JAX's public interface has no segments, and a dense mask would be T x T: a batch with a
packed row, and a row that is split over context devices, take the blockwise kernel instead. The
choice is made at run time; both kernels are part of one compiled program.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from agentcpm_jax.model.attention.blockwise import blockwise
from agentcpm_jax.model.attention.reference import Kernel, by_index

BLOCK = 1024  # of the blockwise kernel here: GPUs need fewer, larger products than CPUs


def cudnn_kernel() -> Kernel:
    """The kernel; rows of one segment go to cuDNN, all others blockwise."""
    return by_index(attend)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    q_segments: Int[Array, "B T"],
    kv_segments: Int[Array, "B S"],
    q_index: Int[Array, " T"],
) -> Float[Array, "B T N H"]:
    """Equal to `reference.reference_kernel` except at padding, whose output is not used."""

    def packed() -> jax.Array:
        return blockwise(q, k, v, q_segments, kv_segments, q_index, block=BLOCK)

    def single() -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    if q.shape[1] != k.shape[1]:
        return packed()
    return jax.lax.cond(one_segment(q_segments), single, packed)


def one_segment(segment_ids: Int[Array, "B T"]) -> Bool[Array, ""]:
    """Whether every row is one segment, followed by padding or not."""
    same = segment_ids == segment_ids[:, :1]
    padding = segment_ids == 0
    begun = jnp.cumsum(padding, axis=1) > 0
    return jnp.all(jnp.where(begun, padding, same))
