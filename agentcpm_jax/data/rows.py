"""From trajectories to rows: a row is one sequence and its tokens' training data.

Loss masks come from provenance alone (and, in RL, from the denoising filters' `keep`). A sampled
token is trained exactly once: a fork shows its parent's tokens as HISTORY.

The rows of one trajectory are a trie over token ids. Attention is causal, so only the leaves need a
forward pass: tokens after the last trained one of a row are cut, and a row that is a prefix of
another is trained inside it. A trajectory that was only appended to is one forward pass, however
many segments it was recorded in. A prefix that two leaves share is forwarded twice (but trained
once); forwarding it once would need tree attention. `RowStats.shared` says how much that would
save.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields, replace
from itertools import groupby, pairwise

import numpy as np

from agentcpm_jax.types import Credit, Provenance, Segment, ShippedSegment


@dataclass(frozen=True)
class Row:
    """One sequence, all arrays of its length T.

    ids i32, loss_mask bool (never the first token: nothing predicts it), weights f32,
    advantages f32, logprobs f32 (0 where not sampled), versions i32 (-1 where not sampled).
    """

    ids: np.ndarray
    loss_mask: np.ndarray
    weights: np.ndarray
    advantages: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray

    def __post_init__(self) -> None:
        for name in ("loss_mask", "weights", "advantages", "logprobs", "versions"):
            if len(getattr(self, name)) != len(self.ids):
                raise ValueError(
                    f"row: {name} has {len(getattr(self, name))} entries, ids {len(self.ids)}"
                )
        if len(self.ids) and self.loss_mask[0]:
            raise ValueError("row: the first token cannot be trained, nothing predicts it")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_trained(self) -> int:
        """How many tokens are trained."""
        return int(self.loss_mask.sum())


def text_row(ids: Sequence[int] | np.ndarray, weights: np.ndarray | None = None) -> Row:
    """Next-token training on every token; `weights` f32[T] (default 1) scale each token's loss."""
    ids = np.asarray(ids, np.int32)
    mask = np.ones(len(ids), bool)
    mask[:1] = False
    return _row(ids, mask, weights=weights)


def demo_row(segment: Segment) -> Row:
    """SFT: trains the tokens of provenance DEMO, which another author's assistant wrote."""
    mask = np.asarray(segment.provenance == Provenance.DEMO)
    mask[:1] = False
    return _row(np.asarray(segment.ids, np.int32), mask)


def rows_from_segment(segment: Segment, credit: Credit) -> list[Row]:
    """RL: trains the sampled tokens that the filters keep.

    Returns:
      One row, or none when nothing of the segment is trained.
    Raises:
      ValueError: a sampled token lies in the prefix shared with the parent (it would be trained
        twice), has no log-probability or no version, or has a non-finite advantage.
    """
    row = _rl_row(segment, credit)
    return [row] if row.num_trained else []


def shipped_rows(shipped: Iterable[ShippedSegment]) -> list[Row]:
    """RL rows of a batch in shipped order; the segments of one trajectory are merged as a trie.

    Raises `ValueError` as `rows_from_segment` does.
    """
    return [row for rows, _ in _by_trajectory(shipped) for row in rows]


def shipped_stats(shipped: Iterable[ShippedSegment]) -> RowStats:
    """Token counts of the forward passes over the rows of a batch."""
    return sum((count_rows(*found) for found in _by_trajectory(shipped)), RowStats())


def merge_prefixes(rows: Sequence[Row]) -> list[Row]:
    """The leaves of the trie of `rows`: each row that is a prefix of another is merged into it.

    Rows are first cut after their last trained token. A token with the same context, log-
    probability, version, advantage and weight in two rows is one token: it is trained once, in the
    first leaf that holds it. A row whose trained tokens disagree with a longer one's stays a
    separate row. `rows` must be of *one* trajectory: equal rows of two samples are two samples. The
    order of the leaves is kept.
    """
    cut = [_cut(row) for row in rows]
    merged: dict[int, Row] = {}
    for branch in _branches(cut):
        leaves: list[int] = []  # more than one only where values disagree
        for i in branch:
            for j in leaves:
                union = _merge(cut[i], merged[j])
                if union is not None:
                    merged[j] = union
                    break
            else:
                merged[i] = cut[i]
                leaves.append(i)
    return _trained_once([merged[i] for i in sorted(merged) if len(merged[i])])


def _by_trajectory(shipped: Iterable[ShippedSegment]) -> Iterator[tuple[list[Row], int]]:
    """(rows, recorded segments) of each trajectory."""
    for _, found in groupby(shipped, key=lambda s: (s.issue_id, s.sample)):
        segments = list(found)
        rows = [row for s in segments for row in rows_from_segment(s.segment, s.credit)]
        yield merge_prefixes(rows), len(segments)


@dataclass(frozen=True)
class RowStats:
    """Token counts of the forward passes of a batch.

    trained: each sampled token once. forward: tokens of all rows, padding not counted. unique:
    nodes of the tries, i.e. what tree attention would forward. segments: the recorded segments
    that the rows were made from.
    """

    segments: int = 0
    rows: int = 0
    trained: int = 0
    forward: int = 0
    unique: int = 0

    def __add__(self, other: RowStats) -> RowStats:
        return RowStats(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def metrics(self) -> dict[str, float]:
        """`data/...`, as `metrics.jsonl` holds them."""
        return {
            "data/rows": self.rows,
            "data/rows_merged": self.segments - self.rows,
            "data/token_efficiency": self.efficiency,
            "data/shared_prefix": self.shared,
        }

    @property
    def efficiency(self) -> float:
        """Unique trained tokens per token of the forward passes."""
        return self.trained / max(self.forward, 1)

    @property
    def shared(self) -> float:
        """Share of the forward tokens that repeat a context forwarded in another row."""
        return 1.0 - self.unique / max(self.forward, 1)


def count_rows(rows: Sequence[Row], segments: int) -> RowStats:
    """Token counts of the rows of one trajectory, made from `segments` recorded segments."""
    forward = sum(len(row) for row in rows)
    walk = sorted(map(_key, rows))
    unique = forward - sum(_common(a, b) for a, b in pairwise(walk))
    return RowStats(segments, len(rows), sum(row.num_trained for row in rows), forward, unique)


def _branches(rows: Sequence[Row]) -> list[list[int]]:
    """Row indices, grouped by leaf of the trie: each leaf, then its prefixes, longest first, except
    those that are in an earlier group.

    In a walk through the trie, a row that is not a leaf comes right before one that extends it; so
    a backward walk compares each row with the last leaf only.
    """
    keys = [_key(row) for row in rows]
    branches: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: (keys[i], -i), reverse=True):
        if branches and keys[branches[-1][0]].startswith(keys[i]):
            branches[-1].append(i)
        else:
            branches.append([i])
    return branches


def _key(row: Row) -> bytes:
    """A sort key: sorted rows walk through the trie."""
    return row.ids.astype(">u4").tobytes()


def _common(a: bytes, b: bytes) -> int:
    """Tokens of the longest common prefix of two keys."""
    n = min(len(a), len(b))
    different = np.flatnonzero(np.frombuffer(a[:n], ">u4") != np.frombuffer(b[:n], ">u4"))
    return int(different[0]) if len(different) else n // 4


def _cut(row: Row) -> Row:
    """Cut the tokens after the last trained one: no trained token ever sees them."""
    trained = np.flatnonzero(row.loss_mask)
    end = int(trained[-1]) + 1 if len(trained) else 0
    if end == len(row):
        return row
    return Row(**{f.name: getattr(row, f.name)[:end] for f in fields(Row)})


def _trained_once(leaves: list[Row]) -> list[Row]:
    """Masks in each leaf the tokens that an earlier leaf trains, which never include its last."""
    keys = [_key(row) for row in leaves]
    for i, row in enumerate(leaves):
        mask = row.loss_mask.copy()
        for key, earlier in zip(keys[:i], leaves, strict=False):
            n = _common(keys[i], key)
            mask[:n] &= ~(earlier.loss_mask[:n] & _same_values(row, earlier, n))
        leaves[i] = replace(row, loss_mask=mask)
    return leaves


def _same_values(a: Row, b: Row, n: int) -> np.ndarray:
    """bool[n]: where the first n tokens have equal training values."""
    same = np.ones(n, bool)
    for name in _VALUES:
        same &= getattr(a, name)[:n] == getattr(b, name)[:n]
    return same


def _merge(prefix: Row, longer: Row) -> Row | None:
    n = len(prefix)
    both = prefix.loss_mask & longer.loss_mask[:n]
    same_ids = np.array_equal(prefix.ids, longer.ids[:n])
    if not same_ids or not _same_values(prefix, longer, n)[both].all():
        return None
    changes = {"loss_mask": longer.loss_mask.copy()}
    changes["loss_mask"][:n] |= prefix.loss_mask
    for name in _VALUES:
        changes[name] = getattr(longer, name).copy()
        changes[name][:n][prefix.loss_mask] = getattr(prefix, name)[prefix.loss_mask]
    return replace(longer, **changes)


_VALUES = ("weights", "advantages", "logprobs", "versions")


def _rl_row(segment: Segment, credit: Credit) -> Row:
    sampled = segment.sampled
    shared = segment.shared_prefix_len if segment.parent_segment >= 0 else 0
    if sampled[:shared].any():
        raise ValueError(
            f"segment: {int(sampled[:shared].sum())} sampled tokens lie in the prefix of {shared} "
            "tokens shared with the parent; they are the parent's to train (HISTORY here)"
        )
    if not np.isfinite(segment.logprob[sampled]).all() or (segment.version[sampled] < 0).any():
        raise ValueError("segment: a sampled token has no log-probability or no version")
    mask = sampled & np.asarray(credit.keep, bool)
    mask[:1] = False
    advantage = np.asarray(credit.advantage, np.float32)
    if not np.isfinite(advantage[mask]).all():
        raise ValueError("segment: a kept token has a non-finite advantage")
    return _row(
        np.asarray(segment.ids, np.int32),
        mask,
        advantages=np.where(mask, advantage, 0.0),
        logprobs=np.where(sampled, segment.logprob, 0.0),
        versions=np.where(sampled, segment.version, -1),
    )


def _row(
    ids: np.ndarray,
    mask: np.ndarray,
    weights: np.ndarray | None = None,
    advantages: np.ndarray | None = None,
    logprobs: np.ndarray | None = None,
    versions: np.ndarray | None = None,
) -> Row:
    n = len(ids)

    def floats(x: np.ndarray | None, fill: float) -> np.ndarray:
        return np.full(n, fill, np.float32) if x is None else np.asarray(x, np.float32)

    return Row(
        ids=ids,
        loss_mask=mask,
        weights=floats(weights, 1.0),
        advantages=floats(advantages, 0.0),
        logprobs=floats(logprobs, 0.0),
        versions=np.full(n, -1, np.int32) if versions is None else np.asarray(versions, np.int32),
    )
