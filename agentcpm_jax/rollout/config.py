"""How episodes are played, groups produced, and work shared out to workers."""

from __future__ import annotations

from dataclasses import dataclass

from agentcpm_jax.ranges import check_choice, check_least, check_seconds

#: An attempt at a sample may take this many times `stall_timeout`: others may end while it runs.
DEADLINE_STALLS = 4


@dataclass(frozen=True)
class EpisodeConfig:
    """Limits of one episode, in turns or tokens; `max_context` holds prompt and all turns.

    The defaults fit those of the model, the engine's slots and the rows of an RL stage.
    """

    system_prompt: str | None = None  # None: the conversation begins with the question
    max_turns: int = 100
    max_context: int = 512
    max_new_tokens: int = 128  # of one turn
    reserve: int = 64  # tokens of context that must be left for a turn to be worth starting
    temperature: float = 1.0
    repetition_stop: int = 4  # an assistant text that stands this often in the context ends it

    def __post_init__(self) -> None:
        counts = ("max_turns", "max_context", "max_new_tokens", "repetition_stop")
        check_least(self, "episode", dict.fromkeys(counts, 1) | {"reserve": 0, "temperature": 0})


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
    breaker: int = 64  # unknown samples in a row that stop the run
    stall_timeout: float = 900.0  # seconds without any finished sample; asynchronous mode; 0: none

    def __post_init__(self) -> None:
        check_choice(self, "stream", {"over_age": ("drop", "wait")})
        least = {"batch_groups": 1, "group_size": 1, "max_concurrent_groups": 1, "breaker": 1}
        check_least(self, "stream", least | {"max_staleness": 0, "retries": 0})
        check_seconds(self, "stream", "stall_timeout")

    @property
    def sample_deadline(self) -> float | None:
        """Seconds for one attempt at a sample; None: no limit, as when `deterministic`."""
        if self.deterministic or not self.stall_timeout:
            return None
        return DEADLINE_STALLS * self.stall_timeout


@dataclass(frozen=True)
class WorkerConfig:
    """Rollout workers of a log that several processes share (PostgreSQL)."""

    lease: float = 60.0  # seconds without a sign of life until another worker takes a claim over
    trainer_groups: int | None = None  # groups at a time in the trainer's process; None: all

    def __post_init__(self) -> None:
        check_least(self, "workers", {"lease": 1, "trainer_groups": 0})
