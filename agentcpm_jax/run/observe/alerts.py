"""One line of advice from recent metrics: what is wrong, by which figure, what to change.

A pure function of the last rows of `metrics.jsonl`. Figures are medians over the window, so that a
compilation or one slow batch has no effect. Rules are tried in the order of `RULES`, from problems
that make a step worthless to those that make it slow; the first that applies gives the advice.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from agentcpm_jax.run.start.resume import COMPUTES, is_listed

Row = Mapping[str, Any]
WINDOW = 9  # rows considered; odd: five bad ones outvote four good ones
LEAST = 5  # with fewer rows there is no advice: a first step, which compiles, never decides
SOON = 2  # rows for the rules about rewards, which do not depend on the clock


@dataclass(frozen=True)
class Thresholds:
    """Limits beyond which a figure is wrong. Shares are from 0 to 1."""

    unknown: float = 0.3  # attempts without a verdict, each of which is made again
    # Half of all groups without signal doubles the cost of a step; beyond, the tasks are at fault.
    equal_rewards: float = 0.6
    # k3 estimate, nats per token. Same weights: 1e-6 (fp32) to 1e-3 (bf16 engines); a step or two
    # of staleness: a few 1e-3. Above, many importance weights leave the clip band.
    mismatch: float = 0.05
    effective: float = 0.3  # effective sample size of the importance weights
    masked: float = 0.3  # trained tokens whose gradient a clip or mask removed
    stale_long: float = 0.1  # stale drops among the longest three tenths ...
    stale_contrast: float = 3.0  # ... and this many times those of the shorter half
    idle: float = 0.25  # of the trainer, or of the pool
    # MiB per step, and share of the resident memory per step: exceeding both takes more than a
    # small leak of a huge process, or the noise of a small one.
    rss_slope: float = 1.0
    rss_share: float = 2e-4
    lag_ms: float = 250.0  # worst oversleep in a step; a turn's own work takes 5 ms


def advise(
    rows: Sequence[Row], *, lockstep: bool = False, thresholds: Thresholds | None = None
) -> str:
    """The advice after the last of `rows`; empty when nothing is wrong or little is known.

    Args:
      rows: as in `metrics.jsonl`, oldest first; the last `WINDOW` count.
      lockstep: trainer and rollouts take turns by design (deterministic mode, or eta = 0): idle
        times are no fault.
      thresholds: None for the defaults.
    """
    window = list(rows)[-WINDOW:]
    limits = thresholds or Thresholds()
    for rule in RULES:
        least = SOON if rule in (_unknown, _one_sided) else LEAST
        if len(window) < least or (rule is _idle and lockstep):
            continue
        if line := rule(window, limits):
            return line
    return ""


class Alerts:
    """Says a line when the advice changes, and only then."""

    def __init__(
        self, say: Callable[[str], None], rows: Sequence[Row] = (), *, lockstep: bool = False
    ) -> None:
        """`rows`: the metrics of earlier steps, when a run is resumed."""
        self._say, self._lockstep = say, lockstep
        self._rows: deque[Row] = deque(rows, maxlen=WINDOW)
        self._topic = topic(advise(self._rows, lockstep=lockstep))

    def observe(self, row: Row) -> None:
        """Takes the metrics of one more step."""
        self._rows.append(row)
        line = advise(self._rows, lockstep=self._lockstep)
        if line and topic(line) != self._topic:
            self._say(f"step {row.get('step', '?')}: {line}{_elsewhere(line)}")
        self._topic = topic(line)


def history(rows: Sequence[Row], *, lockstep: bool = False) -> list[tuple[int, int, str]]:
    """(first step, last step, advice) of every stretch of a run with the same advice."""
    found: list[tuple[int, int, str]] = []
    for n, row in enumerate(rows):
        line = advise(rows[max(0, n + 1 - WINDOW) : n + 1], lockstep=lockstep)
        if not line:
            continue
        step = int(row["step"])
        if found and topic(found[-1][2]) == topic(line) and found[-1][1] == rows[n - 1]["step"]:
            found[-1] = (found[-1][0], step, line)
        else:
            found.append((step, step, line))
    return found


def topic(line: str) -> str:
    """The topic of an advice: its words before the colon, which do not depend on figures."""
    return line.partition(":")[0]


def _elsewhere(line: str) -> str:
    """Of the keys in an advice, those that a run keeps to its end."""
    keys = re.findall(r"\b(?:optimizer|stream)\.\w+", line)
    pinned = [key for key in keys if is_listed(f"rl.{key}", COMPUTES)]
    return f" (another --workdir may change {' and '.join(pinned)})" if pinned else ""


# ---- the rules


def _not_finite(rows: Sequence[Row], limits: Thresholds) -> str:
    skipped = _grown(rows, "train/nonfinite")
    if not skipped:
        return ""
    return (
        f"non-finite steps: {skipped:.0f} of the last {len(rows)} changed nothing; lower "
        "optimizer.lr or set a gradient clip"
    )


def _unknown(rows: Sequence[Row], limits: Thresholds) -> str:
    share = _median(rows, "reward/unknown")
    if share is None or share <= limits.unknown:
        return ""
    sums: Counter[str] = Counter()
    for row in rows:
        sums.update({k.partition("/")[2]: row[k] or 0 for k in row if k.startswith("unknown/")})
    ((reason, _),) = sums.most_common(1) or [("unknown_verdict", 0)]
    fix = UNKNOWN_FIXES.get(reason, "look at the grader or the judge")
    return f"no verdict: {share:.0%} of the attempts are made again, most for {reason}; {fix}"


def _one_sided(rows: Sequence[Row], limits: Thresholds) -> str:
    found = [row for row in rows if row.get("advantage/positive") is not None]
    if len(found) < SOON:
        return ""
    credit = any(row["advantage/positive"] for row in found)
    blame = any(row["advantage/negative"] for row in found)
    low = min((v for row in found if (v := row.get("reward/min")) is not None), default=0.0)
    high = max((v for row in found if (v := row.get("reward/max")) is not None), default=0.0)
    span = f"rewards from {low:g} to {high:g}"
    if blame and not credit:
        return (
            f"only blame: no token of the last {len(found)} steps got credit ({span}); a right "
            "sample's reward has to exceed advantages.right_above (0.5 unless set)"
        )
    if credit and not blame and low > 0.5:
        return (
            f"only credit: no token of the last {len(found)} steps was blamed ({span}); a wrong "
            "sample's reward must not exceed advantages.right_above (0.5 unless set)"
        )
    if blame or credit or len(found) < LEAST:
        return ""
    if low == high:
        why = f"every reward is {low:g}: does the grader tell right from wrong?"
    else:
        why = f"{span}: compare them with advantages.right_above and denoise.min_spread"
    return f"no gradient: no token of the last {len(found)} steps has an advantage; {why}"


def _equal_rewards(rows: Sequence[Row], limits: Thresholds) -> str:
    equal = _grown(rows, "stream/dropped/zero_variance")
    shipped = _grown(rows, "stream/shipped_groups")
    if not equal or equal < limits.equal_rewards * (equal + shipped):
        return ""
    share = f"{equal:.0f} of {equal + shipped:.0f} groups have equal rewards"
    reward = _median(rows, "reward/mean")
    if reward is None:
        fix = "change the difficulty of the tasks"
    else:
        fix = f"mean reward {reward:.2f}: the tasks are too {'easy' if reward > 0.5 else 'hard'}"
    return (
        f"no gradient: most groups have equal rewards ({share}; {fix}, or raise stream.group_size)"
    )


def _mismatch(rows: Sequence[Row], limits: Thresholds) -> str:
    kl = _median(rows, "loss/kl_behavior_k3")
    if kl is None or kl <= limits.mismatch:
        return ""
    age = _median(rows, "stale/age_mean") or 0.0
    if age < 0.5:
        fix = "the samples are fresh, so engine and trainer disagree: compare their log-probs"
    else:
        fix = f"mean age {age:.1f}: lower optimizer.lr or stream.max_staleness"
    return f"mismatch KL high: {kl:.3f} nats per token to the sampling policy; {fix}"


def _effective(rows: Sequence[Row], limits: Thresholds) -> str:
    ess = _median(rows, "loss/ess")
    if ess is None or ess >= limits.effective:
        return ""
    return (
        f"few tokens carry the step: effective sample size {ess:.0%}; lower stream.max_staleness "
        "or optimizer.lr, or cap the importance weights"
    )


def _masked(rows: Sequence[Row], limits: Thresholds) -> str:
    shares = {n: _median(rows, f"loss/{n}") for n in MASKS}
    name, share = max(((n, v or 0.0) for n, v in shares.items()), key=lambda pair: pair[1])
    if share <= limits.masked:
        return ""
    return (
        f"tokens lost to {name.removesuffix('_fraction')}: {share:.0%} of those trained; lower "
        "optimizer.lr or stream.max_staleness, or widen the band"
    )


def _stale_long(rows: Sequence[Row], limits: Thresholds) -> str:
    deciles = [_median(rows, f"stale/dropped_decile/{k}") for k in range(10)]
    rates = [d for d in deciles if d is not None]
    if len(rates) < 10:
        return ""
    long, short = sum(rates[7:]) / 3, sum(rates[:5]) / 5
    if long < limits.stale_long or long < limits.stale_contrast * short:
        return ""
    return (
        f"stale drops concentrate in long trajectories: {long:.0%} of the longest 30 % are lost, "
        f"{short:.0%} of the shorter half; raise stream.max_staleness or lower "
        "stream.max_concurrent_groups"
    )


def _idle(rows: Sequence[Row], limits: Thresholds) -> str:
    trainer, pool = _median(rows, "time/trainer_idle"), _median(rows, "pool/idle")
    if trainer is None or pool is None:
        return ""
    figures = f"trainer idle {trainer:.0%}, pool idle {pool:.0%}"
    if trainer > limits.idle and pool > limits.idle:
        return f"tool-bound: {figures}; both wait for tools: raise stream.max_concurrent_groups"
    if trainer > limits.idle:
        return f"pool-bound: {figures}; raise stream.max_staleness (eta) or add rollout workers"
    if pool > limits.idle:
        return f"trainer-bound: {figures}; rollouts wait for admission: fewer workers would do"
    return ""


def _memory(rows: Sequence[Row], limits: Thresholds) -> str:
    slope, rss = _median(rows, "memory/rss_slope"), _median(rows, "memory/rss_mib")
    if slope is None or rss is None:
        return ""
    if slope <= max(limits.rss_slope, limits.rss_share * rss):
        return ""
    return (
        f"RSS grows: {slope:.1f} MiB per step from {rss:,.0f} MiB; a restart resumes exactly, "
        "a custom tool or reward is the first suspect"
    )


def _lag(rows: Sequence[Row], limits: Thresholds) -> str:
    lag = _median(rows, "loop/lag_max_ms")
    if lag is None or lag <= limits.lag_ms:
        return ""
    return (
        f"event loop lags: {lag:.0f} ms at worst; something blocks it: move a tool's or reward's "
        "own work to a thread, or add rollout workers"
    )


UNKNOWN_FIXES = {
    "non_finite_reward": "the grader returns NaN or infinity: return None where it cannot tell",
    "engine_error": "the engine fails: pool/trouble_* says how",
    "infra_error": "tools or their servers fail: `launch/inspect_run.py why` has their messages",
}
MASKS = ("clip_fraction", "bound_fraction", "mask_fraction")
RULES: tuple[Callable[[Sequence[Row], Thresholds], str], ...] = (
    _not_finite,
    _unknown,
    _one_sided,
    _equal_rewards,
    _mismatch,
    _effective,
    _masked,
    _stale_long,
    _idle,
    _memory,
    _lag,
)


def _median(rows: Sequence[Row], name: str) -> float | None:
    """Median over the rows that have the figure; None when fewer than half do."""
    found = [row[name] for row in rows if row.get(name) is not None]
    return median(found) if 2 * len(found) >= len(rows) else None


def _grown(rows: Sequence[Row], name: str) -> float:
    """The increase of a counter over the rows; after a restart it counts from 0."""
    values = [row.get(name) or 0.0 for row in rows]
    return sum(b - a if b >= a else b for a, b in pairwise(values))
