"""Parses SGLang's request bodies into jobs and writes jobs as its answers.

Unsupported parameters are refused by name; none that would change a sample is ignored.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from agentcpm_jax.engine.config import MAX_STOP_IDS
from agentcpm_jax.engine.sessions import GenerationJob, version_spans
from agentcpm_jax.ranges import did_you_mean
from agentcpm_jax.types import UserError

DEFAULT_NEW_TOKENS = 128
#: Unsupported parameters, with the values that have no effect; any other value is refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "repetition_penalty": (1, None),
    "min_new_tokens": (0, None),
    "n": (1, None),
    "regex": (None, ""),
    "json_schema": (None, ""),
    "ebnf": (None, ""),
    "structural_tag": (None, ""),
    "logit_bias": (None, {}),
    "stop_regex": (None, [], ""),
}
#: (neutral value, test, valid values in words)
_OPTIONS: dict[str, tuple[float, Callable[[float], bool], str]] = {
    "top_p": (1.0, lambda p: 0 < p <= 1, "a number above 0, at most 1"),
    "top_k": (0, lambda k: k == int(k) and k >= -1, "-1 for all, or a positive integer"),
    "min_p": (0.0, lambda p: 0 <= p <= 1, "a number from 0 to 1"),
}
#: SGLang's sampling parameters; the last line changes nothing of what this server returns.
_PARAMETERS = (
    *("max_new_tokens", "temperature", "sampling_seed", *_OPTIONS, *_NEUTRAL),
    *("stop", "stop_token_ids", "ignore_eos", "no_stop_trim"),
    *("skip_special_tokens", "spaces_between_special_tokens", "stream_interval", "custom_params"),
)


@dataclasses.dataclass(frozen=True)
class RequestLimits:
    """What a request may ask for."""

    capacity: int  # tokens, prompt and completion
    vocab_size: int
    stop_ids: tuple[int, ...] = ()  # of the model, unless `ignore_eos`


def parse_generate(
    body: Mapping[str, Any], limits: RequestLimits, encode: Callable[[str], np.ndarray] | None
) -> list[GenerationJob]:
    """The jobs of a `/generate` body: one, or one per prompt of a batch.

    Raises `UserError`: status 400, with a message that names the field.
    """
    inputs = [key for key in ("input_ids", "text", "input_embeds") if body.get(key) is not None]
    if inputs == ["text"] and encode is not None:
        texts = [body["text"]] if isinstance(body["text"], str) else list(body["text"])
        prompts, single = [encode(text).tolist() for text in texts], isinstance(body["text"], str)
    elif inputs == ["input_ids"]:
        ids = body["input_ids"]
        single = not (isinstance(ids, list) and ids and isinstance(ids[0], list))
        prompts = [ids] if single else ids
    else:
        raise UserError(f"exactly one of input_ids and text must be given, not {inputs or 'none'}")
    if body.get("return_logprob") and body.get("logprob_start_len", -1) not in (-1, None):
        raise UserError("logprob_start_len: log-probabilities of the prompt are not computed here")
    for key in ("top_logprobs_num", "token_ids_logprob", "lora_path", "image_data"):
        if body.get(key):
            raise UserError(f"{key} is not supported by this server")
    rids = body.get("rid")
    rids = [rids] if single or rids is None else rids
    params = body.get("sampling_params") or {}
    if not single and rids != [None] and len(rids) != len(prompts):
        raise UserError(f"{len(rids)} rids for {len(prompts)} prompts")
    return [
        make_job(rids[i] if i < len(rids) else None, prompt, params, limits)
        for i, prompt in enumerate(prompts)
    ]


def make_job(
    rid: str | None, prompt: Sequence[int], params: Mapping[str, Any], limits: RequestLimits
) -> GenerationJob:
    """A job from ids and SGLang's `sampling_params`; raises `UserError`."""
    if not isinstance(prompt, list) or not prompt:
        raise UserError("input_ids must be a list of at least one id")
    if not all(isinstance(i, int) and 0 <= i < limits.vocab_size for i in prompt):
        bad = next(i for i in prompt if not (isinstance(i, int) and 0 <= i < limits.vocab_size))
        raise UserError(f"input_ids holds {bad!r}; the vocabulary has {limits.vocab_size} ids")
    for key in params:
        if key not in _PARAMETERS:
            hint = did_you_mean(key, _PARAMETERS)
            raise UserError(f"unknown sampling parameter sampling_params.{key}; {hint}")
    new = params.get("max_new_tokens", DEFAULT_NEW_TOKENS)
    if not isinstance(new, int) or new < 1:
        raise UserError(f"max_new_tokens={new!r} must be a positive integer")
    if len(prompt) >= limits.capacity:
        raise UserError(
            f"the input ({len(prompt)} tokens) is longer than the model's context length "
            f"({limits.capacity} tokens)"
        )
    if len(prompt) + new > limits.capacity:
        raise UserError(
            f"requested token count exceeds the model's maximum context length of "
            f"{limits.capacity} tokens: {len(prompt)} of the input and {new} to be generated"
        )
    temperature = params.get("temperature", 1.0)
    if not isinstance(temperature, int | float) or temperature < 0:
        raise UserError(f"temperature={temperature!r} must be a number of at least 0")
    for key, neutral in _NEUTRAL.items():
        if (value := params.get(key, neutral[0])) not in neutral:
            raise UserError(f"{key}={value!r} is not supported by this server")
    stop = params.get("stop") or ()
    eos = () if params.get("ignore_eos") else (*(params.get("stop_token_ids") or ()),)
    if not params.get("ignore_eos"):
        eos = tuple(dict.fromkeys((*eos, *limits.stop_ids)))
    if len(eos) > MAX_STOP_IDS:
        raise UserError(f"{len(eos)} stop ids, the model's included; at most {MAX_STOP_IDS}")
    return GenerationJob(
        rid=rid or uuid.uuid4().hex,
        prompt=np.asarray(prompt, np.int32),
        max_new_tokens=new,
        temperature=float(temperature),
        stop_ids=tuple(int(i) for i in eos),
        stop_strings=(stop,) if isinstance(stop, str) else tuple(stop),
        seed=params.get("sampling_seed"),
        options={key: _option(key, params.get(key)) for key in _OPTIONS},
        keep_stop=bool(params.get("no_stop_trim")),
    )


def _option(key: str, value: Any) -> float:
    neutral, allowed, words = _OPTIONS[key]
    if value is None:
        return neutral
    if isinstance(value, bool) or not isinstance(value, int | float) or not allowed(value):
        raise UserError(f"{key}={value!r} must be {words}")
    return type(neutral)(max(value, 0))


def generate_answer(
    job: GenerationJob,
    current: str,
    decode: Callable[[Sequence[int]], str] | None,
    *,
    logprobs: bool,
    seconds: float,
) -> dict[str, Any]:
    """SGLang's answer for a job, finished or (in a stream) not."""
    # The stop string or id is cut from the text but stays in the ids.
    matched = None if job.keep_stop else (job.finish or {}).get("matched")
    text = "" if decode is None else decode(job.ids[:-1] if type(matched) is int else job.ids)
    if isinstance(matched, str):
        text = text[: text.index(matched)]
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
    return {"text": text, "output_ids": list(job.ids), "meta_info": meta}
