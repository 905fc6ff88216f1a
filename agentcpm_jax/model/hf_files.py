"""Safetensors files of a checkpoint directory, mapped into memory; numpy only.

A transposing copy between two-byte numbers is bound by the cache: rows that lie a power of two
apart fall on the same few lines of it. `transpose_into` therefore copies blocks to rows that do
not, and writes a block's columns, four lines each, from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from agentcpm_jax.model.config import DTYPES
from agentcpm_jax.types import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Written by some exporters although they hold nothing of their own.
_REDUNDANT = ("rotary_emb.inv_freq",)
_BLOCK = (128, 512)  # rows and columns of a transposing copy
_APART = 32  # numbers between its rows


class Tensors:
    """The tensors of a directory by key, whichever file they are in."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack):
        if (directory / INDEX).is_file():
            weight_map = read_json(directory, INDEX).get("weight_map")
            if not isinstance(weight_map, dict):
                raise UserError(f"{directory / INDEX} has no weight_map; download it again")
            names = sorted(set(weight_map.values()))
        elif (directory / SINGLE).is_file():
            names = [SINGLE]
        else:
            raise UserError(f"{directory} has neither {SINGLE} nor {INDEX}; name a checkpoint")
        self.directory = directory
        self.files: dict[str, tuple[str, Any]] = {}
        self.mapped: dict[str, _Mapped] = {}
        for name in names:
            path = directory / name
            if not path.is_file():
                raise UserError(f"{path} is missing although {INDEX} names it; download it again")
            try:
                opened = stack.enter_context(safetensors.safe_open(path, framework="numpy"))
            except safetensors.SafetensorError as error:
                raise UserError(
                    f"{path} is truncated or corrupt ({error}); download it again"
                ) from error
            self.files.update(dict.fromkeys(opened.keys(), (name, opened)))
            self.mapped[name] = _Mapped(path)

    def check_keys(self, expected: Mapping[str, tuple[int, ...]], tied: bool) -> None:
        """Raises `UserError` when the files have a tensor too few or too many."""
        for key in expected:
            if key not in self.files:
                raise UserError(f"{self.directory} lacks tensor {key} of shape {expected[key]}")
        for key in sorted(self.files.keys() - expected.keys()):
            copy_of_embedding = key == "lm_head.weight" and tied
            if not copy_of_embedding and not key.endswith(_REDUNDANT):
                raise UserError(
                    f"{self.directory / self.files[key][0]} has tensor {key}, which the model of "
                    "config.json does not have; correct config.json"
                )

    def dtype(self, key: str) -> str:
        """The stored dtype of a tensor; raises `UserError` when parameters cannot have it."""
        name, opened = self.files[key]
        stored = _STORED.get(opened.get_slice(key).get_dtype())
        if stored not in DTYPES:
            raise UserError(
                f"{self.directory / name}: tensor {key} is stored as "
                f"{opened.get_slice(key).get_dtype()}; give param_dtype {' or '.join(DTYPES)}"
            )
        return stored

    def get(self, key: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor as it lies in the mapped file; raises `UserError` for another shape or dtype."""
        name, opened = self.files[key]
        header = opened.get_slice(key)
        found = tuple(header.get_shape())
        if found != shape:
            raise UserError(
                f"{self.directory / name}: tensor {key} has shape {found}, expected {shape}; "
                "config.json and weights are of different models"
            )
        if header.get_dtype() not in _STORED:
            raise UserError(
                f"{self.directory / name}: tensor {key} is stored as {header.get_dtype()}, which "
                f"is not supported; convert it to {' or '.join(DTYPES)}"
            )
        return self.mapped[name].array(key, _STORED[header.get_dtype()], shape)

    def release(self, key: str) -> None:
        """Takes a tensor's pages out of this process; the next `get` maps them again."""
        self.mapped[self.files[key][0]].release(key)


class _Mapped:
    """A safetensors file in memory as it lies on disk: u64 header length, JSON header, data."""

    def __init__(self, path: Path):
        with path.open("rb") as file:
            self.memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        length = int.from_bytes(self.memory[:8], "little")
        header = json.loads(self.memory[8 : 8 + length])
        self.ranges = {
            key: tuple(8 + length + offset for offset in entry["data_offsets"])
            for key, entry in header.items()
            if key != "__metadata__"
        }

    def array(self, key: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        start, _ = self.ranges[key]
        kind = np.dtype(np.float16 if dtype == "float16" else jnp.dtype(dtype))
        return np.frombuffer(self.memory, kind, math.prod(shape), start).reshape(shape)

    def release(self, key: str) -> None:
        start, stop = self.ranges[key]
        page = start - start % mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED"):
            self.memory.madvise(mmap.MADV_DONTNEED, page, stop - page)


def write_file(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, tensors: Iterable[np.ndarray]
) -> tuple[int, str]:
    """A safetensors file, one tensor in memory at a time: (bytes of its tensors, its sha256).

    `tensors` come in the order of `shapes`, contiguous, all of `dtype` (a JAX dtype's name).
    """
    name = {theirs: ours for ours, theirs in _STORED.items()}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, shape in shapes.items():
        start, end = end, end + math.prod(shape) * jnp.dtype(dtype).itemsize
        header[key] = {"dtype": name, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(head)
    with path.open("wb") as file:
        file.write(head)
        for tensor in tensors:
            raw = tensor.reshape(-1).view(np.uint8).data
            file.write(raw)
            digest.update(raw)
    return end, digest.hexdigest()


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised array on a 64-byte boundary: XLA takes it over without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def transpose_into(target: np.ndarray, source: np.ndarray) -> None:
    """target [I,O] = source^T, whose axes [*O,*I] multiply to them; casts when dtypes differ."""
    source = source.reshape(target.shape[1], target.shape[0])
    if target.dtype == source.dtype:  # plain integers: numpy copies bfloat16 one call at a time
        plain = np.dtype(f"u{target.dtype.itemsize}")
        target, source = target.view(plain), source.view(plain)
    rows, columns = _BLOCK
    staged = np.empty((rows, columns + _APART), target.dtype)
    plain = np.dtype(f"u{target.dtype.itemsize}")
    for row in range(0, source.shape[0], rows):
        for column in range(0, source.shape[1], columns):
            part = source[row : row + rows, column : column + columns]
            block = staged[: part.shape[0], : part.shape[1]]
            block[...] = part
            place = target[column : column + columns, row : row + rows]
            place.view(plain)[...] = block.view(plain).T


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """A JSON object of the directory; raises `UserError` when it is missing or damaged."""
    path = directory / name
    if not path.is_file():
        raise UserError(f"{path} is missing; name a Hugging Face checkpoint directory")
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; download it again")
    return value
