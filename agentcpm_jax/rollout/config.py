"""How episodes are played, groups produced, and work shared out to workers."""

from __future__ import annotations

from dataclasses import dataclass

from agentcpm_jax.types import UserError


@dataclass(frozen=True)
class EpisodeConfig:
    """Limits are counts of turns, tokens (max_context, max_new_tokens, reserve) or characters."""

    system_prompt: str = ""
    max_turns: int = 100
    max_context: int = 32768
    max_new_tokens: int = 4096
    reserve: int = 64  # room that must be left for a generation to be worth starting
    temperature: float = 1.0
    repetition_stop: int = 4  # times the same assistant text may stand in the context
    no_progress_stop: int = 20  # consecutive turns with neither call nor answer
    truncated_stop: int = 1  # turns cut at max_new_tokens
    turn_deadline: float | None = None  # seconds for one generation
    max_tool_chars: int = 20_000  # of one observation
    nudge: str = (
        "Your message held neither a tool call nor an answer. "
        "Call a tool, or give the final answer between <answer> and </answer>."
    )
    nudge_truncated: str = "Your message was cut off because it was too long. Be brief."


@dataclass(frozen=True)
class StreamConfig:
    """How groups are produced and shipped.

    `max_staleness` is eta: a batch trained at version v holds no token older than v - eta.
    `over_age` 'drop' refills what grew too old; 'wait' holds batches back so that nothing does
    (always so when `deterministic`).
    """

    batch_groups: int = 8  # B: groups per batch
    group_size: int = 8  # samples per group
    max_staleness: int = 4
    max_concurrent_groups: int = 32
    deterministic: bool = False  # lockstep: batch n is sampled at version max(0, n - eta)
    over_age: str = "drop"  # drop | wait
    retries: int = 3  # of one failed sample, each in a fresh environment
    retry_delay: float = 0.5  # seconds, times the attempt; asynchronous mode only
    sample_deadline: float = 3600.0  # seconds for one attempt; asynchronous mode only; 0: none
    min_valid: int = 2  # samples with a verdict that a group needs
    reissues: int = 1  # how often a task whose group failed is issued again
    epoch_size: int = 0  # tasks per epoch; failed ones return at its end (0: a batch later)
    breaker: int = 64  # unknown samples in a row that stop the run
    barren_batches: int = 50  # batches' worth of groups dropped in a row that stop the run
    stall_timeout: float = 900.0  # seconds without any finished sample; asynchronous mode; 0: none

    def __post_init__(self) -> None:
        if self.over_age not in ("drop", "wait"):
            raise UserError(f"stream.over_age: {self.over_age!r}; choose 'drop' or 'wait'")
        if not 1 <= self.min_valid <= self.group_size:
            raise UserError(
                f"stream.min_valid: {self.min_valid}; choose 1..group_size ({self.group_size})"
            )
        least = {"batch_groups": 1, "max_concurrent_groups": 1, "breaker": 1, "barren_batches": 1}
        least |= {"max_staleness": 0, "retries": 0, "reissues": 0, "epoch_size": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UserError(f"stream.{name}: {getattr(self, name)}; it is at least {low}")
        for name in ("retry_delay", "sample_deadline", "stall_timeout"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"stream.{name}: {getattr(self, name)}; give seconds, 0 or more")


@dataclass(frozen=True)
class WorkerConfig:
    """Rollout workers of a shared (PostgreSQL) log. `lease`: seconds without a sign of life after
    which a claim is given to another worker."""

    lease: float = 60.0
    trainer_groups: int = -1  # groups at a time in the trainer's process; -1: all; 0: none

    def __post_init__(self) -> None:
        if self.lease < 1:
            raise UserError(f"workers.lease={self.lease:g}; it is at least 1 second")
        if self.trainer_groups < -1:
            raise UserError(f"workers.trainer_groups={self.trainer_groups}; it is at least -1")
