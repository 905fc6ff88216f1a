"""How much memory a train step holds on one device: an estimate, without compiling it.

    arguments + saved + gradients + weights + max(layer, head)
arguments  parameters, moments and batch, exactly, from their shardings
saved      activations that the remat policy keeps of the forward pass
gradients  of all trained parameters; with micro-batches the running sum and those of one
weights    copies of the layers' matrices in the dtype (or the layout) of their products
layer      one layer while it is differentiated: its gathered matrices, activations, their gradients
head       the output matrix and its gradient, the embedding's gradient, the logits of a chunk
Activations are counted in floats per token: D width, F ffw, N query, K key heads of size H. Those
of a layer beyond the remat policy (`LAYER_WIDTHS`, `LAYER_INNER`) are fitted to the compiler's own
figures (`experiments/aot.py`), which check the total; the rest is read off the compiled programs.
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
#: Floats per token of the layer being differentiated: 37 D + 6 ((N + 2 K) H + F).
LAYER_WIDTHS, LAYER_INNER = 37, 6


class MemoryEstimate(NamedTuple):
    """Bytes on one device, by the parts above."""

    arguments: float
    saved: float
    gradients: float
    weights: float
    layer: float
    head: float

    @property
    def parts(self) -> dict[str, float]:
        """Bytes by the name that users are shown."""
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
        """The peak: the larger of the memory in the layers and that at the output matrix."""
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
    """Memory of a step over rows x row_length tokens, `micro_rows` rows at a time (0: all).

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
    """Bytes of the copies of the layers' matrices.

    All are cast before the scan to a smaller dtype; with equal dtypes only those of q, k and v are
    copied, to heads first.
    """
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    if BYTES[model.dtype] < BYTES[model.param_dtype]:
        heads += model.num_heads * model.head_dim + 3 * model.ffw
    elif model.dtype != model.param_dtype:  # cast one layer at a time: all at once would take more
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
    """Bytes held at the output matrix.

    On a mesh the embedding is gathered twice (rows, output matrix), and its two float32 gradients
    are held before and after their sum over the devices.
    """
    vocab, several = model.vocab_size / mesh.shape["tensor"], mesh.size > 1
    chunk = min(model.logits_chunk or chunk_tokens(model.vocab_size), tokens)
    e = 4 if model.lm_head_fp32 else BYTES[model.dtype]
    gathered = e if several or e != BYTES[model.param_dtype] else 0
    if not model.lora_rank:
        gathered += e + 16 if several else 8
    return float(vocab * (model.width * gathered + chunk * (4 + e)))
