"""Packing: a pure function that keeps every token of every row, or says why not."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentcpm_jax.data.batch import Batch
from agentcpm_jax.data.pack import forward_fill, pack, plan
from agentcpm_jax.data.rows import Row, text_row
from agentcpm_jax.train.step import accumulate
from agentcpm_jax.types import UserError

FIELDS = ("weights", "advantages", "logprobs", "versions", "loss_mask")


def random_row(n: int, rng: np.random.Generator) -> Row:
    row = text_row(rng.integers(1, 99, n))
    return dataclasses.replace(
        row,
        loss_mask=row.loss_mask & (rng.random(n) < 0.5),
        weights=rng.random(n, np.float32),
        advantages=rng.standard_normal(n).astype(np.float32),
        logprobs=-rng.random(n, np.float32),
        versions=rng.integers(0, 9, n, np.int32),
    )


def unpack(batch: Batch) -> list[Row]:
    rows = []
    for b in range(batch.shape[0]):
        for k in range(1, batch.segment_ids[b].max() + 1):
            at = np.flatnonzero(batch.segment_ids[b] == k)
            np.testing.assert_array_equal(np.diff(at), 1)
            np.testing.assert_array_equal(batch.positions[b, at], np.arange(len(at)))
            rows.append(
                Row(
                    ids=batch.tokens[b, at],
                    loss_mask=batch.loss_mask[b, at] > 0,
                    weights=batch.weights[b, at],
                    advantages=batch.advantages[b, at],
                    logprobs=batch.behavior_logprobs[b, at],
                    versions=batch.versions[b, at],
                )
            )
    return rows


def key(row: Row) -> tuple:
    return (tuple(row.ids), *(tuple(getattr(row, name).tolist()) for name in FIELDS))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 20), max_size=20), st.integers(0, 2**32 - 1))
def test_what_is_packed_and_what_is_rejected_make_up_the_rows(lengths, seed) -> None:
    rng = np.random.default_rng(seed)
    rows = [random_row(n, rng) for n in lengths]
    packed = pack(rows, row_length=16, num_rows=3)
    assert packed.batch.shape == (3, 16)
    rejected = {r.index: r for r in packed.rejected}
    for r in packed.rejected:
        assert r.length == len(rows[r.index])
        assert (r.reason == "too_long") == (r.length > 16)
    kept = [row for i, row in enumerate(rows) if i not in rejected and len(row)]
    assert sorted(map(key, unpack(packed.batch))) == sorted(map(key, kept))
    assert packed.batch.num_tokens == sum(row.num_trained for row in kept)
    assert packed.batch.num_sequences == sum(row.num_trained > 0 for row in kept)


def test_padding_holds_padding_values() -> None:
    batch = pack([text_row([1, 2, 3])], row_length=8, num_rows=2).batch
    padding = batch.segment_ids == 0
    assert padding.sum() == 13
    for name in ("tokens", "positions", "loss_mask", "weights", "advantages", "behavior_logprobs"):
        assert not getattr(batch, name)[padding].any()
    assert (batch.versions == -1).all()


def test_best_fit_decreasing_is_stable() -> None:
    # 7 opens a, 6 opens b, 4 goes to b (room 4, not 3), 3 to a: both full.
    bins, too_long = plan([3, 4, 11, 6, 7, 0], row_length=10)
    assert bins == [[4, 0], [3, 1]]
    assert too_long == [2]
    assert plan([5, 5, 5], row_length=5)[0] == [[0], [1], [2]]


def test_bins_depend_on_the_multiset_of_lengths_alone() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, 200)
    counts = {len(plan(rng.permutation(lengths).tolist(), 32)[0]) for _ in range(5)}
    assert len(counts) == 1
    best = max(lengths.sum() / 32, (lengths > 16).sum())
    assert counts.pop() <= 11 / 9 * best + 6 / 9  # Johnson 1973


def test_padding_is_left_to_as_few_forward_passes_as_possible() -> None:
    rng = np.random.default_rng(3)
    rows = [random_row(n, rng) for n in (8, 8, 7, 8, 5)]
    for micro_rows, fill in ((1, 36 / 40), (2, 36 / 48), (4, 36 / 64), (0, 36 / 64)):
        batch = pack(rows, 8, row_multiple=8, micro_rows=micro_rows).batch
        assert batch.shape == (8, 8)
        assert sorted(map(key, unpack(batch))) == sorted(map(key, rows))
        assert forward_fill(batch.segment_ids, micro_rows) == pytest.approx(fill)
    assert forward_fill(np.zeros((4, 8), np.int32), 2) == 0.0
    with pytest.raises(UserError, match="8 rows are not a multiple of micro_rows=3"):
        pack(rows, 8, row_multiple=8, micro_rows=3)


def test_the_step_makes_no_pass_over_padding_alone() -> None:
    """A loss that is not a number without tokens: its passes add nothing, gradients included."""

    def loss_fn(params: jax.Array, micro: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        tokens = jnp.sum(micro.segment_ids > 0)
        loss = params * jnp.sum(micro.tokens) * tokens / tokens
        return loss, {"a/max": loss, "a/sum": 1.0 / tokens}

    rows = [text_row([1] * 8), text_row([2] * 8), text_row([3] * 4)]
    batch = pack(rows, 8, row_multiple=8, micro_rows=2).batch
    batch = jax.tree.map(jnp.asarray, batch)
    loss, metrics, grads = accumulate(loss_fn, jnp.float32(0.5), batch, micro_rows=2)
    assert float(grads) == 8 + 16 + 12
    assert float(loss) == 18
    assert float(metrics["a/max"]) == 12 and float(metrics["a/sum"]) == pytest.approx(5 / 16)


def test_row_counts_come_in_multiples() -> None:
    rows = [text_row([1] * 8)] * 5
    assert pack(rows, 8, row_multiple=4).batch.shape == (8, 8)
    assert pack([], 8, row_multiple=4).batch.shape == (4, 8)
    assert pack([], 8).batch.num_tokens == 0
