"""Interpolation along arcs instead of chords.

    slerp(t)    (sin((1-t) theta) B + sin(t theta) W) / sin theta     Shoemake 1985
    nuslerp     the same between two models or their task vectors, t = w2 / (w1 + w2)
    multislerp  one step on the sphere from the normalised weighted mean, then back
    karcher     the mean on the sphere that minimises squared arcs    Karcher 1977

All of these lie in the span of their inputs. So one pass takes the inner products, the rest is
arithmetic on a matrix of M x M numbers in float64, and a second pass combines the inputs.

Deviations from mergekit: accuracy, its norms being float32 (or bfloat16) sums; and multislerp of
more than two models leaves alone a tensor that none of them moved, which is an error there.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import ModuleType

import numpy as np

from agentcpm_jax.merge.kernels.ops import Array, Ops, Scalar, nonzero_sum
from agentcpm_jax.types import UserError

PARALLEL = 0.9995  # slerp: above this cosine, interpolate linearly
SMALLEST_NORM = 1e-8
SMALLEST_ROW_NORM = 1e-7
SMALLEST_SINE2 = 1e-16
SMALLEST_SUM = 1e-6


def slerp(ops: Ops, tensors: Sequence[Array], *, base: Array, t: Scalar) -> Array:
    """From the base (t = 0) to the model (t = 1)."""
    bb, bw, ww = inner_products(ops, [base, tensors[0]])
    a, b = _arc(ops.xp, bb, bw, ww, t, SMALLEST_NORM, parallel=PARALLEL)
    return _combined(ops, [a, b], [base, tensors[0]])


def nuslerp(
    ops: Ops,
    tensors: Sequence[Array],
    *,
    base: Array | None,
    weight: Sequence[Scalar],
    nuslerp_flatten: bool,
    nuslerp_row_wise: bool,
) -> Array:
    """Between two models, or from the base along two task vectors."""
    xp = ops.xp
    w1, w2 = weight
    small = abs(w1 + w2) < SMALLEST_SUM
    t = xp.where(small, 0.5, w2 / xp.where(small, 1.0, w1 + w2))
    if nuslerp_flatten:
        xx, xy, yy = inner_products(ops, tensors, base)
        a, b = _arc(xp, xx, xy, yy, t, SMALLEST_ROW_NORM)
        return _combined(ops, [a, b], tensors, base)

    def row(at: int, *chunks: Array) -> Array:
        x, y = _vectors(chunks, base)
        xx, xy, yy = (ops.row_total(p) for p in pair_products([x, y]))
        a, b = _arc(xp, xx, xy, yy, t, SMALLEST_ROW_NORM)
        out = x * ops.number(a) + y * ops.number(b)
        return out if base is None else chunks[0] + out

    arrays = _inputs(tensors, base)
    if nuslerp_row_wise and len(ops.shape) > 1:
        turned = ops.turned()
        return xp.swapaxes(turned.map(row, [xp.swapaxes(x, 0, -1) for x in arrays]), 0, -1)
    return ops.map(row, arrays)


def multislerp(
    ops: Ops,
    tensors: Sequence[Array],
    *,
    base: Array | None,
    weight: Sequence[Scalar],
    normalize_weights: bool,
    eps: Scalar,
) -> Array:
    """Weighted mean on the sphere of the models, or of their task vectors if there is a base."""
    if len(tensors) == 1:
        return ops.map(lambda at, x: x, tensors)
    xp = ops.xp
    total = nonzero_sum(ops, weight) if normalize_weights else 1.0
    a = xp.stack([xp.asarray(w / total, float) for w in weight])
    gram = _matrix(xp, inner_products(ops, tensors, base), len(tensors))
    norms = xp.sqrt(xp.diagonal(gram))
    units = gram / ((norms + eps)[:, None] * (norms + eps)[None, :])  # <u_i, u_j>
    length = _norm(xp, a, units)
    # Without a mean direction, where no model moved or two are opposite, take the linear mean.
    straight = length < eps
    if not ops.traced and straight and len(tensors) > 2 and norms.any():
        raise UserError(
            f"the weighted mean direction of tensor {ops.name} is zero: multislerp has no "
            "starting point; change the weights or use linear"
        )
    mu = a / xp.where(straight, 1.0, length)  # coefficients of the units
    along = units @ mu
    tau = a - mu * xp.sum(a * along)
    arc = _norm(xp, tau, units) + eps
    point = mu * xp.cos(arc) + tau * xp.sin(arc) / arc
    curved = point * xp.sum(a * norms) / (norms + eps)
    return _combined(ops, list(xp.where(straight, a, curved)), tensors, base)


def karcher(ops: Ops, tensors: Sequence[Array], *, max_iter: Scalar, tol: Scalar) -> Array:
    """The mean of the directions on the sphere, with the mean length of the inputs."""
    xp = ops.xp
    if len(tensors) == 1:
        return ops.map(lambda at, x: x, tensors)
    count = len(tensors)
    gram = _matrix(xp, inner_products(ops, tensors), count)
    norms = xp.sqrt(xp.diagonal(gram))
    used = norms > tol
    safe = xp.where(used, norms, 1.0)
    units = gram / (safe[:, None] * safe[None, :])
    share = used / xp.maximum(xp.sum(used), 1)
    length = _norm(xp, share, units)
    first = (xp.cumsum(used) == 1) & used
    mu = xp.where(length < tol, first * 1.0, share / xp.where(length < tol, 1.0, length))

    def descend(mu: Array, moving: Array) -> tuple[Array, Array]:
        cosine = xp.clip(units @ mu, -1.0, 1.0)
        theta = xp.arccos(cosine)
        far = used & (theta >= tol)
        pull = xp.where(far, theta / xp.where(far, xp.sin(theta), 1.0), 0.0)
        pull = pull / xp.maximum(xp.sum(used), 1)
        tau = pull - mu * xp.sum(pull * cosine)
        size = _norm(xp, tau, units)
        moving = moving & (size >= tol)
        step = mu * xp.cos(size) + tau * xp.sin(size) / xp.where(size > 0, size, 1.0)
        step = step / xp.maximum(_norm(xp, step, units), 1e-30)
        return xp.where(moving, step, mu), moving

    mu, _ = ops.repeat(int(max_iter), descend, (mu, xp.asarray(True)))
    mean = xp.sum(norms * used) / xp.maximum(xp.sum(used), 1)
    return _combined(ops, list(mu * mean / safe), tensors)


def _arc(
    xp: ModuleType,
    xx: Array,
    xy: Array,
    yy: Array,
    t: Scalar,
    smallest: float,
    parallel: float | None = None,
) -> tuple[Array, Array]:
    """Coefficients of x and y at t, from their inner products; scalars or one per row."""
    nx, ny = xp.sqrt(xx), xp.sqrt(yy)
    if parallel is None:
        c = xp.clip(xy / (xp.maximum(nx, smallest) * xp.maximum(ny, smallest)), -1.0, 1.0)
        straight = 1.0 - c * c <= SMALLEST_SINE2
    else:
        scale = xp.where(nx > smallest, nx, 1.0) * xp.where(ny > smallest, ny, 1.0)
        c = xp.clip(xy / scale, -1.0, 1.0)
        straight = abs(c) > parallel
    theta = xp.arccos(xp.where(straight, 0.0, c))
    sine = xp.sin(theta)
    a = xp.where(straight, 1.0 - t, xp.sin((1.0 - t) * theta) / sine)
    b = xp.where(straight, t, xp.sin(t * theta) / sine)
    return a, b


def inner_products(
    ops: Ops, tensors: Sequence[Array], base: Array | None = None
) -> Sequence[Scalar]:
    """<x_i, x_j> of every `pair_products`; x are the tensors or, given a base, deltas from it."""

    def products(at: int, *chunks: Array) -> tuple[Array, ...]:
        return pair_products(_vectors(chunks, base))

    return ops.totals(products, _inputs(tensors, base))


def pair_products(x: Sequence[Array]) -> tuple[Array, ...]:
    """x_i x_j of every pair i <= j, element by element: the upper triangle, row by row."""
    return tuple(a * b for a, b in itertools.combinations_with_replacement(x, 2))


def _inputs(tensors: Sequence[Array], base: Array | None) -> list[Array]:
    return list(tensors) if base is None else [base, *tensors]


def _vectors(chunks: Sequence[Array], base: Array | None) -> Sequence[Array]:
    """Chunks of the models or, where the first one is the base's, of their deltas."""
    return chunks if base is None else [chunk - chunks[0] for chunk in chunks[1:]]


def _matrix(xp: ModuleType, upper: Sequence[Array], count: int) -> Array:
    """The symmetric [M, M] whose upper triangle is given, row by row."""
    rows, columns = np.triu_indices(count)
    place = np.zeros((count, count), int)
    place[rows, columns] = place[columns, rows] = np.arange(len(rows))
    return xp.stack([xp.asarray(v) for v in upper])[place]


def _norm(xp: ModuleType, c: Array, units: Array) -> Array:
    """Length of sum_m c_m u_m."""
    return xp.sqrt(xp.maximum(c @ units @ c, 0.0))


def _combined(
    ops: Ops, coefficients: Sequence[Array], tensors: Sequence[Array], base: Array | None = None
) -> Array:
    """sum_m c_m x_m; x are the tensors or, given a base, deltas added to it."""
    c = [ops.number(x) for x in coefficients]

    def combine(at: int, *chunks: Array) -> Array:
        x = _vectors(chunks, base)
        out = x[0] * c[0]
        for xm, cm in zip(x[1:], c[1:], strict=True):
            out = out + xm * cm
        return out if base is None else chunks[0] + out

    return ops.map(combine, _inputs(tensors, base))
