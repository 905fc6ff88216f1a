"""Arithmetic of a train step, counted as the field does for model FLOP/s utilisation.

    FLOPs of a token = 6 N + 6 L N_q H T
N parameters in matrix products (a tied embedding once), N_q query heads of size H, T the row's
length: causal attention is half of 12 L N_q H T. With adapters the frozen matrices get no
gradient: 4 N instead of 6 N, and 6 N_a for the N_a parameters of the adapters.

The roofline counts what is really computed, at the peak rate of its precision. Layers under full
remat run forward twice, logits always do; adapters are merged into their matrices, so a layer's
matrices do get a gradient; an output matrix in float32 runs at the float32 rate.

Peak figures are the vendors' dense numbers per chip. TPUs have no float32 units: six bfloat16
passes make one product of float32 at full precision.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from agentcpm_jax import tree
from agentcpm_jax.model import params
from agentcpm_jax.model.config import ModelConfig
from agentcpm_jax.model.lora import adapter_specs


class Chip(NamedTuple):
    """Peak bf16 FLOP/s, peak float32 FLOP/s, HBM bytes usable by a program, HBM bytes/s."""

    flops: float
    flops32: float
    hbm_bytes: float
    bandwidth: float


GIB = 2**30
#: By the first part of a slice's name; for GPUs, by their kind.
CHIPS = {
    "v5e": Chip(197e12, 197e12 / 6, 15.75 * GIB, 819e9),
    "v5p": Chip(459e12, 459e12 / 6, 95.74 * GIB, 2765e9),
    "v6e": Chip(918e12, 918e12 / 6, 31.25 * GIB, 1640e9),
    "t4": Chip(8.1e12, 8.1e12, 14.75 * GIB, 320e9),  # no bfloat16: all is computed in float32
    "h200": Chip(989e12, 67e12, 139 * GIB, 4800e9),
}


def train_flops(model: ModelConfig, rows: int, row_length: int) -> float:
    """Model FLOPs of one optimizer step over rows x row_length tokens (forward and backward)."""
    matrices = 6.0 * params.count(model)
    if model.lora_rank:
        matrices = 4.0 * params.count(model) + 6.0 * count_adapters(model)
    return (matrices + 6.0 * _attention(model, row_length)) * rows * row_length


def roofline_seconds(
    model: ModelConfig, rows: int, row_length: int, chip: Chip, devices: int
) -> float:
    """Seconds for all that a step computes, at the peak rates of `devices` chips."""
    head = model.vocab_size * model.width
    layers = params.count(model) - head * (1 if model.tied_embeddings else 2)
    attention = _attention(model, row_length)
    in_layers = 6.0 * (layers + attention)
    if model.remat in ("full", "offload"):
        in_layers += 2.0 * (layers + attention)
    elif model.remat == "attention":
        in_layers += 2.0 * layers
    in_head = (6.0 if model.lora_rank else 8.0) * head
    rate = chip.flops if model.dtype == "bfloat16" else chip.flops32
    head_rate = chip.flops32 if model.lm_head_fp32 else rate
    return (in_layers / rate + in_head / head_rate) * rows * row_length / devices


def count_adapters(model: ModelConfig) -> int:
    """Number of adapter parameters; 0 without adapters."""
    if not model.lora_rank:
        return 0
    return sum(math.prod(spec.shape) for spec in tree.flatten(adapter_specs(model)).values())


def seconds(
    flops: float, model: ModelConfig, chip: Chip, devices: int, utilisation: float
) -> float:
    """Seconds for `flops` in the model's dtype on `devices` chips at `utilisation` of peak."""
    rate = chip.flops if model.dtype == "bfloat16" else chip.flops32
    return flops / (rate * devices * utilisation)


def _attention(model: ModelConfig, row_length: int) -> float:
    return float(model.num_layers * model.num_heads * model.head_dim * row_length)
