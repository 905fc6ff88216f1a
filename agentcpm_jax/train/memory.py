"""How much memory a train step holds on one device: an estimate, without compiling it.

    arguments + max(head, layers)
arguments  parameters, moments and batch, exactly, from their shardings
layers     saved activations, gradients, and what one layer holds while it is differentiated
head       saved activations, the output matrix with its gradient, and the logits of a chunk
Counted in bytes per token of a device: D width, F ffw, N query and K key heads of size H, e bytes
of an activation. The compiler's own figures (`experiments/aot.py`) are what it is held against.
"""

from __future__ import annotations

from typing import NamedTuple

import optax
from jax.sharding import AbstractMesh, Mesh

from agentcpm_jax.model.chunked_head import chunk_tokens
from agentcpm_jax.model.config import ModelConfig
from agentcpm_jax.sharding import TOKEN_AXES, axis_size
from agentcpm_jax.train.placement import abstract_inputs, sharding_report, step_shardings

BYTES = {"float32": 4, "bfloat16": 2}


class Memory(NamedTuple):
    """Bytes of one device."""

    arguments: float
    saved: float
    gradients: float
    layer: float
    head: float

    @property
    def total(self) -> float:
        """The larger of the two moments at which most is held."""
        return self.arguments + self.saved + max(self.gradients + self.layer, self.head)


def estimate(
    model: ModelConfig,
    tx: optax.GradientTransformation,
    mesh: Mesh | AbstractMesh,
    rows: int,
    row_length: int,
    micro_rows: int = 0,
) -> Memory:
    """Memory of a step over rows x row_length tokens, `micro_rows` of them at a time (0: all).

    Raises `UserError` when the mesh does not divide the model or the rows.
    """
    shardings = step_shardings(mesh, model, tx, micro_rows or rows)
    state, batch = abstract_inputs(model, tx, rows, row_length, shardings)
    arguments = sum(row.device_bytes for row in sharding_report((state, batch)))
    trained = sum(row.device_bytes for row in sharding_report(state.params))
    tensor = mesh.shape["tensor"]
    tokens = (micro_rows or rows) * row_length / axis_size(mesh, TOKEN_AXES)
    gradients = trained * (2 if micro_rows and micro_rows < rows else 1)
    vocab = model.vocab_size / tensor
    chunk = min(model.logits_chunk or chunk_tokens(model.vocab_size), tokens)
    e_head = 4 if model.lm_head_fp32 else BYTES[model.dtype]
    head = vocab * (model.width * (e_head + 4) + chunk * (4 + 4 + e_head))
    saved = tokens * _saved(model, tensor)
    return Memory(arguments, saved, gradients, _layer(model, tokens, mesh), head)


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


def _layer(model: ModelConfig, tokens: float, mesh: Mesh | AbstractMesh) -> float:
    """One layer while it is differentiated: its weights, and the activations of both directions."""
    e, d, tensor = BYTES[model.dtype], model.width, mesh.shape["tensor"]
    heads = model.num_heads * model.head_dim / tensor
    keys = 2 * model.num_kv_heads * model.head_dim / tensor
    ffw = model.ffw / tensor
    weights = d * (2 * heads + keys + 3 * ffw)
    own = e * tokens * (4 * d + max(5 * ffw, 4 * heads + 2 * keys))
    gathered = 4 * e * keys * tokens * mesh.shape["context"] if mesh.shape["context"] > 1 else 0
    return float(weights * (e + 4) + own + gathered)
