"""Packing: rows of many lengths into a batch of fixed shape, best fit decreasing.

A pure function of the list of rows: the same list gives the same batch, on every machine.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from agentcpm_jax.data.batch import Batch
from agentcpm_jax.data.rows import Row
from agentcpm_jax.types import UserError


@dataclass(frozen=True)
class Rejected:
    """A row that is not in the batch: its index in the given list, and why."""

    index: int
    reason: Literal["too_long", "no_room"]
    length: int


@dataclass(frozen=True)
class Packed:
    """A batch, and the rows that did not fit (rows are not truncated, nor dropped silently)."""

    batch: Batch
    rejected: tuple[Rejected, ...]

    @property
    def fill(self) -> float:
        """Share of the batch that is not padding."""
        return float((self.batch.segment_ids > 0).mean())


def pack(
    rows: Sequence[Row],
    row_length: int,
    num_rows: int | None = None,
    row_multiple: int = 1,
    micro_rows: int = 0,
) -> Packed:
    """Pack `rows` into a `Batch` of `[num_rows, row_length]`.

    Args:
      rows: sequences; empty ones are skipped.
      row_length: T of the batch. A longer row is rejected as `too_long`.
      num_rows: B of the batch; what does not fit is rejected as `no_room`. None: as many as
        needed (at least one), rounded up to `row_multiple` so that few shapes get compiled.
      micro_rows: rows per forward pass. Rows are put into as few passes as possible, so that the
        step can skip the passes that are only padding.
    Raises:
      UserError: the rows of the batch are not a multiple of `micro_rows`.
    """
    lengths = [len(row) for row in rows]
    bins, too_long = plan(lengths, row_length)
    rejected = [Rejected(i, "too_long", lengths[i]) for i in too_long]
    if num_rows is None:
        num_rows = -(-max(len(bins), 1) // row_multiple) * row_multiple
    for left_over in bins[num_rows:]:
        rejected.extend(Rejected(i, "no_room", lengths[i]) for i in left_over)
    members = [[rows[i] for i in indices] for indices in bins[:num_rows]]
    batch = fill(_by_micro_batch(members, num_rows, micro_rows), row_length, num_rows)
    return Packed(batch, tuple(rejected))


def forward_fill(segment_ids: np.ndarray, micro_rows: int = 0) -> float:
    """Share of the tokens in forward passes that are not padding; segment_ids i32[B,T].

    A micro-batch (row j of every B / micro_rows: see `train.step`) of only padding is not a pass.
    """
    used = segment_ids > 0
    passes = used.reshape(micro_rows or len(used), -1, used.shape[1]).swapaxes(0, 1)
    some = passes.any(axis=(1, 2))
    return float(passes[some].mean()) if some.any() else 0.0


def plan(lengths: Sequence[int], row_length: int) -> tuple[list[list[int]], list[int]]:
    """Best fit decreasing: (bins of indices, indices that are longer than `row_length`).

    Ties go to the earlier index and to the earlier bin. The number of bins depends on the
    multiset of lengths alone.
    """
    bins: list[list[int]] = []
    open_bins: list[tuple[int, int]] = []  # (room left, bin), sorted
    too_long = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        n = lengths[i]
        if n > row_length:
            too_long.append(i)
        if not 0 < n <= row_length:
            continue
        at = bisect.bisect_left(open_bins, (n, -1))
        if at < len(open_bins):
            room, target = open_bins.pop(at)
        else:
            room, target = row_length, len(bins)
            bins.append([])
        bins[target].append(i)
        if room > n:
            bisect.insort(open_bins, (room - n, target))
    return bins, sorted(too_long)


def _by_micro_batch(bins: list[list[Row]], num_rows: int, micro_rows: int) -> list[list[Row]]:
    """Micro-batch j takes row j of every num_rows / micro_rows; it gets the j-th run of bins."""
    if not 0 < micro_rows < num_rows:
        return bins
    if num_rows % micro_rows:
        raise UserError(f"{num_rows} rows are not a multiple of micro_rows={micro_rows}")
    bins = bins + [[] for _ in range(num_rows - len(bins))]
    count = num_rows // micro_rows
    return [bins[(r % count) * micro_rows + r // count] for r in range(num_rows)]


def fill(
    bins: Sequence[Sequence[Row]],
    row_length: int,
    num_rows: int,
    only: Sequence[int] | None = None,
) -> Batch:
    """Lay the rows of each bin side by side; rows of the batch beyond the bins are padding.

    `only`: ascending indices of the rows to build (None: all); the counts cover all rows.
    """
    made = range(num_rows) if only is None else only
    batch = Batch.empty(len(made), row_length)
    for b, members in enumerate(bins[r] if r < len(bins) else () for r in made):
        start = 0
        for k, row in enumerate(members, 1):
            at = np.s_[b, start : start + len(row)]
            batch.tokens[at] = row.ids
            batch.positions[at] = np.arange(len(row))
            batch.segment_ids[at] = k
            batch.loss_mask[at] = row.loss_mask
            batch.weights[at] = row.weights
            batch.advantages[at] = row.advantages
            batch.behavior_logprobs[at] = row.logprobs
            batch.versions[at] = row.versions
            start += len(row)
    trained = [row.num_trained for members in bins for row in members]
    return replace(
        batch,
        num_tokens=np.float32(sum(trained)),
        num_sequences=np.float32(sum(n > 0 for n in trained)),
    )
