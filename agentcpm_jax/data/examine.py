"""What becomes of the records of a file: rows kept and dropped with reasons, lengths, an example.

`launch/data.py check` and the start of every stage show it, and the report of a run.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from agentcpm_jax.chat.format import ChatFormat
from agentcpm_jax.data.conversation import Conversation
from agentcpm_jax.data.rows import Row
from agentcpm_jax.data.sft import Rendered, SFTDataConfig, each_conversation, render_row
from agentcpm_jax.tasks.jsonl import scan_tasks
from agentcpm_jax.types import UserError

#: Of each reason, how many rows the start of a run names; `data check` names all.
NAMED = 3
_TRAINED = "\033[32m"  # green
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # would steer the terminal
_PROBE = "a thought that the template shows"


@dataclass(frozen=True)
class Examined:
    """A file's records. `dropped` names each one that is not used, by its reason.

    `digests` has a short hash of each row that is used, in order. `example` is one row as pieces
    of text, each with whether it is trained.
    """

    path: str
    kept: int = 0
    dropped: tuple[tuple[str, str], ...] = ()  # (reason, which record and why)
    lengths: tuple[int, ...] = ()  # tokens of each row that is kept
    trained: int = 0  # tokens of them that are trained
    notes: tuple[str, ...] = ()
    digests: tuple[str, ...] = ()
    example: tuple[tuple[str, bool], ...] = ()

    @property
    def counts(self) -> Counter[str]:
        """`kept`, and how many records each reason dropped."""
        return Counter(kept=self.kept) + Counter(reason for reason, _ in self.dropped)

    def usable(self) -> Examined:
        """These; raises `UserError` when no record is used."""
        if self.kept:
            return self
        reason, which = self.dropped[0] if self.dropped else ("empty", "there is none")
        n = len(self.dropped)
        raise UserError(f"{self.path}: none of {n} records is usable, the first: {reason}, {which}")

    def lines(self, named: int | None = None, color: bool | None = None) -> list[str]:
        """For a terminal; `named`: at most so many dropped records of each reason by name.

        `color` of what is trained; None: if stdout is a terminal.
        """
        if color is None:
            color = sys.stdout.isatty() and not os.environ.get("NO_COLOR", "")
        records = self.kept + len(self.dropped)
        reasons = Counter(reason for reason, _ in self.dropped)
        why = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
        said = f"{self.kept} of {records} records of {self.path} are used"
        out = [said + (f"; dropped: {why}" if why else "")]
        for reason in reasons:
            which = [text for r, text in self.dropped if r == reason]
            out += [f"  {reason}: {text}" for text in which[:named]]
            more = len(which) - len(which[:named])
            out += [f"  {reason}: {more} more; launch/data.py check names all"] if more else []
        if self.lengths:
            low, middle, high, most = np.percentile(self.lengths, [0, 50, 90, 100])
            total = sum(self.lengths)
            share = self.trained / max(total, 1)
            out.append(
                f"  tokens: {total:,}, {share:.0%} of them trained; a row has {low:.0f} to "
                f"{most:.0f}, median {middle:.0f}, 90 % at most {high:.0f}; none is truncated"
            )
        out += [f"  note: {note}" for note in self.notes]
        if self.example:
            out += ["  one row, what is trained " + ("in green:" if color else "in [[ ]]:")]
            out += _shown(self.example, bool(color)).split("\n")
        return out


def examine_conversations(
    path: str, chat: ChatFormat, cfg: SFTDataConfig, row_length: int | None = None
) -> tuple[list[Row], Examined]:
    """(rows, what became of each record); rows longer than `row_length` are dropped too.

    Raises:
      UserError: a record cannot be read or rendered, and `cfg.skip_bad` is not set.
    """
    rendered: list[Rendered] = []
    dropped: list[tuple[str, str]] = []
    for found in each_conversation(path):
        if isinstance(found, Conversation):
            rendered.append(_fitting(render_row(found, chat, cfg), row_length))
            if rendered[-1].reason:
                dropped.append((rendered[-1].reason, rendered[-1].detail))
            continue
        line, flaw = found
        said = f"{path}:{line}: {flaw}"
        if not cfg.skip_bad:
            fix = "mend the line, or pass skip_bad=True to use the others"
            raise UserError(f"{said}; {fix}")
        dropped.append(("bad", said))
    used = [r for r in rendered if r.row is not None and not r.reason]
    rows = [r.row for r in used if r.row is not None]
    digests = tuple(_digest(row.ids.tobytes(), row.loss_mask.tobytes()) for row in rows)
    return rows, Examined(
        path,
        len(rows),
        tuple(dropped),
        tuple(map(len, rows)),
        sum(row.num_trained for row in rows),
        (*_notes(used, chat), *_repeated(digests)),
        digests,
        tuple(_pieces(rows[0], chat)) if rows else (),
    )


def examine_tasks(path: str, skip_bad: bool = False) -> Examined:
    """What becomes of each record of a file of tasks; raises `UserError` as `scan_tasks` does."""
    _, report = scan_tasks(path, skip_bad)
    dropped = [("bad", line) for line in report.bad]
    dropped += [("duplicate", line) for line in report.duplicates]
    return Examined(path, report.loaded, tuple(dropped), digests=report.digests)


def _fitting(rendered: Rendered, row_length: int | None) -> Rendered:
    row = rendered.row
    if rendered.reason or row is None or row_length is None or len(row) <= row_length:
        return rendered
    said = f"{rendered.conversation.where}: {len(row):,} tokens, shape.row_length is {row_length:,}"
    return rendered._replace(reason="too_long", detail=said)


def _notes(used: Sequence[Rendered], chat: ChatFormat) -> list[str]:
    """What the template changes without a word."""
    thinking = sum(any(m.reasoning and m.train for m in r.conversation.messages) for r in used)
    turn = {"role": "assistant", "content": "a", "reasoning_content": _PROBE}
    asked = [{"role": "user", "content": "q"}, turn]
    if thinking and _PROBE not in chat.render(asked, add_generation_prompt=False):
        return [
            f"{thinking} rows have thoughts under keys of their own, which this template does not "
            "show: they are not trained; use a template that does, or write them into the content"
        ]
    return []


def _repeated(digests: Sequence[str]) -> list[str]:
    again = len(digests) - len(set(digests))
    return [f"{again:,} rows repeat an earlier one word for word; they are used"] if again else []


def _pieces(row: Row, chat: ChatFormat) -> list[tuple[str, bool]]:
    cuts = [0, *(np.flatnonzero(np.diff(row.loss_mask)) + 1).tolist(), len(row)]
    return [(chat.decode(row.ids[a:b]), bool(row.loss_mask[a])) for a, b in pairwise(cuts) if a < b]


def _shown(pieces: Sequence[tuple[str, bool]], color: bool) -> str:
    pieces = [(_CONTROL.sub("\ufffd", text), trained) for text, trained in pieces]
    if color:  # each line by itself, so that a pager keeps it
        marked = [
            text if not trained else "\n".join(f"{_TRAINED}{t}\033[0m" for t in text.split("\n"))
            for text, trained in pieces
        ]
        return "".join(marked)
    return "".join(f"[[{text}]]" if trained else text for text, trained in pieces)


def _digest(*parts: bytes) -> str:
    found = hashlib.blake2b(digest_size=6)
    for part in parts:
        found.update(part)
    return found.hexdigest()
