"""Log-probabilities and entropies aligned with the tokens they speak of; temperature 1, float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from agentcpm_jax.model import qwen3
from agentcpm_jax.model.attention import Attention
from agentcpm_jax.model.config import ModelConfig


def token_logprobs(
    params: Mapping[str, Any],
    cfg: ModelConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    *,
    attention: Attention | None = None,
) -> Float[Array, "B T"]:
    """log p(token t | the tokens of its segment before t), at index t.

    0 at the first token of a segment and at padding. Arguments as in `qwen3.forward`.
    """
    hidden = qwen3.hidden_states(params, cfg, tokens, positions, segment_ids, attention=attention)
    logits = qwen3.unembed(params, cfg, hidden[:, :-1])
    return _align(logprobs_from_logits(logits, tokens[:, 1:]), predicted(segment_ids))


def token_logprobs_and_entropy(
    params: Mapping[str, Any],
    cfg: ModelConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    *,
    attention: Attention | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """`token_logprobs`, and at t the entropy (nats) of the distribution that predicts token t."""
    hidden = qwen3.hidden_states(params, cfg, tokens, positions, segment_ids, attention=attention)
    logits = qwen3.unembed(params, cfg, hidden[:, :-1])
    valid = predicted(segment_ids)
    logprobs = _align(logprobs_from_logits(logits, tokens[:, 1:]), valid)
    return logprobs, _align(entropy_from_logits(logits), valid)


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


def _align(values: Float[Array, "B T1"], valid: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    # Logits at t speak of token t + 1.
    return jnp.where(valid, jnp.pad(values, ((0, 0), (1, 0))), 0.0)
