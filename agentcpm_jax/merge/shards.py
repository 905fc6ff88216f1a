"""Hugging Face checkpoint directories, one tensor at a time.

Reading goes through safetensors' lazy handles. Writing streams: the header of a safetensors file
says where every tensor lies, and shapes are known before any value is, so a shard is never held
in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from agentcpm_jax.merge.methods import FLOATS
from agentcpm_jax.types import UserError

INDEX = "model.safetensors.index.json"
CODES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype name (`float32`, `bfloat16`, or the file's own code if not a float)."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * FLOATS[self.dtype].itemsize


class Checkpoint:
    """A directory with config.json and safetensors files, opened lazily; use `with`.

    Raises UserError for a directory, file or index that is missing, truncated or inconsistent.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.config = _read_json(directory / "config.json")
        self.files = _weight_files(directory)
        self._stack = contextlib.ExitStack()
        self._handle: dict[str, Any] = {}  # tensor name -> open file

    def __enter__(self) -> Checkpoint:
        for file in self.files:
            try:
                handle = self._stack.enter_context(safe_open(file, framework="np"))
            except (SafetensorError, OSError) as e:
                self._stack.close()
                raise UserError(
                    f"{file} is not a whole safetensors file ({e}); copy or convert it again"
                ) from None
            self._handle.update(dict.fromkeys(handle.keys(), handle))
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor's shape and dtype, without reading any."""
        out = {}
        for name in sorted(self._handle):
            s = self._handle[name].get_slice(name)
            code = str(s.get_dtype())
            out[name] = TensorInfo(tuple(s.get_shape()), CODES.get(code, code))
        return out

    def read(self, name: str) -> np.ndarray:
        """One tensor in its stored dtype."""
        return self._handle[name].get_tensor(name)

    def sha256(self) -> dict[str, str]:
        """Digest of each weight file, by file name."""
        out = {}
        for file in self.files:
            with file.open("rb") as f:
                out[file.name] = hashlib.file_digest(f, "sha256").hexdigest()
        return out


def write_shards(
    directory: Path,
    tensors: Mapping[str, TensorInfo],
    values: Callable[[str], np.ndarray],
    max_shard_bytes: int,
) -> list[Path]:
    """Writes `values(name)` for every tensor, asked for once each, in the order of the files.

    The bytes depend on the tensors alone. Returns the paths of the weight files.
    """
    shards = list(_plan(tensors, max_shard_bytes))
    paths, weight_map = [], {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        path = directory / (file if len(shards) > 1 else "model.safetensors")
        _write_file(path, {n: tensors[n] for n in names}, values)
        paths.append(path)
        weight_map.update(dict.fromkeys(names, path.name))
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return paths


def _write_file(
    path: Path, tensors: Mapping[str, TensorInfo], values: Callable[[str], np.ndarray]
) -> None:
    codes = {v: k for k, v in CODES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # wide dtypes first keeps every tensor aligned to its own width
    order = sorted(tensors, key=lambda n: (-FLOATS[tensors[n].dtype].itemsize, n))
    for name in order:
        t = tensors[name]
        header[name] = {
            "dtype": codes[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [offset, offset + t.nbytes],
        }
        offset += t.nbytes
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for name in order:
            value = values(name)
            t = tensors[name]
            if value.shape != t.shape or value.dtype != FLOATS[t.dtype]:
                raise ValueError(f"{name}: {value.dtype}{value.shape} is not {t}")
            # bfloat16 has no buffer protocol of its own
            f.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        f.flush()
        os.fsync(f.fileno())


def _plan(tensors: Mapping[str, TensorInfo], max_shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name in sorted(tensors):
        if names and size + tensors[name].nbytes > max_shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensors[name].nbytes
    yield names


def _weight_files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index} has no weight_map; copy or convert the checkpoint again")
        names = sorted(set(weight_map.values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (directory / name).is_file():
            raise UserError(f"{directory / name} is missing; copy or convert the checkpoint again")
    return [directory / name for name in names]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; give a Hugging Face checkpoint directory"
        ) from None
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read: {e}; copy the checkpoint again") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} is not a JSON object; copy the checkpoint again")
    return data
