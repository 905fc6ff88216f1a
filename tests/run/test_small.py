"""The recipes of small accelerators, shrunk to the tiny model: adapters merged and exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from agentcpm_jax.files import SHIPPED
from agentcpm_jax.hf.files import read_json
from agentcpm_jax.hf.names import CONFIG, GENERATION
from agentcpm_jax.hf.tokenizer import served_chat
from agentcpm_jax.run.commandline import parse
from agentcpm_jax.run.inspect.convert import convert
from agentcpm_jax.run.observe.metrics import read_metrics
from agentcpm_jax.run.stages import run_experiment


def run(workdir: Path, config: str, *flags: str) -> list[float]:
    """Losses of the SFT stage."""
    init = "--config.stage.sft.init_from=shipped:base"
    run_experiment(parse([f"--config=configs/{config}:runlocal", init, *flags]).config, workdir)
    return [row["train/loss"] for row in read_metrics(workdir / "sft" / "metrics.jsonl")]


@pytest.mark.runs
def test_what_is_trained_stops_where_its_base_did_and_at_the_end_of_a_turn(tmp_path: Path) -> None:
    """So does what is converted from its checkpoints, when either is served."""
    base = Path(shutil.copytree(SHIPPED["shipped:base"], tmp_path / "base"))
    (base / GENERATION).write_text(json.dumps({"eos_token_id": [516, 520], "top_k": 20}))
    flags = [f"--config.{key}={base}" for key in ("stage.sft.init_from", "tokenizer")]
    run(tmp_path / "run", "sft_qwen3_4b.py", *flags, "--config.stage.sft.shape.steps=1")
    convert(tmp_path / "run/sft/checkpoints", tmp_path / "converted")
    for model in (tmp_path / "run/sft/hf", tmp_path / "converted"):
        assert read_json(model / CONFIG)["eos_token_id"] == [516, 520, 518]
        assert read_json(model / GENERATION) == {"eos_token_id": [516, 520, 518], "top_k": 20}
        assert served_chat(str(model))[1].stop_ids == (518, 516, 520)


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
