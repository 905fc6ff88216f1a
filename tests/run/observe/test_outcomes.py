"""The figures of a batch are those of its groups, whatever else was sampled meanwhile."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.log.schema import ShipEntry
from agentcpm_jax.run.observe.outcomes import outcome_metrics
from agentcpm_jax.types import (
    Credit,
    Provenance,
    Segment,
    StopReason,
    Task,
    Trajectory,
    Verdict,
)


def ended(
    issue: int, sample: int, attempt: int, reward: float | None, stop=StopReason.ANSWERED
) -> Trajectory:
    sampled = np.array([Provenance.TEMPLATE, Provenance.SAMPLED, Provenance.SAMPLED], np.uint8)
    segment = Segment(
        np.array([1, 2, 3], np.int32),
        sampled,
        np.array([np.nan, -1, -1], np.float32),
        np.array([-1, 0, 0], np.int32),
    )
    known = reward is not None and math.isfinite(reward)
    verdict = Verdict.UNKNOWN if not known else Verdict.RIGHT if reward else Verdict.WRONG
    trajectory = Trajectory((segment,), (), stop, issue_id=issue, sample=sample, attempt=attempt)
    return replace(trajectory, verdict=verdict, reward=reward)


def credit(advantage: float) -> Credit:
    keep = np.array([False, True, True])
    return Credit(np.where(keep, advantage, 0).astype(np.float32), keep)


@pytest.fixture
def log(tmp_path: Path):
    with ExperienceLog.open(tmp_path / "e.db") as log:
        yield log


def test_all_samples_of_the_groups_count_and_no_others(log: ExperienceLog) -> None:
    one = log.issue("rl", "train", Task("a", ("x",), kind="hop1"), 0, 0)
    two = log.issue("rl", "train", Task("b", ("x",), kind="hop2"), 0, 1)
    other = log.issue("rl", "train", Task("c", ("x",), kind="hop2"), 0, 2)
    nan, unknown = float("nan"), StopReason.ENGINE_ERROR
    for trajectory in (
        ended(one, 0, 0, 1.0),
        ended(one, 1, 0, 0.0),
        ended(one, 2, 0, None, unknown),  # was tried again
        ended(one, 2, 1, 0.0, StopReason.MAX_TURNS),  # muted: it counts, and is not trained
        ended(two, 0, 0, nan),
        ended(two, 0, 1, -1.0),
        ended(two, 1, 0, 0.5),
        ended(other, 0, 0, 1.0),  # ended meanwhile
    ):
        log.record_trajectory(trajectory)
    for issue in (one, two, other):
        log.finish_group(issue, "ready", "", ())
    entries = [
        ShipEntry(one, 0, 0, credit(2.0)),
        ShipEntry(one, 1, 0, credit(-1.0)),
        ShipEntry(two, 0, 0, credit(-1.0)),
        ShipEntry(two, 1, 0, credit(0.0)),
    ]
    log.ship("rl", 0, entries)
    found = outcome_metrics(log, log.shipped("rl", 0))
    assert found == {
        "reward/mean": pytest.approx(0.1),
        "reward/std": pytest.approx(np.std([1.0, 0.0, 0.0, -1.0, 0.5])),
        "reward/min": -1.0,
        "reward/max": 1.0,
        "reward/unknown": pytest.approx(2 / 7),
        "reward/hop1": pytest.approx(1 / 3),
        "reward/hop2": pytest.approx(-0.25),
        "unknown/engine_error": pytest.approx(1 / 7),
        "unknown/non_finite_reward": pytest.approx(1 / 7),
        "episode/samples": 5.0,
        "episode/turns": 0.0,
        "episode/tokens": 3.0,
        "episode/flagged_turns": 0.0,
        "stop/answered": pytest.approx(0.8),
        "stop/max_turns": pytest.approx(0.2),
        "advantage/positive": pytest.approx(0.25),
        "advantage/negative": pytest.approx(0.5),
    }
    assert outcome_metrics(log, []) == {}
