"""Questions of the offline worlds as a long, lazy, reproducible list of tasks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from agentcpm_jax.types import Task, UserError
from agentcpm_jax.world.graph import TOOL_FAULTS, WorldConfig
from agentcpm_jax.world.names import SPLITS
from agentcpm_jax.world.questions import MAX_HOPS, questions
from agentcpm_jax.world.search import search_index

#: The first seed of a split's worlds, and how many there are. They are the same in every run:
#: results of different runs are about the same questions.
FIRST_SEED = {"train": 0, "validation": 1_000_000, "test": 1_000_000}
_SEEDS = 1_000_000


@dataclass(frozen=True)
class WorldTasks:
    """`worlds` worlds of one split, `per_world` questions of every hop count in each.

    Splits are disjoint by entity name. Neighbouring indices cycle through the hop counts, then
    through the worlds, so any prefix is balanced over hops and uses as many worlds as it can.
    """

    split: str = "train"
    worlds: int = 300
    hops: tuple[int, ...] = (1, 2)  # relations that a question follows
    per_world: int = 8
    tool_fault_rate: float = 0.0  # share of the tool calls that fail
    tool_faults: tuple[str, ...] = TOOL_FAULTS  # how: see `WorldConfig`

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise UserError(f"tasks.split is {self.split!r}; use one of {', '.join(SPLITS)}")
        if not 1 <= self.worlds <= _SEEDS or self.per_world < 1:
            raise UserError(
                f"tasks.worlds is {self.worlds}, per_world {self.per_world}; "
                f"use worlds from 1 to {_SEEDS} and per_world >= 1"
            )
        if (
            not self.hops
            or not set(self.hops) <= set(range(1, MAX_HOPS + 1))
            or len(set(self.hops)) < len(self.hops)
        ):
            raise UserError(
                f"tasks.hops is {self.hops}; use different hop counts from 1 to {MAX_HOPS}"
            )
        self.world_at(0)  # which checks the faults

    def __len__(self) -> int:
        return self.worlds * self.per_world * len(self.hops)

    def task_at(self, index: int) -> Task:
        """The task at 0 <= index < len(self); `IndexError` outside."""
        if not 0 <= index < len(self):
            raise IndexError(f"task {index} of {len(self)}")
        rest, hop = divmod(index, len(self.hops))
        number, world = divmod(rest, self.worlds)
        return _questions(self.world_at(world), self.hops[hop], self.per_world)[number]

    def take(self, n: int) -> list[Task]:
        """The first n tasks. Raises `UserError` when there are fewer."""
        if n > len(self):
            raise UserError(
                f"{n} tasks wanted of {self.worlds} worlds x {self.per_world} questions x "
                f"{len(self.hops)} hop counts = {len(self)}; raise tasks.worlds or tasks.per_world"
            )
        return [self.task_at(index) for index in range(n)]

    def world_at(self, number: int) -> WorldConfig:
        """The config of the world with that number."""
        return WorldConfig(
            seed=FIRST_SEED[self.split] + number,
            split=self.split,
            tool_fault_rate=self.tool_fault_rate,
            tool_faults=self.tool_faults,
        )


@lru_cache(maxsize=4096)
def _questions(cfg: WorldConfig, hop: int, count: int) -> tuple[Task, ...]:
    return tuple(questions(search_index(cfg).world, (hop,), count))
