"""A training checkpoint `<stage>/checkpoints/<step>` of this package, read like a Hugging Face one.

Orbax stores the layers of a parameter as one array, whose chunks can only be decoded whole. So the
first tensor that is asked for brings its array out once, into an unnamed temporary file that is
mapped into memory; the file vanishes with the process. JAX (for the map of the names) and
tensorstore are imported here alone, when such an input is opened.
"""

from __future__ import annotations

import mmap
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from agentcpm_jax.hf.files import TensorInfo, as_bytes, read_json, transpose_into
from agentcpm_jax.hf.names import check_shape, file_shape, file_tensors, stacked
from agentcpm_jax.manifest import MANIFEST, damage
from agentcpm_jax.types import UserError


def is_training_step(directory: Path) -> bool:
    """Whether this is one step's checkpoint."""
    return (directory / "state" / "_METADATA").is_file() and (directory / "meta").is_dir()


class TrainingStep:
    """The parameters of one step as a `MergeInput`. Optimiser state and the rest stay untouched.

    Raises UserError for a checkpoint that is incomplete or not of a model.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        if (directory / MANIFEST).exists() and (said := damage(directory)):
            raise UserError(f"{directory} is damaged: {said}; use another step")
        self.files = sorted(p for p in (directory / "state").rglob("*") if p.is_file())
        self.tensors: dict[str, TensorInfo] = {}
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

        try:
            self._model = ModelConfig(**model)
        except TypeError as e:
            raise UserError(
                f"{directory} was stored by another version ({e}); convert it with "
                "launch/convert.py and merge the result"
            ) from None
        if self._model.lora_rank:
            raise UserError(
                f"{directory} holds LoRA adapters alone; convert it with launch/convert.py and "
                "merge base+adapter"
            )
        self.config = to_hf_config(self._model)
        # beside a converted checkpoint, or in the run's working directory
        places = (directory.absolute().parents[i] / "tokenizer" for i in (0, 2))
        self.companions = next((place for place in places if place.is_dir()), directory)

    def __enter__(self) -> TrainingStep:
        from agentcpm_jax import tree
        from agentcpm_jax.model.params import param_specs

        self._specs: dict[str, Any] = tree.flatten(param_specs(self._model), sep=".")
        for path, spec in self._specs.items():
            array = self._arrays[path] = self._open(path)
            named = f"{self.directory}: parameter {path}"
            check_shape(named, array.shape, spec.shape, "merge the stage's hf/ directory instead")
        self._places = file_tensors(self._specs)
        for name, (path, _) in self._places.items():
            dtype = np.dtype(self._arrays[path].dtype.numpy_dtype).name
            self.tensors[name] = TensorInfo(file_shape(self._specs[path]), dtype)
        return self

    def __exit__(self, *exc: object) -> None:
        self._spilled.clear()

    def read(self, name: str) -> np.ndarray:
        """A read-only view of one tensor, as the file format has it."""
        path, layer = self._places[name]
        if path not in self._spilled:
            self._spilled[path] = self._spill(path)
        info = self.tensors[name]
        flat = np.frombuffer(self._spilled[path], self._arrays[path].dtype.numpy_dtype)
        count = int(np.prod(info.shape))
        return flat[(layer or 0) * count :][:count].reshape(info.shape)

    def copies(self, name: str) -> bool:
        """`read` gives views."""
        return False

    def release(self, name: str) -> None:
        """Nothing: a shared array stays mapped until all its layers are merged."""

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

    def _spill(self, path: str) -> mmap.mmap:
        try:
            value = np.asarray(self._arrays[path].read().result())
        except (OSError, ValueError) as e:
            raise UserError(
                f"{self.directory}: parameter {path} is truncated ({str(e).splitlines()[0]}); "
                "use another step"
            ) from None
        spec = self._specs[path]
        with tempfile.TemporaryFile() as file:
            for part in value if stacked(spec) else [value]:
                if spec.hf_inputs:
                    matrix = np.empty(file_shape(spec), value.dtype)
                    transpose_into(matrix, part)
                    part = matrix
                file.write(as_bytes(part))
            file.flush()
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
