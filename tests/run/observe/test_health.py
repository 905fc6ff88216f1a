"""A loss that is no number; what the report says of staleness, advice: from a run's own files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from agentcpm_jax.data.batch import Batch
from agentcpm_jax.run.inspect.opened import open_run
from agentcpm_jax.run.observe.health import (
    advice_table,
    is_lockstep,
    staleness_chart,
    staleness_headline,
    stop_if_not_finite,
)
from agentcpm_jax.run.observe.metrics import read_metrics
from agentcpm_jax.run.observe.summary import write_summary
from agentcpm_jax.types import UserError
from tests.run.recorded_run import CFG, STEPS, finished


def test_headline_and_chart_count_the_samples_of_the_log() -> None:
    with open_run(finished()) as run:
        ctx, (stage, _) = run.context(), run.stage()
        (headline,) = staleness_headline(ctx, stage)
        (chart,) = staleness_chart(ctx, stage)
    assert headline.value == "31.8%" and "22 samples" in headline.detail
    (shares,) = chart.series.values()
    assert len(chart.categories) == len(shares) == 10
    assert sum(round(s.value * s.tasks) for s in shares) == 7
    assert all(s.low <= s.value <= s.high for s in shares)


def test_advice_is_told_with_its_steps(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished(), tmp_path / "run"))
    metrics = copy / "rl" / "metrics.jsonl"
    last = read_metrics(metrics)[-1]
    rows = [last | {"step": n, "loss/kl_behavior_k3": 0.3 * (n > 10)} for n in range(1, 21)]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open_run(copy) as run:
        (table,) = advice_table(run.context(), run.stage()[0])
    assert table.rows[-1][0] == "15 to 20" and "mismatch KL high" in str(table.rows[-1][1])


def test_the_report_of_a_run_has_the_new_panels(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished(), tmp_path / "run"))
    with open_run(copy) as run:
        text = write_summary(run.context(), lambda line: None).read_text()
    for title in (
        "rl: samples lost to staleness",
        "rl: share lost to staleness, by tenths of length (tokens)",
        "Idle share of trainer and pool",
        "Age of shipped segments (shares)",
        "Effective sample size (share)",
        "Clipped and masked tokens (shares)",
        "Resident memory (MiB)",
    ):
        assert title in text, title
    assert "<b>run</b>" not in text


def test_turn_taking_is_known_from_the_configuration() -> None:
    assert is_lockstep(CFG.stages[0]), "eta = 0"
    assert len(read_metrics(finished() / "rl" / "metrics.jsonl")) == STEPS


def test_the_batch_is_dumped_and_its_issues_are_named(tmp_path: Path) -> None:
    batch = Batch.empty(2, 4).replace(tokens=np.arange(8, dtype=np.int32).reshape(2, 4))
    stop_if_not_finite({"train/loss": 1.0}, batch, tmp_path, "rl", 3, (7,))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"rl: the loss of step 3 is nan; .* of issues 7, 12 is in"):
        stop_if_not_finite({"train/loss": np.nan}, batch, tmp_path, "rl", 3, (12, 7, 12))
    found = np.load(tmp_path / "nonfinite-step-3.npz")
    np.testing.assert_array_equal(found["tokens"], batch.tokens)
    assert "loss_mask" in found and "proximal_logprobs" not in found
