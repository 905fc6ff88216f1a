"""What a completion asks for: tool calls with typed errors, and the answer.

One rule for training and evaluation:
1. the first thought ends at the first `</think>`, later ones stand between tags of their own; what
   stands in a thought does not count. An open thought that begins the turn is the whole turn;
2. every `<tool_call>...</tool_call>` block is one call, in order; a bad one does not affect others
   (`chat/blocks.py`);
3. a block holds one JSON object (JSON5 leniency, see `lenient_json`), and for the code tools
   `<code>...</code>` fills an absent or blank `code` argument;
4. the answer is the last `<answer>...</answer>` outside thoughts and calls, stripped;
5. a call or an answer that cannot count is a typed error: none is dropped in silence.

Linear in the length of the text; the limits bound what one hostile turn can cost.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from agentcpm_jax.chat import lenient_json
from agentcpm_jax.chat.blocks import CLOSE, OPEN, THINK_END, Block, Kind, cut, split_code
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
    "stray_thought_end",
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
    if len(text) > MAX_CHARS:
        call = _error("too_large", f"the message is longer than {MAX_CHARS} characters")
        return ParsedTurn((call,), None, ((0, len(text)),))
    start = 0
    if in_thought:
        start = text.find(THINK_END) + len(THINK_END)
    blocks = list(cut(text, start))
    if (in_thought and THINK_END not in text) or _is_open_from_the_start(text, blocks):
        return ParsedTurn((_UNFINISHED,), None, ((0, len(text)),))
    calls: list[ToolCall] = []
    spans: list[tuple[int, int]] = []
    if not in_thought and (end := _implied_thought(blocks)) is not None:
        if any(block.end <= end.start for block in blocks) or _answer(text[: end.start], 0, ()):
            calls.append(_STRAY)
            spans.append((0, end.end))
        start, blocks = end.end, [block for block in blocks if block.start >= end.end]
    if blocks and blocks[-1].kind is Kind.OPEN_THOUGHT and not _asks(text, blocks[-1]):
        blocks.pop()  # the tag is only spoken of
    room = MAX_CALL_CHARS
    for kind, first, last in blocks:
        if kind in (Kind.THOUGHT, Kind.THOUGHT_END):
            continue
        spans.append((first, last))
        room -= last - first
        if kind is Kind.OPEN_THOUGHT:
            calls.append(_UNFINISHED)
        elif len(calls) == MAX_CALLS:
            calls.append(_error("too_large", f"more than {MAX_CALLS} calls in one message"))
            spans[-1] = (first, len(text))
            break
        elif kind is Kind.UNCLOSED:
            calls.append(_UNCLOSED)
        elif room < 0:
            message = f"the calls of a message are longer than {MAX_CALL_CHARS} characters"
            calls.append(_error("too_large", message))
        else:
            calls.append(_read(text[first:last], tool_names, MAX_DEPTH))
    return ParsedTurn(tuple(calls), _answer(text, start, blocks), tuple(spans))


def _is_open_from_the_start(text: str, blocks: Sequence[Block]) -> bool:
    if not blocks or blocks[0].kind is not Kind.OPEN_THOUGHT:
        return False
    return not text[: blocks[0].start].strip()


def _implied_thought(blocks: Sequence[Block]) -> Block | None:
    """The first `</think>` of a message that has opened no thought before."""
    opened = (Kind.THOUGHT, Kind.OPEN_THOUGHT, Kind.THOUGHT_END)
    first = next((block for block in blocks if block.kind in opened), None)
    return first if first is not None and first.kind is Kind.THOUGHT_END else None


def _asks(text: str, thought: Block) -> bool:
    """Whether a call or an answer stands in a thought that is never closed."""
    said = text[thought.start :]
    return OPEN in said or CLOSE in said or _answer(said, 0, ()) is not None


def _read(text: str, tool_names: Collection[str], max_depth: int) -> ToolCall:
    """The call inside a closed block."""
    block = text[len(OPEN) : -len(CLOSE)].strip()
    try:
        body, code = split_code(block)
        call = _to_call(_first_object(body, max_depth), code, max_depth)
    except LenientJsonError as error:
        return _error("bad_arguments" if error.kind == "bad_value" else error.kind, str(error))
    if call.error is None and call.name not in tool_names:
        known = ", ".join(sorted(tool_names))[:500]
        return _error("unknown_tool", f"there is no tool {call.name[:100]!r}; use {known}", call)
    return call


def _first_object(block: str, max_depth: int) -> dict[str, Any]:
    """The JSON object of a block; a JSON string that holds one is decoded once."""
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
    found = lenient_json.loads(block[brace:end], max_depth)
    if "{" in block[end:]:
        raise _NotAnObject("a second object; each call stands between tags of its own")
    return found


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
    arguments = found.get("arguments")
    if name in CODE_TOOLS and code and arguments is None:
        arguments = {}
    elif "arguments" not in found:
        return _error("bad_arguments", "the call has no arguments", call)
    elif code and name not in CODE_TOOLS:
        return _error("bad_arguments", "this tool takes no <code>; use its arguments", call)
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


def _answer(text: str, start: int, blocks: Sequence[Block]) -> str | None:
    """The last answer from `start` on and outside the blocks."""
    kept: list[str] = []
    for kind, first, last in blocks:
        if kind is not Kind.THOUGHT_END:
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


_UNCLOSED = _error("unclosed_call", "a call stands between <tool_call> and </tool_call>")
_UNFINISHED = _error("unfinished_thought", "the thought is not closed with </think>")
_STRAY = _error("stray_thought_end", "a call or an answer before </think>, and no <think>")
