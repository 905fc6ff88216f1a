"""Means of models, and methods that take their weights from the tensors themselves.

    linear        sum_m w_m W_m / Z, Z = sum_m w_m if `normalize`     Wortsman et al. 2022
    model_stock   t mean(W) + (1 - t) B, t = N c / (1 + (N-1) c), c the mean cosine of the task
                  vectors                                            Jang et al. 2024
    sce           select by variance, weigh by mean square, elect     Wan et al. 2024 (FuseChat-3)
    ram, ram+     unique entries of sparse task vectors undiluted, shared ones averaged
                                                                     arXiv 2601.13572
    nearswap      w = clip(t / |B - W|, 0, 1); w W + (1 - w) B
    arcee_fusion  W where |W - B| KL(softmax W, softmax B) is an outlier, else B

Deviations from mergekit, undone by `compat`:
1. The guards of model_stock and sce against division by zero are relative to the tensor.
2. arcee_fusion keeps the dtype; mergekit writes float32. Above 10^6 elements its quantiles come
   from as many seeded draws, here as there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from agentcpm_jax.merge.kernels.task_vectors import agreeing, is_zero, nonzero_sum

SMALLEST = 1e-6
QUANTILE_DRAWS = 1_000_000


def weighted_mean(
    ops: Any, tensors: Sequence[Any], base: Any, shared: Mapping[str, Any], own: Sequence[Any]
) -> Any:
    """sum_m w_m W_m, over sum_m w_m if `normalize`."""
    del base
    weights = [p["weight"] for p in own]
    total = nonzero_sum(ops, weights) if shared["normalize"] else 1.0
    used = [i for i, w in enumerate(weights) if not is_zero(w)]
    if not used:
        return ops.map(lambda at, x: x * ops.number(0.0), tensors[:1])
    c = [ops.number(weights[i] / total) for i in used]

    def mixed(at: Any, *chunks: Any) -> Any:
        return ops.sum([x * w for x, w in zip(chunks, c, strict=True)])

    return ops.map(mixed, [tensors[i] for i in used], propagates=True)


def model_stock(
    ops: Any, tensors: Sequence[Any], base: Any, shared: Mapping[str, Any], own: Sequence[Any]
) -> Any:
    """Between the base and the mean of the models, as near the latter as they agree."""
    del own
    xp, n = ops.xp, len(tensors)

    def ratio(products: Mapping[tuple[int, int], Any]) -> Any:
        norms = [xp.sqrt(products[i, i]) for i in range(n)]
        total: Any = 0.0
        for i in range(n):
            for j in range(i + 1, n):
                scale = norms[i] * norms[j]
                guard = SMALLEST if ops.compat else 0.0
                scale = xp.maximum(scale, guard)
                cosine = products[i, j] / xp.where(scale > 0, scale, 1.0)
                total = total + xp.clip(cosine, -1.0, 1.0)
        c = total / (n * (n - 1) / 2)
        below = 1.0 + (n - 1) * c
        small = abs(below) < SMALLEST
        return xp.where(small, 0.0, n * c / xp.where(small, 1.0, below))

    def products(b: Any, models: Sequence[Any]) -> dict[tuple[int, int], Any]:
        d = [m - b for m in models]
        return {(i, j): d[i] * d[j] for i in range(n) for j in range(i, n)}

    if shared["filter_wise"]:

        def mixed(at: Any, b: Any, *models: Any) -> Any:
            t = ratio({k: ops.row_total(v) for k, v in products(b, models).items()})
            return _mean(models, ops) * ops.numbers(t) + b * ops.numbers(1.0 - t)

    else:
        keys = [(i, j) for i in range(n) for j in range(i, n)]
        sums = ops.totals(lambda at, b, *m: tuple(products(b, m).values()), [base, *tensors])
        t = ratio(dict(zip(keys, sums, strict=True)))
        ahead, back = ops.number(t), ops.number(1.0 - t)

        def mixed(at: Any, b: Any, *models: Any) -> Any:
            return _mean(models, ops) * ahead + b * back

    return ops.map(mixed, [base, *tensors])


def sce(
    ops: Any, tensors: Sequence[Any], base: Any, shared: Mapping[str, Any], own: Sequence[Any]
) -> Any:
    """Task vectors where they vary most, weighted by their mean squares, signs elected."""
    del own
    xp, share = ops.xp, float(shared["select_topk"])
    arrays = [base, *tensors]

    def variance(at: Any, b: Any, *models: Any) -> Any:
        d = [m - b for m in models]
        mean = _mean(d, ops)
        return _mean([(x - mean) * (x - mean) for x in d], ops)

    if share >= 1.0:
        select = None
    else:
        varied = ops.totals(lambda at, *c: ((variance(at, *c) > 0) * ops.number(1.0),), arrays)[0]
        select = ops.largest(variance, arrays, xp.floor(varied * share))

    def selected(at: Any, b: Any, *models: Any) -> list[Any]:
        d = [m - b for m in models]
        if select is None:
            return d
        mask = select(at, variance(at, b, *models))
        return [x * mask for x in d]

    energy = ops.totals(lambda at, *c: tuple(x * x for x in selected(at, *c)), arrays)
    if ops.compat:
        energy = [e / ops.size for e in energy]
    total = sum(energy[1:], start=energy[0])
    small = total < (SMALLEST if ops.compat else 1e-300)
    weights = [
        ops.number(xp.where(small, 1.0 / len(energy), e / xp.where(small, 1.0, total)))
        for e in energy
    ]
    guard = ops.number(SMALLEST)

    def mixed(at: Any, b: Any, *models: Any) -> Any:
        d = selected(at, b, *models)
        share = [m * a for m, a in zip(agreeing(d, d, ops), weights, strict=True)]
        z = ops.sum(share)
        mix = ops.sum([x * a for x, a in zip(d, share, strict=True)])
        return b + mix / (xp.maximum(z, guard) if ops.compat else z + (z == 0))

    return ops.map(mixed, arrays)


def ram(
    ops: Any,
    tensors: Sequence[Any],
    base: Any,
    shared: Mapping[str, Any],
    own: Sequence[Any],
    amplify: bool = False,
) -> Any:
    """Entries that one model moved as it moved them, entries of several as their mean."""
    del own
    xp, epsilon = ops.xp, ops.number(shared["epsilon"])
    arrays = [base, *tensors]
    one = ops.number(1.0)

    def moved(b: Any, models: Sequence[Any]) -> tuple[list[Any], list[Any], Any]:
        d = [m - b for m in models]
        z = [(abs(x) > epsilon) * one for x in d]
        return d, z, ops.sum(z)

    gains = [one] * len(tensors)
    if amplify:

        def counts(at: Any, b: Any, *models: Any) -> tuple[Any, ...]:
            _, z, count = moved(b, models)
            return (*(m * (count == 1) for m in z), *(m * (count > 1) for m in z))

        sums = ops.totals(counts, arrays)
        unique, both = sums[: len(tensors)], sums[len(tensors) :]
        gains = [
            ops.number(
                1.0
                + shared["r"] * xp.clip(s / xp.maximum(u, shared["epsilon"]), 0.0, shared["alpha"])
            )
            for u, s in zip(unique, both, strict=True)
        ]

    def mixed(at: Any, b: Any, *models: Any) -> Any:
        d, z, count = moved(b, models)
        alone = count == 1
        divisor = xp.maximum(count, one)
        kept = [x * m for x, m in zip(d, z, strict=True)]
        if amplify:
            kept = [x * (alone * g + ~alone) for x, g in zip(kept, gains, strict=True)]
        return b + ops.sum(kept) / divisor

    return ops.map(mixed, arrays)


def nearswap(
    ops: Any, tensors: Sequence[Any], base: Any, shared: Mapping[str, Any], own: Sequence[Any]
) -> Any:
    """The model where it is near the base, and less of it the farther it is."""
    del own
    xp, t, small = ops.xp, ops.number(shared["t"]), ops.number(SMALLEST)

    def swap(at: Any, b: Any, w: Any) -> Any:
        share = xp.clip(t / xp.maximum(abs(b - w), small), ops.number(0.0), ops.number(1.0))
        return share * w + (ops.number(1.0) - share) * b

    return ops.map(swap, [base, tensors[0]])


def arcee_fusion(
    ops: Any, tensors: Sequence[Any], base: Any, shared: Mapping[str, Any], own: Sequence[Any]
) -> Any:
    """The model's entries of unusual importance, the base's elsewhere."""
    del shared, own
    xp = ops.xp
    tiny = ops.number(1e-8)

    def softmax(x: Any) -> Any:
        e = xp.exp(x - x.max(axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True)

    def importance(at: Any, b: Any, w: Any) -> Any:
        p, q = softmax(w) + tiny, softmax(b) + tiny
        divergence = (p * xp.log(p / q)).sum(axis=-1, keepdims=True)
        return abs(w - b) * divergence

    arrays = [base, tensors[0]]
    if ops.size > QUANTILE_DRAWS:
        draws = ops.draws(0, np.empty(QUANTILE_DRAWS, np.bool_), ops.key(0))
        index = xp.sort((draws.astype(np.float64) * (ops.size / 2.0**32)).astype(np.int64))
        ordered = xp.sort(ops.pick(importance, arrays, index))
    else:
        ordered = xp.sort(ops.values(importance, arrays).reshape(-1))
    n = ordered.shape[0]
    low, middle, high = (ordered[math.floor(q * (n - 1))] for q in (0.25, 0.5, 0.75))
    limit = middle + ops.number(1.5) * (high - low)

    def swap(at: Any, b: Any, w: Any) -> Any:
        unusual = importance(at, b, w) >= limit
        return xp.where(unusual, w, b)

    return ops.map(swap, arrays)


def passthrough(
    ops: Any, tensors: Sequence[Any], base: Any, shared: Mapping[str, Any], own: Sequence[Any]
) -> Any:
    """The one input, times `scale`."""
    del base, shared
    scale = own[0].get("scale")
    if scale is None:
        return ops.map(lambda at, w: w, tensors)
    factor = ops.number(scale)
    return ops.map(lambda at, w: w * factor, tensors)


def _mean(x: Sequence[Any], ops: Any) -> Any:
    return ops.sum(x) / ops.number(len(x))
