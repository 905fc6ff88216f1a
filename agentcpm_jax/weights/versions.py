"""Weights by version, for deterministic runs: batch n is sampled with version max(0, n - eta)."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import jax
import numpy as np

from agentcpm_jax.model.config import ModelConfig
from agentcpm_jax.weights import store
from agentcpm_jax.weights.publish import load_version, publish_version


class VersionStore:
    """Publishes each version once and hands it out again, in this run or after a restart.

    Not `enabled` (asynchronous runs): the engine holds the only copy and nothing is stored.
    """

    def __init__(self, directory: Path, model: ModelConfig, *, enabled: bool) -> None:
        self._directory, self._model, self._enabled = directory, model, enabled
        self._recent: dict[int, Any] = {}

    def put(self, version: int, params: Any) -> None:
        """Store `params` as `version`; a version that exists is never published again."""
        if not self._enabled:
            return
        host = jax.tree.map(np.asarray, jax.device_get(params))
        publish_version(self._directory, version, host, self._model)
        self._recent[version] = host

    async def wait(self, version: int) -> Any:
        """The parameters of `version`, once it exists."""
        while version not in self._recent:
            if version in store.versions(self._directory):
                self._recent[version] = load_version(self._directory, version)
                break
            await asyncio.sleep(0.01)
        return self._recent[version]

    def collect_garbage(self, keep_from: int) -> None:
        """Forget versions below `keep_from`."""
        if self._enabled:
            store.collect_garbage(self._directory, keep_from)
            self._recent = {v: p for v, p in self._recent.items() if v >= keep_from}
