"""`/v1/chat/completions`: messages and tools in, a message with tool calls out, whole or streamed.

What OpenAI's protocol has and this server has not is refused by name.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from agentcpm_jax.chat.blocks import OPEN, first_call
from agentcpm_jax.chat.format import ROLES, ChatFormat
from agentcpm_jax.chat.parse import parse_completion
from agentcpm_jax.engine.fields import (
    INT32,
    INT64,
    Reader,
    anything,
    flag,
    integer,
    json_object,
    list_of,
    neutral,
    one_of,
    read_fields,
    refused,
    text,
)
from agentcpm_jax.engine.requests import (
    DRAWING,
    RequestLimits,
    answer_text,
    make_job,
    request_id,
)
from agentcpm_jax.engine.sessions import GenerationJob, Sessions, version_spans
from agentcpm_jax.engine.streaming import GrowingText, without_beginnings
from agentcpm_jax.types import UserError

MAX_MESSAGES, MAX_TOOLS, MAX_CALLS = 4096, 256, 256
MAX_NAME = 256
_NEW = integer(1, INT32, "a positive integer below 2**31")


@dataclass(frozen=True)
class ChatRequest:
    """A body of `/v1/chat/completions`: its job, and how it is answered."""

    job: GenerationJob
    chat: ChatFormat
    tools: frozenset[str]
    model: str
    stream: bool
    usage: bool  # a last part of the stream says what was used


def parse_chat(body: Mapping[str, Any], chat: ChatFormat, limits: RequestLimits) -> ChatRequest:
    """The request in a body; raises `UserError`, status 400, that names the field."""
    given = read_fields(body, _CHAT)
    if "messages" not in given:
        raise UserError("messages is missing; send a list of at least one message")
    chat = chat.with_kwargs(**given.get("chat_template_kwargs", {}))
    tools = given.get("tools", []) if given.get("tool_choice") != "none" else []
    prompt = chat.prompt_ids(given["messages"], tools or None)
    new = given.get("max_completion_tokens") or given.get("max_tokens")
    params = {name: given[name] for name in DRAWING if name in given}
    params["max_new_tokens"] = new or max(limits.capacity - len(prompt), 1)
    params["sampling_seed"] = given.get("seed")
    return ChatRequest(
        job=make_job(given.get("rid") or uuid.uuid4().hex, prompt, params, limits),
        chat=chat,
        tools=frozenset(tool["function"]["name"] for tool in tools),
        model=given.get("model", "default"),
        stream=given.get("stream", False),
        usage=given.get("stream_options", {}).get("include_usage", False),
    )


def chat_completion(request: ChatRequest, current: str) -> dict[str, Any]:
    """OpenAI's answer for a finished job; the versions of the weights are in `metadata`."""
    said = answer_text(request.job, request.chat.decode)
    content, calls, finish = _reply(request, said)
    message = {"role": "assistant", "content": content, "tool_calls": calls or None}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    frame = _frame(request, "chat.completion") | {"choices": [choice]}
    return frame | {"usage": _usage(request.job)} | _versions(request, current)


async def chat_chunks(
    request: ChatRequest, jobs: AsyncIterator[GenerationJob], weights: Sessions
) -> AsyncGenerator[dict[str, Any], None]:
    """OpenAI's parts of a stream, whose contents together are that of the whole answer."""
    frame = _frame(request, "chat.completion.chunk")

    def part(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return frame | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}

    growing, sent = GrowingText(request.chat.decode), -1
    async for job in jobs:
        if sent < 0:
            sent = 0
            yield part({"role": "assistant", "content": ""})
        if job.finish is None:
            certain = growing.extend(job.text_ids)
            end = _settled(certain, request)
            if end > sent:
                yield part({"content": certain[sent:end]})
                sent = end
    said = answer_text(request.job, partial(growing.extend, end=True))
    content, calls, finish = _reply(request, said)
    if rest := (content or "")[sent:]:
        yield part({"content": rest})
    for call in calls:
        yield part({"tool_calls": [call]})
    usage = {"usage": _usage(request.job)}
    yield part({}, finish) | _versions(request, weights.version) | ({} if request.usage else usage)
    if request.usage:
        yield frame | {"choices": []} | usage


def _settled(text: str, request: ChatRequest) -> int:
    """How much of a growing text will be content, whatever comes."""
    marks = (*request.job.stop_strings, *((OPEN,) if request.tools else ()))
    end = without_beginnings(text, marks)
    if request.tools:
        end = min(end, first_call(text, request.chat.in_thought))
        end = len(text[:end].rstrip())  # what stands before a call ends without blanks
    return end


def _reply(request: ChatRequest, said: str) -> tuple[str | None, list[dict[str, Any]], str]:
    """Content, tool calls and finish reason of a text. With a malformed call, all is content."""
    job, chat = request.job, request.chat
    assert job.finish is not None
    parsed = parse_completion(said, request.tools, in_thought=chat.in_thought)
    if not request.tools or not parsed.calls or parsed.errors:
        return said, [], job.finish["type"]
    calls = [
        {
            "id": f"call_{job.rid}_{index}",
            "index": index,
            "type": "function",
            "function": {
                "name": call.name,
                "arguments": json.dumps(call.arguments, ensure_ascii=False),
            },
        }
        for index, call in enumerate(parsed.calls)
    ]
    starts = [start for start, _ in parsed.spans[1:]]
    between = [
        said[end:start].strip()
        for (_, end), start in zip(parsed.spans, [*starts, len(said)], strict=True)
    ]
    before = said[: parsed.spans[0][0]].rstrip()
    return "\n".join(filter(None, [before, *between])) or None, calls, "tool_calls"


def _frame(request: ChatRequest, kind: str) -> dict[str, Any]:
    now = int(time.time())
    return {"id": request.job.rid, "object": kind, "created": now, "model": request.model}


def _usage(job: GenerationJob) -> dict[str, int]:
    used = {"prompt_tokens": len(job.prompt), "completion_tokens": len(job.ids)}
    return used | {"total_tokens": sum(used.values())}


def _versions(request: ChatRequest, current: str) -> dict[str, Any]:
    versions = request.job.versions
    spans = version_spans(versions, current)
    return {"metadata": {"weight_version": spans[-1]["version"], "weight_versions": spans}}


# --- what a body may hold ---------------------------------------------------------------------


def messages(path: str, value: Any) -> list[dict[str, Any]]:
    """The messages, each with text as its content."""
    return list_of(_message, MAX_MESSAGES, 1)(path, value)


def tools(path: str, value: Any) -> list[dict[str, Any]]:
    """The tools as they were given, since templates show them as they are."""
    for i, tool in enumerate(list_of(anything, MAX_TOOLS)(path, value)):
        given = read_fields(tool, _TOOL, f"{path}[{i}]")
        if "name" not in given.get("function", {}):
            raise UserError(f"{path}[{i}].function.name is missing; name the tool")
    return value


def _message(path: str, value: Any) -> dict[str, Any]:
    given = read_fields(value, _MESSAGE, path)
    if "role" not in given:
        raise UserError(f"{path}.role is missing; one of {', '.join(ROLES)}")
    if "content" not in given and given["role"] != "assistant":
        raise UserError(f"{path}.content is missing; give a text")
    return {"content": "", **given}


def _content(path: str, value: Any) -> str:
    """A text, or the texts of its parts; halves of surrogate pairs are the template's business."""
    if isinstance(value, list):
        parts = [read_fields(part, _PART, f"{path}[{i}]") for i, part in enumerate(value)]
        for i, part in enumerate(parts):
            if part.keys() != {"type", "text"}:
                raise UserError(f"{path}[{i}] must have a type and a text")
        return "".join(part["text"] for part in parts)
    return _any_text(path, value)


def _any_text(path: str, value: Any) -> str:
    if not isinstance(value, str):
        raise refused(path, value, "a text")
    return value


def _tool_call(path: str, value: Any) -> dict[str, Any]:
    given = read_fields(value, _CALL, path)
    if given.get("function", {}).keys() != {"name", "arguments"}:
        raise UserError(f"{path}.function must have a name and arguments")
    return given


def _arguments(path: str, value: Any) -> Any:
    return _any_text(path, value) if isinstance(value, str) else json_object(path, value)


def _record(table: Mapping[str, Reader]) -> Reader:
    return lambda path, value: read_fields(value, table, path)


_PART: dict[str, Reader] = {"type": one_of("text"), "text": _any_text}
_CALL: dict[str, Reader] = {
    "id": text(MAX_NAME),
    "index": integer(0, INT32),
    "type": one_of("function"),
    "function": _record({"name": text(MAX_NAME, 1), "arguments": _arguments}),
}
_MESSAGE: dict[str, Reader] = {
    "role": one_of(*ROLES),
    "content": _content,
    "reasoning_content": _any_text,
    "name": text(MAX_NAME),
    "tool_call_id": text(MAX_NAME),
    "tool_calls": list_of(_tool_call, MAX_CALLS),
    # What OpenAI's clients send back of a message they were given.
    "refusal": neutral(""),
    "annotations": neutral([]),
    "audio": neutral(),
    "function_call": neutral(),
}
_TOOL: dict[str, Reader] = {
    "type": one_of("function"),
    "function": _record(
        {
            "name": text(MAX_NAME, 1),
            "description": _any_text,
            "parameters": json_object,
            "strict": neutral(False),
        }
    ),
}
_CHAT: dict[str, Reader] = DRAWING | {
    "messages": messages,
    "tools": tools,
    "tool_choice": one_of("auto", "none"),
    "parallel_tool_calls": neutral(True),
    "response_format": _record({"type": one_of("text")}),
    "model": text(MAX_NAME),
    "max_tokens": _NEW,
    "max_completion_tokens": _NEW,
    "seed": integer(-INT64, INT64),
    "rid": request_id,
    "stream": flag,
    "stream_options": _record({"include_usage": flag, "continuous_usage_stats": neutral(False)}),
    "chat_template_kwargs": _record({"enable_thinking": flag}),
    "logprobs": neutral(False),  # `/generate` returns them, with ids and versions
    "top_logprobs": neutral(0),
    "min_tokens": neutral(0),
    "modalities": neutral(["text"]),
    # Of the caller's own records and bills.
    **dict.fromkeys(("user", "metadata", "store", "service_tier", "safety_identifier"), anything),
}
