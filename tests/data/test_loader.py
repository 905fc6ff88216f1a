"""Loaders: every row once an epoch, and a restored iterator continues bit for bit."""

from __future__ import annotations

import threading

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from agentcpm_jax.data.batch import Batch
from agentcpm_jax.data.loader import EpochBatches, StepBatches
from agentcpm_jax.data.rows import Row, text_row
from agentcpm_jax.types import UserError


def corpus(count: int = 40) -> list[Row]:
    """Row i holds nothing but the token i + 1."""
    rng = np.random.default_rng(0)
    return [text_row([i + 1] * n) for i, n in enumerate(rng.integers(2, 12, count))]


def recorded(step: int) -> list[Row]:
    """A log of five steps."""
    if step >= 5:
        raise StopIteration
    return corpus(10 + step)[step:]


DATASETS = {
    "epochs": lambda: EpochBatches(corpus(), 16, batch_rows=4, seed=7, epochs=2),
    "steps": lambda: StepBatches(recorded, 16, row_multiple=4),
}


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("kind", DATASETS)
def test_a_checkpoint_continues_bit_for_bit(kind: str, tmp_path) -> None:
    iterator = iter(DATASETS[kind]())
    for _ in range(3):
        next(iterator)
    with ocp.CheckpointManager(tmp_path / "ckpt") as manager:
        save = ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator))
        manager.save(3, args=save)
        manager.wait_until_finished()
    rest = list(iterator)
    restored = iter(DATASETS[kind]())
    with ocp.CheckpointManager(tmp_path / "ckpt") as manager:
        load = ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(restored))
        manager.restore(3, args=load)
    assert restored.get_state() == {"step": 3}
    assert rest
    assert_same(list(restored), rest)


def test_starting_at_a_step_is_the_same_as_walking_there() -> None:
    walked = list(DATASETS["epochs"]())
    started = EpochBatches(corpus(), 16, batch_tokens=64, seed=7, epochs=2, start=3)
    assert_same(list(started), walked[3:])


def test_every_row_is_seen_once_an_epoch_in_a_new_order() -> None:
    dataset = EpochBatches(corpus(), 16, batch_rows=4, seed=7, epochs=3)
    epochs = []
    for epoch in range(3):
        first = epoch * dataset.steps_per_epoch
        batches = [dataset.batch(first + i) for i in range(dataset.steps_per_epoch)]
        seen = [int(s) for b in batches for s in b.tokens[(b.positions == 0) & (b.segment_ids > 0)]]
        assert sorted(seen) == list(range(1, 41))
        assert sum(float(b.num_sequences) for b in batches) == 40
        epochs.append(seen)
    assert epochs[0] != epochs[1] != epochs[2]
    with pytest.raises(StopIteration):
        dataset.batch(3 * dataset.steps_per_epoch)
    other = EpochBatches(corpus(), 16, batch_rows=4, seed=8).batch(0)
    assert not np.array_equal(other.tokens, dataset.batch(0).tokens)


def test_a_step_waits_for_its_source() -> None:
    ready = threading.Event()

    def source(step: int) -> list[Row]:
        assert ready.wait(30)
        return recorded(step)

    got: list[Batch] = []
    consumer = threading.Thread(target=lambda: got.append(next(iter(StepBatches(source, 16)))))
    consumer.start()
    assert not got
    ready.set()
    consumer.join(30)
    assert_same(got, [StepBatches(recorded, 16).batch(0)])


def test_rows_that_do_not_fit_are_never_lost_in_silence() -> None:
    rows = [text_row([1] * 4), text_row([2] * 9)]
    with pytest.raises(UserError, match=r"step 0: 1 rows .*longest 9 tokens.* row_length=8"):
        StepBatches(lambda step: rows, 8).batch(0)
    told = []
    StepBatches(lambda step: rows, 8, on_rejected=lambda *a: told.append(a)).batch(6)
    assert [(step, [r.index for r in rejected]) for step, rejected in told] == [(6, [1])]
    assert [r.index for r in EpochBatches(rows, 8, batch_rows=1).rejected] == [1]
    with pytest.raises(UserError, match="none of 2 rows fits into row_length=2"):
        EpochBatches(rows, 2, batch_rows=1)
    with pytest.raises(UserError, match="make no batch"):
        EpochBatches(rows, 8, batch_tokens=7)
