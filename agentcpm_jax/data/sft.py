"""Supervised data: files of conversations, in every schema of `schemas.FORMS`, become rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from agentcpm_jax.data.conversation import Conversation
from agentcpm_jax.data.rows import Row, demo_row, text_row
from agentcpm_jax.data.schemas import read_conversation
from agentcpm_jax.ranges import check_choice, check_least
from agentcpm_jax.records import Flaw, read_records
from agentcpm_jax.types import Segment, UserError


@dataclass(frozen=True)
class SFTDataConfig:
    """Where demonstrations come from and which of their tokens are trained.

    Conversations of more than `max_length` tokens are dropped and counted, never cut; the
    original's limit is 21,000.
    """

    path: str | None = None  # a file of conversations; None: demonstrations of the offline world
    max_length: int = 21_000
    mask: str = "all"  # what is trained: all assistant turns | the last one
    skip_bad: bool = False  # leave out bad lines of the file

    def __post_init__(self) -> None:
        check_choice(self, "data", {"mask": ("all", "last")})
        check_least(self, "data", {"max_length": 1})


class Renderer(Protocol):
    """The part of `chat.format.ChatFormat` used here: token ids with provenance."""

    def demo_segment(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        context: Collection[int],
    ) -> Segment: ...

    def raw_ids(self, text: str) -> np.ndarray: ...

    def with_kwargs(self, **template_kwargs: Any) -> Renderer: ...


def read_conversations(path: str, skip_bad: bool = False) -> tuple[list[Conversation], list[str]]:
    """(the conversations, an error message for each bad record that was skipped).

    Raises:
      UserError: no such file; a bad record (named as file:line) unless `skip_bad`; nothing usable.
    """
    conversations, bad = [], []
    for found in each_conversation(path):
        if isinstance(found, Conversation):
            conversations.append(found)
            continue
        line, flaw = found
        bad.append(f"{path}:{line}: {flaw}")
        if not skip_bad:
            raise UserError(f"{bad[0]}; mend the line, or pass skip_bad=True to use the others")
    if not conversations:
        raise UserError(
            f"{path} holds no usable conversation ({len(bad)} bad lines, the first is {bad[0]})"
        )
    return conversations, bad


def each_conversation(path: str) -> Iterator[Conversation | tuple[int, Flaw]]:
    """A conversation, or (line, what is wrong with it), for each record of a file."""
    for record in read_records(path):
        try:
            if record.flaw:
                raise record.flaw
            yield read_conversation(record.value, f"{path}:{record.line}")
        except Flaw as flaw:
            yield record.line, flaw


class Rendered(NamedTuple):
    """A conversation's row, and why it is not trained ('' if it is)."""

    conversation: Conversation
    row: Row | None
    reason: str = ""  # too_long | nothing_trained | bad
    detail: str = ""


def conversation_rows(
    conversations: Sequence[Conversation], chat: Renderer, cfg: SFTDataConfig
) -> tuple[list[Row], Counter[str]]:
    """(rows, counts): `kept`, and dropped as `too_long`, `nothing_trained` or `bad`.

    Raises:
      UserError: the template cannot render a conversation (named as file:line), unless
        `cfg.skip_bad`.
    """
    rendered = [render_row(conversation, chat, cfg) for conversation in conversations]
    rows = [r.row for r in rendered if r.row is not None and not r.reason]
    return rows, Counter(r.reason or "kept" for r in rendered)


def render_row(conversation: Conversation, chat: Renderer, cfg: SFTDataConfig) -> Rendered:
    """One conversation as `conversation_rows` has it."""
    try:
        row = _row(conversation, chat)
    except UserError as error:
        said = f"{conversation.where}: {error}"
        if not cfg.skip_bad:
            raise UserError(said) from error
        return Rendered(conversation, None, "bad", said)
    if cfg.mask == "last":
        row = replace(row, loss_mask=last_span(row.loss_mask))
    if len(row) > cfg.max_length:
        said = f"{len(row):,} tokens, max_length is {cfg.max_length:,}"
        return Rendered(conversation, row, "too_long", f"{conversation.where}: {said}")
    if not row.num_trained:
        said = f"{conversation.where}: no token of it is trained"
        return Rendered(conversation, row, "nothing_trained", said)
    return Rendered(conversation, row)


def _row(conversation: Conversation, chat: Renderer) -> Row:
    if conversation.segments:
        parts = [(chat.raw_ids(part.text), part.train) for part in conversation.segments]
        mask = np.concatenate([np.full(len(ids), train, bool) for ids, train in parts])
        row = text_row(np.concatenate([ids for ids, _ in parts]))
        return replace(row, loss_mask=row.loss_mask & mask)
    if conversation.template_kwargs:
        chat = chat.with_kwargs(**conversation.template_kwargs)
    messages = conversation.for_template()
    if messages[0]["role"] == "assistant":
        raise UserError("it begins with an assistant's turn; put what was asked before it")
    turns = enumerate(conversation.messages)
    context = {i for i, m in turns if m.role == "assistant" and not m.train}
    return demo_row(chat.demo_segment(messages, conversation.tools, context))


def last_span(mask: np.ndarray) -> np.ndarray:
    """bool[T]: only the last run of True (assistant turns have template tokens between them)."""
    trained = np.flatnonzero(mask)
    if not len(trained):
        return mask
    gaps = np.flatnonzero(np.diff(trained) > 1)
    start = trained[gaps[-1] + 1] if len(gaps) else trained[0]
    return mask & (np.arange(len(mask)) >= start)
