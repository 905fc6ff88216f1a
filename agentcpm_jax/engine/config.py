"""The shapes of the in-process engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agentcpm_jax.types import UserError

MAX_STOP_IDS = 8  # of one request


@dataclass(frozen=True)
class EngineConfig:
    """Shapes of the engine.

    `deterministic`: one shape and no prefix reuse, which makes a row's bits independent of what
    else runs. `tensor`: devices of this process that heads, ffw and vocabulary are split over.
    """

    slots: int = 96
    capacity: int = 512  # tokens per slot: prompt + completion
    chunk: int = 8  # decode steps per device call
    row_buckets: tuple[int, ...] = (16, 48)  # `slots` is always the last bucket
    token_buckets: tuple[int, ...] = (16, 64)
    length_buckets: tuple[int, ...] = ()  # of the cache that is read; `capacity` is the last
    deterministic: bool = False
    prefill_tokens: int = 8192  # prompt tokens, with padding, between two chunks of decoding
    reuse: bool = True  # keep and copy prefixes
    tensor: int = 1
    prefill_rows: tuple[int, ...] = ()  # row buckets of prefill; default `row_buckets`


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
