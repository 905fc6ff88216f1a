"""An engine behind SGLang's HTTP protocol: the subset that rollouts and weight updates need.

    GET   /health /health_generate /model_info /server_info /v1/models /metrics
    POST  /generate /v1/chat/completions /tokenize /detokenize
    POST  /pause_generation /continue_generation /abort_request /flush_cache       control:
          /update_weights_from_disk /update_weight_version                         admin key

Control routes require the admin key; without one they answer on the loopback interface only.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from agentcpm_jax.chat.format import ChatFormat
from agentcpm_jax.engine.chat_route import chat_completion, chat_job
from agentcpm_jax.engine.requests import RequestLimits, generate_answer, parse_generate
from agentcpm_jax.engine.sessions import EngineFailure, GenerationJob, ServedEngine, Sessions
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

MAX_BODY_BYTES = 64 << 20  # of a request: millions of token ids, and no denial of service

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
        decode = None if chat is None else chat.decode
        self.sessions = Sessions(engine, version=weight_version, chunk=chunk, decode=decode)
        self._decode = decode
        self._limits = RequestLimits(
            engine.capacity, engine.vocab_size, () if chat is None else chat.stop_ids
        )
        self._model = {"model_path": "", "tokenizer_path": "", "is_generation": True}
        self._model |= model or {}
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
            return _error(400, str(error))
        except EngineFailure as error:
            return _error(500, str(error))
        except web.HTTPException as error:
            return _error(error.status, error.text or error.reason)

    # --- sampling ---------------------------------------------------------------------------

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await _json(request)
        encode = None if self._chat is None else self._chat.encode_text
        jobs = parse_generate(body, self._limits, encode)
        logprobs, started = bool(body.get("return_logprob")), time.monotonic()

        def answer(job: GenerationJob) -> dict[str, Any]:
            seconds = time.monotonic() - started
            return generate_answer(
                job, self.sessions.version, self._decode, logprobs=logprobs, seconds=seconds
            )

        single = not isinstance((body.get("input_ids") or [0])[0], list) and not isinstance(
            body.get("text"), list
        )
        if body.get("stream"):
            if not single:
                raise UserError("stream: one prompt at a time")
            return await _stream(request, (answer(job) async for job in self.sessions.run(jobs[0])))
        answers = await asyncio.gather(*(self._finish(job) for job in jobs))
        found = [answer(job) for job in answers]
        return web.json_response(found[0] if single else found)

    async def _chat_completions(self, request: web.Request) -> web.StreamResponse:
        body = await _json(request)
        if self._chat is None:
            raise UserError("/v1/chat/completions: this server has no chat template")
        job = chat_job(body, self._chat, self._limits)
        if body.get("stream"):

            async def chunks() -> AsyncIterator[dict[str, Any]]:
                assert self._chat is not None
                async for part in self.sessions.run(job):
                    if part.finish is not None:
                        yield chat_completion(part, body, self._chat, self.sessions.version)

            return await _stream(request, chunks())
        done = await self._finish(job)
        return web.json_response(chat_completion(done, body, self._chat, self.sessions.version))

    async def _finish(self, job: GenerationJob) -> GenerationJob:
        async for _ in self.sessions.run(job):
            pass
        return job

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await _json(request)
        if self._chat is None:
            raise UserError("/tokenize: this server has no tokenizer")
        if body.get("messages") is not None:
            ids = self._chat.prompt_ids(body["messages"], body.get("tools")).tolist()
        elif isinstance(body.get("prompt"), str):
            ids = self._chat.encode_text(body["prompt"]).tolist()
        else:
            raise UserError("/tokenize: give a prompt or messages")
        return web.json_response(
            {"tokens": ids, "count": len(ids), "max_model_len": self._limits.capacity}
        )

    async def _detokenize(self, request: web.Request) -> web.Response:
        body = await _json(request)
        if self._chat is None:
            raise UserError("/detokenize: this server has no tokenizer")
        return web.json_response({"text": self._chat.decode(body.get("tokens") or [])})

    # --- control ----------------------------------------------------------------------------

    async def _pause(self, request: web.Request) -> web.Response:
        mode = (await _json(request)).get("mode", "abort")
        if mode not in ("abort", "retract", "in_place"):
            raise UserError(f"mode={mode!r}; one of abort, retract, in_place")
        await self.sessions.pause(mode)
        return web.json_response({"message": "Generation paused successfully.", "status": "ok"})

    async def _continue(self, request: web.Request) -> web.Response:
        self.sessions.resume()
        return web.json_response({"message": "Generation continued successfully.", "status": "ok"})

    async def _abort(self, request: web.Request) -> web.Response:
        body = await _json(request)
        self.sessions.abort(body.get("rid") or "", everything=bool(body.get("abort_all")))
        return web.Response()

    async def _flush(self, request: web.Request) -> web.Response:
        if self.sessions.running or not self.sessions.engine.flush():
            return web.Response(status=400, text="Flush cache failed: requests are running.\n")
        return web.Response(text="Cache flushed.\n")

    async def _update(self, request: web.Request) -> web.Response:
        body = await _json(request)
        path, waiting = body.get("model_path"), self.sessions.running
        if not isinstance(path, str):
            raise UserError("model_path must be a directory")
        if body.get("abort_all_requests"):
            self.sessions.abort("", everything=True)
        try:
            await self.sessions.update(path, body.get("weight_version"))
        except UserError as error:
            refused = {"success": False, "message": str(error), "num_paused_requests": 0}
            return web.json_response(refused, status=400)
        self._model["model_path"] = path
        message = f"Succeeded to update model weights. Weight version: {self.sessions.version}."
        return web.json_response(
            {"success": True, "message": message, "num_paused_requests": waiting}
        )

    async def _rename(self, request: web.Request) -> web.Response:
        body = await _json(request)
        if body.get("abort_all_requests", True):
            self.sessions.abort("", everything=True)
        self.sessions.rename(str(body.get("new_version")))
        return web.json_response({"success": True, "new_version": self.sessions.version})

    # --- information ------------------------------------------------------------------------

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _health_generate(self, request: web.Request) -> web.Response:
        if not self.sessions.running:
            (job,) = parse_generate(
                {"input_ids": [0], "sampling_params": {"max_new_tokens": 1}}, self._limits, None
            )
            await self._finish(job)
        return web.Response()

    async def _model_info(self, request: web.Request) -> web.Response:
        return web.json_response(self._model | {"weight_version": self.sessions.version})

    async def _server_info(self, request: web.Request) -> web.Response:
        running = {"num_running_reqs": self.sessions.running, "paused": self.sessions.paused}
        return web.json_response(
            self._model
            | {
                "version": "agentcpm_jax",
                "context_length": self._limits.capacity,
                "vocab_size": self._limits.vocab_size,
                "enable_deterministic_inference": True,  # sampling_seed is honoured
                "startup_time": self._started,
                "weight_version": self.sessions.version,
                "internal_states": [running],
            }
        )

    async def _models(self, request: web.Request) -> web.Response:
        name = self._model.get("served_model_name") or Path(self._model["model_path"]).name
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
        body = await request.json() if request.can_read_body else {}
    except ValueError:
        raise UserError("the body is not JSON") from None
    if not isinstance(body, dict):
        raise UserError("the body must be a JSON object")
    return body


async def _stream(
    request: web.Request, answers: AsyncIterator[dict[str, Any]]
) -> web.StreamResponse:
    """Send server-sent events; an error before the first decides the status."""
    first = await anext(answers)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)

    async def send(data: str) -> None:
        await response.write(f"data: {data}\n\n".encode())

    await send(json.dumps(first))
    try:
        async for answer in answers:
            await send(json.dumps(answer))
    except EngineFailure as error:
        await send(json.dumps({"error": {"message": str(error), "code": 500}}))
    await send("[DONE]")
    await response.write_eof()
    return response
