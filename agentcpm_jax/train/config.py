"""The optimiser by name, and its constants."""

from __future__ import annotations

import math
from dataclasses import dataclass

from agentcpm_jax.ranges import check_between, check_choice, check_least

NAMES = ("adamw", "adafactor", "muon")
MOMENTS = ("float32", "bfloat16")
SCHEDULES = ("cosine", "constant", "linear", "flat_linear")


@dataclass(frozen=True)
class OptimizerConfig:
    """Which optimiser, and how its rate moves over the steps of the stage.

    The defaults are the original's SFT recipe but for its warm-up of 3 % of the steps.

    Raises:
      UserError: unknown name or schedule.
    """

    name: str = "adamw"  # adamw | adafactor | muon
    lr: float = 2e-5  # the peak rate; of muon that of the matrices
    adam_lr: float = 2e-3  # of muon: the peak rate of the rest, on the same schedule
    b2: float = 0.999  # decay of the second moment
    eps: float = 1e-8
    moments: str = "float32"  # or bfloat16: of adamw's first moment
    weight_decay: float = 0.01
    clip_norm: float = 1.0  # 0: gradients are not clipped
    schedule: str = "cosine"  # cosine | constant | linear | flat_linear
    warmup: float = 0.0  # steps; below 1: share of the stage's steps, rounded up
    final_fraction: float | None = None  # of lr; None: 0.05 for flat_linear, 0 for the others

    def __post_init__(self) -> None:
        choices = {"name": NAMES, "schedule": SCHEDULES, "moments": MOMENTS}
        check_choice(self, "optimizer", choices)
        zero = ("lr", "adam_lr", "eps", "weight_decay", "clip_norm", "warmup", "final_fraction")
        check_least(self, "optimizer", dict.fromkeys(zero, 0))
        check_between(self, "optimizer", {"b2": (0, 1)})

    def warmup_steps(self, total_steps: int) -> int:
        """Updates until the full rate."""
        share = self.warmup < 1
        return math.ceil(self.warmup * total_steps) if share else round(self.warmup)
