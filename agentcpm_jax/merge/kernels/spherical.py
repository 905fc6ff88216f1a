"""Interpolation along arcs instead of chords.

    slerp(t)    (sin((1-t) theta) B + sin(t theta) W) / sin theta     Shoemake 1985
    nuslerp     the same between two models or their task vectors, t = w2 / (w1 + w2)
    multislerp  one step on the sphere from the normalised weighted mean, then back
    karcher     the mean on the sphere that minimises squared arcs    Karcher 1977

All of these lie in the span of their inputs. So one pass takes the inner products, the rest is
arithmetic on a matrix of M x M numbers in float64, and a second pass combines the inputs.

Deviations from mergekit: none but accuracy; its norms are float32 (or bfloat16) sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from agentcpm_jax.merge.kernels.ops import Array, Ops, Scalar, nonzero_sum
from agentcpm_jax.types import UserError

PARALLEL = 0.9995  # slerp: above this cosine, interpolate linearly
SMALLEST_NORM = 1e-8
SMALLEST_ROW_NORM = 1e-7
SMALLEST_SINE2 = 1e-16
SMALLEST_SUM = 1e-6


def slerp(ops: Ops, tensors: Sequence[Array], *, base: Array, t: Scalar) -> Array:
    """From the base (t = 0) to the model (t = 1)."""
    bb, bw, ww = _products(ops, [base, tensors[0]])
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
        xx, xy, yy = _products(ops, tensors, base)
        a, b = _arc(xp, xx, xy, yy, t, SMALLEST_ROW_NORM)
        return _combined(ops, [a, b], tensors, base)
    by_column = nuslerp_row_wise and len(ops.shape) > 1

    def row(at: int, *chunks: Array) -> Array:
        x, y = chunks[:2] if base is None else (chunks[1] - chunks[0], chunks[2] - chunks[0])
        xx, xy, yy = (ops.row_total(p) for p in (x * x, x * y, y * y))
        a, b = _arc(xp, xx, xy, yy, t, SMALLEST_ROW_NORM)
        out = x * ops.numbers(a) + y * ops.numbers(b)
        return out if base is None else chunks[0] + out

    arrays = list(tensors) if base is None else [base, *tensors]
    if by_column:
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
    gram = _matrix(xp, _products(ops, tensors, base), len(tensors))
    norms = xp.sqrt(xp.diagonal(gram))
    units = gram / ((norms + eps)[:, None] * (norms + eps)[None, :])  # <u_i, u_j>
    length = _norm(xp, a, units)
    if not ops.traced and length < eps:
        if len(tensors) > 2:
            raise UserError(
                f"the weighted mean direction of tensor {ops.name} is zero: multislerp has no "
                "starting point; change the weights or use linear"
            )
        return _combined(ops, list(a), tensors, base)
    mu = a / length  # coefficients of the units
    along = units @ mu
    tau = a - mu * xp.sum(a * along)
    arc = _norm(xp, tau, units) + eps
    point = mu * xp.cos(arc) + tau * xp.sin(arc) / arc
    scale = xp.sum(a * norms)
    return _combined(ops, list(point * scale / (norms + eps)), tensors, base)


def karcher(ops: Ops, tensors: Sequence[Array], *, max_iter: Scalar, tol: Scalar) -> Array:
    """The Riemannian mean of the directions, as long as the inputs are on average."""
    xp = ops.xp
    if len(tensors) == 1:
        return ops.map(lambda at, x: x, tensors)
    count = len(tensors)
    gram = _matrix(xp, _products(ops, tensors), count)
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
    if parallel is None:
        c = xy / (xp.maximum(xp.sqrt(xx), smallest) * xp.maximum(xp.sqrt(yy), smallest))
        c = xp.clip(c, -1.0, 1.0)
        straight = 1.0 - c * c <= SMALLEST_SINE2
    else:
        nx, ny = (xp.sqrt(n) for n in (xx, yy))
        c = xy / (xp.where(nx > smallest, nx, 1.0) * xp.where(ny > smallest, ny, 1.0))
        c = xp.clip(c, -1.0, 1.0)
        straight = abs(c) > parallel
    theta = xp.arccos(xp.where(straight, 0.0, c))
    sine = xp.sin(theta)
    a = xp.where(straight, 1.0 - t, xp.sin((1.0 - t) * theta) / sine)
    b = xp.where(straight, t, xp.sin(t * theta) / sine)
    return a, b


def _products(ops: Ops, tensors: Sequence[Array], base: Array = None) -> Sequence[Scalar]:
    """The upper triangle of <x_i, x_j>, row by row; x are models or, given a base, deltas."""

    def products(at: int, *chunks: Array) -> tuple[Array, ...]:
        x = chunks if base is None else [c - chunks[0] for c in chunks[1:]]
        return tuple(x[i] * x[j] for i in range(len(x)) for j in range(i, len(x)))

    return ops.totals(products, list(tensors) if base is None else [base, *tensors])


def _matrix(xp: ModuleType, upper: Sequence[Array], count: int) -> Array:
    rows = [[xp.asarray(0.0)] * count for _ in range(count)]
    values = iter(upper)
    for i in range(count):
        for j in range(i, count):
            rows[i][j] = rows[j][i] = next(values)
    return xp.stack([xp.stack([xp.asarray(v) for v in row]) for row in rows])


def _norm(xp: ModuleType, c: Array, units: Array) -> Array:
    """Length of sum_m c_m u_m."""
    return xp.sqrt(xp.maximum(c @ units @ c, 0.0))


def _combined(
    ops: Ops, coefficients: Sequence[Array], tensors: Sequence[Array], base: Array = None
) -> Array:
    """sum_m c_m x_m; x are the tensors or, given a base, deltas added to it."""
    c = [ops.number(x) for x in coefficients]

    def combine(at: int, *chunks: Array) -> Array:
        x = chunks if base is None else [m - chunks[0] for m in chunks[1:]]
        out = x[0] * c[0]
        for xm, cm in zip(x[1:], c[1:], strict=True):
            out = out + xm * cm
        return out if base is None else chunks[0] + out

    return ops.map(combine, list(tensors) if base is None else [base, *tensors])
