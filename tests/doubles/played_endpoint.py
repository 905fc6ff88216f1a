"""A chat-completions server on a real port whose model is a Python function."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from agentcpm_jax.rewards.grade import grade_exact

#: (body, headers) -> the reply's text, or a whole response; may be async.
Play = Callable[[dict[str, Any], Any], Any]


@dataclass
class Played:
    """What was asked, and where."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[Any] = field(default_factory=list)
    running: int = 0
    most_running: int = 0


@asynccontextmanager
async def played(play: Play) -> AsyncIterator[Played]:
    """The server, until the block ends."""
    seen = Played()

    async def complete(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        seen.bodies.append(body)
        seen.headers.append(request.headers)
        seen.running += 1
        seen.most_running = max(seen.most_running, seen.running)
        try:
            reply = play(body, request.headers)
            reply = await reply if hasattr(reply, "__await__") else reply
        finally:
            seen.running -= 1
        if not isinstance(reply, str):
            return reply
        message = {"role": "assistant", "content": reply}
        return web.json_response({"choices": [{"message": message, "finish_reason": "stop"}]})

    app = web.Application()
    app.router.add_post("/v1/chat/completions", complete)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert site._server is not None
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
    seen.url = f"http://127.0.0.1:{port}/v1"
    try:
        yield seen
    finally:
        await runner.cleanup()


def fields(prompt: str) -> dict[str, Any]:
    """What an attentive reader of a judge's prompt finds in its three data lines."""
    found: dict[str, Any] = {}
    for line in prompt.splitlines():
        for name in ("QUESTION", "ACCEPTED ANSWERS", "ANSWER"):
            if line.startswith(f"{name} "):
                assert name not in found, f"two lines pose as {name}"
                found[name] = line.removeprefix(f"{name} ")
    accepted = found["ACCEPTED ANSWERS"].split(" or ")
    return found | {
        "QUESTION": json.loads(found["QUESTION"]),
        "ANSWER": json.loads(found["ANSWER"]),
        "ACCEPTED ANSWERS": [json.loads(a) for a in accepted],
    }


def verdict_line(prompt: str, verdict: str) -> str:
    """The line that the prompt asks for."""
    return next(s for s in prompt.splitlines() if s.startswith("VERDICT") and s.endswith(verdict))


def honest(prompt: str) -> str:
    """A judge that compares, and says so as it was told to."""
    data = fields(prompt)
    verdict = grade_exact(data["ANSWER"], data["ACCEPTED ANSWERS"]).upper()
    return f"The answer was compared.\n{verdict_line(prompt, verdict)}\n"


def content(body: dict[str, Any]) -> str:
    """The user's message of a request."""
    return body["messages"][-1]["content"]
