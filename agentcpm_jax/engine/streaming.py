"""Answers that are sent while they grow: text that will not change any more, and events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from aiohttp import web

from agentcpm_jax.engine.sessions import EngineFailure

MAX_HELD = 64  # ids that make no whole character are kept together for so long
BROKEN = "\ufffd"  # stands for bytes that are no character, or not yet one


class GrowingText:
    """The text of ids that come one after another, each decoded a few times only.

    Held back is what more ids may change: the bytes of a character that is not complete. Bytes that
    never become one may be spelt otherwise than when all ids are decoded at once.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._before = ""  # text of the ids before `_whole`, at which no character is cut
        self._whole = 0

    def extend(self, ids: Sequence[int], *, end: bool = False) -> str:
        """What is certain of the text of `ids`, which begin with those of the last call.

        `end`: no more will come, so all is certain. What was certain once remains so.
        """
        new = self._decode(ids[self._whole :])
        certain = new.rstrip(BROKEN)
        if end or certain == new or len(ids) - self._whole > MAX_HELD:
            self._before, self._whole = self._before + new, len(ids)
            return self._before
        return self._before + certain


def without_beginnings(text: str, marks: Sequence[str]) -> int:
    """How much of a text that grows no mark can reach that has only begun at its end."""
    longest = max(map(len, marks), default=0)
    for start in range(max(len(text) - longest + 1, 0), len(text)):
        if any(mark.startswith(text[start:]) for mark in marks):
            return start
    return len(text)


async def send_events(
    request: web.Request, answers: AsyncGenerator[dict[str, Any], None]
) -> web.StreamResponse:
    """Server-sent events, and `[DONE]`; an error before the first decides the status.

    A client that goes away ends the answers, and with them its request.
    """
    async with aclosing(answers):
        first = await anext(answers)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})

        async def send(data: str) -> None:
            await response.write(f"data: {data}\n\n".encode())

        try:
            await response.prepare(request)
            await send(json.dumps(first))
            try:
                async for answer in answers:
                    await send(json.dumps(answer))
            except EngineFailure as error:
                await send(json.dumps({"error": {"message": str(error), "code": 500}}))
            await send("[DONE]")
            await response.write_eof()
        except ConnectionError:  # nobody listens any more
            pass
    return response
