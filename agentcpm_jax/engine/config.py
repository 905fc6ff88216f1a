"""The shapes of the in-process engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agentcpm_jax.ranges import check_least
from agentcpm_jax.types import UserError

MAX_STOP_IDS = 8  # of one request
MAX_TEMPERATURE = 1_000_000  # draws evenly from any vocabulary; float32 ends at 3e38


@dataclass(frozen=True)
class EngineConfig:
    """Shapes of the engine. A device program is compiled for each size of a bucket that occurs:
    more of them waste less arithmetic on padding, and take longer to compile."""

    slots: int = 96  # requests decoded together
    capacity: int = 512  # tokens per slot: prompt and completion
    chunk: int = 8  # decode steps per device call
    row_buckets: tuple[int, ...] = (16, 48)  # rows of a call; `slots` is always the last bucket
    token_buckets: tuple[int, ...] = (16, 64)  # prompt tokens that a row is fed in a call
    length_buckets: tuple[int, ...] = ()  # of the cache that is read; `capacity` is the last
    tensor: int = 1  # devices of this process that heads, ffw and vocabulary are split over

    def __post_init__(self) -> None:
        sizes = ("slots", "capacity", "chunk", "row_buckets", "token_buckets", "length_buckets")
        check_least(self, "engine", dict.fromkeys((*sizes, "tensor"), 1))


def check_capacity(cfg: EngineConfig, max_context: int) -> None:
    """Raise `UserError` when episodes may outgrow a slot."""
    if max_context > cfg.capacity:
        raise UserError(
            f"episode.max_context={max_context} exceeds engine.capacity={cfg.capacity}; "
            "raise the capacity or lower the context"
        )


def up_to(last: int, buckets: Sequence[int]) -> tuple[int, ...]:
    """The buckets below `last`, and `last`."""
    return (*(b for b in buckets if b < last), last)
