"""Rows: masks come from provenance, and every sampled token is trained exactly once."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from agentcpm_jax.data.rows import (
    Row,
    RowStats,
    count_rows,
    demo_row,
    merge_prefixes,
    rows_from_segment,
    shipped_rows,
    shipped_stats,
    text_row,
)
from agentcpm_jax.types import Credit, Provenance, Segment, ShippedSegment

T, S, D, H, O = (  # noqa: E741
    Provenance.TEMPLATE,
    Provenance.SAMPLED,
    Provenance.DEMO,
    Provenance.HISTORY,
    Provenance.TOOL,
)


def segment(provenance: list[Provenance], ids: list[int] | None = None, **fork: int) -> Segment:
    kinds = np.array(provenance, np.uint8)
    n, sampled = len(kinds), kinds == S
    return Segment(
        ids=np.array(ids if ids is not None else range(10, 10 + n), np.int32),
        provenance=kinds,
        logprob=np.where(sampled, -0.1 * np.arange(n, dtype=np.float32), np.nan),
        version=np.where(sampled, 3, -1).astype(np.int32),
        **fork,
    )


def credit(n: int, advantage: float = 0.5, drop: tuple[int, ...] = ()) -> Credit:
    keep = np.ones(n, bool)
    keep[list(drop)] = False
    return Credit(np.full(n, advantage, np.float32), keep)


def test_only_sampled_and_kept_tokens_are_trained_in_rl() -> None:
    kinds = [T, D, S, S, O, H, S]
    (row,) = rows_from_segment(segment(kinds), credit(7, drop=(3,)))
    np.testing.assert_array_equal(np.flatnonzero(row.loss_mask), [2, 6])
    np.testing.assert_array_equal(row.advantages, [0, 0, 0.5, 0, 0, 0, 0.5])
    np.testing.assert_allclose(row.logprobs, [0, 0, -0.2, -0.3, 0, 0, -0.6], rtol=1e-6)
    np.testing.assert_array_equal(row.versions, [-1, -1, 3, 3, -1, -1, 3])
    assert rows_from_segment(segment(kinds), credit(7, drop=tuple(range(7)))) == []


def test_only_demonstrated_tokens_are_trained_in_sft() -> None:
    row = demo_row(segment([T, D, D, O, H, S, D]))
    np.testing.assert_array_equal(np.flatnonzero(row.loss_mask), [1, 2, 6])


def test_text_trains_everything_but_the_first_token() -> None:
    row = text_row([5, 6, 7], weights=np.array([1, 0.1, 1]))
    np.testing.assert_array_equal(row.loss_mask, [False, True, True])
    np.testing.assert_allclose(row.weights, [1, 0.1, 1], rtol=1e-6)
    assert len(text_row([])) == 0


def test_bugs_upstream_are_refused() -> None:
    twice = segment([T, S, O, S], parent_segment=0, shared_prefix_len=3)
    with pytest.raises(ValueError, match="1 sampled tokens lie in the prefix of 3"):
        rows_from_segment(twice, credit(4))
    unknown = segment([T, S])
    unknown.logprob[1] = np.nan
    with pytest.raises(ValueError, match="no log-probability"):
        rows_from_segment(unknown, credit(2))
    with pytest.raises(ValueError, match="non-finite advantage"):
        rows_from_segment(segment([T, S]), credit(2, advantage=np.nan))
    with pytest.raises(ValueError, match="first token"):
        dataclasses.replace(text_row([1, 2]), loss_mask=np.ones(2, bool))


def test_a_fork_that_continues_its_parent_becomes_one_row() -> None:
    parent = segment([T, S, S], ids=[1, 2, 3])
    child = segment([T, H, H, O, S], ids=[1, 2, 3, 4, 5], parent_segment=0, shared_prefix_len=3)
    (row,) = shipped_rows(shipped((parent, credit(3, 0.5)), (child, credit(5, 0.5))))
    np.testing.assert_array_equal(row.ids, child.ids)
    np.testing.assert_array_equal(np.flatnonzero(row.loss_mask), [1, 2, 4])
    np.testing.assert_allclose(row.logprobs, [0, -0.1, -0.2, 0, -0.4], rtol=1e-6)
    np.testing.assert_array_equal(row.versions, [-1, 3, 3, -1, 3])


def test_a_fork_that_leaves_its_parent_stays_a_row_of_its_own() -> None:
    parent = segment([T, S, O, S], ids=[1, 2, 3, 4])
    child = segment([T, H, T, S], ids=[1, 2, 9, 8], parent_segment=0, shared_prefix_len=2)
    rows = shipped_rows(shipped((parent, credit(4)), (child, credit(4))))
    assert [list(row.ids) for row in rows] == [[1, 2, 3, 4], [1, 2, 9, 8]]
    assert [list(np.flatnonzero(row.loss_mask)) for row in rows] == [[1, 3], [3]]


def test_only_segments_of_one_trajectory_are_merged() -> None:
    """Two samples of equal tokens are two samples, however much their rows agree."""
    one = segment([T, S, S], ids=[1, 2, 3])
    both = shipped((one, credit(3))) + shipped((one, credit(3)), sample=1)
    assert [list(row.ids) for row in shipped_rows(both)] == [[1, 2, 3], [1, 2, 3]]
    assert shipped_stats(both) == RowStats(segments=2, rows=2, trained=4, forward=6, unique=6)


def test_merging_never_changes_what_is_trained() -> None:
    """Random tries: the set of (context, value) of trained tokens is the same, without doubles."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        stem = rng.integers(0, 3, 12).astype(np.int32)
        rows = [random_prefix(stem, rng) for _ in range(4)]
        merged = merge_prefixes(rows)
        assert len(merged) <= len(rows)
        assert trained(merged) == trained(rows)
        total = sum(row.num_trained for row in merged)
        assert total == len(trained(merged))


def test_merged_rows_are_the_leaves_of_the_trie() -> None:
    """Against a trie built node by node: one row per leaf, whose nodes are counted once each."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        rows = [random_walk(rng) for _ in range(6)]
        nodes = {tuple(row.ids[: t + 1]) for row in rows for t in range(last_trained(row) + 1)}
        leaves = {n for n in nodes if not any(m[: len(n)] == n for m in nodes if len(m) > len(n))}
        merged = merge_prefixes(rows)
        assert sorted(tuple(row.ids) for row in merged) == sorted(leaves)
        assert trained(merged) == trained(rows)
        stats = count_rows(merged, len(rows))
        assert stats.unique == len(nodes)
        assert stats.forward == sum(map(len, leaves))
        assert stats.trained == len(trained(rows))


def test_what_no_trained_token_sees_is_not_forwarded() -> None:
    """Only an observation keeps the first segment from being a prefix of the second."""
    parent = segment([T, S, O], ids=[1, 2, 3])
    child = segment([T, H, O, S, O], ids=[1, 2, 9, 8, 7], parent_segment=0, shared_prefix_len=2)
    (row,) = shipped_rows(shipped((parent, credit(3)), (child, credit(5))))
    assert list(row.ids) == [1, 2, 9, 8]
    assert list(np.flatnonzero(row.loss_mask)) == [1, 3]


def test_siblings_forward_their_prefix_twice_and_the_figures_say_so() -> None:
    rows = [text_row([1, 2, 3, 4]), text_row([1, 2, 5])]
    rows = [dataclasses.replace(r, loss_mask=np.arange(len(r)) >= 2) for r in rows]
    stats = count_rows(merge_prefixes(rows), segments=2)
    assert stats == RowStats(segments=2, rows=2, trained=3, forward=7, unique=5)
    assert stats.shared == pytest.approx(2 / 7) and stats.efficiency == pytest.approx(3 / 7)
    assert stats + RowStats() == stats
    assert RowStats().efficiency == 0


def test_disagreeing_rows_are_not_merged() -> None:
    row = text_row([1, 2, 3])
    other = dataclasses.replace(row, logprobs=row.logprobs - 1)
    assert len(merge_prefixes([row, other])) == 2


def shipped(*segments: tuple[Segment, Credit], sample: int = 0) -> list[ShippedSegment]:
    """The segments of one trajectory, in its order."""
    return [ShippedSegment(7, sample, i, s, c) for i, (s, c) in enumerate(segments)]


def random_prefix(stem: np.ndarray, rng: np.random.Generator) -> Row:
    n = int(rng.integers(2, len(stem) + 1))
    row = text_row(stem[:n])
    mask = row.loss_mask & (rng.random(n) < 0.5)
    logprobs = np.where(mask, -0.1 * np.arange(n), 0).astype(np.float32)
    return dataclasses.replace(row, loss_mask=mask, logprobs=logprobs)


def random_walk(rng: np.random.Generator) -> Row:
    """A few tokens out of two, so that walks meet, part and end inside one another."""
    ids = rng.integers(0, 2, int(rng.integers(2, 7))).astype(np.int32)
    mask = rng.random(len(ids)) < 0.6
    mask[0], mask[1] = False, True
    logprobs = np.where(mask, -0.1 * np.arange(len(ids)), 0).astype(np.float32)
    return dataclasses.replace(text_row(ids), loss_mask=mask, logprobs=logprobs)


def last_trained(row: Row) -> int:
    return int(np.flatnonzero(row.loss_mask)[-1])


def trained(rows: list[Row]) -> set[tuple]:
    return {
        (tuple(row.ids[: t + 1]), float(row.logprobs[t]), float(row.advantages[t]))
        for row in rows
        for t in np.flatnonzero(row.loss_mask)
    }
