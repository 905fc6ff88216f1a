"""`/v1/chat/completions`: messages and tools in, a message with tool calls out."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from agentcpm_jax.chat.format import ChatFormat
from agentcpm_jax.chat.parse import parse_completion
from agentcpm_jax.engine.requests import RequestLimits, make_job
from agentcpm_jax.engine.sessions import GenerationJob, version_spans
from agentcpm_jax.types import UserError

_FINISH = {"stop": "stop", "length": "length", "abort": "abort"}


def chat_job(body: Mapping[str, Any], chat: ChatFormat, limits: RequestLimits) -> GenerationJob:
    """The job for a request body; raises `UserError` (status 400)."""
    messages, tools = body.get("messages"), body.get("tools")
    if not isinstance(messages, list) or not messages:
        raise UserError("messages must be a list of at least one message")
    if body.get("logprobs"):
        raise UserError("logprobs: use /generate, which returns them with ids and versions")
    prompt = chat.prompt_ids(messages, tools if body.get("tool_choice") != "none" else None)
    new = body.get("max_completion_tokens") or body.get("max_tokens")
    params = {key: body[key] for key in _PASSED if body.get(key) is not None}
    params["max_new_tokens"] = new or max(limits.capacity - len(prompt), 1)
    if body.get("seed") is not None:
        params["sampling_seed"] = body["seed"]
    return make_job(body.get("rid"), prompt.tolist(), params, limits)


_PASSED = (
    *("temperature", "stop", "stop_token_ids", "ignore_eos", "n", "top_p", "top_k", "min_p"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias"),
)


def chat_completion(
    job: GenerationJob, body: Mapping[str, Any], chat: ChatFormat, current: str
) -> dict[str, Any]:
    """OpenAI's answer (or the one chunk of a stream) for a finished job; versions in `metadata`."""
    ids = job.ids
    assert job.finish is not None
    if ids and job.finish.get("matched") == ids[-1]:
        ids = ids[:-1]
    text = chat.decode(ids)
    if isinstance(job.finish.get("matched"), str):
        text = text[: text.index(job.finish["matched"])]
    message: dict[str, Any] = {"role": "assistant", "content": text, "tool_calls": None}
    finish = _FINISH[job.finish["type"]]
    names = frozenset(t.get("function", t).get("name", "") for t in body.get("tools") or ())
    if names:
        parsed = parse_completion(text, names, in_thought=chat.in_thought)
        if parsed.calls and not parsed.errors:
            message["content"] = text[: parsed.spans[0][0]].strip() or None
            message["tool_calls"] = [
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
            finish = "tool_calls"
    stream = bool(body.get("stream"))
    choice = {"index": 0, ("delta" if stream else "message"): message, "finish_reason": finish}
    used = {"prompt_tokens": len(job.prompt), "completion_tokens": len(job.ids)}
    return {
        "id": job.rid,
        "object": "chat.completion.chunk" if stream else "chat.completion",
        "created": int(time.time()),
        "model": body.get("model", "default"),
        "choices": [choice],
        "usage": used | {"total_tokens": sum(used.values())},
        "metadata": {
            "weight_version": job.versions[-1] if job.versions else current,
            "weight_versions": version_spans(job.versions, current),
        },
    }
