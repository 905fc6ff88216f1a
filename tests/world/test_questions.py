from __future__ import annotations

import asyncio
import random

import pytest

from agentcpm_jax.types import ToolStatus, UserError
from agentcpm_jax.world.graph import World, WorldConfig, build_world, execute
from agentcpm_jax.world.names import SPLITS
from agentcpm_jax.world.questions import (
    demonstration,
    question_text,
    questions,
)
from agentcpm_jax.world.tools import open_toolbox
from tests.world.flawless import oracle_answer, oracle_calls


def test_question_and_script_to_the_letter() -> None:
    assert question_text("Kar Vel", ["founder"]) == "What is the founder of Kar Vel?"
    text = question_text("Kar Vel", ["founder", "mayor", "heir"])
    assert text == "What is the heir of the mayor of the founder of Kar Vel?"
    (task,) = questions(build_world(WorldConfig()), (2,), 1)
    start, middle, end = task.meta["path"]
    first, second = task.meta["relations"]
    assert oracle_calls(task) == [
        ("search", {"query": start}),
        ("visit", {"title": start}),
        ("search", {"query": f"{first} {middle}"}),
        ("visit", {"title": middle}),
    ]
    assert oracle_answer(task) == f"{second} {end}"
    assert task.answers == (end, f"{second} {end}")
    assert (task.kind, task.split) == ("hop2", "train")


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_unique_by_brute_force(split: str) -> None:
    world = build_world(WorldConfig(split=split, entities=12, family=3, facts=3))
    edges = [
        (a, r, b) for a, facts in zip(world.entities, world.facts, strict=True) for r, b in facts
    ]
    tasks = questions(world, (1, 2, 3, 4), 80)
    assert len({t.question for t in tasks}) == 80
    for task in tasks:
        ends = _walks(edges, task.meta["start"], task.meta["relations"])
        assert [e[-1] for e in ends] == [task.answers[0]], "exactly one walk fits the question"
        assert execute(world, task.meta["start"], task.meta["relations"]) == {task.answers[0]}
        assert ends[0] == task.meta["path"] and len(set(ends[0])) == len(ends[0])


def test_the_oracle_script_reads_the_answer_through_the_tools() -> None:
    async def play(world: World) -> None:
        for task in questions(world, (1, 2, 3, 4), 40):
            box = await open_toolbox(task.meta, (0, 0, 0))
            calls, key, names = oracle_calls(task), task.meta["relations"], []
            for hop, relation in enumerate(key):
                (search, query), (visit, title) = calls[2 * hop], calls[2 * hop + 1]
                found = await box.call(search, query)
                assert title["title"] in found.content.split("\n")
                page = await box.call(visit, title)
                assert found.status == page.status == ToolStatus.OK
                (line,) = [x for x in page.content.split("\n") if x.startswith(f"{relation} ")]
                names.append(line)
                if 2 * hop + 2 < len(calls):
                    assert calls[2 * hop + 2][1]["query"] == line
            await box.close()
            assert len(calls) == 2 * int(task.kind.removeprefix("hop"))
            assert names[-1] == oracle_answer(task) and names[-1] in task.answers

    for split in SPLITS:
        asyncio.run(play(build_world(WorldConfig(seed=2, split=split, stale=0.3, injections=0.5))))


def test_flawless_demonstrations_follow_the_oracle() -> None:
    world = build_world(WorldConfig())
    for task in questions(world, (1, 2, 3, 4), 20):
        messages, right = demonstration(task, world, rng=random.Random(0))
        assert right
        assert [_call(m) for m in messages if "tool_calls" in m] == oracle_calls(task)
        assert messages[0] == {"role": "user", "content": task.question}
        assert messages[-1]["content"] == f"<answer>{oracle_answer(task)}</answer>"
        roles = [m["role"] for m in messages]
        assert roles == ["user", *["assistant", "tool"] * len(oracle_calls(task)), "assistant"]


def test_stop_early_answers_the_inner_hop() -> None:
    world = build_world(WorldConfig())
    for task in questions(world, (1, 2, 3), 30):
        messages, right = demonstration(task, world, rng=random.Random(0), stop_early=1.0)
        hop1 = f"{task.meta['relations'][0]} {task.meta['path'][1]}"
        assert messages[-1]["content"] == f"<answer>{hop1}</answer>"
        assert right == (task.kind == "hop1") and len(messages) == 6


def test_wrong_pick_believes_the_look_alike_or_returns() -> None:
    world = build_world(WorldConfig())
    believed = returned = 0
    for task in questions(world, (1,), 100):
        messages, right = demonstration(task, world, rng=random.Random(1), wrong_pick=1.0)
        titles = [_call(m)[1]["title"] for m in messages[3:] if "tool_calls" in m]
        assert titles[0] != task.meta["start"] and titles[0].split()[0] in task.meta["start"]
        if len(titles) == 1:
            said = world.facts_of[titles[0]][task.meta["relations"][0]]
            assert messages[-1]["content"].endswith(f" {said}</answer>")
            assert right == (said == task.answers[0])
            believed += 1
        else:
            assert titles[1] == task.meta["start"] and right
            returned += 1
    assert 20 < believed < 60 and believed + returned == 100, "4 of 10 relations are on a page"


def test_faults_come_at_their_rates_and_are_reproducible() -> None:
    world = build_world(WorldConfig())
    tasks = questions(world, (2,), 200)
    faults = {"wrong_pick": 0.2, "stop_early": 0.65, "malformed": 0.1}
    runs = [
        [demonstration(t, world, rng=random.Random(i), **faults) for i, t in enumerate(tasks)]
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    early = [d for d in runs[0] if not d.right]
    assert 0.6 < len(early) / 200 < 0.8
    refused = [m for d in runs[0] for m in d.messages if "has no argument" in m["content"]]
    calls = [m for d in runs[0] for m in d.messages if "tool_calls" in m]
    assert 0.06 < len(refused) / len(calls) < 0.13


def test_a_world_without_enough_questions_says_so() -> None:
    world = build_world(WorldConfig(entities=4, facts=1))
    with pytest.raises(UserError, match="5 different questions of 1 hops"):
        questions(world, (1,), 5)
    with pytest.raises(UserError, match="hops is"):
        questions(world, (5,), 1)


def _walks(edges: list[tuple[str, str, str]], start: str, relations: list[str]) -> list[list[str]]:
    """Every walk from `start` along `relations`, by scanning all edges."""
    walks = [[start]]
    for relation in relations:
        walks = [[*w, b] for w in walks for a, r, b in edges if a == w[-1] and r == relation]
    return walks


def _call(message: dict) -> tuple[str, dict[str, str]]:
    function = message["tool_calls"][0]["function"]
    return function["name"], function["arguments"]
