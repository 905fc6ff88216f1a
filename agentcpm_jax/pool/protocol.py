"""SGLang's `/generate` on the wire: the request body, and what of an answer can be trained on.

Nothing here does input or output. Every field is read with suspicion (`fields.py`): `PoolError` is
all that can be raised, whatever a server sends. The body of an answer is read before its status:
SGLang reports a manual abort as 200 in some releases and as 500 in others, with the same body.

How the version of a token is determined depends on the fields that the server sends:
  A  `weight_versions` spans over the output: exact;
  B  `weight_version_start` / `weight_version_end`: exact if equal, else the older, uncertain;
  C  `weight_version`, the newest: exact if it is the version at send, else the latter, uncertain;
  D  nothing: refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agentcpm_jax.pool.errors import PoolError, PoolErrorKind, shown
from agentcpm_jax.pool.fields import Fields, is_count, parse
from agentcpm_jax.rollout.policy import Finish, SamplingParams

#: Log-probabilities of sampled tokens lie between these (nats): below, the probability is 0 in
#: float32; above 0 by the rounding of a sum of exponentials at most.
LEAST_LOGPROB, MOST_LOGPROB = -104.0, 1e-5


@dataclass(frozen=True)
class Chunk:
    """One answer: ids i32[N], logprobs f32[N], versions i32[N]; `uncertain`: see the tiers."""

    ids: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    finish: Finish  # stop | length | abort
    uncertain: bool = False
    message: str = ""  # of an abort


@dataclass(frozen=True)
class Expected:
    """What an answer is checked against."""

    rid: str
    url: str
    vocab_size: int
    budget: int
    versions: Mapping[str, int]  # published name -> version
    oldest: int  # version of the worker when the request was sent; -1: unknown (a router chose)
    least: int = 1  # tokens before an answer may end for its `length`
    stop_strings: tuple[str, ...] = ()


def generate_body(
    rid: str,
    input_ids: Sequence[int] | np.ndarray,
    budget: int,
    params: SamplingParams,
    *,
    seed: int | None = None,
    extra_key: str = "",
) -> dict[str, Any]:
    """The JSON body of one chunk. `seed`: sent only to servers that honour it."""
    # Defaults are sent too: servers have their own (--preferred-sampling-params), and the trainer
    # does not compute the log-probabilities of a truncated distribution.
    sampling: dict[str, Any] = {
        "max_new_tokens": int(budget),
        "temperature": float(params.temperature),
        "top_p": float(params.top_p),
        "top_k": int(params.top_k) or -1,
        "min_p": float(params.min_p),
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "stop": list(params.stop_strings),
        "stop_token_ids": [int(i) for i in params.stop_ids],
        # `ignore_eos` also disables `stop_token_ids`, so it is set only when there are none.
        "ignore_eos": not params.stop_ids,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "no_stop_trim": True,
    }
    if seed is not None:
        sampling["sampling_seed"] = seed
    body = {
        "rid": rid,
        "input_ids": np.asarray(input_ids).tolist(),
        "sampling_params": sampling,
        "return_logprob": True,
        "logprob_start_len": -1,
        "stream": False,
    }
    return body | ({"extra_key": extra_key} if extra_key else {})


def read_generate(status: int, payload: bytes, expected: Expected) -> Chunk:
    """Parse and validate an answer to `/generate`.

    Raises:
      PoolError: the answer is unusable; no token of it may be trained on.
    """
    url = expected.url
    answer = Fields(read_body(status, payload, url), url)
    meta = answer.inner("meta_info")
    if meta is None:
        raise answer.bad(f"no meta_info in {shown(answer.values)}")
    if (rid := meta.text("id")) != expected.rid:
        raise answer.bad(f"the answer of request {shown(rid)}, not of {expected.rid}")
    reason = meta.inner("finish_reason")
    kind = None if reason is None else reason.text("type")
    if reason is None or kind not in ("stop", "length", "abort"):
        raise answer.bad(f"finish_reason {shown(meta.values.get('finish_reason'))}")
    message = shown(reason.values.get("message") or "")
    if kind == "abort" and (code := reason.count("status_code")):
        raise PoolError(_kind_of(code), url, message or "aborted")
    if kind != "abort" and status != 200:
        raise PoolError(_kind_of(status), url, f"status {status} of an answer that ended: {kind}")
    ids, logprobs = _tokens(answer, meta, expected)
    _check_finish(kind, reason, ids, expected)
    versions, uncertain = _versions(meta, len(ids), expected)
    return Chunk(ids, logprobs, versions, Finish(kind), uncertain, message)


def read_body(status: int, payload: bytes, url: str) -> Any:
    """The JSON body of any answer; with `meta_info` it is returned whatever the status.

    Raises:
      PoolError: status 200 without valid JSON, an error in the body, or any other status.
    """
    try:
        body = parse(payload, url) if payload else None
    except PoolError:
        if status == 200:
            raise
        body = None
    if isinstance(body, dict):
        if body.get("success") is False:
            raise PoolError(PoolErrorKind.UPDATE_REFUSED, url, _message(body))
        if body.get("error") is not None and status == 200:
            raise PoolError(PoolErrorKind.SERVER_ERROR, url, _message(body))
        if "meta_info" in body:
            return body  # finish_reason says more than the status
    if status != 200:
        said = _message(body) if body is not None else payload[:200].decode(errors="replace")
        raise PoolError(_kind_of(status), url, f"status {status}: {said or 'no message'}")
    return body


_STATUS = {
    400: PoolErrorKind.BAD_REQUEST,
    401: PoolErrorKind.FORBIDDEN,
    403: PoolErrorKind.FORBIDDEN,
    408: PoolErrorKind.BUSY,
    429: PoolErrorKind.BUSY,
    500: PoolErrorKind.SERVER_ERROR,
    502: PoolErrorKind.SERVER_ERROR,
    503: PoolErrorKind.BUSY,
    504: PoolErrorKind.TIMEOUT,
}


def _kind_of(status: int) -> PoolErrorKind:
    others = PoolErrorKind.BAD_REQUEST if 400 <= status < 500 else PoolErrorKind.SERVER_ERROR
    return _STATUS.get(status, others)


def _message(body: Any) -> str:
    error = body.get("error") or body.get("message", body) if isinstance(body, dict) else body
    if isinstance(error, dict):
        error = error.get("message", error)
    return shown(error)


def _tokens(answer: Fields, meta: Fields, expected: Expected) -> tuple[np.ndarray, np.ndarray]:
    """Ids i32[N] and log-probabilities f32[N] of the same rows; all counts must agree with them."""
    rows = meta.rows("output_token_logprobs") or []  # absent when aborted before the prefill
    if len(rows) > expected.budget:
        raise answer.bad(f"{len(rows)} tokens where {expected.budget} were allowed")
    if not all(type(row) is list and len(row) > 1 and is_count(row[1]) for row in rows):
        raise answer.bad("output_token_logprobs are no rows of a log-probability and an id")
    ids = [row[1] for row in rows]
    output = answer.counts("output_ids")
    if output is not None and output != ids:
        said = f"{len(output)} output_ids, {len(ids)} log-probabilities, or other ids in them"
        raise answer.bad(said)
    told = meta.count("completion_tokens")
    told = meta.count("output_token_logprobs_length") if told is None else told
    if told not in (None, len(ids)):
        raise answer.bad(f"{len(ids)} tokens came where the server counted {told}")
    if answer.text("text") and not ids:
        raise answer.bad("a text without tokens")
    if ids and max(ids) >= expected.vocab_size:
        said = f"sampled id {max(ids)}; the trainer has ids 0..{expected.vocab_size - 1}"
        raise PoolError(PoolErrorKind.VOCABULARY, expected.url, said)
    logprobs = [_logprob(row[0], place, expected.url) for place, row in enumerate(rows)]
    return np.asarray(ids, np.int32), np.asarray(logprobs, np.float32)


def _logprob(value: Any, place: int, url: str) -> float:
    """A log-probability that a sampled token can have; SGLang writes one that is NaN as null."""
    number = math.nan if value is None else value
    if type(number) is float and not math.isfinite(number):
        said = f"log-probability {number} at token {place}"
        raise PoolError(PoolErrorKind.NON_FINITE, url, said)
    if type(number) not in (float, int) or not LEAST_LOGPROB <= number <= MOST_LOGPROB:
        said = f"log-probability {shown(number)} at token {place}: from {LEAST_LOGPROB:g} to 0"
        raise PoolError(PoolErrorKind.BAD_ANSWER, url, f"{said}, please")
    return min(float(number), 0.0)


def _check_finish(kind: str, reason: Fields, ids: np.ndarray, expected: Expected) -> None:
    """An episode acts on why its turn ended, so that is to be true too."""
    if kind != "abort" and not len(ids):
        raise reason.bad(f"finish {kind} without a token")
    if kind == "length" and len(ids) < expected.least:
        said = f"finish length after {len(ids)} of {expected.budget} tokens"
        raise reason.bad(said)
    matched = reason.values.get("matched")
    if kind == "stop" and matched is not None:
        known = type(matched) is str and matched in expected.stop_strings
        if not known and not (is_count(matched) and matched == ids[-1]):
            raise reason.bad(f"finish stop by {shown(matched)}, not by the end of the answer")


def _versions(meta: Fields, count: int, expected: Expected) -> tuple[np.ndarray, bool]:
    spans = meta.rows("weight_versions")
    newest = meta.text("weight_version")
    if spans is not None:  # tier A
        return _from_spans(spans, count, expected), False
    if (start := meta.text("weight_version_start")) is not None:  # tier B
        first = _known(start, expected)
        last = _known(meta.text("weight_version_end"), expected)
        return np.full(count, first, np.int32), first != last
    if newest is not None and newest != "None":  # tier C
        version = _known(newest, expected)
        sent = version if expected.oldest < 0 else expected.oldest
        return np.full(count, sent, np.int32), version != sent
    said = "the answer names no weight version; update SGLang"
    raise PoolError(PoolErrorKind.WRONG_VERSION, expected.url, said)


def _from_spans(spans: list[Any], count: int, expected: Expected) -> np.ndarray:
    """Versions i32[count] from half-open spans, contiguous from 0 to `count`, never going back."""
    versions, end = np.full(count, -1, np.int32), 0
    wrong = PoolError(
        PoolErrorKind.BAD_ANSWER, expected.url, f"version spans {shown(spans)} of {count} tokens"
    )
    for value in spans:
        span = Fields(value, expected.url, "weight_versions")
        start, stop = span.count("start"), span.count("end")
        if start is None or stop is None or start != end or not end <= stop <= count:
            raise wrong
        if start < stop:  # an empty span says nothing about a token
            versions[start:stop] = _known(span.text("version"), expected)
        end = stop
    if end != count or (np.diff(versions) < 0).any():
        raise wrong
    return versions


def _known(name: str | None, expected: Expected) -> int:
    """The version of a published name; raises `PoolError` if unknown or older than at send."""
    version = expected.versions.get(name or "", -1)
    if version < max(expected.oldest, 0):
        at_send = next((n for n, v in expected.versions.items() if v == expected.oldest), "any")
        said = f"weights {shown(name)!r}, {at_send!r} or newer expected"
        raise PoolError(PoolErrorKind.WRONG_VERSION, expected.url, said)
    return version
