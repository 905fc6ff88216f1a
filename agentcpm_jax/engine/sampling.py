"""How the next id is drawn from logits: temperature, top-k, top-p, min-p, one key per token.

An id may be drawn if fewer than `top_k` ids are likelier than it, if those together have less than
`top_p` of the mass, and if it has at least `min_p` of the mass of the likeliest. All three are
judged on the temperature-scaled full distribution, as SGLang judges them (others renormalise
between two); ids of equal probability stay or go together.

The engine reports the log-probability under the full distribution at temperature 1, which is what
the trainer computes, not under the distribution drawn from. The two differ under a restriction or
another temperature, so sampling for training uses neither.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

LEAST_TEMPERATURE = (
    1e-6  # as SGLang: below it logits overflow, and the likeliest id is drawn anyway
)


@flax.struct.dataclass
class Draw:
    """Sampling parameters of R rows; jax or numpy arrays."""

    temperature: Any  # f32[R] below LEAST_TEMPERATURE = greedy
    top_k: Any  # i32[R] 0 = all
    top_p: Any  # f32[R] 1 = all
    min_p: Any  # f32[R] 0 = all
    key: Any  # u32[R, 2]


def sample(logits: jax.Array, draw: Draw, index: jax.Array) -> jax.Array:
    """Ids i32[R] from logits f32[R, V]: Gumbel-max with the row's key folded with `index` i32[R],
    the number of tokens sampled before; temperature 0 is the argmax.

    A row's id depends on that row alone. Noise is made and restrictions are applied only when some
    row asks for it.
    """
    greedy = draw.temperature < LEAST_TEMPERATURE
    scaled = logits / jnp.where(greedy, 1.0, draw.temperature)[:, None]
    scaled = jax.lax.cond(
        jnp.any(~greedy & ((draw.top_k > 0) | (draw.top_p < 1) | (draw.min_p > 0))),
        lambda: jnp.where(_allowed(scaled, draw), scaled, -jnp.inf),
        lambda: scaled,
    )
    noisy = jax.lax.cond(
        jnp.any(~greedy),
        lambda: scaled + jnp.where(greedy[:, None], 0.0, _noise(draw.key, index, logits.shape[1])),
        lambda: scaled,
    )
    return jnp.argmax(noisy, axis=1).astype(jnp.int32)


def _noise(keys: jax.Array, index: jax.Array, width: int) -> jax.Array:
    folded = jax.vmap(lambda k, t: jax.random.fold_in(jax.random.wrap_key_data(k), t))(keys, index)
    return jax.vmap(lambda k: jax.random.gumbel(k, (width,), jnp.float32))(folded)


def _allowed(scaled: jax.Array, draw: Draw) -> jax.Array:
    """The ids that may be drawn: bool[R, V].

    Bisection over the ordered bits of float32 finds the least likely id that top-k and top-p allow,
    without sorting the vocabulary.
    """
    probs = jax.nn.softmax(scaled, axis=1)
    top_k = jnp.where(draw.top_k > 0, draw.top_k, scaled.shape[1])
    top_p = jnp.where(draw.top_p < 1, draw.top_p, jnp.inf)
    order = _ordered_bits(scaled)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # as a threshold `high` is allowed, `low - 1` is not
        middle = low + (high - low) // 2
        likelier = order > middle[:, None]
        mass = jnp.sum(jnp.where(likelier, probs, 0.0), axis=1)
        fits = (jnp.sum(likelier, axis=1) < top_k) & (mass < top_p)
        return jnp.where(fits, low, middle + 1), jnp.where(fits, middle, high)

    high = order.max(axis=1)
    _, least = jax.lax.fori_loop(0, 32, halve, (jnp.zeros_like(high), high))
    enough = probs >= draw.min_p[:, None] * probs.max(axis=1, keepdims=True)
    return (order >= least[:, None]) & enough


def _ordered_bits(x: jax.Array) -> jax.Array:
    """uint32 values in the same order as the float32 values."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return bits ^ jnp.where(bits >> 31 == 1, jnp.uint32(0xFFFFFFFF), jnp.uint32(0x80000000))
