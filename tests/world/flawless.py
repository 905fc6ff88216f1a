"""What a flawless episode does and says, from a task's own path through the graph."""

from __future__ import annotations

from agentcpm_jax.types import Task

Call = tuple[str, dict[str, str]]


def oracle_calls(task: Task) -> list[Call]:
    """The tool calls of a flawless episode, two per hop."""
    calls: list[Call] = []
    key = ""
    for relation, name in zip(task.meta["relations"], task.meta["path"][:-1], strict=True):
        calls += [("search", {"query": key + name}), ("visit", {"title": name})]
        key = f"{relation} "
    return calls


def oracle_answer(task: Task) -> str:
    """What stands inside `<answer></answer>`: the last relation, then the name."""
    return f"{task.meta['relations'][-1]} {task.meta['path'][-1]}"
