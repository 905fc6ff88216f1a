"""What mergekit lacks: the merges that a trainer and a search are made of, on nested dicts.

    WiSE-FT / LITI  (1 - alpha) base + alpha tuned, over a range of alpha    Wortsman et al. 2022b
    uniform soup    mean_m W_m                                              Wortsman et al. 2022a
    greedy soup     add a model to the mean, best first, if the score does not fall
    EMA             ema <- decay ema + (1 - decay) W                        Polyak & Juditsky 1992
    last-k          mean of the last k checkpoints                          Izmailov et al. 2018
    WARP            B + eta (slerp_m(W_m - B)), B the EMA anchor            Rame et al. 2024
    ExPO            B + (1 + alpha) (W - B)                                 Zheng et al. 2024
    negation        B - strength (W - B)                                    Ilharco et al. 2023

All are pure functions; those without an evaluator trace, and so run inside a training step.

Deviations:
1. EMA with `debias` divides by 1 - decay^n, so that the first value is the first model, not a mix
   with the initial one.
2. WARP's spherical mean of more than two task vectors is `multislerp` (one step on the sphere from
   their mean direction) instead of slerps nested in the order of the models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agentcpm_jax.merge.kernels.methods import merge_tensors
from agentcpm_jax.merge.kernels.ops import Array, Scalar
from agentcpm_jax.merge.kernels.trees import Tree, linear, map_leaves, task_arithmetic
from agentcpm_jax.types import UserError


def wise_ft(base: Tree, tuned: Tree, alphas: Sequence[float]) -> Iterator[tuple[float, Tree]]:
    """(alpha, model) from the base (0) to the tuned model (1), made one at a time."""
    for alpha in alphas:
        yield alpha, linear([base, tuned], [1.0 - alpha, alpha])


def uniform_soup(trees: Sequence[Tree]) -> Tree:
    """The mean of the models."""
    return linear(trees, [1.0] * len(trees))


@dataclass(frozen=True)
class Soup:
    """What a greedy soup took: indices in order of adding, and the score after each."""

    ingredients: tuple[int, ...]
    scores: tuple[float, ...]


def greedy_soup(trees: Sequence[Tree], evaluate: Callable[[Tree], float]) -> tuple[Tree, Soup]:
    """Adds models, the best alone first, as long as the mean scores no worse.

    Args:
      trees: M nested dicts.
      evaluate: params -> score, more is better; called 2 M - 1 times.

    Raises:
      UserError: no models, or a score that is not a number.
    """
    if not trees:
        raise UserError("nothing to merge: 0 models; give at least one")
    alone = [_score(evaluate, tree, f"model {i}") for i, tree in enumerate(trees)]
    first, *rest = sorted(range(len(trees)), key=lambda i: -alone[i])
    taken, scores, soup = [first], [alone[first]], trees[first]
    for i in rest:
        # A running mean: only the soup so far is kept, not its ingredients.
        n = len(taken)
        larger = linear([soup, trees[i]], [n / (n + 1), 1 / (n + 1)], normalize=False)
        score = _score(evaluate, larger, f"the soup of {[*taken, i]}")
        if score >= scores[-1]:
            taken.append(i)
            scores.append(score)
            soup = larger
    return soup, Soup(tuple(taken), tuple(scores))


def ema_update(average: Tree, params: Tree, decay: Scalar) -> Tree:
    """decay * average + (1 - decay) * params, in the average's dtype (keep it in float32)."""

    def leaf(a: Array, p: Array) -> Array:
        wide = p.astype(a.dtype)
        return (a + (wide - a) * (1.0 - decay)).astype(a.dtype)

    return map_leaves(leaf, [average, params])


def ema_debiased(average: Tree, decay: float, updates: Scalar) -> Tree:
    """The average of an EMA that began at zero, after so many updates (> 0)."""
    return map_leaves(lambda a: (a / (1.0 - decay**updates)).astype(a.dtype), [average])


def last_k_average(trees: Sequence[Tree], k: int) -> Tree:
    """The mean of the last `k` checkpoints of a run, oldest first in `trees`."""
    if not 1 <= k <= len(trees):
        raise UserError(f"cannot average the last {k} of {len(trees)} checkpoints; lower k")
    return uniform_soup(trees[-k:])


def warp(anchor: Tree, trees: Sequence[Tree], eta: float = 1.0) -> Tree:
    """Spherical mean of the task vectors from the EMA anchor, then `eta` of the way to it."""
    if not trees:
        raise UserError("nothing to merge: 0 models; give at least one")
    mean = merged_tree("multislerp", trees, anchor, [{"weight": 1.0}] * len(trees))
    return linear([anchor, mean], [1.0 - eta, eta])


def extrapolated(base: Tree, tuned: Tree, alpha: float) -> Tree:
    """ExPO: past the tuned model by `alpha` times the way from the base."""
    return task_arithmetic(base, [tuned], [1.0 + alpha])


def negated(base: Tree, tuned: Tree, strength: float = 1.0) -> Tree:
    """Unlearning: from the base away from the model tuned on what is unwanted."""
    return task_arithmetic(base, [tuned], [-strength])


def merged_tree(
    method: str,
    trees: Sequence[Tree],
    base: Tree | None,
    own: Sequence[dict[str, Any]],
    shared: dict[str, Any] | None = None,
    seed: int = 0,
) -> Tree:
    """Any method of `methods.METHODS` on nested dicts of numpy or JAX arrays, leaf by leaf."""

    def leaf(name: str, *leaves: Array) -> Array:
        return merge_tensors(
            method,
            leaves if base is None else leaves[1:],
            base=None if base is None else leaves[0],
            global_params=shared,
            model_params=own,
            name=name,
            seed=seed,
        )

    return map_leaves(leaf, trees if base is None else [base, *trees], named=True)


def _score(evaluate: Callable[[Tree], float], tree: Tree, what: str) -> float:
    score = float(evaluate(tree))
    if not np.isfinite(score):
        raise UserError(f"the score of {what} is {score}; the evaluator must return a number")
    return score
