"""The operations that merge methods are made of, in numpy, a few rows in cache at a time.

A method sees each tensor as [rows, R] (a vector is one row), a chunk of rows at a time; nothing as
large as a tensor is made but the result. Sums are taken row by row in float64 and the rows' sums
are added exactly, so that the size of a chunk has no effect.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import numpy as np

from agentcpm_jax.hf.files import all_finite
from agentcpm_jax.merge.kernels.ops import Array, Kernel, Scalar
from agentcpm_jax.merge.kernels.random_bits import Key, bits_at, stream_key
from agentcpm_jax.merge.kernels.selection import SAMPLE, find_cut
from agentcpm_jax.types import UserError

CHUNK = 1 << 16  # elements: fewer calls outweigh the second-level cache


@dataclass
class Chunked:
    """The operations `ops.Ops` on numpy arrays; the fields are explained there.

    `labels` says what to call arrays in messages, by their `id`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    compute: np.dtype
    seed: int
    compat: bool
    labels: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.xp: ModuleType = np
        self.traced, self.native = False, self.compute.itemsize < 4
        self.size = math.prod(self.shape)
        self.row = self.shape[-1] if self.shape else 1
        self.rows = self.size // self.row if self.row else 0

    def number(self, x: Scalar | Array) -> Array:
        return np.asarray(x, self.compute)

    def sum(self, parts: Sequence[Array]) -> Array:
        """16-bit arrays are added in float32 and rounded once."""
        total = parts[0].astype(np.float32) if self.native else parts[0]
        for part in parts[1:]:
            total = total + part
        return total.astype(self.compute, copy=False)

    def repeat(self, count: int, step: Callable[..., Any], state: Any) -> Any:
        for _ in range(count):
            state = step(*state)
        return state

    def turned(self) -> Chunked:
        return replace(self, shape=(self.shape[-1], *self.shape[1:-1], self.shape[0]))

    def map(self, kernel: Kernel, arrays: Sequence[Array], propagates: bool = False) -> np.ndarray:
        """Raises UserError for an input, or with `propagates` for a result, that is not finite."""
        out = np.empty((self.rows, self.row), self.dtype)
        broken = self._what_is_not_finite
        for at, chunks in self._chunks(arrays, None if propagates else broken):
            first = at // max(self.row, 1)
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                value = kernel(at, *chunks)
                if propagates and not _sums_to_a_number(value):
                    raise UserError(broken(arrays))
                out[first : first + chunks[0].shape[0]] = value
        return out.reshape(self.shape)

    def pick(self, kernel: Kernel, arrays: Sequence[Array], index: Array | None) -> np.ndarray:
        parts = []
        for at, chunks in self._chunks(arrays):
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                value = kernel(at, *chunks).reshape(-1)
            if index is not None:
                start, end = np.searchsorted(index, (at, at + value.size))
                value = value[index[start:end] - at]
            parts.append(value)
        return np.concatenate(parts)

    def totals(self, kernel: Kernel, arrays: Sequence[Array]) -> list[float]:
        """Raises UserError for inputs that are not finite."""
        parts: list[list[float]] | None = None
        for at, chunks in self._chunks(arrays):
            with np.errstate(over="ignore", invalid="ignore"):
                rows = [self.row_total(x).reshape(-1).tolist() for x in kernel(at, *chunks)]
            parts = rows if parts is None else [a + b for a, b in zip(parts, rows, strict=True)]
        sums = [math.fsum(p) if np.isfinite(p).all() else math.nan for p in parts or []]
        if not np.isfinite(sums).all():
            raise UserError(self._what_is_not_finite(arrays))
        return sums

    def row_total(self, x: Array) -> Array:
        return x.sum(axis=-1, dtype=np.float64, keepdims=True)

    def largest(self, kernel: Kernel, arrays: Sequence[Array], k: Scalar) -> Kernel:
        def pieces() -> Iterator[tuple[int, np.ndarray]]:
            for at, chunks in self._chunks(arrays):
                yield at, kernel(at, *chunks).astype(wide, copy=False)

        k = int(k)
        if not 0 < k < self.size:
            return lambda at, m: (m >= 0) if k > 0 else (m < 0)
        wide = np.promote_types(self.compute, np.float32)
        step = max(1, self.size // SAMPLE)
        sample = [a.reshape(-1)[::step].astype(self.compute) for a in arrays]
        return find_cut(pieces, kernel(0, *sample).astype(wide, copy=False), self.size, k)

    def key(self, model: int) -> Key:
        return stream_key(self.seed, self.name, model)

    def draws(self, at: int, like: Array, key: Key) -> np.ndarray:
        index = _counting(like.size, np.uint32).copy()
        return self._bits(at, index, key).reshape(like.shape)

    def kept_by_rank(
        self, at: int, magnitude: Array, key: Key, limits: np.ndarray, values: np.ndarray
    ) -> np.ndarray:
        # A float's pattern orders as its magnitude does; below it in one 64-bit word, the index.
        bits = magnitude.astype(np.float32, copy=False).view(np.uint32)
        words = bits.astype(np.int64)
        words <<= 32
        words |= _counting(words.size, np.int64).reshape(words.shape)
        words.sort(axis=-1)
        words &= 0xFFFFFFFF
        place = words.reshape(-1)
        # In the order of rank the tables are contiguous: one scatter brings all of it back.
        kept = self._bits(at, place.astype(np.uint32), key) < np.tile(limits, len(words))
        out = np.empty(place.size, values.dtype)
        out[place] = np.tile(values, len(words)) * kept
        return out.reshape(words.shape)

    def _bits(self, at: int, index: np.ndarray, key: Key) -> np.ndarray:
        """Draws of the elements `at` + `index`, which is overwritten."""
        block = (key[0], np.uint32((int(key[1]) + (at >> 32)) & 0xFFFFFFFF))
        index += np.uint32(at & 0xFFFFFFFF)
        return bits_at(index, block)

    def _chunks(
        self, arrays: Sequence[Array], broken: Callable[[Sequence[Array]], str] | None = None
    ) -> Iterator[tuple[int, list[np.ndarray]]]:
        """(index of the first element, chunks in the compute dtype) of each few rows.

        With `broken`, UserError(broken(arrays)) for what is not finite.
        """
        flat = [np.ascontiguousarray(a).reshape(self.rows, self.row) for a in arrays]
        step = max(1, CHUNK // max(self.row, 1))
        for first in range(0, self.rows, step):
            part = [a[first : first + step] for a in flat]
            if broken and not all(map(all_finite, part)):
                raise UserError(broken(arrays))
            yield first * self.row, [a.astype(self.compute, copy=False) for a in part]

    def _what_is_not_finite(self, arrays: Sequence[Array]) -> str:
        for array in arrays:
            for _, (chunk,) in self._chunks([array]):
                if not np.isfinite(chunk).all():
                    label = self.labels.get(id(array), "an input")
                    bad = array.size - np.count_nonzero(np.isfinite(array))
                    return (
                        f"tensor {self.name} of {label} holds {bad} NaN or infinite values; "
                        "the checkpoint is damaged or its training diverged: use another"
                    )
        return (
            f"tensor {self.name} overflows {self.compute.name} while it is merged; "
            "its values are too large: use another checkpoint"
        )


def _sums_to_a_number(x: np.ndarray) -> bool:
    if x.dtype.itemsize < 4:
        return all_finite(x)
    return math.isfinite(np.add.reduce(x, axis=None)) or all_finite(x)


@functools.lru_cache(maxsize=8)
def _counting(size: int, dtype: type) -> np.ndarray:
    """0, 1, 2, ...: read-only, made once for each size of chunk."""
    numbers = np.arange(size, dtype=dtype)
    numbers.setflags(write=False)
    return numbers
