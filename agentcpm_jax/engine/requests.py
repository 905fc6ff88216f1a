"""Parses SGLang's request bodies into jobs and writes jobs as its answers.

Unsupported parameters are refused by name; none that would change an answer is ignored.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from agentcpm_jax.engine.config import MAX_STOP_IDS, MAX_TEMPERATURE
from agentcpm_jax.engine.fields import (
    INT32,
    INT64,
    Reader,
    anything,
    flag,
    integer,
    list_of,
    neutral,
    number,
    read_fields,
    refused,
    shown,
    text,
)
from agentcpm_jax.engine.sessions import GenerationJob, version_spans
from agentcpm_jax.types import UserError

DEFAULT_NEW_TOKENS = 128
MAX_PROMPTS = 1024  # of one request
MAX_TOKEN_CHARS = 256  # a longer text cannot be so few tokens: it is not tokenised to find out
MAX_STOPS, MAX_STOP_CHARS = 16, 256
MAX_RID_CHARS = 512


def request_id(path: str, value: Any) -> str:
    """A request id: a text, or an integer that stands for its digits."""
    if type(value) is int and abs(value) <= INT64:
        return str(value)
    return text(MAX_RID_CHARS, 1)(path, value)


def stop_strings(path: str, value: Any) -> tuple[str, ...]:
    """One text or several, none of them empty."""
    stop = text(MAX_STOP_CHARS, 1)
    if isinstance(value, str):
        return (stop(path, value),)
    return tuple(list_of(stop, MAX_STOPS)(path, value))


#: What changes how tokens are drawn or when they end, in both protocols.
DRAWING: dict[str, Reader] = {
    "temperature": number(0, MAX_TEMPERATURE, f"a number of at least 0, at most {MAX_TEMPERATURE}"),
    "top_p": number(0, 1, "a number above 0, at most 1", above=True),
    "top_k": integer(-1, INT32, "-1 for all, or a positive integer below 2**31"),
    "min_p": number(0, 1, "a number from 0 to 1"),
    "stop": stop_strings,
    "stop_token_ids": list_of(integer(0, INT32), 64),
    "ignore_eos": flag,
    "no_stop_trim": flag,
    "frequency_penalty": neutral(0),
    "presence_penalty": neutral(0),
    "repetition_penalty": neutral(1),
    "n": neutral(1),
    "regex": neutral(""),
    "ebnf": neutral(""),
    "json_schema": neutral(""),
    "structural_tag": neutral(""),
    "logit_bias": neutral({}),
    "stop_regex": neutral([], ""),
    "skip_special_tokens": neutral(False),  # texts hold all tokens
}
#: SGLang's `sampling_params`.
SAMPLING: dict[str, Reader] = DRAWING | {
    "max_new_tokens": integer(1, INT32, "a positive integer below 2**31"),
    "min_new_tokens": neutral(0),
    "sampling_seed": integer(-INT64, INT64),
    "stream_interval": integer(1, INT32),  # tokens between two parts of a stream
    "custom_params": neutral({}),
    "spaces_between_special_tokens": anything,
}
#: The body of `/generate`; prompts and rids are read once it is known whether they are a batch.
_GENERATE: dict[str, Reader] = {
    "input_ids": anything,
    "text": anything,
    "rid": anything,
    "sampling_params": lambda path, value: read_fields(value, SAMPLING, path),
    "stream": flag,
    "return_logprob": flag,
    "logprob_start_len": integer(-1, INT32),
    "top_logprobs_num": neutral(0),
    "token_ids_logprob": neutral([]),
    "return_text_in_logprobs": neutral(False),
    "return_hidden_states": neutral(False),
    "input_embeds": neutral(),
    "image_data": neutral([]),
    "audio_data": neutral([]),
    "video_data": neutral([]),
    "modalities": neutral([]),
    "lora_path": neutral("", []),
    "session_params": neutral({}),
    "custom_logit_processor": neutral(),
    # Caches are of one version of the weights and of everybody here, and requests take their turn.
    **dict.fromkeys(("extra_key", "priority", "log_metrics", "routing_key"), anything),
}


@dataclasses.dataclass(frozen=True)
class RequestLimits:
    """What a request may ask for."""

    capacity: int  # tokens, prompt and completion
    vocab_size: int
    stop_ids: tuple[int, ...] = ()  # of the model, unless `ignore_eos`


@dataclasses.dataclass(frozen=True)
class GenerateRequest:
    """A `/generate` body: its jobs, and how they are answered."""

    jobs: tuple[GenerationJob, ...]
    single: bool  # answered by one object, not by a list
    stream: bool
    interval: int  # tokens between two parts of a stream
    logprobs: bool


def parse_generate(
    body: Mapping[str, Any], limits: RequestLimits, encode: Callable[[str], np.ndarray] | None
) -> GenerateRequest:
    """The request in a `/generate` body; raises `UserError`, status 400, that names the field.

    `encode`: text to ids; None: the server has no tokenizer.
    """
    given = read_fields(body, _GENERATE)
    prompts, single = _prompts(given, limits, encode)
    params = given.get("sampling_params", {})
    if given.get("return_logprob") and given.get("logprob_start_len", -1) != -1:
        raise UserError(
            f"logprob_start_len={given['logprob_start_len']}: log-probabilities of the prompt are "
            "not computed here; leave it out"
        )
    if given.get("stream") and not single:
        raise UserError("stream=true: one prompt at a time")
    rids = _rids(given.get("rid"), len(prompts), single)
    return GenerateRequest(
        jobs=tuple(make_job(*one, params, limits) for one in zip(rids, prompts, strict=True)),
        single=single,
        stream=given.get("stream", False),
        interval=params.get("stream_interval", 1),
        logprobs=given.get("return_logprob", False),
    )


def _prompts(
    given: Mapping[str, Any], limits: RequestLimits, encode: Callable[[str], np.ndarray] | None
) -> tuple[list[np.ndarray], bool]:
    """The prompts as ids i32[P], and whether one was given by itself."""
    inputs = [name for name in ("input_ids", "text") if name in given]
    if len(inputs) != 1 or (encode is None and inputs == ["text"]):
        raise UserError(f"exactly one of input_ids and text must be given, not {inputs or 'none'}")
    (name,) = inputs
    value = given[name]
    single = not isinstance(value, list) or (
        name == "input_ids" and not any(isinstance(part, list) for part in value[:1])
    )
    parts = [(name, value)] if single else [(f"{name}[{i}]", part) for i, part in enumerate(value)]
    if not 1 <= len(parts) <= MAX_PROMPTS:
        raise UserError(f"{name} holds {len(parts)} prompts; send 1 to {MAX_PROMPTS}")
    if name == "input_ids":
        return [_ids(*part, limits) for part in parts], single
    assert encode is not None
    read = text(limits.capacity * MAX_TOKEN_CHARS, 1)
    return [encode(read(*part)) for part in parts], single


def _ids(path: str, value: Any, limits: RequestLimits) -> np.ndarray:
    if not isinstance(value, list) or not value:
        raise refused(path, value, "a list of at least one id")
    if len(value) >= limits.capacity:
        raise _too_long(len(value), limits)
    bad = [i for i in value if type(i) is not int or not 0 <= i < limits.vocab_size]
    if bad:
        raise UserError(f"{path} holds {shown(bad[0])}; the vocabulary has {limits.vocab_size} ids")
    return np.asarray(value, np.int32)


def _rids(value: Any, count: int, single: bool) -> list[str]:
    if value is None:
        return [uuid.uuid4().hex for _ in range(count)]
    if single:
        return [request_id("rid", value)]
    rids = list_of(request_id, MAX_PROMPTS)("rid", value)
    if len(rids) != count or len(set(rids)) != count:
        raise UserError(f"rid: {len(set(rids))} different ids for {count} prompts; give each one")
    return rids


def make_job(
    rid: str, prompt: np.ndarray, params: Mapping[str, Any], limits: RequestLimits
) -> GenerationJob:
    """A job from ids i32[P] and what `SAMPLING` has read; raises `UserError`."""
    new = params.get("max_new_tokens", DEFAULT_NEW_TOKENS)
    if len(prompt) >= limits.capacity:
        raise _too_long(len(prompt), limits)
    if len(prompt) + new > limits.capacity:
        raise UserError(
            f"max_new_tokens={new}: requested token count exceeds the model's maximum context "
            f"length of {limits.capacity} tokens: {len(prompt)} of the input and {new} to be "
            "generated"
        )
    stop_ids: tuple[int, ...] = ()
    if not params.get("ignore_eos"):
        stop_ids = tuple(dict.fromkeys((*params.get("stop_token_ids", ()), *limits.stop_ids)))
    if len(stop_ids) > MAX_STOP_IDS:
        raise UserError(
            f"stop_token_ids: {len(stop_ids)} stop ids, the model's included; at most "
            f"{MAX_STOP_IDS}"
        )
    return GenerationJob(
        rid=rid,
        prompt=prompt,
        max_new_tokens=new,
        temperature=params.get("temperature", 1.0),
        stop_ids=stop_ids,
        stop_strings=params.get("stop", ()),
        seed=params.get("sampling_seed"),
        options={
            "top_p": params.get("top_p", 1.0),
            "top_k": max(params.get("top_k", 0), 0),
            "min_p": params.get("min_p", 0.0),
        },
        keep_stop=params.get("no_stop_trim", False),
    )


def _too_long(count: int, limits: RequestLimits) -> UserError:
    return UserError(
        f"the input ({count} tokens) is longer than the model's context length "
        f"({limits.capacity} tokens)"
    )


def generate_answer(
    job: GenerationJob,
    current: str,
    said: str,
    *,
    logprobs: bool,
    seconds: float,
) -> dict[str, Any]:
    """SGLang's answer for a job whose text is `said`, finished or (in a stream) not."""
    meta: dict[str, Any] = {
        "id": job.rid,
        "finish_reason": job.finish,
        "prompt_tokens": len(job.prompt),
        "completion_tokens": len(job.ids),
        "cached_tokens": job.cached,
        "num_retractions": job.retractions,
        "e2e_latency": seconds,
        "weight_version": job.versions[-1] if job.versions else current,
    }
    if job.finish is not None:
        meta["weight_versions"] = version_spans(job.versions, current)
    if logprobs:
        rows = zip(job.logprobs, job.ids, strict=True)
        meta["output_token_logprobs"] = [[value, token, None] for value, token in rows]
        meta["output_token_logprobs_length"] = len(job.ids)
    return {"text": said, "output_ids": list(job.ids), "meta_info": meta}


def answer_text(job: GenerationJob, decode: Callable[[Sequence[int]], str]) -> str:
    """The text of a job: what stopped it is cut off, and stays in the ids."""
    said = decode(job.text_ids)
    matched = None if job.keep_stop else (job.finish or {}).get("matched")
    return said.partition(matched)[0] if isinstance(matched, str) else said
