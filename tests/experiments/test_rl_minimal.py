"""The loop with `max_staleness=0` computes what the algorithm on one screen computes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from agentcpm_jax.config import from_config_dict
from agentcpm_jax.run.observe.metrics import read_metrics
from agentcpm_jax.run.stages import run_experiment
from configs import tiny

STEPS = 3


@pytest.mark.runs
def test_a_synchronous_run_has_the_losses_of_the_minimal_loop(tmp_path: Path) -> None:
    config = tiny.get_config()
    config.stage.rl.stream.max_staleness = 0
    config.stage.rl.shape.steps = STEPS
    cfg = from_config_dict(config)
    run_experiment(cfg, tmp_path / "run")
    losses = [row["train/loss"] for row in read_metrics(tmp_path / "run/rl/metrics.jsonl")]
    rl = cfg.stages[0].rl
    assert rl is not None
    assert list(minimal().train(cfg, rl, "shipped:sft")) == losses
    assert len(losses) == STEPS and len(set(losses)) == STEPS, "nothing was learned"


def minimal():
    path = Path(__file__).parents[2] / "experiments/rl_minimal.py"
    spec = importlib.util.spec_from_file_location("rl_minimal", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
