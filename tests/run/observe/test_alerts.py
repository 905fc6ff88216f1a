"""Each fault alone gives its own advice; a healthy run none; a changing one speaks once."""

from __future__ import annotations

from typing import Any

import pytest

from agentcpm_jax.run.observe.alerts import LEAST, Alerts, advise, history, topic

HEALTHY: dict[str, Any] = {
    "train/nonfinite": 0,
    "stream/dropped/zero_variance": 0,
    "stream/shipped_groups": 0,
    "reward/mean": 0.5,
    "reward/min": 0.0,
    "reward/max": 1.0,
    "reward/unknown": 0.05,
    "unknown/infra_error": 0.05,
    "advantage/positive": 0.6,
    "advantage/negative": 0.4,
    "loss/kl_behavior_k3": 0.002,
    "loss/ess": 0.95,
    "loss/clip_fraction": 0.02,
    "loss/bound_fraction": 0.01,
    "stale/age_mean": 1.5,
    "time/trainer_idle": 0.03,
    "pool/idle": 0.05,
    "memory/rss_mib": 2000.0,
    "memory/rss_slope": 0.05,
    "loop/lag_max_ms": 12.0,
} | {f"stale/dropped_decile/{k}": 0.01 for k in range(10)}


def run(steps: int = 9, **changes: Any) -> list[dict[str, Any]]:
    """Rows of a healthy run with figures replaced; a callable gets the step."""
    rows = []
    for step in range(1, steps + 1):
        row = HEALTHY | {"step": step, "stream/shipped_groups": 8 * step}
        row |= {k: v(step) if callable(v) else v for k, v in changes.items()}
        rows.append(row)
    return rows


LONG = {f"stale/dropped_decile/{k}": v for k, v in ((7, 0.1), (8, 0.25), (9, 0.5))}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train/nonfinite": lambda step: step // 2}, "non-finite steps"),
        ({"stream/dropped/zero_variance": lambda step: 20 * step}, "no gradient"),
        ({"loss/kl_behavior_k3": 0.2}, "mismatch KL high"),
        ({"loss/ess": 0.1}, "few tokens carry the step"),
        ({"loss/bound_fraction": 0.6}, "tokens lost to bound"),
        (LONG, "stale drops concentrate in long trajectories"),
        ({"time/trainer_idle": 0.6}, "pool-bound"),
        ({"pool/idle": 0.6}, "trainer-bound"),
        ({"pool/idle": 0.6, "time/trainer_idle": 0.6}, "tool-bound"),
        ({"memory/rss_slope": 5.0}, "RSS grows"),
        ({"loop/lag_max_ms": 900.0}, "event loop lags"),
        ({"reward/unknown": 0.5, "unknown/non_finite_reward": 0.5}, "no verdict"),
        ({"reward/unknown": 0.5, "unknown/engine_error": 0.4, "unknown/x": 0.1}, "no verdict"),
        ({"advantage/positive": 0.0, "reward/min": -1.0, "reward/max": 0.0}, "only blame"),
        ({"advantage/negative": 0.0, "reward/min": 1.0, "reward/max": 2.0}, "only credit"),
        ({"advantage/negative": 0.0, "reward/min": 0.0, "reward/max": 1.0}, ""),  # raw scores
        ({"advantage/positive": 0.0, "advantage/negative": 0.0}, "no gradient"),
        ({}, ""),
    ],
)
def test_each_fault_has_its_own_line(changes: dict[str, Any], expected: str) -> None:
    line = advise(run(**changes))
    assert topic(line) == expected
    assert "\n" not in line and len(line) < 200


def test_the_worthless_comes_before_the_slow() -> None:
    line = advise(
        run(**{"time/trainer_idle": 0.9, "stream/dropped/zero_variance": lambda s: 20 * s})
    )
    assert topic(line) == "no gradient"


def test_the_fix_depends_on_the_figures() -> None:
    def equal(step: int) -> int:
        return 20 * step

    easy = advise(run(**{"stream/dropped/zero_variance": equal, "reward/mean": 0.97}))
    hard = advise(run(**{"stream/dropped/zero_variance": equal, "reward/mean": 0.02}))
    assert "too easy" in easy and "too hard" in hard
    fresh = advise(run(**{"loss/kl_behavior_k3": 0.2, "stale/age_mean": 0.0}))
    assert "engine and trainer disagree" in fresh
    assert "max_staleness" in advise(run(**{"loss/kl_behavior_k3": 0.2}))


def test_rewards_of_another_scale_are_said_at_the_second_step() -> None:
    """They do not depend on the clock, and a short run should not end before it hears of them."""
    scale = {"advantage/positive": 0.0, "reward/min": -1.0, "reward/max": 0.0}
    assert advise(run(1, **scale)) == ""
    line = advise(run(2, **scale))
    assert "rewards from -1 to 0" in line and "advantages.right_above" in line
    nan = advise(run(2, **{"reward/unknown": 0.5, "unknown/non_finite_reward": 0.5}))
    assert "50% of the attempts" in nan and "NaN" in nan
    equal = {"advantage/positive": 0.0, "advantage/negative": 0.0}
    constant = equal | {"reward/min": 0.5, "reward/max": 0.5}
    assert advise(run(2, **constant)) == ""  # two batches without luck are no advice
    assert "every reward is 0.5" in advise(run(5, **constant))


def test_stale_drops_alike_for_all_lengths_are_no_bias() -> None:
    assert advise(run(**{f"stale/dropped_decile/{k}": 0.3 for k in range(10)})) == ""


def test_one_bad_step_missing_figures_and_short_runs_say_nothing() -> None:
    once = run(**{"time/trainer_idle": lambda step: 0.99 if step == 1 else 0.02})
    assert advise(once) == ""
    assert advise([{"step": n} for n in range(1, 9)]) == ""
    assert advise([row | {"pool/idle": None, "loss/ess": None} for row in run()]) == ""
    assert advise(run(LEAST - 1, **{"loss/ess": 0.0})) == ""


def test_taking_turns_by_design_is_no_fault() -> None:
    rows = run(**{"time/trainer_idle": 0.6, "memory/rss_slope": 5.0})
    assert topic(advise(rows)) == "pool-bound"
    assert topic(advise(rows, lockstep=True)) == "RSS grows"


def test_counters_that_restart_with_the_process_do_not_go_backwards() -> None:
    rows = run(**{"stream/dropped/zero_variance": lambda step: 900 if step < 5 else 2})
    assert advise(rows) == ""


def test_a_line_is_said_once_per_change() -> None:
    said: list[str] = []
    alerts = Alerts(said.append)
    bad = {"time/trainer_idle": lambda step: 0.5 + step / 100}
    rows = [*run(12), *run(12, **bad), *run(12), *run(12, **bad)]
    for n, row in enumerate(rows, 1):
        alerts.observe(row | {"step": n, "stream/shipped_groups": 8 * n})
    assert [topic(line.partition(": ")[2]) for line in said] == ["pool-bound", "pool-bound"]
    assert said[0].startswith("step 17: ")  # five of the nine rows are bad


def test_a_resumed_run_does_not_repeat_what_it_said() -> None:
    rows, said = run(20, **{"pool/idle": 0.9}), []
    alerts = Alerts(said.append, rows[:10])
    for row in rows[10:]:
        alerts.observe(row)
    assert said == []


def test_history_joins_stretches() -> None:
    bad = {"pool/idle": 0.9}
    rows = [r | {"step": n} for n, r in enumerate([*run(12), *run(12, **bad), *run(12)], 1)]
    ((first, last, line),) = history(rows)
    assert (first, last) == (17, 28) and topic(line) == "trainer-bound"
    assert history(run(30)) == []
