"""Supervised data: JSON lines of {"messages": [...], "tools": [...]}, one conversation each."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from agentcpm_jax.data.rows import Row, demo_row
from agentcpm_jax.ranges import check_choice, check_least
from agentcpm_jax.types import Segment, UserError

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class SFTDataConfig:
    """Where demonstrations come from and which of their tokens are trained.

    Conversations of more than `max_length` tokens are dropped and counted, never cut; the
    original's limit is 21,000.
    """

    path: str | None = None  # a JSONL file; None: demonstrations of the offline world
    max_length: int = 21_000
    mask: str = "all"  # what is trained: all assistant turns | the last one
    skip_bad: bool = False  # leave out bad lines of the file

    def __post_init__(self) -> None:
        check_choice(self, "data", {"mask": ("all", "last")})
        check_least(self, "data", {"max_length": 1})


@dataclass(frozen=True)
class Conversation:
    """One line of the file; `where` is file:line."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    where: str = ""


class Renderer(Protocol):
    """The part of `chat.format.ChatFormat` used here: token ids with provenance."""

    def demo_segment(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> Segment: ...


def read_conversations(path: str, skip_bad: bool = False) -> tuple[list[Conversation], list[str]]:
    """(the conversations, an error message for each bad line that was skipped).

    Blank lines are ignored.

    Raises:
      UserError: no such file; a bad line (named as file:line) unless `skip_bad`; nothing usable.
    """
    if not Path(path).is_file():
        raise UserError(f"no such file: {path!r}; give a JSONL file of conversations")
    conversations, bad = [], []
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                conversations.append(_parse(line, f"{path}:{number}"))
            except ValueError as error:
                bad.append(f"{path}:{number}: {error}")
                if not skip_bad:
                    raise UserError(
                        f"{bad[0]}; mend the line, or pass skip_bad=True to use the others"
                    ) from None
    if not conversations:
        raise UserError(f"{path} holds no usable conversation ({len(bad)} bad lines)")
    return conversations, bad


def conversation_rows(
    conversations: Sequence[Conversation], chat: Renderer, cfg: SFTDataConfig
) -> tuple[list[Row], Counter[str]]:
    """(rows, counts): `kept`, and dropped as `too_long`, `nothing_trained` or `bad`.

    Raises:
      UserError: the template cannot render a conversation (named as file:line), unless
        `cfg.skip_bad`.
    """
    rows: list[Row] = []
    counts: Counter[str] = Counter()
    for conversation in conversations:
        try:
            segment = chat.demo_segment(conversation.messages, conversation.tools)
        except UserError as error:
            if not cfg.skip_bad:
                raise UserError(f"{conversation.where}: {error}") from error
            counts["bad"] += 1
            continue
        row = demo_row(segment)
        if cfg.mask == "last":
            row = replace(row, loss_mask=last_span(row.loss_mask))
        if len(row) > cfg.max_length:
            counts["too_long"] += 1
        elif not row.num_trained:
            counts["nothing_trained"] += 1
        else:
            counts["kept"] += 1
            rows.append(row)
    return rows, counts


def last_span(mask: np.ndarray) -> np.ndarray:
    """bool[T]: only the last run of True (assistant turns have template tokens between them)."""
    trained = np.flatnonzero(mask)
    if not len(trained):
        return mask
    gaps = np.flatnonzero(np.diff(trained) > 1)
    start = trained[gaps[-1] + 1] if len(gaps) else trained[0]
    return mask & (np.arange(len(mask)) >= start)


def _parse(line: bytes, where: str) -> Conversation:
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        raise ValueError('not an object with a list "messages"')
    messages, tools = record["messages"], record.get("tools") or []
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise ValueError(f"messages[{i}] has role {role!r}, not one of {', '.join(ROLES)}")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no assistant message to learn from")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError('"tools" is not a list of objects')
    return Conversation(tuple(messages), tuple(tools), where)
