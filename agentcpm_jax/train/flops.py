"""Arithmetic of a train step, counted as the field does for model FLOP/s utilisation.

    FLOPs of a token = 6 N + 6 L N_q H T
N parameters that multiply (a tied embedding once), N_q query heads of size H, T the row's length:
causal scores and values are half of 12 L N_q H T. Recomputation is not counted in MFU; the roofline
counts it, since it has to be done.

Peak figures are the vendors' dense bfloat16 numbers per chip.
"""

from __future__ import annotations

from typing import NamedTuple

from agentcpm_jax.model import params
from agentcpm_jax.model.config import ModelConfig


class Chip(NamedTuple):
    """flops: bf16 per second; hbm_bytes: usable by a program; bandwidth: bytes per second."""

    flops: float
    hbm_bytes: float
    bandwidth: float


GIB = 2**30
#: By the first part of a slice's name, and the GPUs that configs are made for.
CHIPS = {
    "v5e": Chip(197e12, 15.75 * GIB, 819e9),
    "v5p": Chip(459e12, 95.74 * GIB, 2765e9),
    "v6e": Chip(918e12, 31.25 * GIB, 1640e9),
    "t4": Chip(65e12, 14.75 * GIB, 300e9),  # fp16; it has no bf16 units
    "h200": Chip(989e12, 139 * GIB, 4800e9),
}


def train_flops(model: ModelConfig, rows: int, row_length: int) -> float:
    """Model FLOPs of one optimizer step over rows x row_length tokens (forward and backward)."""
    attention = model.num_layers * model.num_heads * model.head_dim * row_length
    return 6.0 * (params.count(model) + attention) * rows * row_length


def hardware_flops(model: ModelConfig, rows: int, row_length: int) -> float:
    """`train_flops` and what is computed twice: layers under full remat, logits always."""
    tokens = rows * row_length
    head = model.vocab_size * model.width
    attention = model.num_layers * model.num_heads * model.head_dim * row_length
    layers = params.count(model) - head * (1 if model.tied_embeddings else 2)
    again = 2.0 * head
    if model.remat in ("full", "offload"):
        again += 2.0 * (layers + attention)
    elif model.remat == "attention":
        again += 2.0 * layers
    return train_flops(model, rows, row_length) + again * tokens


def step_seconds(flops: float, chip: Chip, devices: int, utilisation: float) -> float:
    """Time of `flops` on `devices` chips at a share of their peak."""
    return flops / (chip.flops * devices * utilisation)
