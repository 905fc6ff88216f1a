"""A server that misbehaves on demand: the protocol of `server.py` over a toy policy.

The toy's next id and its log-probability are a function of the weights' name and of every id
before, so a test can recompute each token of a completion: a token that was lost, doubled, or
stamped with the wrong version or log-probability cannot go unnoticed.

Faults are armed in order and hit the next matching requests, each one once.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from aiohttp import web

from agentcpm_jax.chat.format import ChatFormat
from agentcpm_jax.engine.server import EngineServer, ServerConfig, ServerKeys
from agentcpm_jax.rollout.policy import Completion, Finish, SampleRequest
from agentcpm_jax.types import UserError

FaultKind = Literal[
    "hang",  # never an answer
    "error_500",
    "error_400",
    "forbidden_401",
    "busy_503",
    "truncated_json",
    "not_json",
    "number",  # JSON, but a number
    "deep_json",  # lists in lists, deeper than a parser goes
    "drip",  # the answer byte by byte, for ever
    "endless",  # more bytes than an answer has
    "packed",  # a few compressed bytes that unpack to many
    "redirect",
    "abort_before_prefill",
    "abort_500",  # a manual abort as older releases report it: status 500, partial tokens
    "death",  # the connection breaks before the answer
    "reset_after_finish",  # the work is done, the connection breaks
    "duplicated_answer",  # the answer of the request before
    "wrong_version",  # weights that nobody published
    "no_spans",  # tier C: `weight_version` only
    "no_version",  # tier D
    "tier_b",  # `weight_version_start` / `weight_version_end`
    "nan_logprob",
    "null_logprob",
    "short_logprobs",  # fewer log-probabilities than ids
    "vocabulary",  # an id beyond the trainer's
    "update_false",  # status 200, `success: false`
    "slow",  # an answer after `seconds`
    "lies",  # an update that is announced and not done
]


@dataclass(frozen=True)
class Fault:
    """One fault for one request to `path`; `seconds` for the slow ones."""

    kind: FaultKind
    path: str = "/generate"
    seconds: float = 0.0


class ToyEngine:
    """A deterministic policy. A directory's weights are the text of its file `toy.txt`.

    `on_token` is called after each token: the place from which a test interrupts at will.
    """

    def __init__(self, vocab_size: int = 97, capacity: int = 4096, weights: str = "base") -> None:
        self.vocab_size, self.capacity, self.weights = vocab_size, capacity, weights
        self._version = 0
        self.failure = ""
        self.on_token: Callable[[], None] = lambda: None

    async def sample(self, request: SampleRequest) -> Completion:
        ids: list[int] = []
        logprobs: list[float] = []
        versions: list[int] = []
        state = toy_state(request.prompt_ids)
        finish = Finish.LENGTH
        for _ in range(request.max_new_tokens):
            token, logprob = toy_next(state, self.weights, self.vocab_size)
            ids.append(token)
            logprobs.append(logprob)
            versions.append(self._version)
            state = zlib.crc32(token.to_bytes(4, "little"), state)
            if request.progress is not None:
                request.progress([token], [logprob], [self._version])
            self.on_token()
            await asyncio.sleep(0)  # weights may change between any two tokens
            if token in request.params.stop_ids:
                finish = Finish.STOP
                break
        return Completion(
            np.asarray(ids, np.int32),
            np.asarray(logprobs, np.float32),
            np.asarray(versions, np.int32),
            finish,
        )

    def load(self, path: str, version: int) -> None:
        file = Path(path) / "toy.txt"
        if not file.is_file():
            raise UserError(f"{file} is missing; name a directory of toy weights")
        self.weights, self._version = file.read_text(), version

    def flush(self) -> bool:
        return True

    def close(self) -> None:
        pass


def toy_state(ids: Sequence[int] | np.ndarray) -> int:
    """A running checksum of all ids so far."""
    return zlib.crc32(np.asarray(ids, np.int32).tobytes())


def toy_next(state: int, weights: str, vocab_size: int) -> tuple[int, float]:
    """(next id, its log-probability) after a text of checksum `state` under `weights`."""
    mixed = zlib.crc32(weights.encode(), state)
    return mixed % vocab_size, -float(np.float32((mixed >> 8) % 65536 / 8192))


class FaultServer(EngineServer):
    """An `EngineServer` over the toy, with armed faults; `start_faulty` listens."""

    def __init__(
        self,
        engine: ToyEngine | None = None,
        cfg: ServerConfig | None = None,
        *,
        chunk: int = 8,
        chat: ChatFormat | None = None,
        keys: ServerKeys | None = None,
        model: dict[str, Any] | None = None,
    ) -> None:
        self.toy, cfg = engine or ToyEngine(), cfg or ServerConfig(port=0)
        super().__init__(self.toy, cfg, chunk=chunk, chat=chat, keys=keys, model=model)
        self._armed: deque[Fault] = deque()
        self._last = b"{}"
        self.hits: list[str] = []

    def arm(self, *faults: Fault) -> None:
        """Each hits one request of its path, in order."""
        self._armed.extend(faults)

    def application(self) -> web.Application:
        app = super().application()
        app.middlewares.append(self._inject)
        return app

    @web.middleware
    async def _inject(self, request: web.Request, handler: Any) -> web.StreamResponse:
        fault = next((f for f in self._armed if f.path == request.path), None)
        if fault is None:
            response = await handler(request)
            if request.path == "/generate" and isinstance(response, web.Response):
                self._last = _bytes(response)
            return response
        self._armed.remove(fault)
        self.hits.append(fault.kind)
        return await self._misbehave(fault, request, handler)

    async def _misbehave(
        self, fault: Fault, request: web.Request, handler: Any
    ) -> web.StreamResponse:
        kind = fault.kind
        if kind == "hang":
            await asyncio.Event().wait()
        if kind in _STATUS:
            status, message = _STATUS[kind]
            return web.json_response({"error": {"message": message}}, status=status)
        if kind == "death":
            return _cut(request)
        if kind == "duplicated_answer":
            await handler(request)
            return web.Response(body=self._last, content_type="application/json")
        if kind == "update_false":
            refused = {"success": False, "message": "shapes differ", "num_paused_requests": 0}
            return web.json_response(refused)
        if kind == "lies":
            self.sessions.rename((await request.json())["weight_version"])
            done = {"success": True, "message": "Succeeded", "num_paused_requests": 0}
            return web.json_response(done)
        if kind == "slow":
            await asyncio.sleep(fault.seconds)
            return await handler(request)
        if kind in ("drip", "endless"):
            return await _pour(request, b" " * (1 if kind == "drip" else 1 << 20))
        if kind in _BODIES:
            return _BODIES[kind]()
        response = await handler(request)
        if kind == "reset_after_finish":
            return _cut(request)
        body = _bytes(response)
        if kind == "truncated_json":
            return web.Response(body=body[: len(body) // 2], content_type="application/json")
        if kind == "not_json":
            return web.Response(text="<html>502 Bad Gateway</html>", content_type="text/html")
        answer = json.loads(body)
        _SPOIL[kind](answer)
        return web.json_response(answer, status=500 if kind == "abort_500" else 200)


_STATUS = {
    "error_500": (500, "internal error"),
    "error_400": (400, "no such request"),
    "forbidden_401": (401, "who are you?"),
    "busy_503": (503, "the queue is full"),
}


async def _pour(request: web.Request, piece: bytes) -> web.StreamResponse:
    """The same bytes again and again, until the client has enough."""
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):
        while True:
            await response.write(piece)
            await asyncio.sleep(0.02)
    return response


_BODIES: dict[str, Callable[[], web.Response]] = {
    "number": lambda: web.json_response(5),
    "deep_json": lambda: web.Response(
        body=b'{"meta_info":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        content_type="application/json",
    ),
    "packed": lambda: web.Response(
        body=gzip.compress(b" " * (1 << 24)), headers={"Content-Encoding": "gzip"}
    ),
    "redirect": lambda: web.Response(status=307, headers={"Location": "http://127.0.0.1:9/"}),
}


def _cut(request: web.Request) -> web.Response:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


def _bytes(response: web.StreamResponse) -> bytes:
    assert isinstance(response, web.Response) and isinstance(response.body, bytes)
    return response.body


def _abort_before_prefill(answer: dict[str, Any]) -> None:
    meta = answer["meta_info"]
    meta["finish_reason"] = {"type": "abort", "message": "Abort before prefill"}
    meta.update(prompt_tokens=0, completion_tokens=0)
    for key in ("output_token_logprobs", "weight_versions"):
        meta.pop(key)
    answer.update(text="", output_ids=[])


def _abort_half(answer: dict[str, Any]) -> None:
    meta = answer["meta_info"]
    half = len(answer["output_ids"]) // 2
    meta["finish_reason"] = {"type": "abort", "message": "Aborted"}
    answer["output_ids"] = answer["output_ids"][:half]
    meta["output_token_logprobs"] = meta["output_token_logprobs"][:half]
    meta["completion_tokens"] = half
    spans = [s for s in meta["weight_versions"] if s["start"] < half]
    for span in spans:
        span["end"] = min(span["end"], half)
    meta["weight_versions"] = spans


def _rename(answer: dict[str, Any]) -> None:
    meta = answer["meta_info"]
    meta["weight_version"] = "default"
    for span in meta["weight_versions"]:
        span["version"] = "default"


def _tier_b(answer: dict[str, Any]) -> None:
    spans = answer["meta_info"].pop("weight_versions")
    answer["meta_info"]["weight_version_start"] = spans[0]["version"]
    answer["meta_info"]["weight_version_end"] = spans[-1]["version"]


def _no_version(answer: dict[str, Any]) -> None:
    answer["meta_info"].pop("weight_versions")
    answer["meta_info"].pop("weight_version")


def _set_logprob(value: float | None) -> Callable[[dict[str, Any]], None]:
    def spoil(answer: dict[str, Any]) -> None:
        answer["meta_info"]["output_token_logprobs"][0][0] = value

    return spoil


def _beyond(answer: dict[str, Any]) -> None:
    answer["output_ids"][0] = 10**6
    answer["meta_info"]["output_token_logprobs"][0][1] = 10**6


_SPOIL: dict[str, Callable[[dict[str, Any]], Any]] = {
    "abort_before_prefill": _abort_before_prefill,
    "abort_500": _abort_half,
    "wrong_version": _rename,
    "no_spans": lambda answer: answer["meta_info"].pop("weight_versions"),
    "no_version": _no_version,
    "tier_b": _tier_b,
    "nan_logprob": _set_logprob(float("nan")),
    "null_logprob": _set_logprob(None),
    "short_logprobs": lambda answer: answer["meta_info"]["output_token_logprobs"].pop(),
    "vocabulary": _beyond,
}
