"""Search for a merge that keeps two skills: the agent's and the general one.

`sweep` evaluates a grid over a method's parameters; `alpha_sweep` the line between two models;
`soup_search` the prefixes of a greedy soup. Each returns every point with both scores, and which
points no other point beats on both (the Pareto set). A grid of lambdas merges once for all of them:
with M the merge at lambda 1, every point is B + lambda (M - B).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agentcpm_jax.merge.kernels.methods import METHODS, spec_of
from agentcpm_jax.merge.kernels.ops import Array
from agentcpm_jax.merge.kernels.trees import Tree, map_leaves, merge_tree
from agentcpm_jax.merge.soups import greedy_soup, wise_ft
from agentcpm_jax.types import UserError

Evaluator = Callable[[Tree], float]


@dataclass(frozen=True)
class Point:
    """One candidate: what was chosen, and its two scores (more is better)."""

    choice: tuple[tuple[str, Any], ...]
    agent: float
    general: float


@dataclass(frozen=True)
class SearchResult:
    """Every candidate in the order of trying, and those that none beats, best agent first."""

    method: str
    points: tuple[Point, ...]
    pareto: tuple[Point, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [
            {**dict(p.choice), "agent": p.agent, "general": p.general, "pareto": p in self.pareto}
            for p in self.points
        ]
        return {"method": self.method, "points": rows}


def sweep(
    method: str,
    trees: Sequence[Tree],
    base: Tree | None,
    grid: Mapping[str, Sequence[Any]],
    agent: Evaluator,
    general: Evaluator,
    own: Sequence[Mapping[str, Any]],
) -> SearchResult:
    """Every combination of the grid.

    Args:
      method: a key of `methods.METHODS`.
      trees: M nested dicts of arrays; base: the base model's, for methods that have one.
      grid: values to try, by parameter. A shared parameter by its name (`lambda`, `t`); a model's
        as `weight` for all models or `weight.0` for the first.
      agent, general: params -> score, more is better.
      own: every model's parameters that are not in the grid. Shared ones have their defaults.

    Raises:
      UserError: a parameter that the method does not have, an empty grid, scores that are not
        numbers.
    """
    spec = spec_of(method)
    for key, values in grid.items():
        name, _, place = key.partition(".")
        known = key in spec.global_params or (
            name in spec.model_params and (not place or place in map(str, range(len(trees))))
        )
        if not known:
            raise UserError(
                f"{method} has no parameter {key!r} to sweep; it has "
                f"{', '.join([*spec.global_params, *spec.model_params])}"
            )
        if not values:
            raise UserError(f"the grid of {key} is empty; list the values to try")
    found = _candidates(method, trees, base, grid, own)
    return _result(method, [_point(choice, params, agent, general) for choice, params in found])


def alpha_sweep(
    base: Tree, tuned: Tree, alphas: Sequence[float], agent: Evaluator, general: Evaluator
) -> SearchResult:
    """WiSE-FT: the line from the base (alpha 0) to the tuned model (1)."""
    if not alphas:
        raise UserError("the grid of alpha is empty; list the values to try")
    line = wise_ft(base, tuned, alphas)
    points = [_point({"alpha": alpha}, params, agent, general) for alpha, params in line]
    return _result("wise_ft", points)


def soup_search(
    trees: Sequence[Tree], agent: Evaluator, general: Evaluator
) -> tuple[Tree, SearchResult]:
    """The greedy soup by the mean of both skills; also the points it looked at."""
    points: list[Point] = []

    def both(params: Tree) -> float:
        points.append(_point({"candidate": len(points)}, params, agent, general))
        return 0.5 * points[-1].agent + 0.5 * points[-1].general

    soup = greedy_soup(trees, both)
    return soup, _result("greedy_soup", points)


def pareto_set(points: Sequence[Point]) -> tuple[Point, ...]:
    """The points that no other equals or beats on both scores and beats on one."""
    best: list[Point] = []
    for p in sorted(points, key=lambda p: (-p.agent, -p.general)):
        twin = best and (p.agent, p.general) == (best[-1].agent, best[-1].general)
        if not best or p.general > best[-1].general or twin:
            best.append(p)
    return tuple(best)


def _candidates(
    method: str,
    trees: Sequence[Tree],
    base: Tree | None,
    grid: Mapping[str, Sequence[Any]],
    own: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[dict[str, Any], Tree]]:
    """(choice, params); lambda varies fastest."""
    outer = {k: v for k, v in grid.items() if k != "lambda"}
    for values in itertools.product(*outer.values()):
        choice = dict(zip(outer, values, strict=True))
        shared = {k: v for k, v in choice.items() if k in METHODS[method].global_params}
        each = [{**p, **_of_model(choice, i, shared)} for i, p in enumerate(own)]
        if "lambda" not in grid:
            yield choice, merge_tree(method, trees, base, each, shared)
            continue
        # Every method with a lambda starts from a base and scales what it adds by lambda.
        shared["lambda"] = 1.0
        whole = merge_tree(method, trees, base, each, shared, dtype=np.float32)
        mix = map_leaves(lambda _, m, b: m - b.astype(m.dtype), [whole, base])
        del whole
        for lambda_ in grid["lambda"]:
            point = map_leaves(functools.partial(_stepped, lambda_), [base, mix])
            yield {**choice, "lambda": lambda_}, point


def _stepped(lambda_: float, name: str, b: Array, mix: Array) -> Array:
    return (b.astype(mix.dtype) + mix * mix.dtype.type(lambda_)).astype(b.dtype)


def _of_model(choice: Mapping[str, Any], i: int, shared: Mapping[str, Any]) -> dict[str, Any]:
    """What the grid's point says of model `i`: a value for all models, or one of its own."""
    mine = {k: v for k, v in choice.items() if "." not in k and k not in shared}
    numbered = {k.partition(".")[0]: v for k, v in choice.items() if k.endswith(f".{i}")}
    return {**mine, **numbered}


def _point(choice: Mapping[str, Any], params: Tree, agent: Evaluator, general: Evaluator) -> Point:
    scores = float(agent(params)), float(general(params))
    for which, score in zip(("agent", "general"), scores, strict=True):
        if not math.isfinite(score):
            raise UserError(
                f"the {which} skill of {dict(choice)} is {score}; "
                "the evaluator must return a number"
            )
    return Point(tuple(choice.items()), *scores)


def _result(method: str, points: Sequence[Point]) -> SearchResult:
    return SearchResult(method, tuple(points), pareto_set(points))
