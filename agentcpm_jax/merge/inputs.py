"""What a merge reads: directories, adapters added to them, training checkpoints."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import xxhash

from agentcpm_jax.hf.files import Checkpoint, TensorInfo
from agentcpm_jax.hf.locate import locate
from agentcpm_jax.merge.adapters import AdaptedCheckpoint
from agentcpm_jax.merge.trained import TrainingStep, is_training_step


@runtime_checkable
class MergeInput(Protocol):
    """An open model; `hf.files.Checkpoint` says what the methods do.

    Attributes:
      directory: where it lies; `companions`: where its tokenizer files lie.
      config: its config.json.
      files: that hold its tensors.
      tensors: what can be read.
    """

    @property
    def directory(self) -> Path: ...
    @property
    def companions(self) -> Path: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def files(self) -> Sequence[Path]: ...
    @property
    def tensors(self) -> dict[str, TensorInfo]: ...
    def read(self, name: str) -> np.ndarray: ...
    def copies(self, name: str) -> bool: ...
    def release(self, name: str) -> None: ...


def open_input(name: str, roots: Sequence[Path]) -> AbstractContextManager[MergeInput]:
    """Finds a model of a recipe; `with` opens it. Raises UserError."""
    found = locate(name, roots)
    if found.adapter is not None:
        return AdaptedCheckpoint(found.model, found.adapter)
    return TrainingStep(found.model) if is_training_step(found.model) else Checkpoint(found.model)


def identity(model: MergeInput) -> list[Any]:
    """Config, and size and time of change of every file: cheap, for resuming."""
    stats = [(path, path.stat()) for path in model.files]
    return [model.config, *([str(path), s.st_size, s.st_mtime_ns] for path, s in stats)]


def fingerprint(model: MergeInput, stop: threading.Event | None = None) -> dict[str, str]:
    """What identifies each file's content, by file name; incomplete once `stop` is set.

    `sha256:...` of a file in the Hub's local cache, which is named by it; else `xxh3-128:...`, as
    `xxhsum -H2` prints it: a fraction of SHA-256's cost.
    """
    out = {}
    block = bytearray(1 << 20)
    for path in model.files:
        inside = path.is_relative_to(model.directory)
        name = str(path.relative_to(model.directory)) if inside else path.name
        blob = path.resolve()
        if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
            out[name] = f"sha256:{blob.name}"
            continue
        digest = xxhash.xxh3_128()
        with path.open("rb", buffering=0) as f:
            while (count := f.readinto(block)) and not (stop and stop.is_set()):
                digest.update(memoryview(block)[:count])
        out[name] = f"xxh3-128:{digest.hexdigest()}"
    return out
