"""What a merge reads: directories, adapters added to them, training checkpoints."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

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
      tensors: what can be read.
    """

    @property
    def directory(self) -> Path: ...
    @property
    def companions(self) -> Path: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def tensors(self) -> dict[str, TensorInfo]: ...
    def read(self, name: str) -> np.ndarray: ...
    def copies(self, name: str) -> bool: ...
    def release(self, name: str) -> None: ...
    def identity(self) -> list[list[str | int]]: ...
    def fingerprint(self, stop: threading.Event | None = None) -> dict[str, str]: ...


def open_input(name: str, roots: Sequence[Path]) -> AbstractContextManager[MergeInput]:
    """Finds a model of a recipe; `with` opens it. Raises UserError."""
    found = locate(name, roots)
    if found.adapter is not None:
        return AdaptedCheckpoint(found.model, found.adapter)
    return TrainingStep(found.model) if is_training_step(found.model) else Checkpoint(found.model)
