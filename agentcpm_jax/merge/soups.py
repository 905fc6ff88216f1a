"""Models averaged into one, and the line between two of them; on nested dicts, see `trees`.

    WiSE-FT      (1 - alpha) base + alpha tuned, over a range of alpha     Wortsman et al. 2022b
    greedy soup  add a model to the mean, best first, if the score does not fall
                                                                           Wortsman et al. 2022a
    EMA          mean <- decay mean + (1 - decay) W, oldest first          Polyak & Juditsky 1992
    WARP         base + the spherical mean of W_m - base                   Rame et al. 2024

WiSE-FT with an alpha above 1 is ExPO (Zheng et al. 2024), with a negative one it is negation
(Ilharco et al. 2023). WARP's last step, a share eta of the way from the base to this mean, is
WiSE-FT again.

Deviations:
1. The EMA is divided by 1 - decay^M, so that the models' weights sum to one and it needs no
   initial value.
2. WARP's spherical mean is `multislerp` with equal weights: one step on the sphere from the mean
   direction, as long as the task vectors are on average, instead of nested slerps, which depend on
   the order of the models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from agentcpm_jax.merge.kernels.trees import Tree, linear, merge_tree
from agentcpm_jax.types import UserError

#: Between checkpoints, not steps: the newest of many weighs a tenth. Our own choice.
EMA_DECAY = 0.9


def wise_ft(base: Tree, tuned: Tree, alphas: Sequence[float]) -> Iterator[tuple[float, Tree]]:
    """(alpha, model) from the base (0) to the tuned model (1), made one at a time."""
    for alpha in alphas:
        yield alpha, linear([base, tuned], [1.0 - alpha, alpha])


def greedy_soup(trees: Sequence[Tree], evaluate: Callable[[Tree], float]) -> Tree:
    """The mean of models added, the best alone first, as long as it scores no worse.

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
    taken, best, soup = [first], alone[first], trees[first]
    for i in rest:
        # A running mean: only the soup so far is kept, not its ingredients.
        larger = linear([soup, trees[i]], [len(taken), 1])
        score = _score(evaluate, larger, f"the soup of {[*taken, i]}")
        if score >= best:
            taken, best, soup = [*taken, i], score, larger
    return soup


def ema(trees: Sequence[Tree]) -> Tree:
    """The exponential moving average of models, oldest first."""
    return linear(trees, [EMA_DECAY**age for age in reversed(range(len(trees)))])


def warp(base: Tree, trees: Sequence[Tree]) -> Tree:
    """The base moved by the spherical mean of the models' task vectors."""
    return merge_tree("multislerp", trees, base, [{"weight": 1.0}] * len(trees))


def _score(evaluate: Callable[[Tree], float], tree: Tree, what: str) -> float:
    score = float(evaluate(tree))
    if not np.isfinite(score):
        raise UserError(f"the score of {what} is {score}; the evaluator must return a number")
    return score
