from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentcpm_jax.evaluate.passk import (
    Estimate,
    TaskScore,
    bootstrap_mean,
    by_kind,
    clopper_pearson,
    estimate,
    mean_at_k,
    paired_difference,
    pass_at_k,
    pass_hat_k,
    per_task,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "score"


def cases(name: str) -> list[dict]:
    return json.loads((GOLDEN / f"{name}.json").read_text())["cases"]


def assert_is(value: float, fraction: str):
    if fraction == "NaN":
        assert math.isnan(value)
    else:
        assert value == pytest.approx(float(Fraction(fraction)), abs=1e-12)


@pytest.mark.parametrize("case", cases("pass_at_k"), ids=lambda c: f"{c['n']}-{c['c']}-{c['k']}")
def test_pass_at_k_oracle(case):
    n, c, k = case["n"], case["c"], case["k"]
    assert_is(pass_at_k(n, c, k), case["pass_at_k"])
    assert_is(pass_hat_k(n, c, k), case["pass_hat_k"])


@pytest.mark.parametrize("case", cases("pass_at_k_task_sets"), ids=lambda c: c["name"])
def test_task_set_oracle(case):
    scores = [TaskScore(str(i), len(r), sum(r)) for i, r in enumerate(case["runs"])]
    for key, want in case["expected"].items():
        if key.startswith("pass@"):
            got = estimate(scores, int(key[5:]))
            assert_is(got.value, want["mean_over_those"])
            assert got.tasks == want["tasks_with_value"]
    assert_is(estimate(scores, 1, mean_at_k).value, case["expected"]["avg_over_tasks"])


@pytest.mark.parametrize("case", cases("intervals"), ids=lambda c: f"{c['c']}-{c['n']}")
def test_interval_oracle(case):
    c, n = case["c"], case["n"]
    got = clopper_pearson(c, n)
    assert (got.low, got.high) == pytest.approx(case["clopper_pearson95"], abs=1e-12)
    assert (got.value, got.tasks) == (c / n, n)


def test_intervals_of_nothing():
    nothing = clopper_pearson(0, 0)
    assert (nothing.low, nothing.high, nothing.tasks) == (0.0, 1.0, 0)
    assert math.isnan(nothing.value) and math.isnan(bootstrap_mean(np.array([])).low)
    assert bootstrap_mean(np.array([0.25])) == Estimate(0.25, 0.25, 0.25, 1)


def test_one_attempt_per_task_gets_the_exact_interval_and_several_the_bootstrap():
    once = [TaskScore(str(i), 1, int(i < 7)) for i in range(10)]
    assert estimate(once, 1, mean_at_k) == estimate(once, 1, pass_hat_k) == clopper_pearson(7, 10)
    perfect = [TaskScore(str(i), 1, 1) for i in range(10)]
    assert estimate(perfect).low == pytest.approx(0.025 ** (1 / 10))
    twice = [TaskScore(str(i), 2, 2 * int(i < 7)) for i in range(10)]
    assert estimate(twice, 1, mean_at_k) == bootstrap_mean(np.array([1.0] * 7 + [0.0] * 3))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=8), st.integers(1, 8))
def test_is_the_mean_over_all_subsets(runs, k):
    n, c = len(runs), sum(runs)
    subsets = list(itertools.combinations(runs, k))
    if not subsets:
        assert math.isnan(pass_at_k(n, c, k)) and math.isnan(pass_hat_k(n, c, k))
        return
    assert pass_at_k(n, c, k) == pytest.approx(np.mean([any(s) for s in subsets]))
    assert pass_hat_k(n, c, k) == pytest.approx(np.mean([all(s) for s in subsets]))
    assert mean_at_k(n, c, k) == pytest.approx(np.mean(subsets))


@pytest.mark.parametrize(("n", "c", "k"), [(2, 3, 1), (2, -1, 1), (2, 1, 0)])
def test_impossible_counts_raise(n, c, k):
    with pytest.raises(ValueError, match=f"n = {n}, c = {c}, k = {k}"):
        pass_at_k(n, c, k)
    if k == 1:
        with pytest.raises(ValueError, match="right"):
            TaskScore("t", n, c)


def test_bootstrap_covers_the_truth_at_its_level_and_repeats():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        e = bootstrap_mean(rng.binomial(4, 0.3, 60) / 4)
        hits += e.low <= 0.3 <= e.high
    assert 0.89 <= hits / 200 <= 0.99
    values = rng.random(50)
    assert bootstrap_mean(values) == bootstrap_mean(values.copy())
    normal = 1.96 * values.std() / 50**0.5
    got = bootstrap_mean(values)
    assert (got.high - got.low) / 2 == pytest.approx(normal, rel=0.05)


def test_paired_difference_removes_the_difficulty_of_tasks():
    rng = np.random.default_rng(0)
    hard = rng.random(300)
    a = {f"t{i}": h + 0.05 + rng.normal(0, 0.02) for i, h in enumerate(hard)}
    b = {f"t{i}": h for i, h in reversed(list(enumerate(hard)))}  # order is of no matter
    paired = paired_difference(a, b)
    assert paired.tasks == 300
    assert 0.045 < paired.low < paired.value < paired.high < 0.055
    back = paired_difference(b, a)
    assert back.value == pytest.approx(-paired.value)
    b["t0"] = math.nan
    assert paired_difference(a, b).tasks == 299
    del b["t1"]
    with pytest.raises(ValueError, match="1 tasks are only in one"):
        paired_difference(a, b)


def test_breakdown_by_kind():
    scores = [
        TaskScore("a", 4, 4, "hop1"),
        TaskScore("b", 4, 0, "hop2"),
        TaskScore("c", 2, 2, "hop2", unknown=2),
    ]
    assert list(by_kind(scores)) == ["hop1", "hop2"]
    values = {k: estimate(v, 1).value for k, v in by_kind(scores).items()}
    assert values == {"hop1": 1.0, "hop2": 0.5}
    assert estimate(by_kind(scores)["hop2"], 4).tasks == 1
    assert math.isnan(estimate([], 1).value) and estimate([], 1).tasks == 0
    assert per_task(scores) == {"a": 1.0, "b": 0.0, "c": 1.0}
    with pytest.raises(ValueError, match="twice"):
        per_task([scores[0], scores[0]])
