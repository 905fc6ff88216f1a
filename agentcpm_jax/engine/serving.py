"""A server from a directory, until it is told to stop."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

from agentcpm_jax.chat.format import ChatFormat
from agentcpm_jax.engine.config import EngineConfig
from agentcpm_jax.engine.served_local import ServedLocal
from agentcpm_jax.engine.server import EngineServer, ServerConfig, ServerKeys

API_KEY, ADMIN_KEY = "SGLANG_API_KEY", "SGLANG_ADMIN_API_KEY"  # environment variables


def keys_from_environment() -> ServerKeys:
    """The bearer keys that clients must show; unset = none."""
    return ServerKeys(os.environ.get(API_KEY, ""), os.environ.get(ADMIN_KEY, ""))


def serve(
    path: str,
    engine: EngineConfig,
    server: ServerConfig,
    *,
    dtype: str | None = None,
    announce: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve the checkpoint in `path` until SIGINT or SIGTERM; `announce(url)` once it listens.

    Raises `UserError`: no checkpoint, no tokenizer, or the port is taken.
    """
    chat = ChatFormat.load(path)
    served = ServedLocal(path, engine, dtype)
    try:
        asyncio.run(_serve(path, served, chat, server, announce))
    finally:
        served.close()


async def _serve(
    path: str,
    served: ServedLocal,
    chat: ChatFormat,
    cfg: ServerConfig,
    announce: Callable[[str], None],
) -> None:
    front = EngineServer(
        served, cfg, chat=chat, keys=keys_from_environment(), model=served.describe(path)
    )
    runner, url = await front.start()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    announce(url)
    await stop.wait()
    await runner.cleanup()
