"""Trajectories and credits as compressed blobs, exact to the bit.

Format 1: the byte 0x01, then one zlib stream of [u32 header length][header, JSON][arrays].
Arrays are little-endian with their bytes regrouped by significance (all first bytes, then all
second bytes, ...), which helps zlib with token ids. A segment that forks from another stores
only what its shared prefix does not already say, so storage is linear in unique tokens.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from agentcpm_jax.types import (
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


@dataclass(frozen=True)
class Credit:
    """What the reward side says about a segment: advantage f32[T] and keep bool[T]."""

    advantage: np.ndarray
    keep: np.ndarray


def encode_credit(advantage: np.ndarray, keep: np.ndarray) -> bytes:
    """Advantage f32[T] and keep bool[T] as one blob; inverse: `decode_credit`."""
    if len(advantage) != len(keep):
        raise ValueError(f"credit: {len(advantage)} advantages, {len(keep)} keeps")
    arrays = [np.asarray(advantage, "<f4"), np.asarray(keep, bool).view("u1")]
    return b"\x01" + zlib.compress(b"".join(map(_regroup, arrays)), 1)


def decode_credit(blob: bytes) -> Credit:
    """Inverse of `encode_credit`."""
    raw = np.frombuffer(_inflate(blob), "u1")
    n = len(raw) // 5
    return Credit(_ungroup(raw[: 4 * n], "<f4"), raw[4 * n :].astype(bool))


#: (name, dtype, what fills a prefix that only shows older tokens again)
_ARRAYS = (
    ("ids", "<i4", 0),
    ("provenance", "u1", 0),
    ("logprob", "<f4", np.nan),
    ("version", "<i4", -1),
)


def encode_trajectory(traj: Trajectory) -> bytes:
    """Segments, turns and scalars as one blob, bit for bit (NaN included); see the module text."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name, _, _ in _ARRAYS}
    segments = []
    for index, seg in enumerate(traj.segments):
        linked = 0 <= seg.parent_segment < index
        parent = traj.segments[seg.parent_segment] if linked else None
        cut = seg.shared_prefix_len
        if parent is None or not 0 < cut <= min(len(seg), len(parent)):
            parent = None
        hows = []
        for name, dtype, fill in _ARRAYS:
            values, how = np.asarray(getattr(seg, name)).astype(dtype, copy=False), "whole"
            shown = None if parent is None else getattr(parent, name)
            for how_prefix, prefix in _prefixes(shown, name, dtype, fill, cut).items():
                if prefix.tobytes() == values[:cut].tobytes():
                    values, how = values[cut:], how_prefix
                    break
            parts[name].append(values)
            hows.append(how)
        segments.append([len(seg), seg.parent_segment, cut, seg.edit_reason, *hows])
    header = {
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
        "turns": [asdict(turn) for turn in traj.turns],
        "segments": segments,
    }
    # One array per name over all segments: alike compresses best beside alike.
    arrays = [
        _regroup(np.concatenate([np.empty(0, dtype), *parts[name]])) for name, dtype, _ in _ARRAYS
    ]
    # Spans and rewards may be numpy scalars: `item` makes them Python's.
    text = json.dumps(header, separators=(",", ":"), default=lambda v: v.item()).encode()
    return b"\x01" + zlib.compress(b"".join([struct.pack("<I", len(text)), text, *arrays]), 1)


def decode_trajectory(blob: bytes) -> Trajectory:
    """Inverse of `encode_trajectory`."""
    data = _inflate(blob)
    (size,) = struct.unpack_from("<I", data)
    header = json.loads(data[4 : 4 + size])
    rows, raw, at = header.pop("segments"), np.frombuffer(data, "u1"), 4 + size
    arrays: dict[str, list[np.ndarray]] = {}
    for column, (name, dtype, fill) in enumerate(_ARRAYS, start=4):
        lengths = [row[0] - (0 if row[column] == "whole" else row[2]) for row in rows]
        nbytes = np.dtype(dtype).itemsize * sum(lengths)
        values = np.split(_ungroup(raw[at : at + nbytes], dtype), np.cumsum(lengths))
        at += nbytes
        whole: list[np.ndarray] = []
        for (_, parent, cut, _, *hows), tail in zip(rows, values, strict=False):
            how = hows[column - 4]
            if how != "whole":
                prefix = _prefixes(whole[parent], name, dtype, fill, cut)[how]
                tail = np.concatenate([prefix, tail])
            whole.append(tail)
        arrays[name] = whole
    header["segments"] = tuple(
        Segment(
            **{name: values[n] for name, values in arrays.items()},
            parent_segment=row[1],
            shared_prefix_len=row[2],
            edit_reason=row[3],
        )
        for n, row in enumerate(rows)
    )
    header["turns"] = tuple(_turn(t) for t in header["turns"])
    header["stop"] = StopReason(header["stop"])
    header["verdict"] = Verdict(header["verdict"])
    return Trajectory(**header)


def _prefixes(
    parent: np.ndarray | None, name: str, dtype: str, fill: float, cut: int
) -> dict[str, np.ndarray]:
    """What the shared prefix of a fork usually is: its parent's, as history, or nothing."""
    if parent is None:
        return {}
    same = parent[:cut].astype(dtype, copy=False)
    found = {"same": same, "fill": np.full(cut, fill, dtype)}
    if name == "provenance":
        shown = np.where(same == Provenance.SAMPLED, Provenance.HISTORY, same)
        found["history"] = shown.astype(dtype)
    return found


def _turn(row: dict[str, Any]) -> Turn:
    calls = tuple(ToolCall(**(c | {"span": tuple(c["span"])})) for c in row["calls"])
    results = tuple(ToolResult(**(r | {"status": ToolStatus(r["status"])})) for r in row["results"])
    flags = tuple(TurnFlag(f) for f in row["flags"])
    return Turn(**(row | {"calls": calls, "results": results, "flags": flags}))


def _regroup(values: np.ndarray) -> bytes:
    return np.ascontiguousarray(values).view("u1").reshape(-1, values.itemsize).T.tobytes()


def _ungroup(raw: np.ndarray, dtype: str) -> np.ndarray:
    size = np.dtype(dtype).itemsize
    return np.ascontiguousarray(raw.reshape(size, -1).T).reshape(-1).view(dtype)


def _inflate(blob: bytes) -> bytes:
    if blob[:1] != b"\x01":
        raise ValueError(f"experience log: unknown blob format {blob[:1]!r}")
    return zlib.decompress(blob[1:])
