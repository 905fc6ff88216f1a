"""The HTTP client of one server of the pool: generate, information, control. It keeps no state."""

from __future__ import annotations

import json
import ssl
from collections.abc import Mapping
from typing import Any

import httpx

from agentcpm_jax.pool.config import Keys, PoolConfig
from agentcpm_jax.pool.protocol import PoolError, PoolErrorKind, read_body

HEALTH_TIMEOUT = 25.0  # s; SGLang itself answers after at most 20


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
    return httpx.AsyncClient(verify=verify, limits=limits, timeout=None, mounts=here)


class Server:
    """The routes of one server. Every method raises `PoolError` and nothing else."""

    def __init__(
        self, url: str, client: httpx.AsyncClient, keys: Keys, cfg: PoolConfig, name: str = ""
    ) -> None:
        self.url, self._client, self._keys, self._cfg = url, client, keys, cfg
        self.name = name or url

    async def generate(
        self, body: Mapping[str, Any], timeout: float, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Status and raw body of `/generate`, for `protocol.read_generate` to validate."""
        return await self._send("POST", "/generate", body, timeout, headers or {})

    async def model_info(self) -> dict[str, Any]:
        """The answer of `/model_info`, or of its older name `/get_model_info`."""
        return await self._info("/model_info", "/get_model_info")

    async def server_info(self) -> dict[str, Any]:
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
        body = read_body(status, payload, self.url)
        if not isinstance(body, dict) or not isinstance(body.get("tokens"), list):
            raise PoolError(
                PoolErrorKind.BAD_ANSWER, self.url, f"/tokenize: no tokens in {body!r:.200}"
            )
        return body["tokens"]

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
            await self._control("/update_weights_from_disk", body, self._cfg.update_timeout)
        except PoolError as error:
            if error.kind is PoolErrorKind.UNREACHABLE:
                raise PoolError(PoolErrorKind.DIED_LOADING, self.url, error.detail) from None
            raise

    async def pull(self, run: str, version: int) -> dict[str, Any]:
        """The state of the agent's copy of the weights; the first call starts the copy."""
        body = {"name": run, "version": version}
        found = await self._control("/pull", body, self._cfg.control_timeout)
        if not isinstance(found, dict) or "state" not in found:
            raise PoolError(PoolErrorKind.BAD_ANSWER, self.url, f"/pull: {found!r:.200}")
        return found

    async def abort(self, rid: str) -> None:
        await self._control("/abort_request", {"rid": rid}, self._cfg.control_timeout)

    async def _info(self, *paths: str) -> dict[str, Any]:
        status, payload = 404, b""
        for path in paths:
            status, payload = await self._send("GET", path, None, self._cfg.control_timeout)
            if status != 404:
                break
        body = read_body(status, payload, self.url)
        if not isinstance(body, dict):
            raise PoolError(PoolErrorKind.BAD_ANSWER, self.url, f"{paths[0]} is no object")
        return body

    async def _control(self, path: str, body: Mapping[str, Any], timeout: float) -> Any:
        status, payload = await self._send("POST", path, body, timeout, admin=True)
        return read_body(status, payload, f"{self.url}{path}")

    async def _send(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        timeout: float,
        headers: Mapping[str, str] | None = None,
        *,
        admin: bool = False,
    ) -> tuple[int, bytes]:
        key = self._keys.admin if admin else self._keys.generate
        sent = dict(headers or {})
        if key:
            sent["Authorization"] = f"Bearer {key}"
        content = None
        if body is not None:
            content = json.dumps(body).encode()
            sent["Content-Type"] = "application/json"
        try:
            answer = await self._client.request(
                method,
                f"{self.url}{path}",
                content=content,
                headers=sent,
                timeout=httpx.Timeout(timeout, connect=min(timeout, self._cfg.control_timeout)),
            )
        except httpx.TimeoutException:
            said = f"{path}: no answer within {timeout:g} s"
            raise PoolError(PoolErrorKind.TIMEOUT, self.url, said) from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            said = f"{path}: {type(error).__name__} {error}"
            raise PoolError(PoolErrorKind.UNREACHABLE, self.url, said) from None
        return answer.status_code, answer.content
