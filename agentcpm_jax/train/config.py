"""The optimiser by name, and its constants."""

from __future__ import annotations

from dataclasses import dataclass

from agentcpm_jax.types import UserError

NAMES = ("adamw", "adafactor", "muon")
MOMENTS = ("float32", "bfloat16")
SCHEDULES = ("cosine", "constant", "linear", "flat_linear")


@dataclass(frozen=True)
class OptimizerConfig:
    """Which optimiser, and how its rate moves.

    `lr` is the peak rate (muon: of the matrices; `adam_lr` of the rest, on the same schedule).
    `warmup_steps` wins over `warmup_fraction` (of `total_steps`, rounded up). `clip_norm=0` does
    not clip. The defaults are the original's SFT recipe but for its warm-up of 3 % of the steps.

    Raises:
      UserError: unknown name or schedule.
    """

    name: str = "adamw"  # adamw | adafactor | muon
    lr: float = 2e-5
    adam_lr: float = 2e-3
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    moments: str = "float32"  # or bfloat16: of adamw's first moment
    muon_momentum: float = 0.95
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    schedule: str = "cosine"  # cosine | constant | linear | flat_linear
    warmup_steps: int = 0
    warmup_fraction: float = 0.0
    flat_fraction: float = 0.3  # flat_linear: share of total_steps at the full rate
    total_steps: int = 0
    final_fraction: float | None = None  # None: 0.05 for flat_linear, 0 for the others

    def __post_init__(self) -> None:
        for key, allowed in (("name", NAMES), ("schedule", SCHEDULES), ("moments", MOMENTS)):
            if getattr(self, key) not in allowed:
                value = getattr(self, key)
                raise UserError(
                    f"unknown optimizer.{key} {value!r}; use one of {', '.join(allowed)}"
                )
