"""Which schema a record is in, by its keys, and the conversation that it holds.

Columns that only describe are left alone; those that would change what is trained are read or
refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agentcpm_jax.data.atif import read_steps
from agentcpm_jax.data.calls import Tools, read_tools
from agentcpm_jax.data.conversation import Conversation, Message, TextSegment
from agentcpm_jax.data.tagged import lift_tags
from agentcpm_jax.data.turns import finished, read_turns
from agentcpm_jax.records import Flaw, accepted, is_set, no_text, parse_json

#: Schemas by name, and the keys that say so; the first that fits is taken.
FORMS = {
    "OpenAI and TRL messages": "messages, tools",
    "ShareGPT": "conversations, system, tools",
    "ATIF": "steps, agent, schema_version",
    "TRL prompt and completion": "prompt, completion",
    "raw text": "text",
}
#: Columns that change what is trained and that nobody here reads.
_REFUSED = {
    *("images", "image", "videos", "video", "audios", "audio", "label", "labels", "loss_mask"),
    *("mask", "weight", "weights", "train", "trainable", "input_ids", "assistant_masks"),
    *("loss", "loss_weight", "loss_weights", "sample_weight", "history", "documents", "objects"),
    *("completion_mask", "attention_mask", "chat_template", "response_schema", "reasoning"),
    *("reasoning_content", "thinking", "tool_calls", "function_call", "mask_history"),
}
#: Columns that are the first message.
SYSTEMS = ("system", "system_prompt", "system_message")
_PREFERENCES = ("chosen", "rejected")


def read_conversation(record: Mapping[str, Any], where: str = "") -> Conversation:
    """The conversation of one record; raises `Flaw`."""
    there = {name for name, value in record.items() if is_set(value)}
    if not there.isdisjoint(_PREFERENCES):
        raise accepted("preference pairs are not demonstrations", record, FORMS)
    refused = sorted(there & _REFUSED)
    schema = _schema(record, there) or _schema(
        record, {n for n, v in record.items() if v in ("", [])}
    )
    if not schema:
        raise accepted('not an object with a list "messages" nor in another schema', record, FORMS)
    if refused:
        said = f"changes what is trained, and is not read beside {schema}; take the column out"
        raise Flaw("unknown_key", refused[0], said)
    if schema == "text" or (schema == "prompt" and _is_raw(record)):
        return Conversation(where=where, segments=_raw(record, schema))
    messages, tools = _turns(record, schema)
    return Conversation(
        finished(messages, "completion" if schema == "prompt" else schema),
        tools,
        where,
        _template_kwargs(record),
    )


def _schema(record: Mapping[str, Any], there: set[str]) -> str:
    """The column that says which schema it is, of those that are `there`."""
    for name in ("messages", "conversations", "steps"):
        if name in there:
            return name
    if "completion" in record and isinstance(record.get("prompt"), str | list):
        return "prompt"
    return "text" if "text" in there else ""


def _is_raw(record: Mapping[str, Any]) -> bool:
    """Whether prompt and completion are text, which is not the JSON text of turns."""
    prompt, completion = record["prompt"], record["completion"]
    if not isinstance(prompt, str) or not isinstance(completion, str | None):
        return isinstance(prompt, str)
    return not all((text or "").lstrip().startswith('[{"') for text in (prompt, completion))


def _turns(record: Mapping[str, Any], schema: str) -> tuple[list[Message], Tools]:
    if schema == "steps":
        return read_steps(record)
    tools = _tools(record)
    if schema == "prompt":
        messages = read_turns(record["prompt"], "prompt", tools, context=True)
        completion = read_turns(record["completion"], "completion", tools)
        if not any(m.role == "assistant" for m in completion):
            raise Flaw("no_assistant", None, "no assistant message in completion to learn from")
        messages += completion
    else:
        messages = read_turns(record[schema], schema, tools)
    for column in SYSTEMS:
        messages = _with_system(messages, record.get(column), column)
    return lift_tags(messages, tools)


def _tools(record: Mapping[str, Any]) -> Tools:
    """Of `tools`, or of the older `functions`."""
    found = {name: read_tools(record.get(name), name) for name in ("tools", "functions")}
    if found["tools"] and found["functions"] and found["tools"] != found["functions"]:
        raise Flaw("ambiguous", "functions", "tools and functions differ")
    return found["tools"] or found["functions"]


def _with_system(messages: list[Message], system: Any, column: str) -> list[Message]:
    if not is_set(system):
        return messages
    if not isinstance(system, str):
        raise Flaw("content_part", column, f"the column {column} is not text")
    if not messages or messages[0].role != "system":
        return [Message("system", system, at=column), *messages]
    if messages[0].content != system:
        raise Flaw("ambiguous", column, f"the column {column} and the first message differ")
    return messages


def _raw(record: Mapping[str, Any], schema: str) -> tuple[TextSegment, ...]:
    """Text without a template: all of it, or what follows the prompt, is trained."""
    for name in ("tools", "functions", *SYSTEMS):
        if is_set(record.get(name)):
            raise Flaw("unknown_key", name, "raw text has no template that could show it")
    names = ("text",) if schema == "text" else ("prompt", "completion")
    for name in names:
        if not isinstance(record[name], str):
            said = f"is {type(record[name]).__name__} beside text; use text, or turns in both"
            raise Flaw("unknown_schema", name, said)
    if not record[names[-1]].strip():
        raise Flaw("empty_assistant", names[-1], "there is no text to train")
    return tuple(TextSegment(record[name], name != "prompt") for name in names)


def _template_kwargs(record: Mapping[str, Any]) -> dict[str, Any]:
    found = record.get("chat_template_kwargs")
    if isinstance(found, str) and found.strip():
        try:
            found = parse_json(found)
        except ValueError as error:
            raise Flaw("not_json", "chat_template_kwargs", str(error)) from None
    if is_set(found) and not isinstance(found, dict):
        raise Flaw("unknown_key", "chat_template_kwargs", "not an object of template variables")
    if flaw := no_text(found, "chat_template_kwargs"):
        raise flaw
    kwargs: dict[str, Any] = {**found} if isinstance(found, dict) else {}
    for name in kwargs.keys() & {"messages", "tools", "add_generation_prompt"}:
        said = "the rows themselves give it; take it out"
        raise Flaw("unknown_key", f"chat_template_kwargs.{name}", said)
    thinking = record.get("enable_thinking")
    if thinking is None:
        return kwargs
    if not isinstance(thinking, bool):
        raise Flaw("bad_flag", "enable_thinking", f"is {thinking!r}; use false or true")
    if kwargs.setdefault("enable_thinking", thinking) != thinking:
        raise Flaw("ambiguous", "enable_thinking", "chat_template_kwargs says another thing")
    return kwargs
