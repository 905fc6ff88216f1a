"""Weights by version, for deterministic runs: batch n is sampled with version max(0, n - eta)."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import jax
import numpy as np

from agentcpm_jax.model.config import ModelConfig
from agentcpm_jax.types import UserError
from agentcpm_jax.weights import store
from agentcpm_jax.weights.publish import load_version, publish_version


class VersionCollected(UserError):
    """A version that is asked for was published and is not kept any more."""


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
        """The parameters of `version`, once it exists; raises `VersionCollected` if it did."""
        while version not in self._recent:
            stable = store.versions(self._directory)
            if store.is_collected(version, stable):
                raise VersionCollected(
                    f"version {version} of the weights in {self._directory} was collected; there "
                    f"are {', '.join(map(str, stable))}: resume from the newest checkpoint, or "
                    "begin again in another --workdir"
                )
            if version in stable:
                self._recent[version] = self._load(version)
                break
            await asyncio.sleep(0.01)
        return self._recent[version]

    def _load(self, version: int) -> Any:
        """Raises `UserError`: it is damaged. What computed it is in the log and in checkpoints."""
        try:
            return load_version(self._directory, version)
        except UserError as error:
            later = [self._directory / store.version_folder(version)]
            for step in (self._directory / "checkpoints").glob("*"):
                later += [step] if step.name.isdecimal() and int(step.name) > version else []
            said = str(error).partition("; ")[0]
            raise UserError(
                f"{said}; remove it and the checkpoints after it (rm -r "
                f"{' '.join(map(str, sorted(later)))}), and the same command computes it again"
            ) from None

    def collect_garbage(self, keep_from: int) -> None:
        """Forget versions below `keep_from`."""
        if self._enabled:
            store.collect_garbage(self._directory, keep_from)
            self._recent = {v: p for v, p in self._recent.items() if v >= keep_from}
