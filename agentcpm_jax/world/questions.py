"""k-hop questions with proved answers, and faulty demonstrations."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from agentcpm_jax.types import Task, UserError
from agentcpm_jax.world.graph import World, execute, first_word
from agentcpm_jax.world.search import SearchIndex, search_index
from agentcpm_jax.world.tools import ARGUMENT, answer_call

MAX_HOPS = 4

Message = dict[str, Any]


class Demonstration(NamedTuple):
    """An episode as OpenAI messages (system omitted), and whether its answer is right."""

    messages: list[Message]
    right: bool


def questions(world: World, hops: Sequence[int], count: int) -> list[Task]:
    """`count` different questions, cycling through `hops` (each 1 to 4).

    Every answer is proved unique by executing the query on the graph, and no path visits an entity
    twice. Raises `UserError` when the world does not have that many.
    """
    if not hops or not all(1 <= hop <= MAX_HOPS for hop in hops):
        raise UserError(f"hops is {tuple(hops)}; use hop counts from 1 to {MAX_HOPS}")
    rng = random.Random(f"questions/{world.config.key}/0")
    tasks: dict[str, Task] = {}
    for number in range(count):
        hop = hops[number % len(hops)]
        for _ in range(1000):
            task = _draw(world, hop, rng)
            if task is not None and task.question not in tasks:
                tasks[task.question] = task
                break
        else:
            raise UserError(
                f"world {world.config.key} has no {number + 1} different questions of {hop} hops; "
                "ask for fewer or enlarge world.entities or world.facts"
            )
    return list(tasks.values())


def question_text(start: str, relations: Sequence[str]) -> str:
    """`What is the r_k of the ... of the r_1 of First Second?`"""
    return f"What is {' of '.join(f'the {r}' for r in reversed(relations))} of {start}?"


def demonstration(
    task: Task,
    world: World,
    *,
    rng: random.Random,
    wrong_pick: float = 0.0,
    stop_early: float = 0.0,
    malformed: float = 0.0,
) -> Demonstration:
    """One episode by an imperfect teacher, with the tools' actual outputs.

    stop_early: chance, with two hops or more, to answer the inner hop `r_1 name_1` after one page.
    wrong_pick: chance per visit to open a look-alike from the results. The teacher believes that
    page's value of the relation; when it has none, the right page is opened next. A teacher on a
    wrong chain that finds no value of the relation answers with the last fact it read.
    malformed: chance per call to pass the value under a wrong argument name first.
    """
    teacher = _Teacher(search_index(world.config), task.question, rng, malformed)
    relations = task.meta["relations"]
    stop = len(relations) > 1 and rng.random() < stop_early
    name, fact = task.meta["start"], ""
    for relation in relations:
        results = teacher.call("search", f"{fact or name}").split("\n")
        look_alikes = [t for t in results if t != name and first_word(t) == first_word(name)]
        value = None
        if look_alikes and rng.random() < wrong_pick:
            value = _read(teacher.call("visit", rng.choice(look_alikes)), relation)
        value = value or _read(teacher.call("visit", name), relation)
        if value is None:
            break
        name, fact = value, f"{relation} {value}"
        if stop:
            break
    answer = fact or name
    teacher.messages.append({"role": "assistant", "content": f"<answer>{answer}</answer>"})
    return Demonstration(teacher.messages, answer in task.answers)


class _Teacher:
    """Writes the messages of an episode while calling the tools."""

    def __init__(
        self, index: SearchIndex, question: str, rng: random.Random, malformed: float
    ) -> None:
        self.messages: list[Message] = [{"role": "user", "content": question}]
        self._index, self._rng, self._malformed = index, rng, malformed

    def call(self, tool: str, value: str) -> str:
        if self._rng.random() < self._malformed:
            wrong = next(a for t, a in ARGUMENT.items() if t != tool)
            self._exchange(tool, {wrong: value})
        return self._exchange(tool, {ARGUMENT[tool]: value})

    def _exchange(self, tool: str, arguments: Mapping[str, str]) -> str:
        content = answer_call(self._index, tool, arguments).content
        function = {"name": tool, "arguments": dict(arguments)}
        self.messages += [
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": function}],
            },
            {"role": "tool", "name": tool, "content": content},
        ]
        return content


def _draw(world: World, hop: int, rng: random.Random) -> Task | None:
    """One random walk as a question, or None when it visits an entity twice."""
    path = [rng.choice(world.entities)]
    relations: list[str] = []
    for _ in range(hop):
        relation, value = rng.choice(list(world.facts_of[path[-1]].items()))
        if value in path:
            return None
        path.append(value)
        relations.append(relation)
    if execute(world, path[0], relations) != {path[-1]}:
        return None
    return Task(
        question=question_text(path[0], relations),
        answers=(path[-1], f"{relations[-1]} {path[-1]}"),
        kind=f"hop{hop}",
        split=world.config.split,
        meta={
            "world": json.loads(json.dumps(asdict(world.config))),  # as it is read back
            "start": path[0],
            "relations": relations,
            "path": path,
        },
    )


def _read(page: str, relation: str) -> str | None:
    """The value of a relation on a page's text."""
    for line in page.split("\n")[1:]:
        if line.startswith(f"{relation} "):
            return line.removeprefix(f"{relation} ")
    return None
