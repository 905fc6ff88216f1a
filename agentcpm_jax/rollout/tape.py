"""The growing segment of an episode."""

from __future__ import annotations

import numpy as np

from agentcpm_jax.rollout.policy import Completion
from agentcpm_jax.types import Provenance, Segment


class Tape:
    """The growing segment, in buffers that double: appending a turn costs its own length."""

    def __init__(self) -> None:
        self._length = 0
        self._columns = [
            np.empty(1024, dtype) for dtype in (np.int32, np.uint8, np.float32, np.int32)
        ]

    def __len__(self) -> int:
        return self._length

    def append(self, ids: np.ndarray, provenance: np.ndarray | Provenance) -> None:
        self._write(ids, provenance, np.nan, -1)

    def append_sampled(self, completion: Completion) -> None:
        """Raises ValueError when an engine returns arrays of different lengths."""
        columns = (completion.ids, completion.logprobs, completion.versions)
        if len({len(column) for column in columns}) != 1:
            raise ValueError(f"completion: lengths differ: {[len(c) for c in columns]}")
        self._write(completion.ids, Provenance.SAMPLED, completion.logprobs, completion.versions)

    def ids(self) -> np.ndarray:
        """A read-only view of what has been written; later appends do not change it."""
        view = self._columns[0][: self._length]
        view.flags.writeable = False
        return view

    def segment(self) -> Segment:
        ids, provenance, logprob, version = (c[: self._length].copy() for c in self._columns)
        return Segment(ids=ids, provenance=provenance, logprob=logprob, version=version)

    def _write(self, ids: np.ndarray, *values: np.ndarray | float) -> None:
        end = self._length + len(ids)
        if end > len(self._columns[0]):
            size = max(end, 2 * len(self._columns[0]))
            self._columns = [
                np.concatenate([c, np.empty(size - len(c), c.dtype)]) for c in self._columns
            ]
        for column, value in zip(self._columns, (ids, *values), strict=True):
            column[self._length : end] = value
        self._length = end
