"""A training checkpoint `<stage>/checkpoints/<step>` of this package, read like a Hugging Face one.

Orbax stores the layers of a parameter as one array, whose chunks can only be decoded whole. So the
first tensor that is asked for brings its array out once, into an unnamed temporary file that is
mapped into memory; the file vanishes with the process. JAX (for the map of the names) and
tensorstore are imported here alone, when such an input is opened.
"""

from __future__ import annotations

import mmap
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np

from agentcpm_jax.merge.shards import Checkpoint, TensorInfo, read_json
from agentcpm_jax.types import UserError


def is_training_step(directory: Path) -> bool:
    """Whether this is one step's checkpoint."""
    return (directory / "state" / "_METADATA").is_file() and (directory / "meta").is_dir()


class TrainingStep(Checkpoint):
    """The parameters of one step. Optimiser state and the rest are not touched.

    Raises UserError for a checkpoint that is incomplete or not of a model.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.files = sorted(p for p in (directory / "state").rglob("*") if p.is_file())
        self.tensors = {}
        self._mapped = {}
        self._arrays: dict[str, Any] = {}  # parameter path -> tensorstore array
        self._spilled: dict[str, mmap.mmap] = {}
        try:
            model = read_json(directory / "meta" / "metadata")["config"]["model"]
        except KeyError:
            raise UserError(
                f"{directory} does not say which model it holds; "
                "merge the stage's hf/ directory instead"
            ) from None
        from agentcpm_jax.model.config import ModelConfig, to_hf_config

        self._model = ModelConfig(**model)
        self.config = to_hf_config(self._model)
        tokenizer = directory.parents[2] / "tokenizer"  # of the run's working directory
        self.companions = tokenizer if tokenizer.is_dir() else directory

    def __enter__(self) -> TrainingStep:
        from agentcpm_jax import tree
        from agentcpm_jax.model.params import param_specs

        self._places: dict[str, tuple[str, int | None, Any]] = {}
        for path, spec in tree.flatten(param_specs(self._model), sep=".").items():
            array = self._open(path)
            if tuple(array.shape) != spec.shape:
                raise UserError(
                    f"{self.directory}: parameter {path} has shape {tuple(array.shape)}, its "
                    f"configuration says {spec.shape}; merge the stage's hf/ directory instead"
                )
            self._arrays[path] = array
            stacked = spec.axes[0] == "layers"
            shape = _file_shape(spec.shape[1:] if stacked else spec.shape, spec.hf_inputs)
            info = TensorInfo(shape, np.dtype(array.dtype.numpy_dtype).name)
            for layer in range(spec.shape[0]) if stacked else [None]:
                name = spec.hf_key if layer is None else spec.hf_key.format(layer)
                self.tensors[name] = info
                self._places[name] = (path, layer, spec)
        return self

    def __exit__(self, *exc: object) -> None:
        self._spilled.clear()

    def read(self, name: str) -> np.ndarray:
        """A read-only view of one tensor, as the file format has it."""
        path, layer, spec = self._places[name]
        if path not in self._spilled:
            self._spilled[path] = self._spill(path, spec)
        info = self.tensors[name]
        flat = np.frombuffer(self._spilled[path], self._arrays[path].dtype.numpy_dtype)
        count = int(np.prod(info.shape))
        return flat[(layer or 0) * count :][:count].reshape(info.shape)

    def release(self, name: str) -> None:
        """Nothing: a shared array stays mapped until all its layers are merged."""

    def identity(self) -> list[list[str | int]]:
        """File, size and time of change of every stored file."""
        stats = [(p, p.stat()) for p in self.files]
        return [[str(p.relative_to(self.directory)), s.st_size, s.st_mtime_ns] for p, s in stats]

    def fingerprint(self, stop: threading.Event | None = None) -> dict[str, str]:
        """Digest of every stored file, by path below the step."""
        return self._digest(self.files, stop)

    def _open(self, path: str) -> Any:
        import tensorstore

        store = {
            "driver": "ocdbt",
            "base": f"file://{self.directory.absolute()}/state/",
            "path": f"params.{path}/",
        }
        try:
            return tensorstore.open({"driver": "zarr", "kvstore": store}, open=True).result()
        except (OSError, ValueError) as e:
            raise UserError(
                f"{self.directory}: parameter {path} cannot be read ({str(e).splitlines()[0]}); "
                "use another step"
            ) from None

    def _spill(self, path: str, spec: Any) -> mmap.mmap:
        try:
            value = np.asarray(self._arrays[path].read().result())
        except (OSError, ValueError) as e:
            raise UserError(
                f"{self.directory}: parameter {path} is truncated ({str(e).splitlines()[0]}); "
                "use another step"
            ) from None
        parts = value if spec.axes[0] == "layers" else [value]
        with tempfile.TemporaryFile() as file:
            for part in parts:
                if spec.hf_inputs:
                    part = part.reshape(int(np.prod(part.shape[: spec.hf_inputs])), -1).T
                file.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
            file.flush()
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _file_shape(shape: tuple[int, ...], inputs: int) -> tuple[int, ...]:
    """Matrices are stored [outputs, inputs]."""
    if not inputs:
        return shape
    return int(np.prod(shape[inputs:])), int(np.prod(shape[:inputs]))
