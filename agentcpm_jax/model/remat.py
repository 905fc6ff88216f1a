"""Which activations of a layer are kept for the backward pass; the rest is recomputed.

Every policy has a name. Elements of `cfg.dtype` kept per token and layer (D width, N query and K
key/value heads of size H, F ffw):

    full        D                       only the layer's input
    attention   D + N H                 also attention's output: its kernel runs once
    matmuls     D + (2 N + 2 K) H + 2 F + D   also the products with weights
    none        everything the backward pass reads
    offload     0 on the device; D in host memory
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

#: Names that `qwen3` gives to the activations that a policy may keep.
RESIDUAL, ATTENTION_OUT = "residual", "attention_out"

_policies = jax.checkpoint_policies
#: By the names of `config.REMATS`.
POLICIES: dict[str, Any] = {
    "none": None,
    "full": _policies.nothing_saveable,
    "attention": _policies.save_only_these_names(ATTENTION_OUT),
    "matmuls": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable,
        _policies.save_only_these_names(ATTENTION_OUT),
    ),
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[RESIDUAL],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def rematerialise(body: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The body of a layer scan under the policy `name`."""
    if name == "none":
        return body
    # Inside a scan nothing can be merged with the forward pass anyway.
    return jax.checkpoint(body, policy=POLICIES[name], prevent_cse=False)


def named(x: jax.Array, name: str) -> jax.Array:
    """`x` under a name by which a policy can select it."""
    return checkpoint_name(x, name)
