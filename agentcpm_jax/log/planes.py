"""Byte planes and sections: the physical layer of the experience log's blobs.

A section is [u8 method][u32 length][bytes]. Of three ways to store it the shortest is taken: as it
is, deflated, or entropy-coded alone (deflate that looks for no repeats).
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

_STORED, _DEFLATED = 0, 1
_HEAD = struct.Struct("<BI")


def pack(data: bytes) -> bytes:
    """One section."""
    method, best = _STORED, data
    if _is_noise(data):
        return _HEAD.pack(method, len(best)) + best
    for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY):
        packer = zlib.compressobj(1, zlib.DEFLATED, -15, 9, strategy)
        packed = packer.compress(data) + packer.flush()
        if len(packed) < len(best):
            method, best = _DEFLATED, packed
    return _HEAD.pack(method, len(best)) + best


def pack_array(values: np.ndarray) -> list[bytes]:
    """A section per byte plane of a flat array."""
    rows = np.ascontiguousarray(values).view("u1").reshape(-1, values.itemsize).T
    return [pack(row.tobytes()) for row in rows]


def _is_noise(data: bytes) -> bool:
    """Whether the bytes are all but uniform: nothing can be gained, so nothing is tried.

    The chi-square statistic per byte is 255 / n for uniform ones; 0.15 is about 0.1 bit a byte.
    """
    if len(data) < 2048:
        return False
    counts = np.bincount(np.frombuffer(data, "u1"), minlength=256)
    return float((counts.astype(np.float64) ** 2).sum()) * 256 / len(data) ** 2 - 1 < 0.15


class Sections:
    """Reads the sections of a blob one after the other, from offset `at`."""

    def __init__(self, blob: bytes, at: int) -> None:
        self._blob, self._at = memoryview(blob), at

    def unpack(self) -> bytes:
        """The next section. Raises `struct.error` or `zlib.error` when the blob is damaged."""
        method, length = _HEAD.unpack_from(self._blob, self._at)
        start = self._at + _HEAD.size
        data = bytes(self._blob[start : start + length])
        self._at = start + length
        return zlib.decompress(data, -15) if method == _DEFLATED else data

    def unpack_array(self, dtype: str) -> np.ndarray:
        """The next array, from as many sections as `dtype` has bytes."""
        rows = [np.frombuffer(self.unpack(), "u1") for _ in range(np.dtype(dtype).itemsize)]
        return np.ascontiguousarray(np.stack(rows, axis=1)).reshape(-1).view(dtype)


def regroup(values: np.ndarray) -> bytes:
    """All planes of a flat array, one after the other."""
    return np.ascontiguousarray(values).view("u1").reshape(-1, values.itemsize).T.tobytes()


def ungroup(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Inverse of `regroup`."""
    size = np.dtype(dtype).itemsize
    return np.ascontiguousarray(raw.reshape(size, -1).T).reshape(-1).view(dtype)
