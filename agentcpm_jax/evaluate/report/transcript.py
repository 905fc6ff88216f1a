"""A trajectory as people read it: who said what, what was thought, which tool was called how."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from agentcpm_jax.evaluate.report.formats import format_number

LONG, TALL = 700, 14  # characters and lines of an observation that are shown before a fold
PARTS = re.compile(r"<(think|tool_call|answer)>(.*?)(?:</\1>|\Z)", re.DOTALL)
RESPONSE = re.compile(r"\s*<tool_response>\n?(.*?)\n?</tool_response>\s*", re.DOTALL)
MARKS = {"right": "✓", "wrong": "✗", "unknown": "?"}
ROLES = ("system", "user", "assistant", "tool")


class Part(NamedTuple):
    """A piece of a turn; `kind` says how transcript.html.j2 shows it."""

    kind: str
    text: str = ""
    title: str = ""  # what is shown of folded words; the name of a called tool
    more: str = ""  # what is folded of an observation
    arguments: Sequence[tuple[str, str]] = ()  # of a call: name, value as JSON


class ReadTurn(NamedTuple):
    """One turn, taken apart; `kind` is the role, or `other` for one that is not Qwen's."""

    kind: str
    role: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class TrajectoryReport:
    """One readable trajectory; a turn is (role, text), texts as rendered with Qwen's tags."""

    title: str
    verdict: str
    reward: float | None
    turns: tuple[tuple[str, str], ...]
    note: str = ""

    def outcome(self) -> str:
        """The verdict, if it is one."""
        return self.verdict if self.verdict in MARKS else "unknown"

    def mark(self) -> str:
        """The verdict as a sign."""
        return MARKS[self.outcome()]

    def size(self) -> str:
        """`3 turns, 1 tool call, reward 0.5`."""
        calls = sum(text.count("<tool_call>") for role, text in self.turns if role == "assistant")
        size = f"{len(self.turns)} turns, {calls} tool call{'' if calls == 1 else 's'}"
        return size if self.reward is None else f"{size}, reward {format_number(self.reward)}"

    def read(self) -> list[ReadTurn]:
        """The turns, taken apart."""
        return [_read(role, text) for role, text in self.turns]


def _read(role: str, text: str) -> ReadTurn:
    if role == "user" and RESPONSE.fullmatch(text):
        role = "tool"  # Qwen's template shows observations as the user's words
    if role == "assistant":
        parts = _said(text) or [Part("empty")]
    elif role == "tool":
        parts = [_observation(part) for part in RESPONSE.findall(text) or [text]]
    elif role == "system":
        first, _, rest = text.strip().partition("\n")
        long = rest or len(first) > 160
        parts = [Part("folded words", text.strip(), first[:160])] if long else _words(text)
    else:
        parts = _words(text)
    return ReadTurn(role if role in ROLES else "other", role, parts)


def _said(text: str) -> list[Part]:
    """Plain words, thoughts, calls and the answer, in the order in which they were said."""
    out: list[Part] = []
    at = 0
    for match in PARTS.finditer(text):
        out += _words(text[at : match.start()])
        tag, inner = match.group(1), match.group(2).strip()
        if tag == "tool_call":
            out.append(_call(inner))
        elif tag == "answer" or inner:
            out.append(Part(tag, inner))
        at = match.end()
    return out + _words(text[at:])


def _call(text: str) -> Part:
    """A call with its arguments, or as it was written when it does not parse."""
    try:
        call = json.loads(text)
        name, arguments = str(call["name"]), call["arguments"].items()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Part("malformed call", text)
    shown = [(key, json.dumps(value, ensure_ascii=False)) for key, value in arguments]
    return Part("call", title=name, arguments=shown)


def _observation(text: str) -> Part:
    lines = text.splitlines(keepends=True)
    if len(text) <= LONG + 200 and len(lines) <= TALL + 4:
        return Part("observation", text)
    cut = min(len("".join(lines[:TALL])), LONG)
    cut = text.rfind("\n", cut - 200, cut) + 1 or cut
    return Part("observation", f"{text[:cut].rstrip()}\n…", more=text[cut:])


def _words(text: str) -> list[Part]:
    text = text.strip()
    return [Part("words", text)] if text else []
