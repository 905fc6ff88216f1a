"""Search for a merge that keeps two skills: the agent's and the general one.

`sweep` evaluates a grid over a method's parameters; `alpha_sweep` the line between two models;
`soup_search` the prefixes of a greedy soup. Each returns every point with both scores, and which
points no other point beats on both (the Pareto set). Task arithmetic over a grid of one lambda
reuses the task vectors: B + lambda * MIX costs one multiplication and addition per point, as long
as the models and the MIX fit in memory, which a search needs anyway.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agentcpm_jax.merge.kernels.methods import METHODS
from agentcpm_jax.merge.kernels.ops import Array
from agentcpm_jax.merge.kernels.trees import Tree, linear, map_leaves
from agentcpm_jax.merge.soups import greedy_soup, merged_tree
from agentcpm_jax.types import UserError

Evaluator = Callable[[Tree], float]
#: Methods whose result is base + lambda * (something without lambda).
SCALED_BY_LAMBDA = frozenset(name for name, m in METHODS.items() if "lambda" in m.global_params)


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

    def best_agent(self, keep: float) -> Point:
        """The best agent among points with a general skill of at least `keep`.

        Raises:
          UserError: there is none.
        """
        able = [p for p in self.points if p.general >= keep]
        if not able:
            best = max(p.general for p in self.points)
            raise UserError(
                f"no candidate keeps a general skill of {keep:g}: the best has {best:g}; lower "
                "the bound or widen the grid"
            )
        return max(able, key=lambda p: (p.agent, p.general))


def sweep(
    method: str,
    trees: Sequence[Tree],
    base: Tree | None,
    grid: Mapping[str, Sequence[Any]],
    agent: Evaluator,
    general: Evaluator,
    shared: Mapping[str, Any] | None = None,
    own: Sequence[Mapping[str, Any]] | None = None,
    seed: int = 0,
) -> SearchResult:
    """Every combination of the grid.

    Args:
      method: a key of `methods.METHODS`.
      trees: M nested dicts of arrays; base: the base model's, for methods that have one.
      grid: values to try, by parameter. A shared parameter by its name (`lambda`, `t`); a model's
        as `weight` for all models or `weight.0` for the first.
      agent, general: params -> score, more is better.
      shared, own: the parameters that are not in the grid.
      seed: of the randomness; the same for every point.

    Raises:
      UserError: a parameter that the method does not have, an empty grid, scores that are not
        numbers.
    """
    spec = METHODS.get(method)
    if spec is None:
        raise UserError(f"unknown merge_method {method!r}; use one of {', '.join(METHODS)}")
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
    own = own or [{}] * len(trees)
    points = []
    for choice, params in _candidates(method, trees, base, grid, shared or {}, own, seed):
        points.append(_point(choice, params, agent, general))
    return _result(method, points)


def alpha_sweep(
    base: Tree, tuned: Tree, alphas: Sequence[float], agent: Evaluator, general: Evaluator
) -> SearchResult:
    """The line from the base (alpha 0) to the tuned model (1), as WiSE-FT draws it."""
    if not alphas:
        raise UserError("the grid of alpha is empty; list the values to try")
    points = [
        _point({"alpha": a}, linear([base, tuned], [1.0 - a, a]), agent, general) for a in alphas
    ]
    return _result("wise_ft", points)


def soup_search(
    trees: Sequence[Tree], agent: Evaluator, general: Evaluator, share: float = 0.5
) -> tuple[Tree, SearchResult]:
    """Greedy soup by share * agent + (1 - share) * general; also the points it looked at."""
    points: list[Point] = []

    def both(params: Tree) -> float:
        points.append(_point({"candidate": len(points)}, params, agent, general))
        return share * points[-1].agent + (1.0 - share) * points[-1].general

    soup, _ = greedy_soup(trees, both)
    return soup, _result("greedy_soup", points)


def pareto_set(points: Sequence[Point]) -> tuple[Point, ...]:
    """The points that no other equals or beats on both scores and beats on one."""
    best: list[Point] = []
    for p in sorted(points, key=lambda p: (-p.agent, -p.general)):
        if not best or p.general > best[-1].general or _same(p, best[-1]):
            best.append(p)
    return tuple(best)


def _candidates(
    method: str,
    trees: Sequence[Tree],
    base: Tree | None,
    grid: Mapping[str, Sequence[Any]],
    shared: Mapping[str, Any],
    own: Sequence[Mapping[str, Any]],
    seed: int,
) -> Iterator[tuple[dict[str, Any], Tree]]:
    """(choice, params); lambda varies fastest and costs one multiplication and addition."""
    reuse = base is not None and method in SCALED_BY_LAMBDA and "lambda" in grid
    outer = {k: v for k, v in grid.items() if not (reuse and k == "lambda")}
    for values in itertools.product(*outer.values()):
        choice = dict(zip(outer, values, strict=True))
        common = {
            **shared,
            **{k: v for k, v in choice.items() if k in METHODS[method].global_params},
        }
        each = [{**p, **_of_model(choice, i, common)} for i, p in enumerate(own)]
        if not reuse:
            yield choice, merged_tree(method, trees, base, each, common, seed)
            continue
        wide = [_widened(t) for t in (base, *trees)]
        whole = merged_tree(method, wide[1:], wide[0], each, {**common, "lambda": 1.0}, seed)
        mix = map_leaves(lambda m, b: m - b, [whole, wide[0]])
        del wide, whole
        for lambda_ in grid["lambda"]:
            yield {**choice, "lambda": lambda_}, map_leaves(_stepped(lambda_), [base, mix])


def _stepped(lambda_: float) -> Callable[[Array, Array], Array]:
    def leaf(b: Array, m: Array) -> Array:
        if lambda_ == 0:
            return b
        return (b.astype(m.dtype) + m * m.dtype.type(lambda_)).astype(b.dtype)

    return leaf


def _widened(tree: Tree) -> Tree:
    return map_leaves(lambda x: x.astype(np.result_type(x.dtype, np.float32)), [tree])


def _of_model(choice: Mapping[str, Any], i: int, common: Mapping[str, Any]) -> dict[str, Any]:
    mine = {k: v for k, v in choice.items() if "." not in k and k not in common}
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


def _same(a: Point, b: Point) -> bool:
    return dataclasses.astuple(a)[1:] == dataclasses.astuple(b)[1:]
