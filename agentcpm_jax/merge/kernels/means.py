"""Means of models: with given weights, or with weights from the tensors themselves.

    linear        sum_m w_m W_m / Z, Z = sum_m w_m if `normalize`     Wortsman et al. 2022
    model_stock   t mean(W) + (1 - t) B, t = N c / (1 + (N-1) c), c the mean cosine of the task
                  vectors                                            Jang et al. 2024
    sce           select by variance, weigh by mean square, elect     Wan et al. 2024 (FuseChat-3)
    ram, ram+     unique entries of sparse task vectors undiluted, shared ones averaged
                                                                     arXiv 2601.13572

Deviation from mergekit, undone by `compat`: the guards of model_stock and sce against division by
zero are relative to the tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, combinations_with_replacement

from agentcpm_jax.merge.kernels.ops import Array, Ops, Scalar, is_zero, nonzero_sum
from agentcpm_jax.merge.kernels.spherical import inner_products, pair_products

SMALLEST = 1e-6


def weighted_mean(
    ops: Ops, tensors: Sequence[Array], *, weight: Sequence[Scalar], normalize: bool
) -> Array:
    """sum_m w_m W_m, over sum_m w_m if `normalize`."""
    total = nonzero_sum(ops, weight) if normalize else 1.0
    used = [i for i, w in enumerate(weight) if not is_zero(w)]
    if not used:
        return ops.map(lambda at, x: x * ops.number(0.0), tensors[:1])
    c = [ops.number(weight[i] / total) for i in used]

    def mixed(at: int, *chunks: Array) -> Array:
        return ops.sum([x * w for x, w in zip(chunks, c, strict=True)])

    return ops.map(mixed, [tensors[i] for i in used], propagates=True)


def model_stock(ops: Ops, tensors: Sequence[Array], *, base: Array, filter_wise: bool) -> Array:
    """From the base towards the mean of the models: the farther, the more they agree."""
    xp, n = ops.xp, len(tensors)

    def ratio(products: Sequence[Array]) -> Array:
        """t, from the inner products of the task vectors: of the tensor, or of each row."""
        gram = dict(zip(combinations_with_replacement(range(n), 2), products, strict=True))
        total: Array = 0.0
        for i, j in combinations(range(n), 2):
            scale = xp.sqrt(gram[i, i]) * xp.sqrt(gram[j, j])
            if ops.compat:
                scale = xp.maximum(scale, SMALLEST)
            cosine = gram[i, j] / xp.where(scale > 0, scale, 1.0)
            total = total + xp.clip(cosine, -1.0, 1.0)
        c = total / (n * (n - 1) / 2)
        below = 1.0 + (n - 1) * c
        small = abs(below) < SMALLEST
        return xp.where(small, 0.0, n * c / xp.where(small, 1.0, below))

    whole = None if filter_wise else ratio(inner_products(ops, tensors, base))

    def mixed(at: int, b: Array, *models: Array) -> Array:
        t = whole
        if t is None:
            t = ratio([ops.row_total(p) for p in pair_products([m - b for m in models])])
        return _mean(models, ops) * ops.number(t) + b * ops.number(1.0 - t)

    return ops.map(mixed, [base, *tensors])


def sce(ops: Ops, tensors: Sequence[Array], *, base: Array, select_topk: Scalar) -> Array:
    """Task vectors where they vary most, weighted by their mean squares, signs elected."""
    xp, share = ops.xp, float(select_topk)
    arrays = [base, *tensors]

    def variance(at: int, b: Array, *models: Array) -> Array:
        d = [m - b for m in models]
        mean = _mean(d, ops)
        return _mean([(x - mean) * (x - mean) for x in d], ops)

    if share >= 1.0:
        select = None
    else:
        varied = ops.totals(lambda at, *c: ((variance(at, *c) > 0) * ops.number(1.0),), arrays)[0]
        select = ops.largest(variance, arrays, xp.floor(varied * share))

    def selected(at: int, b: Array, *models: Array) -> list[Array]:
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

    def mixed(at: int, b: Array, *models: Array) -> Array:
        d = selected(at, b, *models)
        share = [m * a for m, a in zip(_agreeing(ops, d), weights, strict=True)]
        z = ops.sum(share)
        mix = ops.sum([x * a for x, a in zip(d, share, strict=True)])
        return b + mix / (xp.maximum(z, guard) if ops.compat else z + (z == 0))

    return ops.map(mixed, arrays)


def ram(
    ops: Ops,
    tensors: Sequence[Array],
    *,
    base: Array,
    epsilon: Scalar,
    r: Scalar | None = None,
    alpha: Scalar | None = None,
) -> Array:
    """The base plus what one model alone moved, and the mean of what several moved.

    Given `r` and `alpha` (RAM+), what a model alone moved is amplified by 1 + r times the share of
    what it moved together with others, at most `alpha`.
    """
    xp, threshold, amplify = ops.xp, ops.number(epsilon), r is not None
    arrays = [base, *tensors]
    one = ops.number(1.0)

    def moved(b: Array, models: Sequence[Array]) -> tuple[list[Array], list[Array], Array]:
        d = [m - b for m in models]
        z = [(abs(x) > threshold) * one for x in d]
        return d, z, ops.sum(z)

    gains = [one] * len(tensors)
    if amplify:

        def counts(at: int, b: Array, *models: Array) -> tuple[Array, ...]:
            _, z, count = moved(b, models)
            return (*(m * (count == 1) for m in z), *(m * (count > 1) for m in z))

        sums = ops.totals(counts, arrays)
        unique, both = sums[: len(tensors)], sums[len(tensors) :]
        gains = [
            ops.number(1.0 + r * xp.clip(s / xp.maximum(u, epsilon), 0.0, alpha))
            for u, s in zip(unique, both, strict=True)
        ]

    def mixed(at: int, b: Array, *models: Array) -> Array:
        d, z, count = moved(b, models)
        alone = count == 1
        divisor = xp.maximum(count, one)
        kept = [x * m for x, m in zip(d, z, strict=True)]
        if amplify:
            kept = [x * (alone * g + ~alone) for x, g in zip(kept, gains, strict=True)]
        return b + ops.sum(kept) / divisor

    return ops.map(mixed, arrays)


def _mean(x: Sequence[Array], ops: Ops) -> Array:
    return ops.sum(x) / ops.number(len(x))


def _agreeing(ops: Ops, x: Sequence[Array]) -> list[Array]:
    """Masks of the entries of each x whose sign is that of the sum; 0 never agrees."""
    positive = ops.sum(x) >= 0
    negative = ~positive
    return [((a > 0) & positive) | ((a < 0) & negative) for a in x]
