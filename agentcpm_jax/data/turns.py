"""The turns of `messages` and of ShareGPT's `conversations`: roles, text, thoughts, calls, flags.

Every key of a turn is read or refused: one that is ignored would change what is trained.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from agentcpm_jax.data.calls import (
    Tools,
    check_ids,
    check_keys,
    check_turn,
    match_results,
    read_call,
    read_function,
)
from agentcpm_jax.data.conversation import Call, Message
from agentcpm_jax.records import Flaw, is_set, no_text, parse_json

#: What files call the four roles.
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
FLAGS = ("weight", "train", "trainable")
_EVERY_TURN = {"role", "from", "content", "value", *FLAGS}
_OF_ROLE: dict[str, set[str]] = {
    "system": set(),
    "user": set(),
    "assistant": {*THOUGHTS, "tool_calls", "function_call"},
    "tool": {"tool_call_id", "name"},
}
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)\Z", re.DOTALL)
_CONTROL = re.compile(r"<\|(?:im_start|im_end|endoftext)\|>")
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


def read_turns(value: Any, column: str, tools: Tools, *, context: bool = False) -> list[Message]:
    """The turns of a column, results not yet matched with calls; raises `Flaw`.

    `context`: none of them is trained, e.g. those of a prompt.
    """
    turns = enumerate(listed(value, column))
    return [_turn(turn, f"{column}[{i}]", tools, context) for i, turn in turns]


def listed(value: Any, column: str) -> list[Any]:
    """The list of a column, which may be its JSON text; raises `Flaw`."""
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            said = f'not an object with a list "{column}", nor with its JSON text ({error})'
            raise Flaw("not_json", column, said) from None
        if flaw := no_text(value, column):
            raise flaw
    if not isinstance(value, list):
        raise Flaw("unknown_schema", column, f'not an object with a list "{column}"')
    return value


def finished(messages: list[Message], column: str) -> tuple[Message, ...]:
    """The turns with results matched to calls; raises `Flaw` for what cannot be trained."""
    matched = match_results(messages)
    if not any(m.role == "assistant" for m in matched):
        raise Flaw("no_assistant", None, f"no assistant message in {column} to learn from")
    for message in matched:
        if message.role == "assistant":
            _check_tags(message)
        if message.train:
            check_turn(message)
    return matched


def _check_tags(message: Message) -> None:
    """Raises `Flaw` for tags that end a turn or a thought elsewhere than the turn itself does."""
    words, key = message.content, f"{message.at}.content"
    control = _CONTROL.search(words + (message.reasoning or ""))
    if control:
        raise Flaw("bad_tags", key, f"{control[0]} would end the turn in the middle; take it out")
    if "</think>" in (message.reasoning or ""):
        raise Flaw("bad_tags", key, "a thought that holds </think> would end there; take it out")
    before, *after = words.split("</think>")
    started = before.lstrip().startswith("<think>")
    if len(after) > 1 or (after and "<think>" in before.lstrip().removeprefix("<think>")):
        raise Flaw("bad_tags", key, "only one thought, at the head of the content, is read")
    if started and not after:
        raise Flaw("bad_tags", key, "a thought that is not closed with </think>")


def _turn(turn: Any, at: str, tools: Tools, context: bool) -> Message:
    if not isinstance(turn, dict):
        known = ", ".join(ROLES)
        raise Flaw("unknown_role", f"{at}.role", f"{at} has role None, not one of {known}")
    said, role = _role(turn, at)
    check_keys(turn, _EVERY_TURN | _OF_ROLE[role], at)
    text, key = _one_of(turn, ("content", "value"), at)
    content = read_content(text, key, allow_none=role == "assistant")
    trained = _flag(turn, at, role)
    if role != "assistant":
        names = (turn.get("tool_call_id"), turn.get("name"))
        found = tuple(str(n) if is_set(n) else None for n in names)
        return Message(role, content, at=at, result_of=(found[0], found[1]))
    if said == "function_call":
        message = _call_turn(content, key, at, tools)
    else:
        message = Message(role, content, calls=_calls(turn, at, tools), at=at)
    message = with_thought(message, turn, at)
    if not (message.content.strip() or (message.reasoning or "").strip() or message.calls):
        raise Flaw("empty_assistant", key, "the assistant neither says, thinks nor calls anything")
    return replace(message, train=trained and not context)


def _role(turn: Mapping[str, Any], at: str) -> tuple[str, str]:
    """(the role in the file's word, and in ours)."""
    said, key = _one_of(turn, ("role", "from"), at)
    if not isinstance(said, str) or said not in ROLES:
        known = ", ".join(ROLES)
        raise Flaw("unknown_role", key, f"{at} has role {said!r}, not one of {known}")
    return said, ROLES[said]


def _one_of(turn: Mapping[str, Any], names: tuple[str, str], at: str) -> tuple[Any, str]:
    """(value, key) of the one of two names that the turn has."""
    there = [name for name in names if turn.get(name) is not None]
    if len(there) == 2 and turn[there[0]] != turn[there[1]]:
        raise Flaw("ambiguous", f"{at}.{there[1]}", f"{names[0]} and {names[1]} differ")
    other = next((n for n in names if n in turn), "from" if "value" in turn else names[0])
    name = there[0] if there else other
    return turn.get(name), f"{at}.{name}"


def read_content(value: Any, key: str, allow_none: bool) -> str:
    """Text, or text parts joined without anything between them; raises `Flaw`."""
    if isinstance(value, str):
        return value
    if value is None and allow_none:
        return ""
    if not isinstance(value, list):
        raise Flaw("content_part", key, f"content is {type(value).__name__}; text is read")
    for i, part in enumerate(value):
        at = f"{key}[{i}]"
        is_text = isinstance(part, dict) and part.get("type") == "text"
        if not is_text or not isinstance(part.get("text"), str):
            raise Flaw("content_part", at, "a part of the content that is not text")
        check_keys(part, {"type", "text"}, at)
    return "".join(part["text"] for part in value)


def _flag(turn: Mapping[str, Any], at: str, role: str) -> bool:
    """Whether the turn is trained, if an assistant wrote it."""
    given = {name: turn[name] for name in FLAGS if turn.get(name) is not None}
    for name, value in given.items():
        if isinstance(value, str | list | dict) or value not in (0, 1):
            raise Flaw("bad_flag", f"{at}.{name}", f"is {value!r}; use 0, 1, false or true")
        if value and role != "assistant":
            said = f"asks to train a turn of {role}; assistants' turns alone are trained"
            raise Flaw("bad_flag", f"{at}.{name}", said)
    if len({bool(value) for value in given.values()}) > 1:
        name = list(given)[-1]
        raise Flaw("bad_flag", f"{at}.{name}", f"{' and '.join(given)} contradict each other")
    return all(given.values())


def _calls(turn: Mapping[str, Any], at: str, tools: Tools) -> tuple[Call, ...]:
    """Calls under `tool_calls`, or the one under the older `function_call`."""
    found, key = turn.get("tool_calls"), f"{at}.tool_calls"
    if isinstance(found, str) and found.strip():
        found = _calls_json(found, key)
    if is_set(found) and not isinstance(found, list):
        raise Flaw("bad_arguments", key, "tool_calls is not a list of calls")
    calls = tuple(read_call(c, f"{key}[{i}]", tools) for i, c in enumerate(found or []))
    check_ids(calls, key)
    legacy, old = turn.get("function_call"), f"{at}.function_call"
    if not is_set(legacy):
        return calls
    if not isinstance(legacy, dict):
        raise Flaw("bad_arguments", old, "function_call is not an object with name and arguments")
    check_keys(legacy, {"name", "arguments"}, old)
    call = read_function(legacy, old, tools)
    if calls and [replace(c, id=None) for c in calls] != [call]:
        raise Flaw("ambiguous", old, "tool_calls and function_call differ")
    return calls or (call,)


def with_thought(message: Message, turn: Mapping[str, Any], at: str) -> Message:
    """The message with the thought that its turn has under one of three keys."""
    found = {name: turn[name] for name in THOUGHTS if is_set(turn.get(name))}
    for name, thought in found.items():
        if not isinstance(thought, str):
            raise Flaw("content_part", f"{at}.{name}", "a thought that is not text")
    thoughts = list(found.values()) + ([message.reasoning] if message.reasoning else [])
    inside = _THOUGHT.match(message.content)
    if thoughts and inside and (thought := inside[1].strip("\n")):
        thoughts.append(thought)
    if len({t.strip("\n") for t in thoughts}) > 1:
        key = f"{at}.{list(found)[-1]}"
        raise Flaw("ambiguous", key, "two thoughts of one turn that differ")
    if not thoughts:
        return message
    content = inside[2].lstrip("\n") if inside else message.content
    return replace(message, content=content, reasoning=thoughts[0])


def _call_turn(content: str, key: str, at: str, tools: Tools) -> Message:
    """ShareGPT's `function_call` turn: JSON of one call or several, or words with tagged calls."""
    reasoning, rest = split_thought(content)
    if "<tool_call>" in rest:
        return replace(read_tagged(rest, key, at, tools), reasoning=reasoning)
    found = _calls_json(rest, key)
    listed = found if isinstance(found, list) else [found]
    if not listed:
        raise Flaw("bad_arguments", key, "the turn is a function_call without a call")
    calls = tuple(read_call(call, key, tools) for call in listed)
    return Message("assistant", "", reasoning, calls, at=at)


def split_thought(content: str) -> tuple[str | None, str]:
    """(thought at the head of the content, the rest), newlines between them gone."""
    found = _THOUGHT.match(content)
    if not found:
        return None, content
    return found[1].strip("\n") or None, found[2].lstrip("\n")


def read_tagged(content: str, key: str, at: str, tools: Tools) -> Message:
    """A turn whose calls stand in its text between `<tool_call>` tags; raises `Flaw`."""
    blocks = _CALL.findall(content)
    words, _, _ = content.partition("<tool_call>")
    calls = tuple(read_call(_calls_json(block, key), key, tools) for block in blocks)
    if _CALL.sub("", content).strip() != words.strip() or "<tool_call>" in words:
        raise Flaw("bad_arguments", key, "a call that is not closed, or words after a call")
    return Message("assistant", words.rstrip("\n"), None, calls, at=at)


def _calls_json(text: str, key: str) -> Any:
    try:
        value = parse_json(text)
    except ValueError as error:
        raise Flaw("bad_arguments", key, f"a call that is no JSON object ({error})") from None
    if flaw := no_text(value, key):
        raise Flaw(flaw.kind, key, str(flaw))
    return value
