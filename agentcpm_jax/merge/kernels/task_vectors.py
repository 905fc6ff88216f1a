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

from collections.abc import Mapping, Sequence
from typing import Any

from agentcpm_jax.merge.kernels.sparsify import sparsifier
from agentcpm_jax.types import UserError

SMALLEST_SUM = 1e-8
ELECTIONS = ("weighted", "unweighted", "count")
RESCALES = ("l1", "inverse_prob", "none")


def merge_task_vectors(
    ops: Any,
    tensors: Sequence[Any],
    base: Any,
    shared: Mapping[str, Any],
    own: Sequence[Mapping[str, Any]],
    sparsify: str,
    elected: bool,
) -> Any:
    """The merged tensor. See the module; parameters as in `methods.METHODS`."""
    used = [i for i, p in enumerate(own) if not is_zero(p["weight"])]
    weights = [own[i]["weight"] for i in used]
    lambda_ = shared["lambda"]
    if not used or is_zero(lambda_):
        return ops.map(lambda at, b: b, [base])
    if shared["normalize"] and not elected:
        total = nonzero_sum(ops, [p["weight"] for p in own])
    else:
        total = 1.0
    rescale = _rescale(shared["rescale"], sparsify, ops.compat)
    sparse = [sparsifier(sparsify, ops, base, tensors[i], own[i], rescale, i) for i in used]
    if not elected and not ops.native:  # lambda and Z cost nothing inside the weights
        weights, total, lambda_ = [x / total * lambda_ for x in weights], 1.0, 1.0
    w = [ops.number(x) for x in weights]
    elect, normalize = shared.get("elect", "weighted"), bool(shared["normalize"])
    if elect not in ELECTIONS:
        raise UserError(f"elect {elect!r} is not one of {', '.join(ELECTIONS)}")

    plain = all(isinstance(x, float | int) and x > 0 for x in weights)
    least = ops.number(min(weights)) if plain else None  # Z is 0 or not below it

    def mixed(at: Any, b: Any, *models: Any) -> Any:
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


def _elected(ops: Any, votes: list[Any], x: list[Any], w: list[Any]) -> tuple[Any, Any]:
    """(sum_m A_m x_m, sum_m A_m w_m): turned to the elected sign, what agrees is positive."""
    sign = ops.xp.copysign(ops.number(1.0), ops.sum(votes))
    turned = [ops.xp.maximum(a * sign, ops.number(0.0)) for a in x]
    mix = ops.sum(turned) * sign
    return mix, ops.sum([(a > 0) * c for a, c in zip(turned, w, strict=True)])


def agreeing(votes: Sequence[Any], x: Sequence[Any], ops: Any) -> list[Any]:
    """Masks of the entries of each x whose sign is that of the summed votes; 0 never agrees."""
    positive = ops.sum(votes) >= 0
    negative = ~positive
    return [((a > 0) & positive) | ((a < 0) & negative) for a in x]


def _votes(xp: Any, elect: str, s: list[Any], x: list[Any]) -> list[Any]:
    if elect == "count":
        return [xp.sign(a) for a in x]
    return x if elect == "weighted" else s


def _rescale(asked: Any, sparsify: str, compat: bool) -> str:
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


def nonzero_sum(ops: Any, weights: Sequence[Any]) -> Any:
    """The sum of the weights; UserError if it is zero (not noticed when traced)."""
    total = sum(weights[1:], start=weights[0])
    if isinstance(total, float | int) and not abs(total) > SMALLEST_SUM:
        raise UserError(
            f"weights {[float(w) for w in weights]} of tensor {ops.name} sum to {total:g}, which "
            "cannot be normalised; change them or set normalize to false"
        )
    return total


def is_zero(x: Any) -> bool:
    """Whether a coefficient is the plain number 0, not a traced scalar."""
    return isinstance(x, float | int) and x == 0


def is_one(x: Any) -> bool:
    """Whether a coefficient is the plain number 1."""
    return isinstance(x, float | int) and x == 1
