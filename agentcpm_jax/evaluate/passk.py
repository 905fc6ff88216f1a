"""pass@k and its uncertainty.

    pass@k = 1 - C(n - c, k) / C(n, k)     some of k attempts is right    Chen et al. 2021, eq. 1
    pass^k = C(c, k) / C(n, k)             all of k attempts are right
    mean@k = c / n                         share of right attempts, where n >= k

for a task with n graded attempts of which c are right: each is the unbiased estimate from the
attempts at hand, and NaN where n < k. Attempts without a verdict are not counted in n: a
mean over fewer tasks than were asked is said to be one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

Metric = Callable[[int, int, int], float]


@dataclass(frozen=True)
class TaskScore:
    """n graded attempts at one task, c of them right; `unknown` more have no verdict.

    `lost` of the unknown failed outside the policy (an outage) and can be asked again.
    """

    uid: str
    n: int
    c: int
    kind: str = "qa"
    unknown: int = 0
    lost: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.c <= self.n:
            raise ValueError(f"task {self.uid}: {self.c} of {self.n} right")


@dataclass(frozen=True)
class Estimate:
    """A mean over `tasks` of the `asked` tasks with its 95 % interval; NaN where there is none.

    `asked` is 0 where nobody says how many there were.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    tasks: int = 0
    asked: int = field(default=0, compare=False)


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


def per_task(scores: Sequence[TaskScore]) -> dict[str, float]:
    """Task uid -> mean@1; NaN where the task has no graded attempt."""
    out = {s.uid: mean_at_k(s.n, s.c, 1) for s in scores}
    if len(out) != len(scores):
        raise ValueError("a task uid occurs twice among the scores")
    return out


def estimate(scores: Sequence[TaskScore], k: int = 1, metric: Metric = pass_at_k) -> Estimate:
    """Mean of the metric over the tasks with n >= k: the estimate's `tasks`, of `asked` in all.

    Tasks with one attempt each are independent draws that are right or wrong, so their interval is
    the exact binomial one; otherwise attempts at one task resemble each other, and tasks are
    resampled whole.
    """
    graded = [s for s in scores if s.n >= k]
    if graded and all(s.n == 1 for s in graded):
        found = clopper_pearson(sum(s.c for s in graded), len(graded))
    else:
        found = bootstrap_mean(np.array([metric(s.n, s.c, k) for s in graded], np.float64))
    return replace(found, asked=len(scores))


def by_kind(scores: Sequence[TaskScore]) -> dict[str, list[TaskScore]]:
    """The scores of each kind of task, kinds in alphabetical order."""
    kinds = sorted({s.kind for s in scores})
    return {kind: [s for s in scores if s.kind == kind] for kind in kinds}


def paired_difference(a: Mapping[str, float], b: Mapping[str, float]) -> Estimate:
    """Mean of a - b over the tasks that have both values, with its bootstrap interval.

    Args:
      a, b: task uid -> value, as from `per_task`.

    Raises:
      ValueError: the two do not hold the same tasks.
    """
    if a.keys() != b.keys():
        raise ValueError(f"unpaired: {len(a.keys() ^ b.keys())} tasks are only in one of the two")
    values = np.array([a[uid] - b[uid] for uid in sorted(a)], np.float64)
    return replace(bootstrap_mean(values[~np.isnan(values)]), asked=len(values))


def bootstrap_mean(values: np.ndarray) -> Estimate:
    """Mean of `values` f64[P], one per task, with its percentile bootstrap interval (Efron 1979).

    The resampling has a fixed seed. The interval has no width when all values are equal.
    """
    from scipy.stats import bootstrap  # takes a second to import: episodes need not wait for it

    n = len(values)
    if n < 2:
        value = float(values[0]) if n else math.nan
        return Estimate(value, value, value, n)
    interval = bootstrap(
        (values,),
        np.mean,
        n_resamples=10_000,
        batch=max(1, 1_000_000 // n),  # bounds the memory of the index table
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(math.fsum(values) / n, float(interval.low), float(interval.high), n)


def clopper_pearson(c: int, n: int) -> Estimate:
    """The share c of n with its exact binomial interval (1934); from 0 to 1 when n is 0."""
    from scipy.stats import binomtest

    _check(n, c, 1)
    if n == 0:
        return Estimate(math.nan, 0.0, 1.0)
    interval = binomtest(c, n).proportion_ci(0.95, "exact")
    return Estimate(c / n, float(interval.low), float(interval.high), n)


def _check(n: int, c: int, k: int) -> None:
    if not 0 <= c <= n or k < 1:
        raise ValueError(f"n = {n}, c = {c}, k = {k}: need 0 <= c <= n and k >= 1")
