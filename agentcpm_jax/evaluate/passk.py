"""pass@k and its uncertainty.

    pass@k = 1 - C(n - c, k) / C(n, k)     some of k attempts is right    Chen et al. 2021, eq. 1
    pass^k = C(c, k) / C(n, k)             all of k attempts are right
    mean@k = c / n                         share of right attempts, where n >= k

for a task with n graded attempts of which c are right: each is the unbiased estimate from the
attempts at hand, and NaN where n < k. Attempts without a verdict are not counted in n.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from scipy.special import betaincinv

Metric = Callable[[int, int, int], float]


@dataclass(frozen=True)
class TaskScore:
    """n graded attempts at one task, c of them right; `unknown` more had no verdict."""

    uid: str
    n: int
    c: int
    kind: str = "qa"
    unknown: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.c <= self.n:
            raise ValueError(f"task {self.uid}: {self.c} of {self.n} right")


@dataclass(frozen=True)
class Estimate:
    """A mean over `tasks` tasks with its interval; NaN where there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan
    tasks: int = 0


@dataclass(frozen=True)
class Aggregate:
    """A metric over a task set.

    `headline` is NaN unless every task has n >= k. `conditional` is the mean over the
    `with_value` tasks (of `tasks`) that have; print it with that denominator.
    """

    headline: float
    conditional: float
    with_value: int
    tasks: int


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that some of k attempts is right; NaN when n < k."""
    _check(n, c, k)
    if n < k:
        return math.nan
    every = math.comb(n, k)
    return (every - math.comb(n - c, k)) / every  # exact integers, rounded once


def pass_hat_k(n: int, c: int, k: int) -> float:
    """pass^k: probability that all of k attempts are right; NaN when n < k."""
    _check(n, c, k)
    return math.nan if n < k else math.comb(c, k) / math.comb(n, k)


def mean_at_k(n: int, c: int, k: int) -> float:
    """Expected share of right attempts among k; NaN when n < k."""
    _check(n, c, k)
    return math.nan if n < k else c / n


def per_task(
    scores: Sequence[TaskScore], k: int = 1, metric: Metric = mean_at_k
) -> dict[str, float]:
    """Task uid -> the metric; NaN where the task has fewer than k graded attempts."""
    out = {s.uid: metric(s.n, s.c, k) for s in scores}
    if len(out) != len(scores):
        raise ValueError("a task uid occurs twice among the scores")
    return out


def aggregate(scores: Sequence[TaskScore], k: int = 1, metric: Metric = pass_at_k) -> Aggregate:
    """The metric over a task set, by the headline rule and conditionally."""
    values = [metric(s.n, s.c, k) for s in scores]
    known = [v for v in values if not math.isnan(v)]
    mean = math.fsum(known) / len(known) if known else math.nan
    return Aggregate(
        headline=mean if len(known) == len(values) else math.nan,
        conditional=mean,
        with_value=len(known),
        tasks=len(values),
    )


def estimate(
    scores: Sequence[TaskScore], k: int = 1, metric: Metric = pass_at_k, seed: int = 0
) -> Estimate:
    """The conditional mean with its 95 % bootstrap interval; `tasks` is its denominator."""
    values = np.array([metric(s.n, s.c, k) for s in scores], np.float64)
    return bootstrap_mean(values[~np.isnan(values)], seed)


def by_kind(scores: Sequence[TaskScore]) -> dict[str, list[TaskScore]]:
    """The scores of each kind of task, kinds in alphabetical order."""
    kinds = sorted({s.kind for s in scores})
    return {kind: [s for s in scores if s.kind == kind] for kind in kinds}


def paired_difference(
    a: Mapping[str, float],
    b: Mapping[str, float],
    seed: int = 0,
    level: float = 0.95,
    resamples: int = 10_000,
) -> Estimate:
    """Mean of a - b over the tasks that have both values, with its bootstrap interval.

    Args:
      a, b: task uid -> value, as from `per_task`.
      seed, level, resamples: as `bootstrap_mean`.

    Raises:
      ValueError: the two do not hold the same tasks.
    """
    if a.keys() != b.keys():
        raise ValueError(f"unpaired: {len(a.keys() ^ b.keys())} tasks are only in one of the two")
    values = np.array([a[uid] - b[uid] for uid in sorted(a)], np.float64)
    return bootstrap_mean(values[~np.isnan(values)], seed, level, resamples)


def bootstrap_mean(
    values: np.ndarray, seed: int = 0, level: float = 0.95, resamples: int = 10_000
) -> Estimate:
    """Mean with its percentile bootstrap interval over tasks (Efron 1979).

    Args:
      values: f64[P], one per task, no NaN.
      seed: of the resampling; the same seed gives the same interval.
      level: coverage of the interval.
      resamples: bootstrap replicates.

    The interval has no width when all values are equal: give Wilson's then.
    """
    n = len(values)
    if n == 0:
        return Estimate(math.nan)
    rng = np.random.default_rng(seed)
    rows = max(1, 1_000_000 // n)  # bounds the memory of the index table
    means = np.concatenate(
        [
            values[rng.integers(0, n, (min(rows, resamples - i), n))].mean(axis=1)
            for i in range(0, resamples, rows)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(math.fsum(values) / n, float(low), float(high), n)


def wilson(c: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (1927) for c of n; (0, 1) when n is 0."""
    _check(n, c, 1)
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + level) / 2)
    p = c / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low = 0.0 if c == 0 else centre - half
    high = 1.0 if c == n else centre + half
    return low, high


def clopper_pearson(c: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The exact binomial interval (1934) for c of n; (0, 1) when n is 0."""
    _check(n, c, 1)
    tail = (1 - level) / 2
    low = 0.0 if c == 0 else float(betaincinv(c, n - c + 1, tail))
    high = 1.0 if c == n else float(betaincinv(c + 1, n - c, 1 - tail))
    return low, high


def _check(n: int, c: int, k: int) -> None:
    if not 0 <= c <= n or k < 1:
        raise ValueError(f"n = {n}, c = {c}, k = {k}: need 0 <= c <= n and k >= 1")
