"""A server with the shipped agent that gives odd answers, and writes down the true ones.

The engine, its routes and its weights are the package's own. An answer is spoilt on its way out,
when the engine has said what it truly sampled: `truth` then holds every token of every request.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from agentcpm_jax.engine.config import EngineConfig
from agentcpm_jax.engine.server import EngineServer, ServerConfig
from agentcpm_jax.engine.serving import ServedLocal
from agentcpm_jax.files import SHIPPED
from agentcpm_jax.hf.tokenizer import load_chat
from configs.tiny import CONTEXT

#: What a value in an answer may become: nothing that could be true in its place.
JUNK = [None, True, "x", [], {}, [[1]], 2**70, -(2**40), 1.5, float("nan"), float("inf"), -1e30]
STATUSES = [204, 307, 400, 401, 403, 404, 408, 418, 429, 500, 502, 503, 504]
DRIP = 0.3  # s between two bytes


def spoil_meta(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A spoiler that puts `value` at `meta_info[key]`."""
    return lambda answer: answer["meta_info"].__setitem__(key, value)


def spoil_row(column: int, value: Any) -> Callable[[dict[str, Any]], None]:
    """A spoiler of one row of log-probability and id; `output_ids` says the same."""

    def spoil(answer: dict[str, Any]) -> None:
        rows = answer["meta_info"]["output_token_logprobs"]
        rows[len(rows) // 2][column] = value
        if column == 1:
            answer["output_ids"][len(rows) // 2] = value

    return spoil


def lose_a_row(answer: dict[str, Any]) -> None:
    answer["meta_info"]["output_token_logprobs"].pop()
    answer.pop("output_ids")
    answer["meta_info"].pop("weight_versions")


def say_nothing(answer: dict[str, Any]) -> None:
    meta = answer["meta_info"]
    meta.update(output_token_logprobs=[], weight_versions=[], completion_tokens=0)
    meta["finish_reason"] = {"type": "stop", "matched": 5}
    answer.update(output_ids=[], text="")


def weights_of_nobody(answer: dict[str, Any]) -> None:
    answer["meta_info"]["weight_version"] = "nobody"
    for span in answer["meta_info"]["weight_versions"]:
        span["version"] = "nobody"


#: Spoilers of an answer to /generate, by name.
CONTENT: dict[str, Callable[[dict[str, Any]], None]] = {
    **{f"logprob {v}": spoil_row(0, v) for v in (5.0, 1e-3, -9999.0, -1e30, True, "-1", None)},
    **{f"logprob {v}": spoil_row(0, float(v)) for v in ("nan", "inf", "-inf")},
    **{f"id {v}": spoil_row(1, v) for v in (-1, 10**6, 2**70, 3.7, True, None, "7", [7])},
    **{f"finish {v}": spoil_meta("finish_reason", v) for v in ("stop", None, {"type": "x"}, [])},
    "status a list": spoil_meta("finish_reason", {"type": "abort", "status_code": [1]}),
    "rows a number": spoil_meta("output_token_logprobs", 5),
    "rows of objects": spoil_meta("output_token_logprobs", [{"0": -1.0, "1": 3}]),
    "spans a number": spoil_meta("weight_versions", 5),
    "spans overlap": spoil_meta("weight_versions", [{"version": "a", "start": 3, "end": 1}]),
    "weights of nobody": weights_of_nobody,
    "another's id": spoil_meta("id", "somebody/else/"),
    "a count too many": spoil_meta("completion_tokens", 10**4),
    "a row lost": lose_a_row,
    "nothing said": say_nothing,
    "ids a number": lambda answer: answer.update(output_ids=5),
}
#: Whole bodies that are sent instead of an answer, on any route.
BODIES: dict[str, bytes] = {
    "empty": b"",
    "html": b"<html>maintenance</html>",
    "null": b"null",
    "number": b"5",
    "list": b"[1]",
    "text": b'"meta_info"',
    "deep": b'{"meta_info":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "many digits": b'{"meta_info": ' + b"9" * 5000 + b"}",
    "not utf-8": b"\xff\xfe\x00",
    "error at 200": b'{"error": {"message": "overloaded"}}',
    "false": b'{"success": false, "message": "\\ud800\\u0000\\u001b[2J"}',
    "endless": b" " * (4 << 20),
}
TRANSPORT = ("cut", "drip", "packed", "half", "twice", "status", "mutation")


class HostileServer(EngineServer):
    """Of all answers, on every route, `share` are odd.

    Args:
      truth: a file that gets a line per answer of the engine: its rid, rows and version spans.
      odd: one that gets a line per odd answer: its kind and route.
    """

    def __init__(
        self, engine: ServedLocal, share: float, seed: int, truth: Path, odd: Path, **options: Any
    ) -> None:
        super().__init__(engine, ServerConfig(port=0), chunk=16, **options)
        self._share, self._rng = share, random.Random(seed)
        self._truth, self._odd, self._last = truth.open("a"), odd.open("a"), b"{}"

    def application(self) -> web.Application:
        app = super().application()
        app.middlewares.insert(0, self._spoil)
        return app

    @web.middleware
    async def _spoil(self, request: web.Request, handler: Any) -> web.StreamResponse:
        response = await handler(request)
        body = getattr(response, "body", None) or b""
        content = request.path == "/generate" and response.status == 200
        if content:
            self._write_truth(json.loads(body))
        if self._rng.random() >= self._share:
            self._last = body if content else self._last
            return response
        kind = self._choose(content)
        self._odd.write(json.dumps([kind, request.path]) + "\n")
        self._odd.flush()
        return await self._send_odd(kind, request, body)

    def _choose(self, content: bool) -> str:
        kinds = [*BODIES, *TRANSPORT] + 2 * [*CONTENT] if content else [*BODIES, *TRANSPORT]
        return self._rng.choice(kinds)

    def _write_truth(self, answer: dict[str, Any]) -> None:
        meta = answer["meta_info"]
        line = {"rid": meta["id"], "rows": meta["output_token_logprobs"]}
        self._truth.write(json.dumps(line | {"versions": meta["weight_versions"]}) + "\n")
        self._truth.flush()

    async def _send_odd(self, kind: str, request: web.Request, body: bytes) -> web.StreamResponse:
        rng = self._rng
        if kind == "cut":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if kind == "drip":
            return await drip(request, body or b"{}")
        if kind == "status":
            return web.Response(status=rng.choice(STATUSES), text="odd")
        if kind == "packed":
            packed = gzip.compress(b" " * (8 << 20))
            return web.Response(body=packed, headers={"Content-Encoding": "gzip"})
        if kind == "half":
            body = body[: rng.randrange(len(body) + 1) // 2]
        elif kind == "twice":  # the answer of another request, or of none
            body = self._last if request.path == "/generate" else body + body
        elif kind == "mutation":
            body = mutate(body, rng)
        elif kind in CONTENT:
            answer = json.loads(body)
            CONTENT[kind](answer)
            body = json.dumps(answer).encode()
        else:
            body = BODIES[kind]
        return web.Response(body=body, content_type="application/json")


def mutate(body: bytes, rng: random.Random) -> bytes:
    """One value anywhere in the body becomes junk, or is gone."""
    try:
        answer = json.loads(body)
    except ValueError:
        return b"{"
    places: list[tuple[Any, Any]] = []
    queue: list[Any] = [answer]
    while queue:
        holder = queue.pop()
        keys = holder if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            places.append((holder, key))
            if isinstance(holder[key], dict | list):
                queue.append(holder[key])
    if not places:
        return b"[]"
    holder, key = rng.choice(places)
    if rng.random() < 0.3:
        del holder[key]
    else:
        holder[key] = rng.choice(JUNK)
    return json.dumps(answer).encode()


async def drip(request: web.Request, body: bytes) -> web.StreamResponse:
    """An answer byte by byte."""
    response = web.StreamResponse(headers={"Content-Length": str(len(body))})
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):
        for at in range(len(body)):
            await response.write(body[at : at + 1])
            await asyncio.sleep(DRIP)
    return response


def serve(share: float, seed: int, folder: Path) -> None:
    """Serves until the process ends; the url is in `folder/url` once it listens."""
    path = str(SHIPPED["shipped:sft"])
    engine = ServedLocal(path, EngineConfig(slots=8, capacity=CONTEXT))
    described = engine.describe(path)
    front = HostileServer(
        engine,
        share,
        seed,
        folder / "truth.jsonl",
        folder / "odd.jsonl",
        chat=load_chat(path),
        model=described,
    )

    async def listen() -> None:
        _, url = await front.start()
        (folder / "url").write_text(url)
        await asyncio.Event().wait()

    asyncio.run(listen())
