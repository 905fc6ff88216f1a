"""Log-probabilities and entropies aligned with the tokens they speak of; temperature 1, float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from agentcpm_jax.model import qwen3
from agentcpm_jax.model.attention.context import reorder
from agentcpm_jax.model.attention.reference import Attention
from agentcpm_jax.model.chunked_head import label_logprobs
from agentcpm_jax.model.config import ModelConfig


def token_logprobs(
    params: Mapping[str, Any],
    cfg: ModelConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    *,
    attention: Attention | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "B T"]:
    """log p(token t | the tokens of its segment before t), at index t.

    0 at the first token of a segment and at padding. Arguments as in `qwen3.forward`. The logits of
    all positions never exist together, see `chunked_head`.
    """
    where = (tokens, positions, segment_ids)
    return _of_labels(params, cfg, *where, attention, mesh, entropy=False)[0]


def token_logprobs_and_entropy(
    params: Mapping[str, Any],
    cfg: ModelConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    *,
    attention: Attention | None = None,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """`token_logprobs`, and at t the entropy (nats) of the distribution that predicts token t."""
    where = (tokens, positions, segment_ids)
    return _of_labels(params, cfg, *where, attention, mesh, entropy=True)


def predicted(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """True where a token has a predecessor in its own segment (never at padding)."""
    follows = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)
    return jnp.pad(follows, ((0, 0), (1, 0)))


def logprobs_from_logits(
    logits: Float[Array, "*B V"], targets: Int[Array, "*B"]
) -> Float[Array, "*B"]:
    """log softmax(logits)[target], float32."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def entropy_from_logits(logits: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """-sum p log p in nats, float32; logits of -inf count as probability 0."""
    logits = logits.astype(jnp.float32)
    logp = jax.nn.log_softmax(logits, axis=-1)
    p = jnp.exp(logp)
    return -jnp.sum(p * jnp.where(p > 0, logp, 0.0), axis=-1)


def _of_labels(
    params: Mapping[str, Any],
    cfg: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    attention: Attention | None,
    mesh: Mesh | None,
    *,
    entropy: bool,
) -> tuple[jax.Array, jax.Array]:
    labels = jnp.roll(tokens, -1, axis=1)  # before any reordering; the last one is never read
    inputs = [reorder(x, mesh) for x in (tokens, positions, segment_ids)]
    hidden = qwen3.hidden_states(params, cfg, *inputs, attention=attention, mesh=mesh)
    found = label_logprobs(
        hidden,
        qwen3.output_matrix(params, cfg, mesh),
        reorder(labels, mesh),
        chunk=cfg.logits_chunk,
        entropy=entropy,
        mesh=mesh,
    )
    valid = predicted(segment_ids)
    logprobs, entropies = (_align(reorder(x, mesh, back=True), valid) for x in found)
    return logprobs, entropies


def _align(values: Float[Array, "B T"], valid: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    # What stands at t speaks of token t + 1.
    return jnp.where(valid, jnp.roll(values, 1, axis=1), 0.0)
