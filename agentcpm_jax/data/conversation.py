"""What a demonstration is once it has been read, whatever its file looked like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Call:
    """An assistant's call of a function. `id` is the file's, which may use one again later."""

    name: str
    arguments: Mapping[str, Any]
    id: str | None = None


@dataclass(frozen=True)
class Message:
    """One turn. `train`: whether its tokens are trained, which only an assistant's may be.

    `answers`, of a tool's result: which call it answers, counting all calls of the conversation
    from 0. `at` is where the turn stands in its record.
    """

    role: str  # system | user | assistant | tool
    content: str = ""
    reasoning: str | None = None
    calls: tuple[Call, ...] = ()
    train: bool = False
    answers: int | None = None
    at: str = ""
    result_of: tuple[str | None, str | None] = (None, None)  # call id and function, as in the file


@dataclass(frozen=True)
class TextSegment:
    """Raw text: no template is put round it."""

    text: str
    train: bool


@dataclass(frozen=True)
class Conversation:
    """One record of a file, `where` is file:line: turns and tools, or segments of raw text."""

    messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    where: str = ""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    segments: tuple[TextSegment, ...] = ()

    def for_template(self) -> list[dict[str, Any]]:
        """The turns as chat templates read them, results in the order of their calls.

        That is the order in which an agent sees them; templates show no ids.
        """
        out: list[dict[str, Any]] = []
        ordinal = 0
        for message in in_order_of_calls(self.messages):
            turn: dict[str, Any] = {"role": message.role, "content": message.content}
            if message.reasoning is not None:
                turn["reasoning_content"] = message.reasoning
            if message.calls:
                turn["tool_calls"] = [
                    {
                        "id": f"call_{ordinal + i}",
                        "type": "function",
                        "function": {"name": call.name, "arguments": call.arguments},
                    }
                    for i, call in enumerate(message.calls)
                ]
            if message.answers is not None:
                turn["tool_call_id"] = f"call_{message.answers}"
            ordinal += len(message.calls)
            out.append(turn)
        return out


def in_order_of_calls(messages: Sequence[Message]) -> list[Message]:
    """The messages, with each run of results sorted by the calls that they answer."""
    out: list[Message] = []
    run: list[Message] = []
    for message in messages:
        if message.role == "tool":
            run.append(message)
            continue
        out += [*sorted(run, key=lambda m: m.answers or 0), message]
        run = []
    return out + sorted(run, key=lambda m: m.answers or 0)
