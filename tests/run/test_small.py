"""The recipes of small accelerators, shrunk to the tiny model: adapters merged and exported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from agentcpm_jax.files import SHIPPED
from agentcpm_jax.run.commandline import parse
from agentcpm_jax.run.observe.metrics import read_metrics
from agentcpm_jax.run.stages import run_experiment


def run(workdir: Path, config: str, *flags: str) -> list[float]:
    """Losses of the SFT stage."""
    init = "--config.stage.sft.init_from=shipped:base"
    run_experiment(parse([f"--config=configs/{config}:runlocal", init, *flags]).config, workdir)
    return [row["train/loss"] for row in read_metrics(workdir / "sft" / "metrics.jsonl")]


@pytest.mark.runs
def test_adapters_are_trained_merged_and_exported(tmp_path: Path) -> None:
    losses = run(tmp_path, "lora_qwen3_4b.py", "--config.stage.sft.shape.steps=8")
    assert losses[-1] < losses[0]
    before, after = (
        load_file(path / "model.safetensors")
        for path in (SHIPPED["shipped:base"], tmp_path / "sft/hf")
    )
    adapter = load_file(tmp_path / "sft/adapter/adapter_model.safetensors")
    config = json.loads((tmp_path / "sft/adapter/adapter_config.json").read_text())
    scale, changed = config["lora_alpha"] / config["r"], 0
    for key, value in after.items():
        pair = f"base_model.model.{key.removesuffix('.weight')}.lora_"
        expected = before[key].astype(np.float32)
        if f"{pair}A.weight" in adapter:
            product = adapter[f"{pair}B.weight"] @ adapter[f"{pair}A.weight"]
            expected, changed = expected + scale * product, changed + 1
            assert np.abs(product).max() > 0
        np.testing.assert_allclose(value, expected, atol=1e-6)
    assert changed == 7 * 3  # matrices of a layer, layers
