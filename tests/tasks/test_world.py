from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import pytest

from agentcpm_jax.tasks.world import WorldTasks
from agentcpm_jax.types import UserError
from agentcpm_jax.world.names import SPLITS


def test_any_prefix_is_balanced_over_hops_and_spread_over_worlds() -> None:
    tasks = WorldTasks(worlds=10, per_world=3, hops=(1, 2, 3))
    assert len(tasks) == 90
    assert Counter(t.kind for t in tasks.take(30)) == {"hop1": 10, "hop2": 10, "hop3": 10}
    assert len({t.meta["world"]["seed"] for t in tasks.take(30)}) == 10
    everything = tasks.take(90)
    assert len({t.uid for t in everything}) == 90
    assert len({(t.meta["world"]["seed"], t.question) for t in everything}) == 90


def test_tasks_are_lazy_and_reproducible() -> None:
    tasks = WorldTasks(worlds=1_000_000, per_world=100)
    last = tasks.task_at(len(tasks) - 1)
    assert last == WorldTasks(worlds=1_000_000, per_world=100).task_at(len(tasks) - 1)
    assert last.kind == "hop2" and last.meta["world"]["seed"] == 999_999
    with pytest.raises(IndexError):
        tasks.task_at(len(tasks))


def test_splits_share_no_entity_name() -> None:
    names = {
        split: {n for t in WorldTasks(split, 40).take(80) for n in t.meta["path"]}
        for split in SPLITS
    }
    for a, b in itertools.combinations(SPLITS, 2):
        assert not names[a] & names[b]
    assert {t.split for t in WorldTasks("test").take(4)} == {"test"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("split", "dev"),
        ("worlds", 0),
        ("per_world", 0),
        ("hops", ()),
        ("hops", (1, 5)),
        ("hops", (2, 2)),
        ("tool_fault_rate", 2.0),
        ("tool_faults", ("fire",)),
    ],
)
def test_an_impossible_config_is_a_user_error(field: str, value: object) -> None:
    with pytest.raises(UserError, match=field):
        dataclasses.replace(WorldTasks(), **{field: value})
    with pytest.raises(UserError, match="5000 tasks wanted"):
        WorldTasks().take(5000)
