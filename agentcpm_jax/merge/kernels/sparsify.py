"""Which entries of a task vector are kept, and how they are rescaled.

    magnitude   the k = max(1, floor(p n)) largest                      Yadav et al. 2023 (TIES)
    outliers    without the floor(gamma n) largest, the next floor(p n) Davari et al. 2023
    bernoulli   each with probability p                                 Yu et al. 2023 (DARE)
    della       with probability p - eps + 2 eps r / (R - 1), r the     Deep et al. 2024
                rank of the magnitude among the R of its row

Density 1 is the identity: nothing is dropped, drawn or rescaled.

Deviations from the papers:
1. The unit is one tensor, as in mergekit, where the TIES paper trims the whole model; `keep` gives
   a number of entries per tensor instead of a density (`selection.keep_counts`).
2. `rescale` may be inverse_prob (DARE, DELLA: d / p), l1 (sum|d| / sum|s| over the tensor,
   mergekit's rule) or none.
3. A row of one element is kept with probability p (the formula is 0 / 0).
"""

from __future__ import annotations

import math

import numpy as np

from agentcpm_jax.merge.kernels.ops import Array, Kernel, Ops, Scalar
from agentcpm_jax.merge.kernels.random_bits import Key, probability_bits
from agentcpm_jax.types import UserError

SMALLEST_L1 = 1e-7


def sparsifier(
    ops: Ops,
    base: Array,
    tensor: Array,
    model: int,
    kind: str,
    rescale: str,
    *,
    density: Scalar = 1.0,
    keep: int | None = None,
    gamma: Scalar = 0.0,
    epsilon: Scalar = 0.0,
) -> Kernel:
    """A function (at, d) -> s for the chunks d of tensor - base; see `ops.Ops.map`.

    Args:
      base, tensor: [...] of equal shape.
      model: which input this is, for the randomness.
      kind: none, magnitude, outliers, bernoulli or della.
      rescale: none, l1 or inverse_prob.
      density: share of entries that are kept; `keep`: their number, of `magnitude`.
      gamma: share of outliers.
      epsilon: half the range of DELLA's probabilities.

    Raises:
      UserError: a density, gamma or epsilon that is impossible.
    """
    density = float(density)
    if not math.isfinite(density):
        raise UserError(f"density {density} of {ops.name} is not a number; use 0 to 1")
    if kind == "none" or (density >= 1.0 and keep is None):
        return lambda at, d: d
    if density <= 0.0 and keep is None:
        return lambda at, d: d * ops.number(0.0)
    if kind == "magnitude":
        count = max(1, math.floor(density * ops.size)) if keep is None else int(keep)
        sparse = _magnitude(ops, base, tensor, count)
    elif kind == "outliers":
        sparse = _without_outliers(ops, base, tensor, density, float(gamma))
    else:
        key = ops.key(model)
        unbiased = rescale == "inverse_prob"
        if kind == "bernoulli":
            sparse = _bernoulli(ops, density, key, unbiased)
        else:
            sparse = _della(ops, density, float(epsilon), key, unbiased)
        if unbiased:
            return sparse
    return sparse if rescale == "none" else _l1_matched(ops, base, tensor, sparse)


def _magnitude(ops: Ops, base: Array, tensor: Array, count: int) -> Kernel:
    cut = _largest(ops, base, tensor, count)
    return lambda at, d: d * cut(at, abs(d))


def _largest(ops: Ops, base: Array, tensor: Array, count: int) -> Kernel:
    return ops.largest(lambda at, b, w: abs(w - b), [base, tensor], count)


def _without_outliers(ops: Ops, base: Array, tensor: Array, density: float, gamma: float) -> Kernel:
    if not 0.0 <= gamma <= 1.0:
        raise UserError(f"gamma {gamma:g} of {ops.name} is not a share; use 0 to 1")
    keep = math.floor(density * ops.size)
    top = min(math.floor(gamma * ops.size), ops.size - keep)
    wide = _largest(ops, base, tensor, keep + top)
    outliers = _largest(ops, base, tensor, top)

    def sparse(at: int, d: Array) -> Array:
        m = abs(d)
        return d * (wide(at, m) ^ outliers(at, m))

    return sparse


def _bernoulli(ops: Ops, density: float, key: Key, unbiased: bool) -> Kernel:
    limit = np.uint32(probability_bits(density))
    factor = ops.number(2.0**32 / float(limit) if unbiased else 1.0)
    if not unbiased:
        return lambda at, d: d * (ops.draws(at, d, key) < limit)
    return lambda at, d: (d * factor) * (ops.draws(at, d, key) < limit)


def _della(ops: Ops, density: float, epsilon: float, key: Key, unbiased: bool) -> Kernel:
    low, high = density - epsilon, density + epsilon
    if not (0.0 < low <= 1.0 and 0.0 < high < 1.0):
        raise UserError(
            f"density {density:g} and epsilon {epsilon:g} of {ops.name} keep with probability "
            f"{low:g} to {high:g}, which must lie between 0 and 1; lower epsilon"
        )
    ranks = np.arange(ops.row)
    if ops.native:  # mergekit's bfloat16 cannot count beyond 256
        ranks = ranks.astype(ops.compute).astype(np.float64)
    share = ranks / (ops.row - 1) if ops.row > 1 else np.array([0.5])
    limits = np.array([probability_bits(p) for p in low + 2 * epsilon * share], np.uint32)

    inverse = 2.0**32 / limits.astype(np.float64) if unbiased else np.ones(len(limits))
    values = inverse.astype(ops.compute)
    return lambda at, d: d * ops.kept_by_rank(at, abs(d), key, limits, values)


def _l1_matched(ops: Ops, base: Array, tensor: Array, sparse: Kernel) -> Kernel:
    def norms(at: int, b: Array, w: Array) -> tuple[Array, Array]:
        d = w - b
        return abs(d), abs(sparse(at, d))

    before, after = ops.totals(norms, [base, tensor])
    xp = ops.xp
    enough = (before >= SMALLEST_L1) & (after >= SMALLEST_L1)
    factor = ops.number(xp.where(enough, before / xp.where(enough, after, 1.0), 1.0))
    return lambda at, d: sparse(at, d) * factor
