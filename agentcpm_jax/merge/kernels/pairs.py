"""The base against one model, element by element; and one model alone.

    nearswap      w = clip(t / |B - W|, 0, 1); w W + (1 - w) B
    arcee_fusion  W where |W - B| KL(softmax W, softmax B) is an outlier, else B
    passthrough   W, times `scale`

Deviation from mergekit, undone by `compat`: arcee_fusion keeps the dtype; mergekit writes float32.
Above 10^6 elements its quantiles come from as many seeded draws, here as there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from agentcpm_jax.merge.kernels.ops import Array, Ops, Scalar

SMALLEST = 1e-6
QUANTILE_DRAWS = 1_000_000


def nearswap(ops: Ops, tensors: Sequence[Array], *, base: Array, t: Scalar) -> Array:
    """The model where it is near the base, and less of it the farther it is."""
    xp, t, small = ops.xp, ops.number(t), ops.number(SMALLEST)

    def swap(at: int, b: Array, w: Array) -> Array:
        share = xp.clip(t / xp.maximum(abs(b - w), small), ops.number(0.0), ops.number(1.0))
        return share * w + (ops.number(1.0) - share) * b

    return ops.map(swap, [base, tensors[0]])


def arcee_fusion(ops: Ops, tensors: Sequence[Array], *, base: Array) -> Array:
    """The model's entries of unusual importance, the base's elsewhere."""
    xp = ops.xp
    tiny = ops.number(1e-8)

    def softmax(x: Array) -> Array:
        e = xp.exp(x - x.max(axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True)

    def importance(at: int, b: Array, w: Array) -> Array:
        p, q = softmax(w) + tiny, softmax(b) + tiny
        divergence = (p * xp.log(p / q)).sum(axis=-1, keepdims=True)
        return abs(w - b) * divergence

    arrays = [base, tensors[0]]
    index = None
    if ops.size > QUANTILE_DRAWS:
        draws = ops.draws(0, np.empty(QUANTILE_DRAWS, np.bool_), ops.key(0))
        index = xp.sort((draws.astype(np.float64) * (ops.size / 2.0**32)).astype(np.int64))
    ordered = xp.sort(ops.pick(importance, arrays, index))
    n = ordered.shape[0]
    low, middle, high = (ordered[math.floor(q * (n - 1))] for q in (0.25, 0.5, 0.75))
    limit = middle + ops.number(1.5) * (high - low)

    def swap(at: int, b: Array, w: Array) -> Array:
        unusual = importance(at, b, w) >= limit
        return xp.where(unusual, w, b)

    return ops.map(swap, arrays)


def passthrough(ops: Ops, tensors: Sequence[Array], *, scale: Sequence[Scalar | None]) -> Array:
    """The one input, times `scale` if that is given."""
    if scale[0] is None:
        return ops.map(lambda at, w: w, tensors)
    factor = ops.number(scale[0])
    return ops.map(lambda at, w: w * factor, tensors)
