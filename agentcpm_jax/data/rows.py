"""From trajectories to rows: one row is one sequence with what is trained on it.

Loss masks come from provenance alone (and, in RL, from the denoising filters' `keep`). A sampled
token is trained exactly once: a fork shows its parent's tokens as HISTORY, and rows of one
trajectory of which one is a prefix of another are merged into one forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from agentcpm_jax.types import Provenance, Segment, Trajectory


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


class Credit(Protocol):
    """What the reward side says about a segment: advantage f32[T] and keep bool[T] per token."""

    @property
    def advantage(self) -> np.ndarray: ...

    @property
    def keep(self) -> np.ndarray: ...


def text_row(ids: Sequence[int] | np.ndarray, weights: np.ndarray | None = None) -> Row:
    """Next-token training on every token; `weights` f32[T] (default 1) scale each token's loss."""
    ids = np.asarray(ids, np.int32)
    mask = np.ones(len(ids), bool)
    mask[:1] = False
    return _row(ids, mask, weights=weights)


def demo_row(segment: Segment) -> Row:
    """SFT: the tokens that another author's assistant wrote (provenance DEMO) are trained."""
    mask = np.asarray(segment.provenance == Provenance.DEMO)
    mask[:1] = False
    return _row(np.asarray(segment.ids, np.int32), mask)


def rows_from_segment(segment: Segment, credit: Credit) -> list[Row]:
    """RL: the sampled tokens that the filters keep are trained.

    Returns:
      One row, or none when nothing of the segment is trained.
    Raises:
      ValueError: a sampled token lies in the prefix shared with the parent (it would be trained
        twice), has no log-probability or no version, or has a non-finite advantage.
    """
    row = _rl_row(segment, credit)
    return [row] if row.num_trained else []


def rows_from_trajectory(trajectory: Trajectory, credits: Sequence[Credit]) -> list[Row]:
    """RL rows of one trajectory (`credits` run parallel to its segments), prefixes merged.

    Raises:
      ValueError: as `rows_from_segment`; or the trajectory is not trainable (its text came from a
        chat endpoint), or the credits do not match the segments.
    """
    if not trajectory.trainable:
        raise ValueError(
            f"trajectory {trajectory.issue_id}/{trajectory.sample} is not trainable: it holds "
            "text, not sampled tokens"
        )
    pairs = zip(trajectory.segments, credits, strict=True)
    rows = merge_prefixes([_rl_row(segment, credit) for segment, credit in pairs])
    return [row for row in rows if row.num_trained]


def merge_prefixes(rows: Sequence[Row]) -> list[Row]:
    """Merge each row that is a prefix of a longer (or equal) one into it.

    Attention is causal, so a token's loss is the same in both; tokens trained in either are
    trained once in the merged row. Rows of *one* trajectory only: equal rows of two samples are two
    samples. A row whose trained tokens disagree with the longer one's (log-probability, version,
    advantage or weight) stays as it is. The order of the remaining rows is kept.
    """
    merged: dict[int, Row] = {}
    by_length = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    for i in by_length:
        for j, longer in merged.items():
            union = _merge(rows[i], longer)
            if union is not None:
                merged[j] = union
                break
        else:
            merged[i] = rows[i]
    return [merged[i] for i in sorted(merged)]


def _merge(prefix: Row, longer: Row) -> Row | None:
    n = len(prefix)
    if not np.array_equal(prefix.ids, longer.ids[:n]):
        return None
    both = prefix.loss_mask & longer.loss_mask[:n]
    values = ("weights", "advantages", "logprobs", "versions")
    for name in values:
        if not np.array_equal(getattr(prefix, name)[both], getattr(longer, name)[:n][both]):
            return None
    changes = {"loss_mask": longer.loss_mask.copy()}
    changes["loss_mask"][:n] |= prefix.loss_mask
    for name in values:
        changes[name] = getattr(longer, name).copy()
        changes[name][:n][prefix.loss_mask] = getattr(prefix, name)[prefix.loss_mask]
    return replace(longer, **changes)


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
