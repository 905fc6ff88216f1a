"""Serves a Hugging Face directory with the in-process engine, until it is told to stop."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from agentcpm_jax.chat.format import ChatFormat
from agentcpm_jax.engine.config import EngineConfig
from agentcpm_jax.engine.local import LocalEngine
from agentcpm_jax.engine.server import EngineServer, ServerConfig, ServerKeys
from agentcpm_jax.hf.load import load_hf
from agentcpm_jax.hf.names import CONFIG
from agentcpm_jax.types import UserError

API_KEY, ADMIN_KEY = "SGLANG_API_KEY", "SGLANG_ADMIN_API_KEY"  # environment variables


def keys_from_environment() -> ServerKeys:
    """The bearer keys that clients must show; unset = none."""
    return ServerKeys(os.environ.get(API_KEY, ""), os.environ.get(ADMIN_KEY, ""))


def serve(
    path: Path,
    chat: ChatFormat,
    engine: EngineConfig,
    server: ServerConfig,
    *,
    dtype: str | None = None,
    announce: Callable[[str], None] = lambda url: None,
    **options: Any,
) -> None:
    """Serve a model, as `served_chat` found it, until SIGINT or SIGTERM.

    `announce(url)` once it listens.

    `options` are those of `EngineServer`: chunk, weight_version.

    Raises `UserError`: the port is taken.
    """
    served = ServedLocal(str(path), engine, dtype)
    try:
        described = served.describe(str(path))
        keys = keys_from_environment()
        front = EngineServer(served, server, chat=chat, keys=keys, model=described, **options)
        asyncio.run(_listen(front, announce))
    finally:
        served.close()


async def _listen(front: EngineServer, announce: Callable[[str], None]) -> None:
    runner, url = await front.start()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    announce(url)
    await stop.wait()
    await runner.cleanup()


class ServedLocal(LocalEngine):
    """A `LocalEngine` with the weights of a directory; implements `ServedEngine`.

    Args:
      path: config.json and safetensors. Raises `UserError` when they are not a Qwen3 checkpoint.
      dtype: of parameters and computation, 'float32' or 'bfloat16'; default: as stored.
    """

    def __init__(self, path: str, cfg: EngineConfig, dtype: str | None = None) -> None:
        params, model = load_hf(path, param_dtype=dtype)
        if dtype is not None:
            model = replace(model, dtype=dtype)
        super().__init__(params, model, cfg)
        self.capacity, self.vocab_size = cfg.capacity, model.vocab_size

    def load(self, path: str, version: int) -> None:
        if not (Path(path) / CONFIG).is_file():
            raise UserError(f"{path} holds no config.json; name a Hugging Face directory")
        params, _ = load_hf(path, self.model)
        self.set_params(params, version)

    def describe(self, path: str) -> dict[str, Any]:
        """The fields of `/model_info` other than the version."""
        return {
            "model_path": path,
            "tokenizer_path": path,
            "model_type": "qwen3",
            "architectures": ["Qwen3ForCausalLM"],
            "dtype": self.model.param_dtype,
        }
