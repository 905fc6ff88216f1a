"""The HTTP client of one server of the pool: generate, information, control. It keeps no state."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Awaitable, Callable, Mapping
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, TypeVar

import httpx

from agentcpm_jax.pool.config import Keys, PoolConfig
from agentcpm_jax.pool.errors import PoolError, PoolErrorKind
from agentcpm_jax.pool.fields import Fields
from agentcpm_jax.pool.protocol import read_body

T = TypeVar("T")
#: How often a check asks the same: of a worker, one odd answer says little.
ASKS = 4
HEALTH_TIMEOUT = 25.0  # s; SGLang itself answers after at most 20
#: Bytes that an answer may have, and those that each token asked for adds: about 60 are needed.
ANSWER_BYTES, TOKEN_BYTES = 1 << 20, 1 << 10


def open_client() -> httpx.AsyncClient:
    """A client for all workers.

    Proxies come from the environment (HTTP_PROXY, NO_PROXY, ...); none of them leads to loopback.
    So does a private certificate authority (SSL_CERT_FILE).
    """
    verify = ssl.create_default_context()
    # A connection idle for longer than the server keeps it (uvicorn: 5 s) would break on its next
    # use, and a broken POST cannot be retried safely.
    limits = httpx.Limits(
        max_connections=None, max_keepalive_connections=None, keepalive_expiry=2.0
    )
    own = httpx.AsyncHTTPTransport(verify=verify, limits=limits)
    here: dict[str, httpx.AsyncBaseTransport | None] = {
        f"all://{host}": own for host in ("127.0.0.1", "localhost", "[::1]")
    }
    none = CookieJar(DefaultCookiePolicy(allowed_domains=()))  # they would go to other workers
    return httpx.AsyncClient(verify=verify, limits=limits, timeout=None, mounts=here, cookies=none)


async def asked(ask: Callable[[], Awaitable[T]]) -> T:
    """What a server answers; when that is odd it is asked again, unless it took too long."""
    for attempt in range(ASKS - 1):
        try:
            return await ask()
        except PoolError as error:
            if error.kind is PoolErrorKind.TIMEOUT:
                raise
        await asyncio.sleep(0.1 * 2**attempt)
    return await ask()


class Server:
    """The routes of one server. Every method raises `PoolError` and nothing else.

    Answers are bounded in bytes, and in time from the first byte sent to the last one read.
    """

    def __init__(
        self, url: str, client: httpx.AsyncClient, keys: Keys, cfg: PoolConfig, name: str = ""
    ) -> None:
        self.url, self._client, self._keys, self._cfg = url, client, keys, cfg
        self.name = name or url

    async def generate(
        self, body: Mapping[str, Any], timeout: float, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Status and raw body of `/generate`, for `protocol.read_generate` to validate."""
        most = ANSWER_BYTES + TOKEN_BYTES * body["sampling_params"]["max_new_tokens"]
        return await self._send("POST", "/generate", body, timeout, headers, most=most)

    async def model_info(self) -> Fields:
        """The answer of `/model_info`, or of its older name `/get_model_info`."""
        return await self._info("/model_info", "/get_model_info")

    async def server_info(self) -> Fields:
        """`/server_info`: the server's arguments."""
        return await self._info("/server_info", "/get_server_info")

    async def healthy(self) -> bool:
        """Whether `/health` answers 200 in time. A paused server does not: do not ask it."""
        try:
            status, _ = await self._send("GET", "/health", None, HEALTH_TIMEOUT)
        except PoolError:
            return False
        return status == 200

    async def tokenize(self, body: Mapping[str, Any]) -> list[int] | None:
        """Ids of a prompt or of messages; None where the server has no such route."""
        status, payload = await self._send("POST", "/tokenize", body, self._cfg.control_timeout)
        if status in (404, 405):
            return None
        found = Fields(read_body(status, payload, self.url), self.url, "/tokenize")
        if (tokens := found.counts("tokens")) is None:
            raise found.bad("/tokenize: no tokens")
        return tokens

    async def pause(self, mode: str) -> None:
        await self._control("/pause_generation", {"mode": mode}, self._cfg.control_timeout)

    async def resume(self) -> None:
        await self._control("/continue_generation", {}, self._cfg.control_timeout)

    async def update_from_disk(self, path: str, version: str, *, flush: bool) -> None:
        """Load the weights in `path` and announce them as `version`.

        SGLang 0.5 exits when their shapes differ from the served model's: `DIED_LOADING`.
        """
        body = {"model_path": path, "weight_version": version, "flush_cache": flush}
        try:
            found = await self._control("/update_weights_from_disk", body, self._cfg.update_timeout)
        except PoolError as error:
            if error.kind is PoolErrorKind.UNREACHABLE:
                raise PoolError(PoolErrorKind.DIED_LOADING, self.url, error.detail) from None
            raise
        if not found.flag("success"):
            raise found.bad("/update_weights_from_disk does not say whether it was done")

    async def pull(self, run: str, version: int) -> str | None:
        """Where the agent has the weights; None while it copies them (the first call begins).

        Raises `PoolError`, `NO_WEIGHTS`, when it cannot.
        """
        body = {"name": run, "version": version}
        found = await self._control("/pull", body, self._cfg.control_timeout)
        state, path = found.text("state"), found.text("path")
        if state == "failed":
            said = found.text("reason") or "no reason given"
            raise PoolError(PoolErrorKind.NO_WEIGHTS, self.url, said)
        if state not in ("pulling", "ready") or (state == "ready" and not path):
            raise found.bad(f"/pull: state {state}, path {path}")
        return path if state == "ready" else None

    async def abort(self, rid: str) -> None:
        await self._control("/abort_request", {"rid": rid}, self._cfg.control_timeout)

    async def _info(self, *paths: str) -> Fields:
        status, payload = 404, b""
        for path in paths:
            status, payload = await self._send("GET", path, None, self._cfg.control_timeout)
            if status != 404:
                break
        return Fields(read_body(status, payload, self.url), self.url, paths[0])

    async def _control(self, path: str, body: Mapping[str, Any], timeout: float) -> Fields:
        status, payload = await self._send("POST", path, body, timeout, admin=True)
        url = f"{self.url}{path}"
        done = read_body(status, payload, url)
        return Fields({} if done is None else done, url)

    async def _send(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        timeout: float,
        headers: Mapping[str, str] | None = None,
        *,
        admin: bool = False,
        most: int = ANSWER_BYTES,
    ) -> tuple[int, bytes]:
        key = self._keys.admin if admin else self._keys.generate
        # Unpacked, a few compressed bytes can fill the memory.
        sent = {"Accept-Encoding": "identity"} | dict(headers or {})
        if key:
            sent["Authorization"] = f"Bearer {key}"
        content = None
        if body is not None:
            content = json.dumps(body).encode()
            sent["Content-Type"] = "application/json"
        limits = httpx.Timeout(timeout, connect=min(timeout, self._cfg.control_timeout))
        target = f"{self.url}{path}"
        try:
            # The time-outs of the client are per read: a server that drips would outlast them.
            async with (
                asyncio.timeout(timeout),
                self._client.stream(
                    method, target, content=content, headers=sent, timeout=limits
                ) as answer,
            ):
                return answer.status_code, await self._read(answer, path, most)
        except (TimeoutError, httpx.TimeoutException):
            said = f"{path}: no answer within {timeout:g} s"
            raise PoolError(PoolErrorKind.TIMEOUT, self.url, said) from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            said = f"{path}: {type(error).__name__} {error}"
            raise PoolError(PoolErrorKind.UNREACHABLE, self.url, said) from None

    async def _read(self, answer: httpx.Response, path: str, most: int) -> bytes:
        packed = answer.headers.get("Content-Encoding", "identity")
        if packed.strip().lower() != "identity":
            said = f"{path}: packed as {packed}, which was not asked for"
            raise PoolError(PoolErrorKind.BAD_ANSWER, self.url, said)
        payload = bytearray()
        async for piece in answer.aiter_raw():
            payload += piece
            if len(payload) > most:
                said = f"{path}: more than the {most} bytes that an answer may have"
                raise PoolError(PoolErrorKind.BAD_ANSWER, self.url, said)
        return bytes(payload)
