from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import pytest

from agentcpm_jax.types import UserError
from agentcpm_jax.world.graph import WorldConfig, build_world, first_word, look_alikes
from agentcpm_jax.world.names import FIRST, RELATIONS, SECOND, SPLITS, seconds_of, split_of


def test_words_are_distinct_and_prefix_free() -> None:
    assert len(FIRST) == len(SECOND) == 96
    assert len(set(FIRST + SECOND)) == 192
    words = [*FIRST, *SECOND, *RELATIONS]
    assert not [(a, b) for a, b in itertools.permutations(words, 2) if b.startswith(a)]


def test_every_word_has_ten_pairs_in_each_held_out_split() -> None:
    pairs = [(i, j, split_of(i, j)) for i in range(96) for j in range(96)]
    assert Counter(s for *_, s in pairs) == {"train": 7296, "validation": 960, "test": 960}
    for held_out in ("validation", "test"):
        assert set(Counter(i for i, _, s in pairs if s == held_out).values()) == {10}
        assert set(Counter(j for _, j, s in pairs if s == held_out).values()) == {10}
    assert [len(seconds_of(5, s)) for s in SPLITS] == [76, 10, 10]


def test_splits_share_no_name() -> None:
    names = {
        split: {n for seed in range(150) for n in build_world(_cfg(split, seed)).entities}
        for split in SPLITS
    }
    for a, b in itertools.combinations(SPLITS, 2):
        assert not names[a] & names[b]
    assert {w for n in names["test"] for w in n.split()} <= {
        w for n in names["train"] for w in n.split()
    }, "held-out names consist of words seen in training"


def test_every_entity_of_every_split_has_the_same_number_of_look_alikes() -> None:
    for split, seed in itertools.product(SPLITS, range(25)):
        world = build_world(_cfg(split, seed))
        assert len(set(world.entities)) == 40
        assert {len(look_alikes(world, name)) for name in world.entities} == {3}
        seconds = [name.split()[1] for name in world.entities]
        assert len(set(seconds)) == 40, "no look-alikes by the second word"


def test_the_last_family_takes_the_remainder() -> None:
    world = build_world(WorldConfig(entities=11, family=4, facts=2))
    sizes = Counter(first_word(name) for name in world.entities)
    assert sorted(sizes.values()) == [4, 7]


def test_facts_have_distinct_relations_and_values_told_apart_by_one_word() -> None:
    world = build_world(_cfg("test", 3))
    for name, facts in zip(world.entities, world.facts, strict=True):
        relations, values = zip(*facts, strict=True)
        assert len(set(relations)) == 4 and set(relations) <= set(RELATIONS)
        assert name not in values and set(values) <= set(world.entities)
        assert len({first_word(v) for v in (name, *values)}) == 5


def test_a_world_is_a_function_of_its_config() -> None:
    assert build_world(_cfg("train", 1)) == build_world(_cfg("train", 1))
    assert build_world(_cfg("train", 1)) != build_world(_cfg("train", 2))


def test_worlds_larger_than_their_split_number_the_names() -> None:
    world = build_world(WorldConfig(split="test", entities=2000))
    assert len(set(world.entities)) == 2000
    assert min(Counter(map(first_word, world.entities)).values()) >= 4
    for name in world.entities:
        first, second = name.split()[:2]
        assert split_of(FIRST.index(first), SECOND.index(second)) == "test"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("split", "dev"),
        ("facts", 11),
        ("family", 0),
        ("entities", 3),
        ("stale", 1.5),
        ("tool_fault_rate", -0.1),
        ("results", 0),
        ("tool_latency", -1.0),
    ],
)
def test_an_impossible_world_names_the_value(field: str, value: object) -> None:
    with pytest.raises(UserError, match=f"{field} (is )?'?{value}"):
        dataclasses.replace(WorldConfig(), **{field: value})


def _cfg(split: str, seed: int) -> WorldConfig:
    return WorldConfig(seed=seed, split=split)
