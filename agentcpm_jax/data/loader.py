"""Grain datasets whose whole state is one integer: the number of the next step.

A batch is a pure function of its step, so a restored iterator needs no replay: there is none of the
state of grain's packing (windows, buffers, parents).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import grain
import numpy as np

from agentcpm_jax.data.batch import Batch
from agentcpm_jax.data.pack import Rejected, fill, pack, plan
from agentcpm_jax.data.rows import Row
from agentcpm_jax.types import UserError

BatchAt = Callable[[int], Batch]


class EpochBatches(grain.IterDataset):
    """Batches of a fixed list of rows, shuffled, packed and grouped anew in every epoch.

    Every row is in exactly one batch of an epoch; the last batch of an epoch is filled up with
    padding. All arrays of a batch are numpy.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        row_length: int,
        batch_rows: int = 0,
        batch_tokens: int = 0,
        seed: int = 0,
        epochs: int | None = None,
        start: int = 0,
        only: Sequence[int] | None = None,
    ) -> None:
        """Args:
          rows: those longer than `row_length` are left out: see `rejected`.
          row_length: T of the batches.
          batch_rows: B of the batches; or give `batch_tokens`, of which B = batch_tokens // T.
          seed: of the shuffles.
          epochs: how often the rows are seen; None: endlessly.
          start: the step of the first batch.
          only: indices of the rows of a batch that this process builds; None: all.
        Raises:
          UserError: no row fits, or a batch has no rows.
        """
        super().__init__()
        self.batch_rows = batch_rows or batch_tokens // row_length
        if self.batch_rows < 1:
            raise UserError(
                f"batch_rows={batch_rows} and batch_tokens={batch_tokens} make no batch of rows of "
                f"{row_length} tokens; raise one of them"
            )
        self._rows, self._row_length, self._seed, self._start = rows, row_length, seed, start
        self._only = only
        bins, too_long = plan([len(row) for row in rows], row_length)
        self.rejected = tuple(Rejected(i, "too_long", len(rows[i])) for i in too_long)
        if not bins:
            raise UserError(
                f"none of {len(rows)} rows fits into row_length={row_length}; "
                "raise it or give more data"
            )
        # The number of bins depends on the lengths alone: it is the same in every epoch.
        self.steps_per_epoch = -(-len(bins) // self.batch_rows)
        self.total_steps = None if epochs is None else epochs * self.steps_per_epoch
        self._epoch_bins = lru_cache(maxsize=2)(self._shuffled_bins)

    def batch(self, step: int) -> Batch:
        """The batch of `step`, which depends on nothing else.

        Raises:
          StopIteration: `step` is past the last epoch.
        """
        if self.total_steps is not None and step >= self.total_steps:
            raise StopIteration
        epoch, within = divmod(step, self.steps_per_epoch)
        first = within * self.batch_rows
        bins = self._epoch_bins(epoch)[first : first + self.batch_rows]
        members = [[self._rows[i] for i in indices] for indices in bins]
        return fill(members, self._row_length, self.batch_rows, self._only)

    def __iter__(self) -> StepIterator:
        return StepIterator(self.batch, self._start)

    def _shuffled_bins(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng([self._seed, epoch])
        order = rng.permutation(len(self._rows))
        # Shuffles rows of equal length, and then the packed rows.
        bins, _ = plan([len(self._rows[i]) for i in order], self._row_length)
        return [[int(order[i]) for i in bins[b]] for b in rng.permutation(len(bins))]


class StepBatches(grain.IterDataset):
    """Batch n packs `source(n)`: the rows that the experience log recorded for step n.

    `source` may block until the step is recorded, and raises StopIteration at the end. For the same
    step it must always return the same rows in the same order.
    """

    def __init__(
        self,
        source: Callable[[int], Sequence[Row]],
        row_length: int,
        num_rows: int | None = None,
        row_multiple: int = 1,
        micro_rows: int = 0,
        start: int = 0,
        on_rejected: Callable[[int, tuple[Rejected, ...]], None] | None = None,
    ) -> None:
        """Args:
        source: step -> rows.
        row_length, num_rows, row_multiple, micro_rows: the shape, as in `pack`.
        start: the first step.
        on_rejected: called with (step, rows that did not fit); None: they raise UserError.
        """
        super().__init__()
        self._source, self._row_length, self._start = source, row_length, start
        self._num_rows, self._row_multiple = num_rows, row_multiple
        self._micro_rows = micro_rows
        self._on_rejected = on_rejected

    def batch(self, step: int) -> Batch:
        """The batch of `step`; blocks as long as the source does."""
        shape = (self._row_length, self._num_rows, self._row_multiple, self._micro_rows)
        packed = pack(self._source(step), *shape)
        if packed.rejected and self._on_rejected is None:
            worst = max(packed.rejected, key=lambda r: r.length)
            raise UserError(
                f"step {step}: {len(packed.rejected)} rows do not fit ({worst.reason}, longest "
                f"{worst.length} tokens) into row_length={self._row_length}, "
                f"num_rows={self._num_rows}; raise them"
            )
        if packed.rejected and self._on_rejected is not None:
            self._on_rejected(step, packed.rejected)
        return packed.batch

    def __iter__(self) -> StepIterator:
        return StepIterator(self.batch, self._start)


class StepIterator(grain.DatasetIterator):
    """Counts steps; its state {"step": n} is all that a checkpoint keeps of the data."""

    def __init__(self, batch_at: BatchAt, step: int = 0) -> None:
        super().__init__()
        self._batch_at = batch_at
        self.step = step

    def __next__(self) -> Batch:
        batch = self._batch_at(self.step)
        self.step += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """{"step": the next step}."""
        return {"step": self.step}

    def set_state(self, state: dict[str, int]) -> None:
        """Continue with `state["step"]`."""
        self.step = int(state["step"])
