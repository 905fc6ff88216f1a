"""Small batches for the losses: ragged sequences, packed as one likes, evaluated in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agentcpm_jax.train.losses.config import LossConfig
from agentcpm_jax.train.losses.objectives import Tokens
from agentcpm_jax.train.losses.policy import Counts, policy_loss

#: Arrays by name: [T] of a sequence, or [B, T] of packed rows.
Arrays = dict[str, np.ndarray]
APART = [[0], [1], [2], [3], [4]]


def sequences(rng: np.random.Generator, n: int = 5) -> list[Arrays]:
    """`n` ragged sequences: each a dict of 1-D float64 arrays, masks with holes."""
    found = []
    for _ in range(n):
        t = int(rng.integers(3, 9))
        cur = -rng.uniform(0.1, 3.0, t)
        found.append(
            {
                "logprobs": cur,
                "behavior": cur + rng.normal(0, 0.3, t),
                "old": cur + rng.normal(0, 0.2, t),
                "reference": cur + rng.normal(0, 0.2, t),
                "advantages": np.full(t, rng.normal()),
                "mask": np.r_[0.0, 1.0, rng.integers(0, 2, t - 2)],
                "age": rng.integers(0, 4, t).astype(float),
            }
        )
    return found


def lay_out(
    seqs: Sequence[Arrays],
    bins: Sequence[Sequence[int]],
    fill: float = 0.0,
    shape: tuple[int, int] = (5, 30),
) -> Arrays:
    """Sequences packed into rows: bin -> row; `fill` where there is none. Adds segment ids.

    One shape for all tests, so that they share compiled operations.
    """
    rows = {k: np.full(shape, fill) for k in seqs[0]}
    rows["mask"] = np.zeros(shape)
    rows["segment_ids"] = np.zeros(shape, np.int32)
    for b, members in enumerate(bins):
        at = 0
        for k, i in enumerate(members, 1):
            n = len(seqs[i]["mask"])
            for name, values in seqs[i].items():
                rows[name][b, at : at + n] = values
            rows["segment_ids"][b, at : at + n] = k
            at += n
    return rows


def run(
    rows: Arrays,
    cfg: LossConfig,
    num_tokens: float | None = None,
    num_sequences: float | None = None,
) -> tuple[float, np.ndarray, dict[str, float]]:
    """(loss, gradient as a dense array, metrics) in float64; counts default to those of `rows`."""
    trained = (rows["mask"] > 0) & (rows["segment_ids"] > 0)
    if num_tokens is None:
        num_tokens = float(trained.sum())
    if num_sequences is None:
        ids = np.arange(len(trained))[:, None] * 1000 + rows["segment_ids"]
        num_sequences = float(len(np.unique(ids[trained])))
    with jax.enable_x64(True):
        x = {k: jnp.asarray(v) for k, v in rows.items()}
        (loss, metrics), grad = compiled(cfg)(x.pop("logprobs"), x, num_tokens, num_sequences)
    return float(loss), np.asarray(grad), {k: float(v) for k, v in metrics.items()}


@functools.cache
def compiled(cfg: LossConfig) -> Callable[..., Any]:
    """Loss and gradient in one jitted function."""

    def loss(
        logprobs: jax.Array, x: dict[str, jax.Array], num_tokens: float, num_sequences: float
    ) -> Any:
        tokens = Tokens(
            logprobs,
            x["behavior"],
            x["advantages"],
            x["mask"],
            x.get("segment_ids"),
            x.get("age"),
            x.get("old"),
            x.get("reference"),
        )
        return policy_loss(tokens, cfg, Counts(num_tokens, num_sequences))

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def per_sequence(
    grad: np.ndarray, bins: Sequence[Sequence[int]], seqs: Sequence[Arrays]
) -> list[np.ndarray]:
    """Dense gradient -> one array per sequence."""
    found = {}
    for b, members in enumerate(bins):
        at = 0
        for i in members:
            n = len(seqs[i]["mask"])
            found[i] = grad[b, at : at + n]
            at += n
    return [found[i] for i in range(len(seqs))]


def one_row(ratios: Sequence[float], advantages: Any, age: float | Sequence[float] = 0.0) -> Arrays:
    """One sequence with these ratios to the behaviour policy."""
    logprobs = np.full(len(ratios), -1.0)
    row = {
        "logprobs": logprobs,
        "behavior": logprobs - np.log(ratios),
        "advantages": np.asarray(advantages, np.float64),
        "mask": np.ones(len(ratios)),
        "age": np.broadcast_to(np.asarray(age, np.float64), logprobs.shape),
    }
    return lay_out([row], [[0]])
