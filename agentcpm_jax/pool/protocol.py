"""SGLang's `/generate` on the wire: the request body, validation of the answer, the errors.

Nothing here does input or output. The body of an answer is read before its status: SGLang reports
a manual abort as 200 in some releases and as 500 in others, with the same body.

How the version of a token is determined depends on the fields that the server sends:
  A  `weight_versions` spans over the output: exact;
  B  `weight_version_start` / `weight_version_end`: exact if equal, else the older, uncertain;
  C  `weight_version`, the newest: exact if it is the version at send, else the latter, uncertain;
  D  nothing: refused, unless unversioned answers are allowed (then the version at send, uncertain).
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agentcpm_jax.rollout.policy import Finish, SamplingParams


class PoolErrorKind(enum.StrEnum):
    """Why an attempt failed; the name in metrics and messages."""

    UNREACHABLE = "unreachable"  # no connection, or it broke
    TIMEOUT = "timeout"
    BUSY = "busy"  # 408, 429, 503
    SERVER_ERROR = "server_error"
    BAD_ANSWER = "bad_answer"  # not JSON, another request's answer, lengths that disagree
    BAD_REQUEST = "bad_request"  # the server will never answer this
    FORBIDDEN = "forbidden"  # 401, 403
    WRONG_VERSION = "wrong_version"
    VOCABULARY = "vocabulary"  # a sampled id that the trainer does not have
    NON_FINITE = "non_finite_logprob"
    UPDATE_REFUSED = "update_refused"  # `success: false`
    DIED_LOADING = "died_loading"  # the connection broke while it loaded weights
    NO_WEIGHTS = "no_weights"  # the host's agent could not copy them


#: Errors that a retry cannot fix: the user has to.
FINAL = frozenset({PoolErrorKind.BAD_REQUEST, PoolErrorKind.FORBIDDEN, PoolErrorKind.VOCABULARY})


class PoolError(Exception):
    """A named failure of one attempt. `str` is one line: kind, server, what it said."""

    def __init__(self, kind: PoolErrorKind, url: str, detail: str) -> None:
        self.kind, self.url, self.detail = kind, url, " ".join(str(detail).split())[:400]
        super().__init__(f"{kind}: {url}: {self.detail}")


@dataclass(frozen=True)
class Chunk:
    """One answer: ids i32[N], logprobs f32[N], versions i32[N]; `uncertain`: see the tiers."""

    ids: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    finish: Finish  # stop | length | abort
    text: str = ""
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
    body = read_body(status, payload, url)
    meta = body.get("meta_info") if isinstance(body, dict) else None
    if not isinstance(meta, dict):
        raise PoolError(PoolErrorKind.BAD_ANSWER, url, f"no meta_info in {str(body)[:200]}")
    if meta.get("id", expected.rid) != expected.rid:
        said = f"the answer of request {meta['id']}, not of {expected.rid}"
        raise PoolError(PoolErrorKind.BAD_ANSWER, url, said)
    reason = meta.get("finish_reason")
    kind = reason.get("type") if isinstance(reason, dict) else None
    if kind not in ("stop", "length", "abort"):
        raise PoolError(PoolErrorKind.BAD_ANSWER, url, f"finish_reason {reason!r}")
    assert isinstance(reason, dict)
    if kind == "abort" and reason.get("status_code") in _STATUS:
        raise PoolError(_STATUS[reason["status_code"]], url, reason.get("message", "aborted"))
    ids, logprobs = _tokens(body, meta, expected)
    versions, uncertain = _versions(meta, len(ids), expected)
    return Chunk(
        ids=ids,
        logprobs=logprobs,
        versions=versions,
        finish=Finish(kind),
        text=str(body.get("text", "")),
        uncertain=uncertain,
        message=str(reason.get("message", "")),
    )


def read_body(status: int, payload: bytes, url: str) -> Any:
    """The JSON body of any answer; with `meta_info` it is returned whatever the status.

    Raises:
      PoolError: status 200 without valid JSON, an error in the body, or any other status.
    """
    try:
        body = json.loads(payload) if payload else None
    except ValueError:
        body = None
        if status == 200:
            said = f"no JSON: {payload[:80]!r}"
            raise PoolError(PoolErrorKind.BAD_ANSWER, url, said) from None
    if isinstance(body, dict):
        if "meta_info" in body:
            return body  # finish_reason says more than the status
        if body.get("success") is False:
            raise PoolError(
                PoolErrorKind.UPDATE_REFUSED, url, body.get("message", "no reason given")
            )
        if body.get("error") is not None and status == 200:
            raise PoolError(PoolErrorKind.SERVER_ERROR, url, _message(body))
    if status != 200:
        kind = _STATUS.get(status)
        if kind is None:
            kind = PoolErrorKind.BAD_REQUEST if 400 <= status < 500 else PoolErrorKind.SERVER_ERROR
        said = _message(body) if body is not None else payload[:200].decode(errors="replace")
        raise PoolError(kind, url, f"status {status}: {said or 'no message'}")
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


def _message(body: Any) -> str:
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, dict):
        error = error.get("message", error)
    return str(error)


def _tokens(
    body: Mapping[str, Any], meta: Mapping[str, Any], expected: Expected
) -> tuple[np.ndarray, np.ndarray]:
    """Ids i32[N] and log-probabilities f32[N] of the same rows; `output_ids` must agree."""
    url = expected.url
    rows = meta.get("output_token_logprobs") or []  # absent when aborted before the prefill
    try:
        ids = np.asarray([row[1] for row in rows], np.int64)
        logprobs = np.asarray([_number(row[0]) for row in rows], np.float32)
    except (TypeError, ValueError, IndexError):
        raise PoolError(
            PoolErrorKind.BAD_ANSWER, url, "output_token_logprobs are no rows"
        ) from None
    output = body.get("output_ids")
    if output is not None and list(output) != ids.tolist():
        said = f"{len(output)} output_ids, {len(ids)} log-probabilities, or other ids in them"
        raise PoolError(PoolErrorKind.BAD_ANSWER, url, said)
    if len(ids) > expected.budget:
        said = f"{len(ids)} tokens where {expected.budget} were allowed"
        raise PoolError(PoolErrorKind.BAD_ANSWER, url, said)
    if len(ids) and not 0 <= ids.min() <= ids.max() < expected.vocab_size:
        said = f"sampled id {ids.max()}; the trainer has ids 0..{expected.vocab_size - 1}"
        raise PoolError(PoolErrorKind.VOCABULARY, url, said)
    if not np.isfinite(logprobs).all():
        where = int(np.flatnonzero(~np.isfinite(logprobs))[0])
        said = f"log-probability {logprobs[where]} at token {where} of {len(ids)}"
        raise PoolError(PoolErrorKind.NON_FINITE, url, said)
    return ids.astype(np.int32), logprobs


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _versions(meta: Mapping[str, Any], count: int, expected: Expected) -> tuple[np.ndarray, bool]:
    spans = meta.get("weight_versions")
    newest = meta.get("weight_version")
    if spans is not None:  # tier A
        return _from_spans(spans, count, expected), False
    if "weight_version_start" in meta:  # tier B
        first = _known(meta["weight_version_start"], expected)
        last = _known(meta.get("weight_version_end"), expected)
        return np.full(count, first, np.int32), first != last
    if newest is not None and newest != "None":  # tier C
        version = _known(newest, expected)
        sent = version if expected.oldest < 0 else expected.oldest
        return np.full(count, sent, np.int32), version != sent
    said = "the answer names no weight version; update SGLang"
    raise PoolError(PoolErrorKind.WRONG_VERSION, expected.url, said)


def _from_spans(spans: Any, count: int, expected: Expected) -> np.ndarray:
    """Versions i32[count] from half-open spans, contiguous from 0 to `count`."""
    versions, end = np.full(count, -1, np.int32), 0
    try:
        for span in spans:
            start, stop = span["start"], span["end"]
            if start != end or not end <= stop <= count:
                raise ValueError
            if start < stop:  # an empty span says nothing about a token
                versions[start:stop] = _known(span["version"], expected)
            end = stop
        if end != count:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        said = f"version spans {spans} of {count} tokens"
        raise PoolError(PoolErrorKind.BAD_ANSWER, expected.url, said) from None
    return versions


def _known(name: Any, expected: Expected) -> int:
    """The version of a published name; raises `PoolError` if unknown or older than at send."""
    version = expected.versions.get(str(name), -1)
    if version < max(expected.oldest, 0):
        at_send = next((n for n, v in expected.versions.items() if v == expected.oldest), "any")
        said = f"weights {name!r}, {at_send!r} or newer expected"
        raise PoolError(PoolErrorKind.WRONG_VERSION, expected.url, said)
    return version
