"""An engine behind SGLang's HTTP protocol: the subset that rollouts and weight updates need.

    GET   /health /health_generate /model_info /server_info /v1/models /metrics
    POST  /generate /v1/chat/completions (both also as streams) /tokenize /detokenize
    POST  /pause_generation /continue_generation /abort_request /flush_cache       control:
          /update_weights_from_disk /update_weight_version                         admin key

Control routes require the admin key; without one they answer on the loopback interface only. A body
is read by a table of its fields: what is of another type, out of range or unknown is status 400 and
concerns nobody else. Status 500 and 503 say that the engine has ended, and why.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from agentcpm_jax.chat.format import ChatFormat
from agentcpm_jax.engine.chat_route import (
    ChatRequest,
    chat_chunks,
    chat_completion,
    messages,
    parse_chat,
    tools,
)
from agentcpm_jax.engine.fields import (
    Reader,
    anything,
    flag,
    integer,
    list_of,
    neutral,
    one_of,
    parse_body,
    read_fields,
    refused,
    text,
)
from agentcpm_jax.engine.requests import (
    MAX_PROMPTS,
    MAX_TOKEN_CHARS,
    GenerateRequest,
    RequestLimits,
    answer_text,
    generate_answer,
    parse_generate,
    request_id,
)
from agentcpm_jax.engine.sessions import EngineFailure, GenerationJob, ServedEngine, Sessions
from agentcpm_jax.engine.streaming import GrowingText, send_events
from agentcpm_jax.types import UserError

CONTROL = frozenset(
    {
        "/pause_generation",
        "/continue_generation",
        "/abort_request",
        "/flush_cache",
        "/update_weights_from_disk",
        "/update_weight_version",
    }
)
OPEN = frozenset({"/health", "/health_generate", "/metrics"})

MAX_BODY_BYTES = 16 << 20  # of a request: a million token ids and more, and soon parsed
HEALTH_SECONDS = 120.0  # in which a well engine samples a token, its compilation included
FLUSH_SECONDS = 5.0  # in which the engine leaves requests that have ended
MAX_NAME, MAX_PATH = 256, 4096

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class ServerConfig:
    """Where to listen. Keys come from the environment."""

    host: str = "127.0.0.1"
    port: int = 30000  # 0: a free one


@dataclass(frozen=True)
class ServerKeys:
    """Bearer keys; empty = none. `repr` shows neither."""

    generate: str = field(default="", repr=False)
    admin: str = field(default="", repr=False)


class EngineServer:
    """The application.

    Args:
      chunk: tokens between two moments at which a request can be held or ended.
      weight_version: what the first weights are called.
      model: describes what is served: merged into `/model_info`.
    """

    def __init__(
        self,
        engine: ServedEngine,
        cfg: ServerConfig,
        *,
        chunk: int = 32,
        weight_version: str = "default",
        chat: ChatFormat | None = None,
        keys: ServerKeys | None = None,
        model: dict[str, Any] | None = None,
    ) -> None:
        self.cfg, self._chat, self._keys = cfg, chat, keys or ServerKeys()
        self._decode = None if chat is None else chat.decode
        self._model = {"tokenizer_path": "", "is_generation": True} | (model or {})
        self.sessions = Sessions(
            engine,
            version=weight_version,
            chunk=chunk,
            decode=self._decode,
            path=self._model.pop("model_path", ""),
        )
        self._limits = RequestLimits(
            engine.capacity, engine.vocab_size, () if chat is None else chat.stop_ids
        )
        self._local = is_loopback(cfg.host)
        self._started = time.time()

    def application(self) -> web.Application:
        """The aiohttp application.

        Run it with `handler_cancellation=True`, so that a request ends when its client disconnects.
        """
        app = web.Application(
            middlewares=[self._errors, self._authorise], client_max_size=MAX_BODY_BYTES
        )
        for path in ("/health", "/ready"):
            app.router.add_get(path, self._health)
        for path in ("/model_info", "/get_model_info"):
            app.router.add_get(path, self._model_info)
        for path in ("/server_info", "/get_server_info"):
            app.router.add_get(path, self._server_info)
        app.router.add_get("/health_generate", self._health_generate)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/flush_cache", self._flush)
        app.router.add_post("/flush_cache", self._flush)
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/v1/chat/completions", self._chat_completions)
        for path in ("/tokenize", "/v1/tokenize"):
            app.router.add_post(path, self._tokenize)
        for path in ("/detokenize", "/v1/detokenize"):
            app.router.add_post(path, self._detokenize)
        app.router.add_post("/pause_generation", self._pause)
        app.router.add_post("/continue_generation", self._continue)
        app.router.add_post("/abort_request", self._abort)
        app.router.add_post("/update_weights_from_disk", self._update)
        app.router.add_post("/update_weight_version", self._rename)
        return app

    async def start(self) -> tuple[web.AppRunner, str]:
        """Listen; returns (runner, url). Port 0 takes a free one, `runner.cleanup()` stops it.

        Raises `UserError` when it cannot listen on the port.
        """
        runner = web.AppRunner(
            self.application(), handler_cancellation=True, access_log=None, shutdown_timeout=1.0
        )
        await runner.setup()
        site = web.TCPSite(runner, self.cfg.host, self.cfg.port)
        try:
            await site.start()
        except OSError as error:
            await runner.cleanup()
            raise UserError(
                f"cannot listen on {self.cfg.host}:{self.cfg.port}: {error.strerror}; "
                "choose another --port"
            ) from None
        port = runner.addresses[0][1]
        host = f"[{self.cfg.host}]" if ":" in self.cfg.host else self.cfg.host
        return runner, f"http://{host}:{port}"

    # --- authorisation ----------------------------------------------------------------------

    @web.middleware
    async def _authorise(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        path, keys = request.path, self._keys
        if path in CONTROL:
            if keys.admin:
                return await handler(request) if _bears(request, keys.admin) else _error(401, path)
            # A web page in a local browser can reach loopback too, but sends its origin.
            if not self._local or "Origin" in request.headers:
                return _error(403, f"{path} needs an admin key, and this server has none")
            if keys.generate and not _bears(request, keys.generate):
                return _error(401, path)
        elif path not in OPEN and keys.generate and not _bears(request, keys.generate):
            return _error(401, path)
        return await handler(request)

    @web.middleware
    async def _errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except UserError as error:
            answer = _error(400, str(error))
        except EngineFailure as error:
            answer = _error(500, str(error))
        except web.HTTPException as error:
            answer = _error(error.status, error.text or error.reason)
        except ConnectionError:  # the client has gone
            raise
        except Exception as error:
            logging.getLogger(__name__).exception("%s %s", request.method, request.path)
            answer = _error(500, f"{type(error).__name__} in {request.path}: see the server's log")
        if not request.content.is_eof():
            answer.force_close()  # else the client's next request meets a connection that ends
        return answer

    # --- sampling ---------------------------------------------------------------------------

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        encode = None if self._chat is None else self._chat.encode_text
        body, started = await _json(request), time.monotonic()
        # Tokenising a long text takes a while, in which the others are served.
        asked = await asyncio.to_thread(parse_generate, body, self._limits, encode)
        if asked.stream:
            return await send_events(request, self._parts(asked, started))
        await self._finish(asked.jobs)
        found = [self._answer(job, asked, started) for job in asked.jobs]
        return web.json_response(found[0] if asked.single else found)

    async def _parts(
        self, asked: GenerateRequest, started: float
    ) -> AsyncGenerator[dict[str, Any], None]:
        """What a job has so far, each time it has grown enough, and at its end."""
        (job,), sent = asked.jobs, 0
        said = None if self._decode is None else GrowingText(self._decode)
        async with aclosing(self.sessions.run(job)) as parts:
            async for _ in parts:
                if job.finish is not None:
                    yield self._answer(job, asked, started)
                elif len(job.ids) - sent >= asked.interval:
                    sent = len(job.ids)
                    yield self._answer(job, asked, started, said)

    def _answer(
        self,
        job: GenerationJob,
        asked: GenerateRequest,
        started: float,
        growing: GrowingText | None = None,
    ) -> dict[str, Any]:
        said = ""
        if growing is not None:
            said = growing.extend(job.text_ids)
        elif self._decode is not None:
            said = answer_text(job, self._decode)
        seconds = time.monotonic() - started
        version = self.sessions.version
        return generate_answer(job, version, said, logprobs=asked.logprobs, seconds=seconds)

    async def _chat_completions(self, request: web.Request) -> web.StreamResponse:
        body = await _json(request)
        if self._chat is None:
            raise UserError("/v1/chat/completions: this server has no chat template")
        asked = await asyncio.to_thread(parse_chat, body, self._chat, self._limits)
        if asked.stream:
            return await send_events(request, self._chunks(asked))
        await self._finish((asked.job,))
        return web.json_response(chat_completion(asked, self.sessions.version))

    async def _chunks(self, asked: ChatRequest) -> AsyncGenerator[dict[str, Any], None]:
        async with aclosing(self.sessions.run(asked.job)) as jobs:
            async for chunk in chat_chunks(asked, jobs, self.sessions):
                yield chunk

    async def _finish(self, jobs: Sequence[GenerationJob]) -> None:
        """Run jobs to their ends; the failure of one ends all of its request."""

        async def finish(job: GenerationJob) -> None:
            async with aclosing(self.sessions.run(job)) as parts:
                async for _ in parts:
                    pass

        try:
            async with asyncio.TaskGroup() as group:
                for job in jobs:
                    group.create_task(finish(job))
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def _tokenize(self, request: web.Request) -> web.Response:
        limit = self._limits.capacity * MAX_TOKEN_CHARS
        table = _TOKENIZE | {"prompt": text(limit), "messages": messages, "tools": tools}
        given = read_fields(await _json(request), table)
        if self._chat is None:
            raise UserError("/tokenize: this server has no tokenizer")
        if ("messages" in given) == ("prompt" in given):
            raise UserError("/tokenize: give either a prompt or messages")
        chat = self._chat
        if "messages" in given:
            ids = await asyncio.to_thread(chat.prompt_ids, given["messages"], given.get("tools"))
        else:
            ids = await asyncio.to_thread(chat.encode_text, given["prompt"])
        return web.json_response(
            {"tokens": ids.tolist(), "count": len(ids), "max_model_len": self._limits.capacity}
        )

    async def _detokenize(self, request: web.Request) -> web.Response:
        ids = list_of(integer(0, self._limits.vocab_size - 1), self._limits.capacity)
        given = read_fields(await _json(request), _TOKENIZE | {"tokens": ids})
        if self._chat is None:
            raise UserError("/detokenize: this server has no tokenizer")
        if "tokens" not in given:
            raise UserError("tokens is missing; send a list of ids")
        return web.json_response({"text": self._chat.decode(given["tokens"])})

    # --- control ----------------------------------------------------------------------------

    async def _pause(self, request: web.Request) -> web.Response:
        given = read_fields(await _json(request), _PAUSE)
        await self.sessions.pause(given.get("mode", "abort"))
        return web.json_response({"message": "Generation paused successfully.", "status": "ok"})

    async def _continue(self, request: web.Request) -> web.Response:
        read_fields(await _json(request), {})
        self.sessions.resume()
        return web.json_response({"message": "Generation continued successfully.", "status": "ok"})

    async def _abort(self, request: web.Request) -> web.Response:
        given = read_fields(await _json(request), _ABORT)
        rids, everything = given.get("rid", []), given.get("abort_all", False)
        if not rids and not everything:
            raise UserError("rid is missing; name the requests to end, or send abort_all=true")
        self.sessions.abort(*rids, everything=everything)
        return web.Response()

    async def _flush(self, request: web.Request) -> web.Response:
        read_fields(await _json(request), {})
        until = time.monotonic() + FLUSH_SECONDS
        while self.sessions.running or not self.sessions.engine.flush():
            if self.sessions.running or time.monotonic() > until:
                raise UserError("Flush cache failed: requests are running.")
            await asyncio.sleep(0.01)
        return web.Response(text="Cache flushed.\n")

    async def _update(self, request: web.Request) -> web.Response:
        given, waiting = read_fields(await _json(request), _UPDATE), self.sessions.running
        if "model_path" not in given:
            raise UserError("model_path is missing; name a directory")
        if given.get("abort_all_requests"):
            self.sessions.abort(everything=True)
        try:
            await self.sessions.update(given["model_path"], given.get("weight_version"))
        except Exception as error:  # whatever files can be damaged in
            known = isinstance(error, UserError)
            said = str(error) if known else f"model_path: {type(error).__name__}: {error}"
            answer = {"success": False, "message": said, "num_paused_requests": 0}
            return web.json_response(answer | {"error": {"message": said, "code": 400}}, status=400)
        message = f"Succeeded to update model weights. Weight version: {self.sessions.version}."
        return web.json_response(
            {"success": True, "message": message, "num_paused_requests": waiting}
        )

    async def _rename(self, request: web.Request) -> web.Response:
        given = read_fields(await _json(request), _RENAME)
        if "new_version" not in given:
            raise UserError("new_version is missing; give the weights a name")
        if given.get("abort_all_requests", True):
            self.sessions.abort(everything=True)
        self.sessions.rename(given["new_version"])
        return web.json_response({"success": True, "new_version": self.sessions.version})

    # --- information ------------------------------------------------------------------------

    async def _health(self, request: web.Request) -> web.Response:
        if failure := self.sessions.engine.failure:
            return _error(503, failure)
        return web.Response()

    async def _health_generate(self, request: web.Request) -> web.Response:
        """As `/health`, and a token is sampled, unless others are being or none may be."""
        if not (self.sessions.running or self.sessions.paused or self.sessions.engine.failure):
            body = {"input_ids": [0], "sampling_params": {"max_new_tokens": 1}}
            asked = parse_generate(body, self._limits, None)
            try:
                async with asyncio.timeout(HEALTH_SECONDS):
                    await self._finish(asked.jobs)
            except TimeoutError:
                return _error(503, f"no token was sampled within {HEALTH_SECONDS:g} s")
            except EngineFailure as error:
                return _error(503, str(error))
        return await self._health(request)

    async def _model_info(self, request: web.Request) -> web.Response:
        return web.json_response(self._described())

    def _described(self) -> dict[str, Any]:
        names = {"model_path": self.sessions.path, "weight_version": self.sessions.version}
        return self._model | names

    async def _server_info(self, request: web.Request) -> web.Response:
        running = {"num_running_reqs": self.sessions.running, "paused": self.sessions.paused}
        return web.json_response(
            self._described()
            | {
                "version": "agentcpm_jax",
                "context_length": self._limits.capacity,
                "vocab_size": self._limits.vocab_size,
                "enable_deterministic_inference": True,  # sampling_seed is honoured
                "startup_time": self._started,
                "internal_states": [running],
            }
        )

    async def _models(self, request: web.Request) -> web.Response:
        name = self._model.get("served_model_name") or Path(self.sessions.path).name
        card = {"id": name or "model", "object": "model", "max_model_len": self._limits.capacity}
        return web.json_response({"object": "list", "data": [card]})

    async def _metrics(self, request: web.Request) -> web.Response:
        total = self.sessions.total
        values = {
            "sglang:num_running_reqs": ("gauge", self.sessions.running),
            "sglang:paused": ("gauge", int(self.sessions.paused)),
            "sglang:num_requests_total": ("counter", total["requests"]),
            "sglang:num_aborted_requests_total": ("counter", total["aborted"]),
            "sglang:prompt_tokens_total": ("counter", total["prompt_tokens"]),
            "sglang:cached_tokens_total": ("counter", total["cached_tokens"]),
            "sglang:generation_tokens_total": ("counter", total["generated_tokens"]),
        }
        lines = [f"# TYPE {n} {kind}\n{n} {value}" for n, (kind, value) in values.items()]
        return web.Response(text="\n".join(lines) + "\n")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bears(request: web.Request, key: str) -> bool:
    kind, _, found = request.headers.get("Authorization", "").partition(" ")
    return kind.lower() == "bearer" and secrets.compare_digest(found.encode(), key.encode())


def _error(status: int, message: str) -> web.Response:
    if status == 401:
        message = f"{message}: missing or wrong bearer key"
    return web.json_response({"error": {"message": message, "code": status}}, status=status)


async def _json(request: web.Request) -> dict[str, Any]:
    try:
        return parse_body(await request.read())
    except web.HTTPException:  # larger than allowed
        raise
    except (web.RequestPayloadError, aiohttp.ClientError) as error:
        raise UserError(f"the body cannot be read: {error}") from None


def _rids(path: str, value: Any) -> list[str]:
    """One request id or several; an empty one is none."""
    if isinstance(value, list):
        return list_of(request_id, MAX_PROMPTS)(path, value)
    return [] if value == "" else [request_id(path, value)]


def _path(path: str, value: Any) -> str:
    found = text(MAX_PATH, 1)(path, value)
    if "\0" in found:
        raise refused(path, value, "the path of a directory")
    return found


_TOKENIZE: dict[str, Reader] = {
    "model": text(MAX_NAME),
    "skip_special_tokens": neutral(False),
    "add_special_tokens": anything,  # the tokenizers of these models add none
}
_PAUSE: dict[str, Reader] = {"mode": one_of("abort", "retract", "in_place")}
_ABORT: dict[str, Reader] = {"rid": _rids, "abort_all": flag}
_RENAME: dict[str, Reader] = {"new_version": text(MAX_NAME, 1), "abort_all_requests": flag}
_UPDATE: dict[str, Reader] = {
    "model_path": _path,
    "weight_version": text(MAX_NAME, 1),
    "abort_all_requests": flag,
    "flush_cache": flag,  # what is cached under other weights is always dropped
    "load_format": neutral("auto", "safetensors"),
    "is_async": neutral(False),
    "keep_pause": flag,  # an update never ends a pause
    # Of other engines' memory and records.
    **dict.fromkeys(("torch_empty_cache", "recapture_cuda_graph", "token_step"), anything),
}
