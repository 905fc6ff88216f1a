"""A `ChatPolicy` over any OpenAI-compatible server: judges, summarisers, evaluation.

One attempt per call, with typed failures: the caller decides about retries, so none multiply.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import httpx

from agentcpm_jax.rollout.policy import AssistantMessage, Finish
from agentcpm_jax.types import UserError

MAX_TOKENS = 1024  # of a reply: a verdict, and a little thought before it

_FINISH = {"length": Finish.LENGTH}
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class ChatEndpoint:
    """Replies of one model at temperature 0. Each call has a connection of its own, so any event
    loop may call.

    Args:
      url: up to and with the version, e.g. http://localhost:30000/v1.
      key_env: the environment variable that holds the key; None: no key is sent.
      timeout: seconds for one reply; 0: no limit.
    Raises:
      UserError: no usable URL or model, or the key's variable is not set.
    """

    def __init__(
        self, url: str, model: str, *, key_env: str | None = None, timeout: float = 60.0
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"endpoint url is {url!r}; give one like http://localhost:30000/v1")
        if not model:
            raise UserError(f"no model is named for the endpoint {url}; name one it serves")
        if key_env and not os.environ.get(key_env):
            raise UserError(
                f"environment variable {key_env} is not set; export the endpoint's key in it, "
                "or set key_env='' if none is needed"
            )
        self._url, self._model, self._timeout = url, model, timeout
        self._key = os.environ[key_env].strip() if key_env else ""
        # A proxy of the environment must not see loopback traffic.
        self._trust_env = parts.hostname not in _LOOPBACK
        self._verify = _certificates() if parts.scheme == "https" else False

    async def reply(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> AssistantMessage:
        """The first choice. A failure is a message with `finish=error` and an `error` that begins
        with timeout, transport, busy, refused or malformed; keys are in no message."""
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [dict(m) for m in messages],
            "temperature": 0.0,
            "max_tokens": MAX_TOKENS,
        }
        if tools:
            body["tools"] = [dict(t) for t in tools]
        try:
            async with asyncio.timeout(self._timeout or None):
                response = await self._post(body)
        except (TimeoutError, httpx.TimeoutException):
            return self._failed("timeout", f"no reply within {self._timeout:g} s")
        except (httpx.HTTPError, OSError) as error:
            return self._failed("transport", f"{type(error).__name__}: {error}")
        if response.status_code != httpx.codes.OK:
            kind = "busy" if _may_pass(response.status_code) else "refused"
            return self._failed(kind, f"status {response.status_code}: {response.text[:200]}")
        try:
            return _message(response.json())
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            return self._failed("malformed", f"{type(error).__name__}: {error}; {response.text!r}")

    async def _post(self, body: Mapping[str, Any]) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        headers["Content-Type"] = "application/json"
        async with httpx.AsyncClient(
            timeout=self._timeout or None, trust_env=self._trust_env, verify=self._verify
        ) as client:
            url = f"{self._url.rstrip('/')}/chat/completions"
            # ASCII: text of a policy may hold lone surrogates, which UTF-8 does not carry.
            return await client.post(url, content=json.dumps(body).encode(), headers=headers)

    def _failed(self, kind: str, detail: str) -> AssistantMessage:
        text = f"{kind}: {detail}"
        text = text.replace(self._key, "***") if self._key else text  # servers may echo it
        return AssistantMessage("", finish=Finish.ERROR, error=text[:500])


def may_retry(error: str) -> bool:
    """Whether a retry may help after this error: after all but a refusal."""
    return not error.startswith("refused")


def _may_pass(status: int) -> bool:
    return status in (408, 409, 425, 429) or status >= 500


def _message(reply: Mapping[str, Any]) -> AssistantMessage:
    """The first choice of a chat completion.

    Raises when there is none: some servers report errors with status 200.
    """
    choice = reply["choices"][0]
    content = choice["message"].get("content") or ""
    if not isinstance(content, str):
        content = "".join(part.get("text", "") for part in content)
    calls = choice["message"].get("tool_calls") or ()
    finish = _FINISH.get(choice.get("finish_reason"), Finish.STOP)
    return AssistantMessage(content, tuple(dict(call) for call in calls), finish)


@cache
def _certificates() -> ssl.SSLContext:
    """Loaded once: reading the certificates takes longer than a request."""
    return ssl.create_default_context()
