"""Task arithmetic, TIES, breadcrumbs, DARE and DELLA: one kernel, three switches.

    x_m = w_m S(W_m - B)             S: `sparsify`
    g   = +1 where sum_m x_m >= 0, else -1;  A_m = [sign(x_m) == g]       if signs are elected
    out = B + lambda * sum_m A_m x_m / Z    Z = sum_m A_m w_m (elected) or sum_m w_m if `normalize`

Ilharco et al. 2023 (task arithmetic), Yadav et al. 2023 (TIES), Davari et al. 2023 (breadcrumbs),
Yu et al. 2023 (DARE), Deep et al. 2024 (DELLA).

Deviations:
1. Signs are elected after weighting, as in mergekit; the TIES paper elects before: `elect` may be
   weighted, unweighted (the paper) or count (one vote per model).
2. With one model and elected signs `normalize` cancels the weight, as in mergekit: w d / w = d.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from agentcpm_jax.merge.kernels.ops import Array, Ops, Scalar, is_one, is_zero, nonzero_sum
from agentcpm_jax.merge.kernels.sparsify import sparsifier
from agentcpm_jax.types import UserError

ELECTIONS = ("weighted", "unweighted", "count")
RESCALES = ("l1", "inverse_prob", "none")


def merge_task_vectors(
    ops: Ops,
    tensors: Sequence[Array],
    *,
    base: Array,
    weight: Sequence[Scalar],
    lambda_: Scalar,
    normalize: bool,
    rescale: bool | str,
    sparsify: str,
    elected: bool,
    elect: str = "weighted",
    **sparsity: Sequence[Any],
) -> Array:
    """The merged tensor; see the module.

    Args:
      weight: w_m.
      rescale: True (as the method's authors do) or False, or one of RESCALES.
      sparsify: S, a kind of `sparsify.sparsifier`.
      elected: whether signs are elected; `elect`: by which votes.
      sparsity: what that kind of sparsifier takes by keyword, for every model.
    """
    used = [i for i, w in enumerate(weight) if not is_zero(w)]
    weights = [weight[i] for i in used]
    if not used or is_zero(lambda_):
        return ops.map(lambda at, b: b, [base])
    total = nonzero_sum(ops, weight) if normalize and not elected else 1.0
    rule = _rescale(rescale, sparsify, ops.compat)
    sparse = [
        sparsifier(
            ops, base, tensors[i], i, sparsify, rule, **{k: v[i] for k, v in sparsity.items()}
        )
        for i in used
    ]
    if not elected and not ops.native:  # lambda and Z cost nothing inside the weights
        weights, total, lambda_ = [x / total * lambda_ for x in weights], 1.0, 1.0
    w = [ops.number(x) for x in weights]
    if elect not in ELECTIONS:
        raise UserError(f"elect {elect!r} is not one of {', '.join(ELECTIONS)}")

    plain = all(isinstance(x, float | int) and x > 0 for x in weights)
    # Z is the sum of some of the weights: 0 where no model agrees, else at least the smallest.
    least = ops.number(min(weights)) if plain else None

    def mixed(at: int, b: Array, *models: Array) -> Array:
        s = [f(at, x - b) for f, x in zip(sparse, models, strict=True)]
        x = [a * c for a, c in zip(s, w, strict=True)]
        if elected:
            mix, z = _elected(ops, _votes(ops.xp, elect, s, x), x, w)
            if normalize:
                mix = mix / (z + (z == 0) if least is None else ops.xp.maximum(z, least))
        else:
            mix = ops.sum(x)
            if not is_one(total):
                mix = mix / ops.number(total)
        return b + (mix if is_one(lambda_) else mix * ops.number(lambda_))

    return ops.map(mixed, [base, *(tensors[i] for i in used)], propagates=True)


def _elected(ops: Ops, votes: list[Array], x: list[Array], w: list[Array]) -> tuple[Array, Array]:
    """(sum_m A_m x_m, sum_m A_m w_m). What agrees is positive once turned to the elected sign."""
    sign = ops.xp.copysign(ops.number(1.0), ops.sum(votes))
    turned = [ops.xp.maximum(a * sign, ops.number(0.0)) for a in x]
    mix = ops.sum(turned) * sign
    return mix, ops.sum([(a > 0) * c for a, c in zip(turned, w, strict=True)])


def _votes(xp: ModuleType, elect: str, s: list[Array], x: list[Array]) -> list[Array]:
    if elect == "count":
        return [xp.sign(a) for a in x]
    return x if elect == "weighted" else s


def _rescale(asked: bool | str, sparsify: str, compat: bool) -> str:
    random = sparsify in ("bernoulli", "della")
    if asked is True:
        return "inverse_prob" if random and not compat else "l1"
    if asked is False:
        return "none"
    if asked not in RESCALES:
        raise UserError(f"rescale {asked!r} is not true, false or one of {', '.join(RESCALES)}")
    if asked == "inverse_prob" and not random:
        raise UserError(
            "rescale inverse_prob needs a random sparsifier (DARE, DELLA); use l1 or none"
        )
    return asked
