"""Sequence-length buckets: a batch of short rows is cut to a shorter compiled shape.

Rows are packed to one length, so usually nothing is cut. Buckets help where rows are not packed
full: the last batch of an epoch, or RL batches early in training, when trajectories are short.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from agentcpm_jax.data.batch import Batch
from agentcpm_jax.types import UserError


def trim(batch: Batch, lengths: Sequence[int]) -> Batch:
    """Cut a numpy batch to the shortest of `lengths` that holds its rows.

    The row length itself always counts as one of them; each length is compiled once.
    """
    row_length = batch.segment_ids.shape[1]
    used = np.flatnonzero(np.any(batch.segment_ids > 0, axis=0))
    longest = int(used[-1]) + 1 if used.size else 1
    length = min((n for n in lengths if longest <= n < row_length), default=row_length)
    if length == row_length:
        return batch
    return jax.tree.map(lambda x: x[:, :length] if np.ndim(x) else x, batch)


def check_lengths(lengths: Sequence[int], row_length: int, multiple: int) -> None:
    """Raises `UserError` for a bucket that is longer than a row or does not split over the mesh."""
    for length in lengths:
        if not 0 < length < row_length or length % multiple:
            fit = max(multiple, min(row_length - multiple, round(length / multiple) * multiple))
            raise UserError(
                f"bucket of {length} tokens: buckets are below row_length={row_length} and "
                f"multiples of {multiple}; the nearest is {fit}"
            )
