"""Cuts what a model wrote into thoughts, call blocks and the text between them.

Tags inside the strings and the code of a call are text, as far as the JSON around them can be read;
where it cannot, a block ends at the next tag, so that a bad call does not swallow the next one.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator
from typing import NamedTuple

from agentcpm_jax.chat import lenient_json
from agentcpm_jax.chat.lenient_json import LenientJsonError

OPEN, CLOSE = "<tool_call>", "</tool_call>"
THINK, THINK_END = "<think>", "</think>"
CODE, CODE_END = "<code>", "</code>"

MAX_BLOCK_CHARS = 64_000  # in which the end of a call is looked for behind tags in its strings
#: Blocks of a message in which that may fail: what a hostile one costs is bounded.
MAX_SEARCHES = 8


class Kind(enum.Enum):
    """What a stretch of a message is."""

    CALL = enum.auto()  # <tool_call> ... </tool_call>
    UNCLOSED = enum.auto()  # one of these two tags without the other
    THOUGHT = enum.auto()  # <think> ... </think>
    OPEN_THOUGHT = enum.auto()  # <think> ... and the message ends
    THOUGHT_END = enum.auto()  # </think> without <think>


class Block(NamedTuple):
    """The characters [start, end) of a message, tags included."""

    kind: Kind
    start: int
    end: int


def cut(text: str, position: int) -> Iterator[Block]:
    """The blocks of a message from `position` on, in order."""
    nested, searches = 0, MAX_SEARCHES  # nested: opening tags whose closing tags are ignored
    while tag := _TAG.search(text, position):
        position = tag.end()
        if tag[0] == THINK:
            end = text.find(THINK_END, position)
            if end < 0:
                yield Block(Kind.OPEN_THOUGHT, tag.start(), len(text))
                return
            position = end + len(THINK_END)
            yield Block(Kind.THOUGHT, tag.start(), position)
        elif tag[0] == THINK_END:
            yield Block(Kind.THOUGHT_END, tag.start(), position)
        elif tag[0] == CLOSE:
            if nested:
                nested -= 1
            else:
                yield Block(Kind.UNCLOSED, tag.start(), position)
        else:
            body, nested = _after_openings(text, position)
            position = _end_of_readable(text, body) if searches else -1
            closed = position >= 0
            if not closed:
                searches -= searches > 0
                position, closed = _end_by_tags(text, body)
            yield Block(Kind.CALL if closed else Kind.UNCLOSED, tag.start(), position)


def first_call(text: str, in_thought: bool) -> int:
    """Where the first call of a message that still grows may begin; its length while none does.

    `in_thought`: the prompt has opened a thought.
    """
    start = 0
    if in_thought or text.lstrip().startswith(THINK):
        start = text.find(THINK_END)
    found = text.find(OPEN, start) if start >= 0 else -1
    return found if found >= 0 else len(text)


def split_code(block: str) -> tuple[str, str | None]:
    """The part of a call with the JSON, and the code in `<code>` (None without a closed one)."""
    brace, code = block.find("{"), block.find(CODE)
    if 0 <= code < brace or brace < 0 <= code:  # code first
        close = _CODE_THEN_OBJECT.search(block, code)
        end = close.start() if close else block.find(CODE_END, code)
        if end < 0:
            return block, None
        rest = block[:code] + block[end + len(CODE_END) :]
        return rest.strip(), _without_margin(block[code + len(CODE) : end])
    end = lenient_json.object_end(block, brace) if brace >= 0 else -1
    code = block.find(CODE, end) if end >= 0 else -1
    close_at = block.rfind(CODE_END, code) if code >= 0 else -1
    if close_at < 0:
        return block, None
    rest = block[:code] + block[close_at + len(CODE_END) :]
    return rest.strip(), _without_margin(block[code + len(CODE) : close_at])


def _after_openings(text: str, body: int) -> tuple[int, int]:
    """Skip opening tags before any brace; returns the place after them and their number."""
    nested = 0
    for tag in _CALL_TAG.finditer(text, body):
        if tag[0] == CLOSE or text.find("{", body, tag.start()) >= 0:
            break
        body, nested = tag.end(), nested + 1
    return body, nested


def _end_of_readable(text: str, body: int) -> int:
    """The end of a call block whose JSON can be read, behind tags in strings and code; or -1."""
    stop = min(body + MAX_BLOCK_CHARS, len(text))
    brace, code = text.find("{", body, stop), text.find(CODE, body, stop)
    first = _CALL_TAG.search(text, body)
    if 0 <= code < brace:
        close = _CODE_THEN_OBJECT.search(text, code, stop)
        if close is None or _another_call(text, code, close.start()):
            return -1
        brace = close.end() - 1
    elif first is not None and first.start() < brace:
        return -1
    end = lenient_json.object_end(text, brace, stop) if brace >= 0 else -1
    found = _AFTER_OBJECT.search(text, end, stop) if end >= 0 else None
    if found is not None and found[0] == CODE:
        code = found.end()
        found = _CODE_THEN_CLOSE.search(text, code, stop)
        if found is not None and _another_call(text, code, found.start()):
            found = None
    if found is None or found[0] == OPEN:
        return -1
    if first is not None and first.end() < found.end() and not _is_json(text[brace:end]):
        return -1  # what looked like strings with tags in them is not
    return found.end()


def _end_by_tags(text: str, body: int) -> tuple[int, bool]:
    """(end, closed) of a call block by its tags alone, but for opening tags in a string."""
    quoted = False
    for tag in _CALL_TAG.finditer(text, body):
        if tag[0] == CLOSE:
            return tag.end(), True
        if not quoted:
            brace = text.find("{", body)
            if lenient_json.object_end(text, brace, tag.start()) != lenient_json.IN_STRING:
                return tag.start(), False  # it was never closed; this tag begins another one
            quoted = True
    return len(text), False


def _another_call(text: str, start: int, end: int) -> bool:
    """Whether a call is closed and another one opened in what would be code."""
    opened = _OPENED.search(text, start, end)
    return opened is not None and text.find(CLOSE, start, opened.start()) >= 0


def _is_json(text: str) -> bool:
    try:
        lenient_json.loads(text)
    except LenientJsonError:
        return False
    return True


def _without_margin(code: str) -> str:
    """The code without blank lines around it, and without what all its lines are indented by."""
    blank = _BLANK_LINES.match(code)
    lines = code[blank.end() if blank else 0 :].rstrip().split("\n")
    full = [line for line in lines if line.strip()]
    indents = [line[: len(line) - len(line.lstrip(" \t"))] for line in full]
    margin = min(indents, key=len, default="")
    if all(line.startswith(margin) for line in full):
        lines = [line.removeprefix(margin) for line in lines]
    if not blank:  # a space after the tag is no indentation
        lines[0] = lines[0].lstrip()
    return "\n".join(lines)


_TAG = re.compile("|".join((OPEN, CLOSE, THINK, THINK_END)))
_CALL_TAG = re.compile(f"{OPEN}|{CLOSE}")
_AFTER_OBJECT = re.compile(f"{OPEN}|{CLOSE}|{CODE}")
_CODE_THEN_CLOSE = re.compile(rf"{CODE_END}\s*+{CLOSE}")
_CODE_THEN_OBJECT = re.compile(rf"{CODE_END}\s*+\{{")
_OPENED = re.compile(rf"{OPEN}\s*+[{{<]")
_BLANK_LINES = re.compile(r"(?:[^\S\n]*+\n)++")
