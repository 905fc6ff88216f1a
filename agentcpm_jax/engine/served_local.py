"""The in-process engine as a server sees it: Hugging Face directories in, tokens out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from agentcpm_jax.engine.local import EngineConfig, LocalEngine
from agentcpm_jax.model.hf import load_hf
from agentcpm_jax.types import UserError


class ServedLocal(LocalEngine):
    """A `LocalEngine` with the weights of a directory: the `ServedEngine` of our server.

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
        if not (Path(path) / "config.json").is_file():
            raise UserError(f"{path} holds no config.json; name a Hugging Face directory")
        params, _ = load_hf(path, self.model)
        self.set_params(params, version)

    def describe(self, path: str) -> dict[str, Any]:
        """What `/model_info` says beside the version."""
        return {
            "model_path": path,
            "tokenizer_path": path,
            "model_type": "qwen3",
            "architectures": ["Qwen3ForCausalLM"],
            "dtype": self.model.param_dtype,
        }
