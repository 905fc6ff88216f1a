"""A seeded knowledge graph: names in look-alike families, and relations between them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from agentcpm_jax.types import UserError
from agentcpm_jax.world.names import FIRST, RELATIONS, SECOND, SPLITS, seconds_of

_DRAWS = 32  # a draw of 40 held-out names repeats a second word about once in seven


#: What can happen to a tool call.
TOOL_FAULTS = ("tool_error", "infra_error", "truncated")


@dataclass(frozen=True)
class WorldConfig:
    """One world. Equal configs give equal worlds, in any process.

    `entities` pages with `facts` facts each, in families of `family` names that share the first
    word. `distractors` is a number of extra pages; `stale`, `contradictory` and `injections` are
    shares of the entities (0 to 1); `tool_fault_rate` is a share of the tool calls, each of which
    has one of `tool_faults`: an error the agent sees, a lost server, or a silent cut to half of the
    text; `results` is the most titles that one search returns.
    """

    seed: int = 0
    split: str = "train"
    entities: int = 40
    facts: int = 4
    family: int = 4
    distractors: int = 0
    stale: float = 0.0
    contradictory: float = 0.0
    injections: float = 0.0
    tool_fault_rate: float = 0.0
    tool_faults: tuple[str, ...] = TOOL_FAULTS
    results: int = 4
    tool_latency: float = 0.0
    tool_latency_sigma: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "tool_faults", tuple(self.tool_faults))  # JSON has lists
        if not self.tool_faults or not set(self.tool_faults) <= set(TOOL_FAULTS):
            raise UserError(
                f"world.tool_faults is {self.tool_faults}; use some of {', '.join(TOOL_FAULTS)}"
            )
        if self.split not in SPLITS:
            raise UserError(f"world.split is {self.split!r}; use one of {', '.join(SPLITS)}")
        if not 1 <= self.facts <= len(RELATIONS):
            raise UserError(f"world.facts is {self.facts}; use 1 to {len(RELATIONS)}")
        if self.family < 1 or self.entities < max(self.family, self.facts + 1):
            raise UserError(
                f"world.entities is {self.entities}, family {self.family}, facts {self.facts}; "
                "use family >= 1 and entities >= max(family, facts + 1)"
            )
        for name in ("stale", "contradictory", "injections", "tool_fault_rate"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UserError(f"world.{name} is {getattr(self, name)}; use a share from 0 to 1")
        for name in ("tool_latency", "tool_latency_sigma"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise UserError(f"world.{name} is {getattr(self, name)}; use a number from 0 on")
        if self.results < 1 or self.distractors < 0:
            raise UserError(
                f"world.results is {self.results}, distractors {self.distractors}; "
                "use results >= 1 and distractors >= 0"
            )

    @property
    def key(self) -> str:
        """Seeds every random choice in the world; it differs between splits."""
        return f"{self.split}/{self.seed}"


@dataclass(frozen=True)
class World:
    """Entities by name and, for each, its facts (relation, value's name) in page order."""

    config: WorldConfig
    entities: tuple[str, ...]
    facts: tuple[tuple[tuple[str, str], ...], ...]

    @cached_property
    def facts_of(self) -> dict[str, dict[str, str]]:
        """entity -> relation -> value."""
        return {name: dict(facts) for name, facts in zip(self.entities, self.facts, strict=True)}


def build_world(cfg: WorldConfig) -> World:
    """The world of `cfg`: a pure function of it."""
    rng = random.Random(f"world/{cfg.key}")
    entities = _draw_names(cfg, rng)
    groups: dict[str, list[str]] = {}
    for name in entities:
        groups.setdefault(first_word(name), []).append(name)
    facts = tuple(
        tuple(
            zip(rng.sample(RELATIONS, cfg.facts), _draw_values(cfg, rng, name, groups), strict=True)
        )
        for name in entities
    )
    return World(cfg, tuple(entities), facts)


def execute(world: World, start: str, relations: Sequence[str]) -> set[str]:
    """The entities that `start` reaches by following `relations`: the query, run on the graph."""
    reached = {start}
    for relation in relations:
        reached = {
            facts[relation]
            for name in reached
            if relation in (facts := world.facts_of.get(name, {}))
        }
    return reached


def first_word(name: str) -> str:
    """The word that look-alikes share."""
    return name.partition(" ")[0]


def look_alikes(world: World, name: str) -> list[str]:
    """The other entities that share the first word."""
    first = first_word(name)
    return [other for other in world.entities if other != name and first_word(other) == first]


def _draw_names(cfg: WorldConfig, rng: random.Random) -> list[str]:
    """Families of names.

    The last family takes the remainder, so that no entity has fewer than `family - 1` look-alikes;
    in worlds small enough no second word is used twice, so that there are no other look-alikes.
    """
    families = cfg.entities // cfg.family
    sizes = [cfg.family] * families
    sizes[-1] += cfg.entities - cfg.family * families
    names: list[str] = []
    for _ in range(_DRAWS if cfg.entities <= len(SECOND) else 1):
        used: set[int] = set()
        firsts = rng.sample(range(len(FIRST)), len(FIRST))
        streams = [_names_with(i, cfg.split, rng, used) for i in firsts]
        names = [
            next(streams[number % len(streams)])
            for number, size in enumerate(sizes)
            for _ in range(size)
        ]
        if len(used) == cfg.entities:
            break
    return names


def _names_with(i: int, split: str, rng: random.Random, used: set[int]) -> Iterator[str]:
    """Endless names with one first word: when the pairs are used up, numbers are appended."""
    seconds = seconds_of(i, split)
    rng.shuffle(seconds)
    seconds.sort(key=used.__contains__)
    number = 1
    while True:
        for j in seconds:
            used.add(j)
            yield f"{FIRST[i]} {SECOND[j]}" + (f" {number}" if number > 1 else "")
        number += 1


def _draw_values(
    cfg: WorldConfig, rng: random.Random, name: str, groups: dict[str, list[str]]
) -> list[str]:
    """Distinct other entities, with distinct first words where the world has enough of them: the
    word before a word is then a unique key on the page, which is what a tiny model can look up."""
    others = [first for first in groups if first != first_word(name)]
    if len(others) >= cfg.facts:
        return [rng.choice(groups[first]) for first in rng.sample(others, cfg.facts)]
    return rng.sample([n for group in groups.values() for n in group if n != name], cfg.facts)
