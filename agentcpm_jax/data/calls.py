"""Tools, calls of tools and their results, in each of the forms that files have them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from agentcpm_jax.chat.parse import parse_completion
from agentcpm_jax.data.conversation import Call, Message
from agentcpm_jax.records import Flaw, finite, is_set, no_text, parse_json

Tools = tuple[Mapping[str, Any], ...]


def read_tools(value: Any, key: str) -> Tools:
    """OpenAI's function objects, of a list, its JSON text, or a list of JSON texts.

    Bare functions are wrapped. Raises `Flaw`.
    """
    if isinstance(value, str) and value.strip():
        said = f'"{key}" is not a list of objects, nor its JSON text'
        value = _json(value, "bad_tools", key, said)
    if not is_set(value) or (isinstance(value, str) and not value.strip()):
        return ()
    if not isinstance(value, list):
        raise Flaw("bad_tools", key, f'"{key}" is not a list of objects')
    return tuple(_tool(tool, f"{key}[{i}]") for i, tool in enumerate(value))


def _tool(tool: Any, key: str) -> dict[str, Any]:
    if isinstance(tool, str):
        tool = _json(tool, "bad_tools", key, "is text, but not the JSON of a function")
    if not isinstance(tool, Mapping):
        raise Flaw("bad_tools", key, "tools are a list of objects, functions with a name each")
    kind = tool.get("type")
    if "function" in tool and kind in (None, "function"):
        tool = {"type": "function", **tool, "function": tool["function"]}
    elif kind in (None, "function"):
        tool = {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
    else:
        raise Flaw("bad_tools", f"{key}.type", f"is {kind!r}; functions alone are read as tools")
    function = tool["function"]
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name.strip():
        raise Flaw("bad_tools", f"{key}.function.name", "a tool is a function with a name")
    if not finite(tool):
        raise Flaw("bad_tools", key, "holds NaN or an infinity, which JSON does not have")
    tool["type"] = "function"
    return {**tool, "function": _without_null_properties(function)}


def _without_null_properties(function: dict[str, Any]) -> dict[str, Any]:
    """A null in place of a parameter's schema is the parameter of another row's tool."""
    parameters = function.get("parameters")
    if not isinstance(parameters, dict):
        return function
    properties = parameters.get("properties")
    if not isinstance(properties, dict) or None not in properties.values():
        return function
    kept = {name: schema for name, schema in properties.items() if schema is not None}
    return {**function, "parameters": {**parameters, "properties": kept}}


def read_call(value: Any, key: str, tools: Tools) -> Call:
    """`{id, type, function: {name, arguments}}`, or the function without that round it."""
    if not isinstance(value, dict):
        raise Flaw("bad_arguments", key, "a call is an object with a name and arguments")
    if value.get("type") not in (None, "function"):
        said = f"is {value['type']!r}; calls of functions alone are read"
        raise Flaw("unknown_key", f"{key}.type", said)
    outer = {"id", "type", "index"}
    wrapped = is_set(value.get("function"))
    check_keys(value, outer | ({"function"} if wrapped else {"name", "arguments"}), key)
    identity = value.get("id")
    call_id = str(identity) if is_set(identity) else None
    inner, inside = (value["function"], f"{key}.function") if wrapped else (value, key)
    if not isinstance(inner, dict):
        raise Flaw("missing_name", f"{inside}.name", "the call has no function with a name")
    check_keys(inner, {"name", "arguments"} | (set() if wrapped else outer), inside)
    return replace(read_function(inner, inside, tools), id=call_id)


def read_function(value: Mapping[str, Any], key: str, tools: Tools) -> Call:
    """`{name, arguments}` with arguments as an object or its JSON text; raises `Flaw`."""
    name = value.get("name")
    if not isinstance(name, str) or not name.strip():
        raise Flaw("missing_name", f"{key}.name", "the call does not name its function")
    at = f"{key}.arguments"
    return Call(name, read_arguments(value.get("arguments"), at, name, tools))


def read_arguments(value: Any, key: str, name: str, tools: Tools) -> dict[str, Any]:
    """The arguments of a call of `name`; "" and null are those of a function without any."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    if isinstance(value, str):
        value = _json(value, "bad_arguments", key, "arguments are text, but not a JSON object")
    if not isinstance(value, dict):
        said = f"arguments are {type(value).__name__}, not a JSON object"
        raise Flaw("bad_arguments", key, said)
    if not finite(value):
        raise Flaw("bad_arguments", key, "arguments hold NaN or an infinity: no JSON object")
    return _without_foreign_nulls(value, key, name, tools)


def _without_foreign_nulls(
    arguments: dict[str, Any], key: str, name: str, tools: Tools
) -> dict[str, Any]:
    """Nulls that stand for parameters of other tools go; those that the schema admits stay."""
    if None not in arguments.values():
        return arguments
    schemas = {tool["function"]["name"]: _parameters(tool) for tool in tools}
    own, required = schemas.get(name, ({}, []))
    foreign = {p for other, (known, _) in schemas.items() if other != name for p in known}
    out = {}
    for parameter, value in arguments.items():
        if value is None and parameter in own and not _admits_null(own[parameter]):
            if parameter in required:
                said = f"the schema of {name} requires a value, not null"
                raise Flaw("bad_arguments", f"{key}.{parameter}", f"arguments: {said}")
            continue
        if value is None and parameter not in own and parameter in foreign:
            continue
        out[parameter] = value
    return out


def _parameters(tool: Mapping[str, Any]) -> tuple[Mapping[str, Any], Sequence[str]]:
    found = tool["function"].get("parameters")
    if not isinstance(found, dict):
        return {}, []
    properties, required = found.get("properties"), found.get("required")
    is_list = isinstance(required, list)
    return (properties if isinstance(properties, dict) else {}), (required if is_list else [])


def _admits_null(schema: Any) -> bool:
    """Whether JSON schema's usual ways of admitting null are used, or nothing is forbidden."""
    if not isinstance(schema, dict):
        return True
    kinds = schema.get("type")
    if kinds == "null" or (isinstance(kinds, list) and "null" in kinds) or schema.get("nullable"):
        return True
    some = [*(schema.get("anyOf") or []), *(schema.get("oneOf") or [])]
    if some:
        return any(map(_admits_null, some))
    if "enum" in schema:
        return None in schema["enum"] and kinds is None
    return kinds is None and "const" not in schema and "$ref" not in schema


def check_ids(calls: Sequence[Call], key: str) -> None:
    """Raises `Flaw` for two calls of one turn with the same id: results would be mixed up."""
    ids = [call.id for call in calls if call.id is not None]
    twice = next((one for one in ids if ids.count(one) > 1), None)
    if twice is not None:
        raise Flaw("ambiguous", f"{key}.id", f"two calls of one turn have the id {twice!r}")


def match_results(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages, each result with the number of the call that it answers.

    By id, the latest open call of that id; else by the function's name, else in order. Raises
    `Flaw` for a result without an open call.
    """
    calls: list[tuple[int, Call]] = []  # all so far, with the number of their turn
    answered: set[int] = set()
    out = []
    for number, message in enumerate(messages):
        if message.role == "tool" and message.answers is None:
            found = _open_call(message, calls, answered)
            answered.add(found)
            message = replace(message, answers=found)
        elif message.answers is not None:
            answered.add(message.answers)
        calls += [(number, call) for call in message.calls]
        out.append(message)
    return tuple(out)


def _open_call(message: Message, calls: list[tuple[int, Call]], answered: set[int]) -> int:
    call_id, name = message.result_of
    still_open = [i for i in range(len(calls)) if i not in answered]
    if call_id is not None:
        fits = [i for i in still_open if calls[i][1].id == call_id][-1:]
    else:
        fits = [i for i in still_open if name is None or calls[i][1].name == name]
        latest = [i for i in fits if calls[i][0] == calls[-1][0]]
        fits = latest or fits
    if not fits:
        key = "tool_call_id" if call_id is not None or name is None else "name"
        said = f"{call_id or name!r} " if call_id or name else ""
        raise Flaw(
            "result_without_call",
            f"{message.at}.{key}",
            f"the result {said}answers no open call (by tool_call_id, name or order)",
        )
    return fits[0]


def check_turn(message: Message) -> None:
    """Raises `Flaw` for a turn whose calls `chat.parse` would not read as they are written."""
    words = message.content
    _, thought_end, after = words.partition("</think>")
    said = [after if thought_end and words.lstrip().startswith("<think>") else words]
    for call in message.calls:
        text = {"name": call.name, "arguments": call.arguments}
        said.append(f"<tool_call>\n{json.dumps(text, ensure_ascii=False)}\n</tool_call>")
    if not message.calls and "tool_call>" not in said[0]:
        return
    parsed = parse_completion("\n".join(said), _Any()).calls
    wrong = next((call for call in parsed if call.error), None)
    extra = len(parsed) - len(message.calls)
    if message.calls and extra > 0 and "tool_call>" in said[0]:
        why = "calls stand here and in tool_calls; take one of them out"
        raise Flaw("ambiguous", f"{message.at}.content", why)
    same = [c.arguments for c in parsed][extra:]
    if wrong is None and same == [c.arguments for c in message.calls]:
        return
    in_text = "tool_call>" in said[0]
    key = f"{message.at}.content" if in_text else f"{message.at}.tool_calls.arguments"
    why = f"{wrong.error}: {wrong.message}" if wrong else "they would be read as others"
    raise Flaw("bad_arguments", key, f"a call that our own parser does not read ({why})")


class _Any(frozenset[str]):
    """The names of all tools there are."""

    def __contains__(self, name: object) -> bool:
        return True


def check_keys(value: Mapping[str, Any], known: set[str], key: str) -> None:
    """Raises `Flaw` for a key with a value that is not known."""
    unknown = [name for name, v in value.items() if name not in known and is_set(v)]
    if unknown:
        said = f"nobody reads this key; known here: {', '.join(sorted(known))}"
        raise Flaw("unknown_key", f"{key}.{unknown[0]}", said)


def _json(text: str, kind: str, key: str, said: str) -> Any:
    try:
        value = parse_json(text)
    except ValueError as error:
        raise Flaw(kind, key, f"{said} ({error})") from None
    if flaw := no_text(value):
        raise Flaw(flaw.kind, key, str(flaw))
    return value
