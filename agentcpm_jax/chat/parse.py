"""What a completion asks for: tool calls with typed errors, and the answer.

One rule for training and evaluation:
1. the thought ends at the first `</think>`; without one, an open thought is the whole turn;
2. every `<tool_call>...</tool_call>` block is one call, in order; a bad one does not affect others;
3. a block holds the first JSON object in it (JSON5 leniency, see `lenient_json`), and for the code
   tools `<code>...</code>` fills an absent or blank `code` argument;
4. the answer is the last `<answer>...</answer>` outside the thought and the calls, stripped.

Linear in the length of the text; the limits bound what one hostile turn can cost.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from agentcpm_jax.chat import lenient_json
from agentcpm_jax.chat.lenient_json import LenientJsonError
from agentcpm_jax.types import ToolCall

#: Every value of `ToolCall.error`.
ERRORS = (
    "bad_json",
    "not_an_object",
    "missing_name",
    "bad_name",
    "bad_arguments",
    "missing_code",
    "unclosed_call",
    "unfinished_thought",
    "unknown_tool",
    "too_large",
    "too_deep",
)
CODE_TOOLS = frozenset({"PythonInterpreter", "execute_code"})


# What one completion may hold; beyond it the typed error is too_large or too_deep.
MAX_CHARS = 2_000_000
MAX_CALL_CHARS = 64_000  # of all calls together
MAX_DEPTH = 64
MAX_CALLS = 64


@dataclass(frozen=True)
class ParsedTurn:
    """`spans[k]` = the characters [start, end) of `calls[k]` in the completion's text."""

    calls: tuple[ToolCall, ...]
    answer: str | None
    spans: tuple[tuple[int, int], ...]

    @property
    def errors(self) -> tuple[str, ...]:
        """The typed errors of the malformed calls, in order."""
        return tuple(call.error for call in self.calls if call.error is not None)


def parse_completion(
    text: str,
    tool_names: Collection[str],
    *,
    in_thought: bool = False,
) -> ParsedTurn:
    """Calls and answer of one completion (the text after the prompt, without `<|im_end|>`).

    `in_thought`: the prompt has already opened `<think>`. Never raises on any text.
    """
    start = _thought_end(text, in_thought)
    if start < 0:
        call = _error("unfinished_thought", "the thought is not closed with </think>")
        return ParsedTurn((call,), None, ((0, len(text)),))
    if len(text) > MAX_CHARS:
        call = _error("too_large", f"the message is longer than {MAX_CHARS} characters")
        return ParsedTurn((call,), None, ((0, len(text)),))
    calls: list[ToolCall] = []
    spans: list[tuple[int, int]] = []
    room = MAX_CALL_CHARS
    for first, last, closed in _blocks(text, start):
        if len(calls) == MAX_CALLS:
            calls.append(_error("too_large", f"more than {MAX_CALLS} calls in one message"))
            spans.append((first, len(text)))
            break
        room -= last - first
        if not closed:
            calls.append(_UNCLOSED)
        elif room < 0:
            message = f"the calls of a message are longer than {MAX_CALL_CHARS} characters"
            calls.append(_error("too_large", message))
        else:
            calls.append(_read(text[first:last], tool_names, MAX_DEPTH))
        spans.append((first, last))
    return ParsedTurn(tuple(calls), _answer(text, start), tuple(spans))


def _thought_end(text: str, in_thought: bool) -> int:
    """Where the thought ends (0 without one), or -1 when it is still open."""
    end = text.find(_THINK_CLOSE)
    if end >= 0:
        return end + len(_THINK_CLOSE)
    return -1 if in_thought or text.lstrip().startswith("<think>") else 0


def _blocks(text: str, position: int) -> Iterator[tuple[int, int, bool]]:
    """(start, end, closed) of the call blocks from `position` on, tags included."""
    start = body = -1  # of the open block: its start, and where its first brace may be
    quoted = False  # the open block holds an opening tag inside a string
    nested = 0  # opening tags right after another: as many closing tags are ignored
    for tag in _TAG.finditer(text, position):
        if tag[0] == _CLOSE:
            if start >= 0:
                yield start, tag.end(), True
            elif nested:
                nested -= 1
            else:
                yield tag.start(), tag.end(), False
            start, quoted = -1, False
        elif start < 0:
            start, body, nested = tag.start(), tag.end(), 0
        elif not quoted:
            brace = text.find("{", body, tag.start())
            if brace < 0:
                body = tag.end()
                nested += 1
            elif lenient_json.object_end(text[brace : tag.start()], 0) == lenient_json.IN_STRING:
                quoted = True
            else:  # the open block was never closed; this tag begins another one
                yield start, tag.start(), False
                start, body, nested = tag.start(), tag.end(), 0
    if start >= 0:
        yield start, len(text), False


def _read(text: str, tool_names: Collection[str], max_depth: int) -> ToolCall:
    """The call inside a closed block."""
    block = text[len(_OPEN) : -len(_CLOSE)].strip()
    try:
        body, code = _split_code(block)
        call = _to_call(_first_object(body, max_depth), code, max_depth)
    except LenientJsonError as error:
        return _error("bad_arguments" if error.kind == "bad_value" else error.kind, str(error))
    if call.error is None and call.name not in tool_names:
        known = ", ".join(sorted(tool_names))[:500]
        return _error("unknown_tool", f"there is no tool {call.name[:100]!r}; use {known}", call)
    return call


def _split_code(block: str) -> tuple[str, str | None]:
    """The part with the JSON, and the stripped text of the `<code>` block (None without one)."""
    brace, code = block.find("{"), block.find("<code>")
    if 0 <= code < brace or brace < 0 <= code:  # code first
        end = block.find("</code>", code)
        if end < 0:
            return block, None
        return block[end + len("</code>") :].strip(), block[code + len("<code>") : end].strip()
    end = lenient_json.object_end(block, brace) if brace >= 0 else -1
    if end < 0:
        return block, None
    code = block.find("<code>", end)
    close = block.rfind("</code>", code)
    if code < 0 or close < 0:
        return block, None
    return block[:code].strip(), block[code + len("<code>") : close].strip()


def _first_object(block: str, max_depth: int) -> dict[str, Any]:
    """The first JSON object of a block; a JSON string that holds one is decoded once."""
    if block.startswith('"'):
        try:
            inner = json.loads(block, strict=False)
        except ValueError:
            inner = None
        if isinstance(inner, str):
            block = inner.strip()
    brace = block.find("{")
    if block.startswith("[") or brace < 0:
        if not block.startswith("["):
            lenient_json.loads(block, max_depth)  # raises unless it is some other JSON value
        raise _NotAnObject("a call is one JSON object with name and arguments")
    end = lenient_json.object_end(block, brace)
    if end < 0:
        if block.count("{") + block.count("[") > max_depth:
            lenient_json.loads(block, max_depth)
        raise LenientJsonError("bad_json", "the JSON object is not closed")
    return lenient_json.loads(block[brace:end], max_depth)


def _to_call(found: dict[str, Any], code: str | None, max_depth: int) -> ToolCall:
    """Name and arguments of a parsed object, `content` and `function` wrappers taken off."""
    if "name" not in found:
        for wrapper in ("content", "function"):
            if isinstance(found.get(wrapper), dict):
                found = found[wrapper]
                break
    if "name" not in found:
        return _error("missing_name", "the call has no name")
    name = found["name"]
    if not isinstance(name, str) or not name.strip():
        return _error("bad_name", "the name of a tool is a string that is not empty")
    call = ToolCall(name, None)
    if "arguments" not in found:
        return _error("bad_arguments", "the call has no arguments", call)
    arguments = found["arguments"]
    if isinstance(arguments, str):
        try:
            arguments = lenient_json.loads(arguments, max_depth)
        except LenientJsonError as error:
            kind = "too_deep" if error.kind == "too_deep" else "bad_arguments"
            return _error(kind, f"arguments: {error}", call)
    if not isinstance(arguments, dict):
        return _error("bad_arguments", "arguments must be a JSON object", call)
    if name in CODE_TOOLS:
        given = arguments.get("code")
        if given is None or (isinstance(given, str) and not given.strip()):
            if not code:
                return _error("missing_code", "put the code between <code> and </code>", call)
            arguments = {**arguments, "code": code}
    return ToolCall(name, arguments)


def _answer(text: str, start: int) -> str | None:
    kept: list[str] = []
    for first, last, _ in _blocks(text, start):
        kept.append(text[start:first])
        start = last
    outside = "".join([*kept, text[start:]])
    close = outside.rfind("</answer>")
    opened = outside.rfind("<answer>", 0, max(close, 0))
    if opened < 0:
        return None
    return outside[opened + len("<answer>") : close].strip() or None


class _NotAnObject(LenientJsonError):
    def __init__(self, message: str) -> None:
        super().__init__("not_an_object", message)


def _error(kind: str, message: str, call: ToolCall | None = None) -> ToolCall:
    call = call or ToolCall("", None)
    return dataclasses.replace(call, name=call.name[:200], error=kind, message=message)


_OPEN, _CLOSE, _THINK_CLOSE = "<tool_call>", "</tool_call>", "</think>"
_TAG = re.compile(f"{_OPEN}|{_CLOSE}")
_UNCLOSED = _error("unclosed_call", "a call stands between <tool_call> and </tool_call>")
