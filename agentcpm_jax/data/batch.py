"""`Batch`: the one shape in which tokens reach a train step."""

from __future__ import annotations

from typing import Any

import flax.struct
import numpy as np

Array = Any  # numpy on the host, jax on the device


@flax.struct.dataclass
class Batch:
    """Packed rows: `B` rows of `T` tokens, several sequences (segments) side by side in a row.

    Per-token arrays describe *that* token, not the next one: a token is predicted from the token
    before it in the same segment, so the first token of a segment is never trained.

    Attributes:
      tokens: i32[B,T].
      positions: i32[B,T], counted from 0 in every segment.
      segment_ids: i32[B,T], 1..K within a row; 0 is padding.
      loss_mask: f32[B,T], 1 where the token is trained.
      weights: f32[B,T], weight of the token in the cross entropy.
      advantages: f32[B,T], 0 where not trained.
      behavior_logprobs: f32[B,T], nats, of the policy that sampled the token; 0 where not sampled.
      versions: i32[B,T], version of that policy; -1 where not sampled.
      num_tokens: f32[], trained tokens of the whole batch: the denominator of token means.
      num_sequences: f32[], sequences with at least one trained token.
      proximal_logprobs: f32[B,T], nats, of the parameters before the batch's first update; the step
        fills it in where its loss asks for it, elsewhere it is None.
    Both denominators are counted when the batch is packed, before any off-policy mask, and stay
    those of the whole batch when it is split into micro-batches.
    """

    tokens: Array
    positions: Array
    segment_ids: Array
    loss_mask: Array
    weights: Array
    advantages: Array
    behavior_logprobs: Array
    versions: Array
    num_tokens: Array
    num_sequences: Array
    proximal_logprobs: Array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return self.tokens.shape

    @classmethod
    def empty(cls, num_rows: int, row_length: int) -> Batch:
        """A batch of padding (numpy, writable): every array at its padding value."""
        shape = (num_rows, row_length)
        return cls(
            tokens=np.zeros(shape, np.int32),
            positions=np.zeros(shape, np.int32),
            segment_ids=np.zeros(shape, np.int32),
            loss_mask=np.zeros(shape, np.float32),
            weights=np.zeros(shape, np.float32),
            advantages=np.zeros(shape, np.float32),
            behavior_logprobs=np.zeros(shape, np.float32),
            versions=np.full(shape, -1, np.int32),
            num_tokens=np.float32(0.0),
            num_sequences=np.float32(0.0),
        )
