"""How much memory a train step holds on one device: an estimate, without compiling it.

    arguments + saved + gradients + weights + max(layer, head)
arguments  parameters, moments and batch, exactly, from their shardings
saved      what the remat policy keeps of the forward pass
gradients  of all trained parameters; with micro-batches their sum and those of one
weights    the layers' matrices in the dtype (or the layout) of their products
layer      one layer while it is differentiated: its gathered matrices, activations, their gradients
head       the output matrix and its gradient, the embedding's gradient, the logits of a chunk
Counted in numbers per token of a device: D width, F ffw, N query and K key heads of size H. What
is kept of a layer beyond the policy (`LAYER_WIDTHS`, `LAYER_INNER`) is fitted to the compiler's own
figures (`experiments/aot.py`), which the whole is held against; the rest is read off its programs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import optax
from jax.sharding import AbstractMesh, Mesh

from agentcpm_jax.model.config import ModelConfig
from agentcpm_jax.model.logprobs import chunk_tokens
from agentcpm_jax.sharding import TOKEN_AXES, WIDTH_AXES, axis_size
from agentcpm_jax.train.placement import (
    abstract_base,
    abstract_inputs,
    sharding_report,
    step_shardings,
)

BYTES = {"float32": 4, "bfloat16": 2}
#: Numbers of a token in the layer that is differentiated: so many times D, and (N + 2 K) H + F.
LAYER_WIDTHS, LAYER_INNER = 37, 6


class MemoryEstimate(NamedTuple):
    """Bytes of one device."""

    arguments: float
    saved: float
    gradients: float
    weights: float
    layer: float
    head: float

    @property
    def parts(self) -> dict[str, float]:
        """By what a reader calls them."""
        return {
            "state and batch": self.arguments,
            "saved activations": self.saved,
            "gradients": self.gradients,
            "weights as they are multiplied": self.weights,
            "a layer being differentiated": self.layer,
            "logits and the output matrix": self.head,
        }

    @property
    def total(self) -> float:
        """What is held at the larger of two moments: in the layers, and at the output matrix."""
        always = self.arguments + self.saved + self.gradients + self.weights
        return always + max(self.layer, self.head)


def estimate(
    model: ModelConfig,
    tx: optax.GradientTransformation,
    mesh: Mesh | AbstractMesh,
    rows: int,
    row_length: int,
    micro_rows: int = 0,
) -> MemoryEstimate:
    """Memory of a step over rows x row_length tokens, `micro_rows` of them at a time (0: all).

    Raises `UserError` when the mesh does not divide the model or the rows.
    """
    shardings = step_shardings(mesh, model, tx, micro_rows or rows)
    state, batch = abstract_inputs(model, tx, rows, row_length, shardings)
    frozen = [abstract_base(model, shardings)] if model.lora_rank else []
    trained = _bytes(state.params)
    tokens = (micro_rows or rows) * row_length / axis_size(mesh, TOKEN_AXES)
    copies = 2 if micro_rows and micro_rows < rows else 1
    return MemoryEstimate(
        _bytes((state, batch, *frozen)),
        tokens * _saved(model, mesh.shape["tensor"]),
        trained * copies,
        _weights(model, axis_size(mesh, (*WIDTH_AXES, "tensor"))),
        _layer(model, tokens, mesh),
        _head(model, tokens, mesh),
    )


def _bytes(arrays: Any) -> float:
    return float(sum(row.device_bytes for row in sharding_report(arrays)))


def _saved(model: ModelConfig, tensor: int) -> float:
    """Bytes that the remat policy keeps of one token, over all layers."""
    e, d = BYTES[model.dtype], model.width
    heads = model.num_heads * model.head_dim / tensor
    keys = 2 * model.num_kv_heads * model.head_dim / tensor
    ffw = model.ffw / tensor
    kept = {
        "full": d,
        "offload": 0,
        "attention": d + heads,
        "matmuls": 2 * d + 2 * heads + keys + 2 * ffw,
        "none": 8 * d + 4 * heads + 2 * keys + 4 * ffw,
    }[model.remat]
    return float(e * kept * model.num_layers)


def _weights(model: ModelConfig, devices: int) -> float:
    """The scan's matrices are cast before it; in their own dtype those of q, k and v are laid out
    anew, heads first."""
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    if BYTES[model.dtype] < BYTES[model.param_dtype]:
        heads += model.num_heads * model.head_dim + 3 * model.ffw
    elif model.dtype != model.param_dtype:  # cast one layer at a time: whole, it would be larger
        return 0.0
    return float(BYTES[model.dtype] * model.num_layers * model.width * heads / devices)


def _layer(model: ModelConfig, tokens: float, mesh: Mesh | AbstractMesh) -> float:
    e, d, tensor = BYTES[model.dtype], model.width, mesh.shape["tensor"]
    keys = 2 * model.num_kv_heads * model.head_dim / tensor
    inner = (model.num_heads * model.head_dim + model.ffw) / tensor + keys
    matrices = d * (inner + (model.num_heads * model.head_dim + 2 * model.ffw) / tensor)
    context = mesh.shape["context"]
    gathered = 4 * keys * tokens * context if context > 1 else 0
    own = tokens * (LAYER_WIDTHS * d + LAYER_INNER * inner)
    return float(e * (matrices + own + gathered))


def _head(model: ModelConfig, tokens: float, mesh: Mesh | AbstractMesh) -> float:
    """On a mesh the embedding is gathered twice (rows, output matrix), and both gradients of it,
    in float32, are there before and after they are summed over the devices."""
    vocab, several = model.vocab_size / mesh.shape["tensor"], mesh.size > 1
    chunk = min(model.logits_chunk or chunk_tokens(model.vocab_size), tokens)
    e = 4 if model.lm_head_fp32 else BYTES[model.dtype]
    gathered = e if several or e != BYTES[model.param_dtype] else 0
    if not model.lora_rank:
        gathered += e + 16 if several else 8
    return float(vocab * (model.width * gathered + chunk * (4 + e)))
