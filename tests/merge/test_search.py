"""Soups, averages of a training run, and the search over two skills."""

from __future__ import annotations

import json
from collections.abc import Callable

import jax
import numpy as np
import pytest

from agentcpm_jax.merge import soups
from agentcpm_jax.merge.kernels.trees import Tree, linear, merge_tree
from agentcpm_jax.merge.search import Point, alpha_sweep, pareto_set, soup_search, sweep
from agentcpm_jax.types import UserError


def tree(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {"embed": rng.normal(size=(5, 8)).astype("f4"), "norm": {"w": np.ones(4, "f4") * seed}}


def close(a: Tree, b: Tree, rtol: float = 1e-5) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6), a, b)


def nearness(target: Tree) -> Callable[[Tree], float]:
    """Evaluator: minus the squared distance to a model."""

    def score(params) -> float:
        gaps = jax.tree.map(lambda x, y: float(np.sum((x - y) ** 2)), params, target)
        return -sum(jax.tree.leaves(gaps))

    return score


def test_wise_ft_runs_from_the_base_to_the_tuned_model():
    base, tuned = tree(0), tree(1)
    points = dict(soups.wise_ft(base, tuned, [0.0, 0.25, 1.0]))
    close(points[0.0], base, 0)
    close(points[1.0], tuned, 0)
    close(points[0.25], jax.tree.map(lambda b, t: 0.75 * b + 0.25 * t, base, tuned))


def test_beyond_the_ends_wise_ft_extrapolates_and_unlearns():
    base, tuned = tree(0), tree(1)
    for alpha, model in soups.wise_ft(base, tuned, [1.3, -0.5]):
        close(model, jax.tree.map(lambda b, t, a=alpha: b + a * (t - b), base, tuned))


def test_an_ema_is_the_weighted_mean_of_the_past():
    models = [tree(s) for s in range(1, 6)]
    average = jax.tree.map(np.zeros_like, models[0])
    for model in models:
        average = jax.tree.map(lambda a, w: 0.9 * a + 0.1 * w, average, model)
    close(soups.ema(models), jax.tree.map(lambda a: a / (1 - 0.9**5), average))
    close(soups.ema(models[:1]), models[0], 0)


def test_warp_keeps_the_length_of_its_task_vectors():
    base, other = tree(0), tree(1)
    close(soups.warp(base, [other]), other)
    merged = soups.warp(base, [other, tree(2)])
    lengths = [np.linalg.norm(t["embed"] - base["embed"]) for t in (other, tree(2))]
    np.testing.assert_allclose(
        np.linalg.norm(merged["embed"] - base["embed"]), np.mean(lengths), rtol=1e-5
    )


def test_a_greedy_soup_takes_what_helps_best_first():
    target, rng = tree(0), np.random.default_rng(3)

    def near(size):
        return jax.tree.map(lambda x: (x + size * rng.normal(size=x.shape)).astype("f4"), target)

    trees = [near(5.0), near(0.11), near(0.1)]
    soup = soups.greedy_soup(trees, nearness(target))
    close(soup, linear(trees[1:], [1, 1]))
    assert nearness(target)(soup) > nearness(target)(trees[2]) > nearness(target)(trees[1])
    with pytest.raises(UserError, match="score of model 0 is nan"):
        soups.greedy_soup(trees, lambda _: float("nan"))
    with pytest.raises(UserError, match="0 models"):
        soups.greedy_soup([], nearness(target))


def test_a_greedy_soup_takes_a_model_on_an_equal_score():
    trees = [tree(seed) for seed in (1, 2, 3)]
    close(soups.greedy_soup(trees, lambda _: 0.5), linear(trees, [1, 1, 1]))


@pytest.mark.parametrize("method", ["task_arithmetic", "dare_ties"])
def test_a_sweep_that_reuses_task_vectors_finds_what_single_merges_find(method):
    base, trees = tree(0), [tree(1), tree(2)]
    seen = []
    grid = {"lambda": [0.0, 0.5, 1.2], "weight.0": [0.3, 0.9]}
    own = [{"weight": 1.0}, {"weight": 0.4}]
    if method == "dare_ties":
        grid["density"] = [0.5]
    result = sweep(
        method,
        trees,
        base,
        grid,
        lambda p: seen.append(p) or 0.0,
        lambda p: 1.0,
        own=own,
    )
    assert len(result.points) == len(seen) == 6
    for point, params in zip(result.points, seen, strict=True):
        c = dict(point.choice)
        mine = [{**p, **({"density": 0.5} if "density" in c else {})} for p in own]
        mine[0]["weight"] = c["weight.0"]
        close(params, merge_tree(method, trees, base, mine, {"lambda": c["lambda"]}))


def test_the_line_between_two_skills_is_the_pareto_set():
    base, tuned = tree(0), tree(1)
    alphas = [0.0, 0.5, 1.0, 2.0]
    result = alpha_sweep(base, tuned, alphas, nearness(tuned), nearness(base))
    assert [dict(p.choice)["alpha"] for p in result.pareto] == [1.0, 0.5, 0.0]
    rows = json.loads(json.dumps(result.to_dict()))["points"]
    assert [r["pareto"] for r in rows] == [True, True, True, False]


def test_pareto_set_by_hand():
    make = lambda *s: Point((("i", s[0]),), float(s[1]), float(s[2]))  # noqa: E731
    points = [make(0, 1, 5), make(1, 2, 4), make(2, 2, 3), make(3, 1, 4), make(4, 3, 0)]
    assert [p.choice[0][1] for p in pareto_set(points)] == [4, 1, 0]
    twins = [make(0, 1, 1), make(1, 1, 1), make(2, 0, 1)]
    assert [p.choice[0][1] for p in pareto_set(twins)] == [0, 1]


def test_soup_search_returns_the_points_it_looked_at():
    base, tuned = tree(0), tree(1)
    soup, result = soup_search([base, tuned], nearness(tuned), nearness(base))
    assert len(result.points) == 3
    close(soup, linear([base, tuned], [1, 1]))


def test_mistakes_in_a_search():
    base, tuned, zero = tree(0), tree(1), lambda _: 0.0
    for method, grid, message in [
        ("tie", {"lambda": [1]}, "unknown merge_method 'tie'"),
        ("ties", {"lamda": [1]}, "ties has no parameter 'lamda' to sweep; it has normalize"),
        ("ties", {"weight.1": [1]}, "no parameter 'weight.1'"),
        ("ties", {"lambda": []}, "the grid of lambda is empty"),
    ]:
        with pytest.raises(UserError, match=message):
            sweep(method, [tuned], base, grid, zero, zero, own=[{"weight": 1.0}])
    with pytest.raises(UserError, match="the grid of alpha is empty"):
        alpha_sweep(base, tuned, [], zero, zero)
    with pytest.raises(UserError, match=r"the general skill of \{'alpha': 1.0\} is inf"):
        alpha_sweep(base, tuned, [1.0], zero, lambda _: float("inf"))
