"""Ages of a batch, and who was lost to staleness: from the log, by length."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.run.inspect.opened import open_run
from agentcpm_jax.run.observe.metrics import read_metrics
from agentcpm_jax.run.observe.staleness import (
    age_metrics,
    drop_metrics,
    length_deciles,
    stale_drops,
)
from agentcpm_jax.types import (
    Credit,
    Provenance,
    Segment,
    ShippedSegment,
    StopReason,
    Task,
    Trajectory,
)
from tests.run.recorded_run import finished


def shipped(version: int, kept: bool = True) -> ShippedSegment:
    segment = Segment(
        np.arange(3, dtype=np.int32),
        np.array([Provenance.TEMPLATE, Provenance.SAMPLED, Provenance.SAMPLED], np.uint8),
        np.array([np.nan, -1, -1], np.float32),
        np.array([-1, version, version + 1], np.int32),
    )
    return ShippedSegment(1, 0, 0, segment, Credit(np.ones(3, np.float32), np.full(3, kept)))


def test_shares_of_ages_are_of_what_is_trained() -> None:
    batch = [shipped(5), shipped(5), shipped(4), shipped(2), shipped(0, kept=False)]
    assert age_metrics(batch, 5) == {
        "stale/age_mean": 1.0,
        "stale/age_max": 3.0,
        "stale/age_share/0": 0.5,
        "stale/age_share/1": 0.25,
        "stale/age_share/3": 0.25,
    }
    assert age_metrics([shipped(0, kept=False)], 5) == {}


def test_deciles_are_equal_parts_by_length() -> None:
    samples = [(length, length > 90) for length in range(1, 101)]
    tenths = length_deciles(samples[::-1])
    assert [len(t) for t in tenths] == [10] * 10
    assert [t[0][0] for t in tenths] == list(range(1, 101, 10))
    found = drop_metrics(samples)
    assert found["stale/dropped"] == 0.1 and found["stale/dropped_decile/9"] == 1.0
    assert all(found[f"stale/dropped_decile/{k}"] == 0.0 for k in range(9))
    assert sum(map(len, length_deciles(samples[:23]))) == 23
    assert drop_metrics(samples[:9]) == {"stale/dropped": 0.0} and drop_metrics([]) == {}


def test_only_staleness_counts_as_lost_to_it(tmp_path: Path) -> None:
    with ExperienceLog.open(tmp_path / "log.db") as log:
        for number, (state, reason) in enumerate(
            [("dropped", "over_age"), ("dropped", "zero_variance"), ("ready", "")]
        ):
            issue_id = log.issue("rl", "train", Task(f"q{number}", ("a",)), 0, number)
            attempts = (0, 1) if number == 0 else (0,)
            for attempt in attempts:  # the last attempt is the one that counts
                log.record_trajectory(
                    Trajectory((), (), StopReason.ANSWERED, issue_id, 0, attempt, seconds=attempt)
                )
            log.finish_group(issue_id, state, reason)
        assert stale_drops(log, "rl") == [(0, True)]
        assert stale_drops(log, "other") == []


def test_a_run_reports_them_at_every_step() -> None:
    with open_run(finished()) as run:
        samples = stale_drops(run.log, "rl", recent=None)
    # Sample 3 of each of five groups lost a segment, and a group of two was lost whole.
    assert len(samples) == 22 and sum(lost for _, lost in samples) == 7
    rows = read_metrics(finished() / "rl" / "metrics.jsonl")
    # All batches were recorded before the first step, as when a run resumes far back: a step shows
    # what was shipped up to it.
    assert [row["stale/dropped"] for row in rows] == [3 / 6, 4 / 10, 5 / 14, 6 / 18]
    assert [row["stale/age_max"] for row in rows] == [0, 1, 1, 1]
    assert "stale/dropped_decile/9" not in rows[0]
    longest = [row["stale/dropped_decile/9"] for row in rows[1:]]
    assert longest[0] > rows[1]["stale/dropped_decile/0"] or longest[0] == 1.0
    for row in rows:
        assert 0 <= row["time/trainer_idle"] <= 1 and row["memory/rss_mib"] > 50
