"""From per-token losses to one number: five modes, all segment-aware.

    token-sum                sum_t m L
    token-mean               sum_t m L / N_tokens                              (DAPO)
    seq-mean-token-sum       sum_s sum_t m L / N_seq                           (MiniRL)
    seq-mean-token-mean      sum_s [sum_t m L / sum_t m] / N_seq               (GRPO, GSPO)
    seq-mean-token-sum-norm  sum_s [sum_t m L / C] / N_seq                     (Dr.GRPO)

A sequence is one segment of a packed row. N_tokens and N_seq count the whole optimizer batch,
before any off-policy mask, so that a mask never increases the weight of the tokens it keeps and the
losses of micro-batches add up to the loss of the batch.

A trajectory whose context was edited has several segments. Each is a separate sequence, here and in
every sequence-level ratio: it is one chain of sampling decisions given its prefix, and the tokens
that it shares with its parent are not trained in it.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from agentcpm_jax.train.losses.config import MODES
from agentcpm_jax.types import UserError


def aggregate(
    per_token: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
    mode: str = "seq-mean-token-sum",
    num_tokens: Float[Array, ""] | float | None = None,
    num_sequences: Float[Array, ""] | float | None = None,
    norm: float | None = None,
) -> Float[Array, ""]:
    """One loss from per-token losses.

    Args:
      per_token: losses; values where `mask` is 0 are ignored, NaN included.
      mask: 1 where the token is trained.
      segment_ids: 1..K within a row, 0 = padding (never counted). None: one sequence per row.
      mode: one of `MODES`.
      num_tokens, num_sequences: counts over the whole optimizer batch. None: counted here
        (sequences without a trained token do not count).
      norm: C of "seq-mean-token-sum-norm".
    Raises:
      UserError: unknown mode, or "-norm" without `norm`.
    """
    if mode not in MODES:
        raise UserError(f"unknown aggregation {mode!r}; use one of {', '.join(MODES)}")
    mask = trained_mask(mask, segment_ids)
    total = jnp.sum(jnp.where(mask > 0, per_token, 0.0) * token_weights(mask, segment_ids, mode))
    if mode == "token-sum":
        return total
    if mode == "token-mean":
        num_tokens = jnp.sum(mask) if num_tokens is None else num_tokens
        return total / jnp.maximum(num_tokens, 1.0)
    if mode == "seq-mean-token-sum-norm":
        if not norm:
            raise UserError(f"aggregation {mode!r} needs a length; set norm, e.g. norm=1024")
        total = total / norm
    if num_sequences is None:
        num_sequences = count_sequences(mask, segment_ids)
    return total / jnp.maximum(num_sequences, 1.0)


def trained_mask(
    mask: Float[Array, "B T"], segment_ids: Int[Array, "B T"] | None
) -> Float[Array, "B T"]:
    """The mask with padding (segment 0) removed."""
    return mask if segment_ids is None else jnp.where(segment_ids > 0, mask, 0.0)


def token_weights(
    mask: Float[Array, "B T"], segment_ids: Int[Array, "B T"] | None, mode: str
) -> Float[Array, "B T"]:
    """Weight of each token before the global division: the mask, or mask / trained length."""
    if mode != "seq-mean-token-mean":
        return mask
    return mask / jnp.maximum(sequence_sum(mask, segment_ids), 1.0)


def count_sequences(
    mask: Float[Array, "B T"], segment_ids: Int[Array, "B T"] | None
) -> Float[Array, ""]:
    """Sequences with at least one trained token."""
    trained = (mask > 0).astype(mask.dtype)
    per_token = trained / jnp.maximum(sequence_sum(trained, segment_ids), 1.0)
    return jnp.round(jnp.sum(per_token))


def sequence_sum(
    values: Float[Array, "B T"], segment_ids: Int[Array, "B T"] | None
) -> Float[Array, "B T"]:
    """At each token, the sum of `values` over its sequence."""
    return _over_sequences(values, segment_ids, jnp.sum, jax.ops.segment_sum)


def sequence_mean(
    values: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
) -> Float[Array, "B T"]:
    """At each token, the mean of `values` over the trained tokens of its sequence (0: none)."""
    total = sequence_sum(jnp.where(mask > 0, values, 0.0), segment_ids)
    length = sequence_sum((mask > 0).astype(values.dtype), segment_ids)
    return total / jnp.maximum(length, 1.0)


def sequence_max(
    values: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
) -> Float[Array, "B T"]:
    """At each token, the largest of `values` over the trained tokens of its sequence (0: none)."""
    trained = jnp.where(mask > 0, values, -jnp.inf)
    largest = _over_sequences(trained, segment_ids, jnp.max, jax.ops.segment_max)
    return jnp.where(jnp.isfinite(largest), largest, 0.0)


def _over_sequences(
    values: Float[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
    over_row: Callable[..., Array],
    over_segment: Callable[..., Array],
) -> Float[Array, "B T"]:
    if segment_ids is None:
        return jnp.broadcast_to(over_row(values, axis=1, keepdims=True), values.shape)
    slots = values.shape[1] + 1

    def one_row(v: Float[Array, " T"], s: Int[Array, " T"]) -> Float[Array, " T"]:
        return over_segment(v, s, num_segments=slots)[s]

    return jax.vmap(one_row)(values, segment_ids)
