"""A traced run leaves a page whose times add up; the losses of a run with adapters fall."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from agentcpm_jax.config import (
    Demonstrations,
    ExperimentConfig,
    SFTStage,
    TrainShape,
    default_config,
    from_config_dict,
    stage_dict,
)
from agentcpm_jax.files import SHIPPED
from agentcpm_jax.hf.load import load_hf
from agentcpm_jax.run.observe.metrics import read_metrics
from agentcpm_jax.run.observe.profile import Operation, phases, read_trace
from agentcpm_jax.run.stages import run_experiment
from agentcpm_jax.train.config import OptimizerConfig
from agentcpm_jax.types import UserError
from configs.tiny import use_tiny_world
from tests.hf.naive_tensors import naive_tensors


def sft(init_from: str, **shape) -> ExperimentConfig:
    """A small SFT stage on the offline world."""
    c = default_config()
    use_tiny_world(c)
    c.stages = ("sft",)
    c.stage.sft = stage_dict(
        "sft",
        init_from,
        demonstrations=Demonstrations(count=8),
        shape=TrainShape(row_length=256, rows=2, checkpoint_every=100, **shape),
        optimizer=OptimizerConfig(lr=1e-2, schedule="constant"),
    )
    return from_config_dict(c)


def events(*rows: tuple[str, float, float]) -> list[dict]:
    meta = {"ph": "M", "pid": 1, "tid": 7, "name": "thread_name", "args": {"name": "XLA Ops"}}
    ops = [
        {"ph": "X", "pid": 1, "tid": 7, "name": name, "ts": start, "dur": long}
        for name, start, long in rows
    ]
    other = {"ph": "X", "pid": 1, "tid": 8, "name": "python", "ts": 0.0, "dur": 1e9}
    on_cpu = {**other, "tid": 9, "name": "dot.1", "dur": 3.0, "args": {"hlo_op": "dot.1"}}
    return [meta, *ops, other, on_cpu]


def test_operations_are_counted_with_the_time_of_their_own(tmp_path: Path) -> None:
    rows = ("while", 0.0, 100.0), ("dot.1", 10.0, 30.0), ("exp", 40.0, 50.0), ("dot.1", 120.0, 5.0)
    path = tmp_path / "a.trace.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events(*rows)}, file)
    found = read_trace(path)
    expected = [("exp", 1, 50e-6), ("dot.1", 3, 38e-6), ("while", 1, 20e-6)]
    assert [op[:2] for op in found] == [row[:2] for row in expected]
    np.testing.assert_allclose([op.seconds for op in found], [row[2] for row in expected])
    assert isinstance(found[0], Operation)


def test_phases_last_until_the_next_begins() -> None:
    began = [(0.0, 3, "read"), (1.0, 3, "step"), (4.0, 4, "read"), (6.0, 4, "step"), (7.0, -1, "")]
    assert phases(began) == {"read": 3.0, "step": 4.0}


@pytest.mark.runs
def test_a_profiled_run_with_adapters(tmp_path: Path) -> None:
    """Its page adds up; what it exports is the base with the adapters added, and says so."""
    cfg = sft("shipped:base", steps=6)
    cfg = replace(cfg, profile=True, model=replace(cfg.model, lora_rank=2, lora_alpha=4.0))
    lines: list[str] = []
    run_experiment(cfg, tmp_path, announce=lines.append)
    page = tmp_path / "sft" / "profile" / "summary.md"
    assert f"profile of 3 steps: {page}" in lines
    text = page.read_text()
    step = float(re.search(r"\| a step \| ([\d.]+) ms", text)[1])
    split = dict(re.findall(r"\| (\w[\w ]+) \| ([\d.]+) \| [\d.]+% \|", text))
    assert sum(map(float, split.values())) == pytest.approx(step, abs=0.1)
    ops = re.findall(r"\| `([^`]+)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+)% \|", text)
    assert len(ops) == 15 and [float(op[2]) for op in ops] == sorted(
        (float(op[2]) for op in ops), reverse=True
    )
    roofline = float(re.search(r"fraction of the roofline \| ([\d.]+)%", text)[1])
    assert 0 < roofline < 150  # the ceiling was measured at another moment than the step

    losses = [row["train/loss"] for row in read_metrics(tmp_path / "sft" / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    base = naive_tensors(*load_hf(SHIPPED["shipped:base"]))
    merged = naive_tensors(*load_hf(tmp_path / "sft" / "hf"))
    stored = safetensors.numpy.load_file(tmp_path / "sft/adapter/adapter_model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    a, b = (stored[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    assert np.abs(b).max() > 0
    np.testing.assert_allclose(
        merged[f"{name}.weight"], base[f"{name}.weight"] + 2.0 * b @ a, atol=1e-5
    )
    np.testing.assert_array_equal(
        merged["model.embed_tokens.weight"], base["model.embed_tokens.weight"]
    )
    for exported in ("hf", "adapter"):
        card = (tmp_path / "sft" / exported / "README.md").read_text()
        assert "made from shipped:base | model.safetensors | `" in card
        assert f"| train/loss | {losses[-1]} |" in card


def test_a_loss_that_is_no_number_is_noticed_before_the_next_checkpoint(tmp_path: Path) -> None:
    """Also where losses are logged rarely: it is the step that is named, not the one that logs."""
    shutil.copytree(SHIPPED["shipped:base"], tmp_path / "nan")
    file = tmp_path / "nan" / "model.safetensors"
    tensors = dict(naive_tensors(*load_hf(tmp_path / "nan")))
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.nan
    safetensors.numpy.save_file(tensors, file)
    cfg = sft(str(tmp_path / "nan"), steps=9, log_every=4)
    assert isinstance(cfg.stages[0].sft, SFTStage)
    with pytest.raises(UserError, match=r"sft: the loss of step 1 is nan; the batch is in"):
        run_experiment(cfg, tmp_path / "run")
    with np.load(tmp_path / "run" / "sft" / "nonfinite-step-1.npz") as found:
        assert found["tokens"].shape == (2, 256) and found["loss_mask"].any()
    left = tmp_path / "run" / "sft" / "checkpoints"
    assert not left.exists() or not any(left.iterdir())
