"""Trajectories and credits as compressed blobs, exact to the bit.

Format 2: the byte 0x02, then sections, each [u8 method][u32 length][bytes]: the header (JSON), then
the byte planes of each array. Plane k of an array holds byte k of every entry: high planes of
token ids and log-probabilities compress well, low planes of log-probabilities are noise and are
kept as they are. Each section is stored in the shortest of three forms: raw, deflated, or only
entropy-coded (deflate that looks for no repeats). At the end stand four bytes, the CRC-32 of all
before; older releases wrote none, and look at none. Log-probabilities and versions are stored for
sampled tokens only, and a forked segment does not store the prefix it shares with its parent again,
so storage is linear in unique tokens. Format 1 is still read.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from agentcpm_jax.types import (
    Credit,
    Provenance,
    Segment,
    StopReason,
    ToolCall,
    ToolResult,
    ToolStatus,
    Trajectory,
    Turn,
    TurnFlag,
    Verdict,
)


def encode_credit(advantage: np.ndarray, keep: np.ndarray) -> bytes:
    """Advantage f32[T] and keep bool[T] as one blob; inverse: `decode_credit`."""
    if len(advantage) != len(keep):
        raise ValueError(f"credit: {len(advantage)} advantages, {len(keep)} keeps")
    # Advantages are few values in long runs: one stream finds the repeats in all planes.
    arrays = [np.asarray(advantage, "<f4"), np.asarray(keep, bool).view("u1")]
    return b"\x01" + zlib.compress(b"".join(map(_regroup, arrays)), 1)


def decode_credit(blob: bytes) -> Credit:
    """Inverse of `encode_credit`."""
    if blob[:1] != b"\x01":
        raise _unknown(blob)
    raw = np.frombuffer(zlib.decompress(blob[1:]), "u1")
    n = len(raw) // 5
    return Credit(_ungroup(raw[: 4 * n], "<f4"), raw[4 * n :].astype(bool))


#: (name, dtype, fill value of unsampled tokens and of a prefix that only repeats older tokens)
_ARRAYS = (
    ("provenance", "u1", 0),
    ("ids", "<i4", 0),
    ("logprob", "<f4", np.nan),
    ("version", "<i4", -1),
)
_FORMAT_1 = ("ids", "provenance", "logprob", "version")  # the order of its arrays


def encode_trajectory(traj: Trajectory) -> bytes:
    """Segments, turns and scalars as one blob, bit for bit (NaN included); see the module text."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name, _, _ in _ARRAYS}
    rows = []
    for index, seg in enumerate(traj.segments):
        linked = 0 <= seg.parent_segment < index
        parent = traj.segments[seg.parent_segment] if linked else None
        if parent is None or not 0 < seg.shared_prefix_len <= min(len(seg), len(parent)):
            parent = None
        hows = ""
        for name, dtype, fill in _ARRAYS:
            prefix, rest, values = _shorten(seg, parent, name, dtype, fill)
            parts[name].append(values)
            hows += prefix[0] + rest[0]
        rows.append([len(seg), seg.parent_segment, seg.shared_prefix_len, seg.edit_reason, hows])
    # Spans and rewards may be numpy scalars: `item` makes them Python's.
    header = json.dumps(_scalars(traj, rows), separators=(",", ":"), default=lambda v: v.item())
    sections = [_pack(header.encode())]
    for name, dtype, _ in _ARRAYS:
        # One array per name over all segments: similar values compress best together.
        sections += _pack_array(np.concatenate([np.empty(0, dtype), *parts[name]]))
    blob = b"\x02" + b"".join(sections)
    return blob + _CRC.pack(zlib.crc32(blob))


def decode_trajectory(blob: bytes) -> Trajectory:
    """Inverse of `encode_trajectory`. Raises ValueError and others for a damaged blob."""
    if blob[:1] == b"\x01":
        header, flat = _read_format_1(blob)
    elif blob[:1] == b"\x02":
        header, flat = _read_format_2(blob)
    else:
        raise _unknown(blob)
    rows = header.pop("segments")
    segments: list[Segment] = []
    at = dict.fromkeys(flat, 0)
    for length, parent, cut, reason, hows in rows:
        whole: dict[str, np.ndarray] = {}
        for column, (name, dtype, fill) in enumerate(_ARRAYS):
            how, rest = hows[2 * column], hows[2 * column + 1]
            prefix = np.empty(0, dtype)
            if how != "w":
                shown = getattr(segments[parent], name)
                prefix = dict(_prefixes(shown, name, dtype, fill, cut))[_LONG[how]]
            left = length - len(prefix)
            if rest == "s":
                mine = whole["provenance"][len(prefix) :] == Provenance.SAMPLED
                count = int(mine.sum())
                tail = np.full(left, fill, dtype)
                tail[mine] = flat[name][at[name] : at[name] + count]
            else:
                count = left
                tail = flat[name][at[name] : at[name] + count]
            at[name] += count
            whole[name] = np.concatenate([prefix, tail]) if len(prefix) else tail.copy()
        segments.append(
            Segment(**whole, parent_segment=parent, shared_prefix_len=cut, edit_reason=reason)
        )
    header["segments"] = tuple(segments)
    header["turns"] = tuple(_turn(t) for t in header["turns"])
    header["stop"] = StopReason(header["stop"])
    header["verdict"] = Verdict(header["verdict"])
    return Trajectory(**header)


def _scalars(traj: Trajectory, rows: list[list[Any]]) -> dict[str, Any]:
    return {
        "stop": traj.stop,
        "issue_id": traj.issue_id,
        "sample": traj.sample,
        "attempt": traj.attempt,
        "answer": traj.answer,
        "verdict": traj.verdict,
        "reward": traj.reward,
        "trainable": traj.trainable,
        "error": traj.error,
        "seconds": traj.seconds,
        "turns": [_turn_row(turn) for turn in traj.turns],
        "segments": rows,
    }


#: How a prefix or a rest is stored, by the letter in the header.
_LONG = {"f": "fill", "h": "history", "p": "parent"}


def _shorten(
    seg: Segment, parent: Segment | None, name: str, dtype: str, fill: float
) -> tuple[str, str, np.ndarray]:
    """(how the prefix is stored, how the rest is stored, the values to store)."""
    values, how, cut = np.asarray(getattr(seg, name)).astype(dtype, copy=False), "whole", 0
    if parent is not None:
        for kind, prefix in _prefixes(
            getattr(parent, name), name, dtype, fill, seg.shared_prefix_len
        ):
            if prefix.tobytes() == values[: len(prefix)].tobytes():
                how, cut = kind, len(prefix)
                break
    values = values[cut:]
    if name in ("logprob", "version"):
        mine = np.asarray(seg.provenance[cut:]) == Provenance.SAMPLED
        others = values[~mine]
        if others.tobytes() == np.full(len(others), fill, dtype).tobytes():
            return how, "sampled", values[mine]
    return how, "whole", values


def _prefixes(
    parent: np.ndarray, name: str, dtype: str, fill: float, cut: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Candidates for the shared prefix of a fork: the parent's, fill values, or history."""
    same = parent[:cut].astype(dtype, copy=False)
    yield "parent", same
    yield "fill", np.full(cut, fill, dtype)
    if name == "provenance":
        shown = np.where(same == Provenance.SAMPLED, Provenance.HISTORY, same)
        yield "history", shown.astype(dtype)


def _read_format_2(blob: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    sections = _Sections(blob, at=1)
    header = json.loads(sections.unpack())
    arrays = {name: sections.unpack_array(dtype) for name, dtype, _ in _ARRAYS}
    sections.check()
    return header, arrays


def _read_format_1(blob: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """[u32 header length][header][arrays] in one stream; only prefixes are shortened."""
    data = zlib.decompress(blob[1:])
    (size,) = struct.unpack_from("<I", data)
    header, raw, at = json.loads(data[4 : 4 + size]), np.frombuffer(data, "u1"), 4 + size
    letters = {"whole": "w", "same": "p", "fill": "f", "history": "h"}
    dtypes = {name: dtype for name, dtype, _ in _ARRAYS}
    flat = {}
    for column, name in enumerate(_FORMAT_1, start=4):
        rows = header["segments"]
        count = sum(row[0] - (0 if row[column] == "whole" else row[2]) for row in rows)
        nbytes = count * np.dtype(dtypes[name]).itemsize
        flat[name] = _ungroup(raw[at : at + nbytes], dtypes[name])
        at += nbytes
    header["segments"] = [
        [*row[:4], "".join(letters[row[4 + _FORMAT_1.index(name)]] + "w" for name, _, _ in _ARRAYS)]
        for row in header["segments"]
    ]
    return header, flat


def _turn_row(turn: Turn) -> dict[str, Any]:
    """`dataclasses.asdict` without its copies, which take longer than the compression."""
    return vars(turn) | {
        "calls": [vars(call) for call in turn.calls],
        "results": [vars(result) for result in turn.results],
    }


def _turn(row: dict[str, Any]) -> Turn:
    calls = tuple(ToolCall(**(c | {"span": tuple(c["span"])})) for c in row["calls"])
    results = tuple(ToolResult(**(r | {"status": ToolStatus(r["status"])})) for r in row["results"])
    flags = tuple(TurnFlag(f) for f in row["flags"])
    return Turn(**(row | {"calls": calls, "results": results, "flags": flags}))


def _unknown(blob: bytes) -> ValueError:
    return ValueError(f"experience log: unknown blob format {bytes(blob[:1])!r}")


# ---- sections and byte planes

_STORED, _DEFLATED = 0, 1
_HEAD, _CRC = struct.Struct("<BI"), struct.Struct("<I")


def _pack(data: bytes) -> bytes:
    """One section, in the shortest form."""
    method, best = _STORED, data
    if _is_noise(data):
        return _HEAD.pack(method, len(best)) + best
    for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY):
        packer = zlib.compressobj(1, zlib.DEFLATED, -15, 9, strategy)
        packed = packer.compress(data) + packer.flush()
        if len(packed) < len(best):
            method, best = _DEFLATED, packed
    return _HEAD.pack(method, len(best)) + best


def _pack_array(values: np.ndarray) -> list[bytes]:
    """A section per byte plane of a flat array."""
    rows = np.ascontiguousarray(values).view("u1").reshape(-1, values.itemsize).T
    return [_pack(row.tobytes()) for row in rows]


def _is_noise(data: bytes) -> bool:
    """Whether the bytes are nearly uniform, so that compressing them gains nothing.

    The chi-square statistic per byte is 255 / n for uniform ones; 0.15 is about 0.1 bit a byte.
    """
    if len(data) < 2048:
        return False
    counts = np.bincount(np.frombuffer(data, "u1"), minlength=256)
    return float((counts.astype(np.float64) ** 2).sum()) * 256 / len(data) ** 2 - 1 < 0.15


class _Sections:
    """Reads the sections of a blob one after the other, from offset `at`."""

    def __init__(self, blob: bytes, at: int) -> None:
        self._blob, self._at = memoryview(blob), at

    def unpack(self) -> bytes:
        """The next section. Raises ValueError, `struct.error` or `zlib.error` of a damaged blob."""
        method, length = _HEAD.unpack_from(self._blob, self._at)
        start = self._at + _HEAD.size
        data = bytes(self._blob[start : start + length])
        self._at = start + length
        if method != _DEFLATED:
            return data
        reader = zlib.decompressobj(-15)
        data = reader.decompress(data)
        if not reader.eof or reader.unused_data:
            raise ValueError("a section does not end where it should")
        return data

    def check(self) -> None:
        """Raises ValueError when what was read is not what was written."""
        rest = self._blob[self._at :]
        if len(rest) and bytes(rest) != _CRC.pack(zlib.crc32(self._blob[: self._at])):
            raise ValueError("its checksum is not the one that was written")

    def unpack_array(self, dtype: str) -> np.ndarray:
        """The next array, from as many sections as `dtype` has bytes."""
        rows = [np.frombuffer(self.unpack(), "u1") for _ in range(np.dtype(dtype).itemsize)]
        return np.ascontiguousarray(np.stack(rows, axis=1)).reshape(-1).view(dtype)


def _regroup(values: np.ndarray) -> bytes:
    """All planes of a flat array, one after the other."""
    return np.ascontiguousarray(values).view("u1").reshape(-1, values.itemsize).T.tobytes()


def _ungroup(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Inverse of `_regroup`."""
    size = np.dtype(dtype).itemsize
    return np.ascontiguousarray(raw.reshape(size, -1).T).reshape(-1).view(dtype)
