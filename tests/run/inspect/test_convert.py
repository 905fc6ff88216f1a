"""Checkpoints become Hugging Face directories and come back bit for bit, card and all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import safetensors.numpy

from agentcpm_jax import tree
from agentcpm_jax.checkpoint import Checkpointer
from agentcpm_jax.config import ExperimentConfig, SFTStage, Stage, to_json
from agentcpm_jax.files import SHIPPED
from agentcpm_jax.hf.load import load_hf
from agentcpm_jax.hf.save import save_hf
from agentcpm_jax.hf.tokenizer import load_tokenizer
from agentcpm_jax.model import lora
from agentcpm_jax.model.config import TINY
from agentcpm_jax.model.params import init
from agentcpm_jax.run.commandline import CHECKOUT
from agentcpm_jax.run.inspect.convert import convert
from agentcpm_jax.train.step import TrainState
from agentcpm_jax.types import UserError

sys.path.insert(0, str(CHECKOUT / "launch"))
import convert as launch_convert

MODEL = dataclasses.replace(
    TINY, vocab_size=640, width=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, ffw=24
)
TOKENIZER = SHIPPED["shipped:base"]


def bits(params) -> dict[str, bytes]:
    return {path: np.asarray(leaf).tobytes() for path, leaf in tree.flatten(params).items()}


def run_with_checkpoint(workdir: Path, model=MODEL):
    """(what was trained, the directory of checkpoints) of a stage `agent` after step 7."""
    params = init(jax.random.key(0), MODEL)
    trained = lora.init_adapters(jax.random.key(1), model) if model.lora_rank else params
    stage = Stage("agent", SFTStage(), "org/base-model")
    cfg = ExperimentConfig(model=model, stages=(stage,), tokenizer=str(TOKENIZER))
    checkpoints = Checkpointer(workdir / "agent" / "checkpoints")
    state = TrainState.create(trained, optax.adam(1e-3))
    checkpoints.save(7, state=state, config=to_json(cfg))
    checkpoints.close()
    (workdir / "agent" / "metrics.jsonl").write_text('{"step": 7, "train/loss": 0.125}\n')
    return trained, checkpoints.directory


def test_a_checkpoint_becomes_a_model_and_comes_back(tmp_path: Path, capsys) -> None:
    params, checkpoints = run_with_checkpoint(tmp_path / "run")
    assert launch_convert.main([str(checkpoints), str(tmp_path / "hf")]) == 0
    assert "step 7" in capsys.readouterr().out
    loaded, model = load_hf(tmp_path / "hf")
    assert bits(loaded) == bits(params) and model.width == MODEL.width
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (TOKENIZER / name).is_file():
            assert (tmp_path / "hf" / name).read_bytes() == (TOKENIZER / name).read_bytes()

    card = (tmp_path / "hf" / "README.md").read_text()
    weights = hashlib.sha256((tmp_path / "hf" / "model.safetensors").read_bytes()).hexdigest()
    assert f"| this | model.safetensors | `{weights}` |" in card
    assert "| train/loss | 0.125 |" in card and '"width": 16' in card
    lineage = json.loads((tmp_path / "hf" / "lineage.json").read_text())
    assert lineage["weights"] == {"model.safetensors": weights}

    convert(tmp_path / "hf", tmp_path / "orbax")
    convert(tmp_path / "orbax" / "0", tmp_path / "again")
    assert bits(load_hf(tmp_path / "again")[0]) == bits(params)
    tokenizer = (tmp_path / "again" / "tokenizer.json").read_bytes()
    assert tokenizer == (TOKENIZER / "tokenizer.json").read_bytes()
    assert weights in (tmp_path / "again" / "README.md").read_text(), "its origin is forgotten"


def test_a_copy_names_its_original_and_a_stage_what_it_began_with(tmp_path: Path) -> None:
    save_hf(tmp_path / "hf", init(jax.random.key(0), MODEL), MODEL)
    convert(tmp_path / "hf", tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back")
    card = (tmp_path / "back" / "README.md").read_text()
    assert f'base_model:\n- "{tmp_path / "hf"}"\ntags' in card
    _, checkpoints = run_with_checkpoint(tmp_path / "run")
    convert(checkpoints, tmp_path / "stage")
    card = (tmp_path / "stage" / "README.md").read_text()
    assert 'base_model:\n- "org/base-model"\ntags' in card


def test_a_stage_that_trained_turns_stops_where_they_end(tmp_path: Path) -> None:
    _, checkpoints = run_with_checkpoint(tmp_path / "run")
    convert(checkpoints, tmp_path / "out")
    end = load_tokenizer(TOKENIZER).token_to_id("<|im_end|>")
    for name in ("config.json", "generation_config.json"):
        stops = json.loads((tmp_path / "out" / name).read_text())["eos_token_id"]
        assert end in (stops if isinstance(stops, list) else [stops])


@pytest.mark.parametrize("back", [False, True])
def test_a_tokenizer_with_more_tokens_than_rows_is_refused(tmp_path: Path, back: bool) -> None:
    small = dataclasses.replace(MODEL, vocab_size=32)
    save_hf(tmp_path / "hf", init(jax.random.key(0), small), small)
    source = tmp_path / "hf"
    if back:
        convert(source, tmp_path / "orbax")
        source = tmp_path / "orbax"
    with pytest.raises(UserError, match=r"has id \d+ in .*, but the model has 32 rows"):
        convert(source, tmp_path / "out", tokenizer=str(TOKENIZER))
    assert not list(tmp_path.glob("*out*"))


def test_a_damaged_model_is_named_and_a_failed_conversion_leaves_nothing(tmp_path, monkeypatch):
    save_hf(tmp_path / "hf", init(jax.random.key(0), MODEL), MODEL)
    weights = tmp_path / "hf" / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-2] + b"\xff\x7f")
    with pytest.raises(UserError, match=r"has 1 values that are not finite"):
        convert(tmp_path / "hf", tmp_path / "orbax")
    weights.write_bytes(good)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("agentcpm_jax.run.inspect.convert.copy_companions", full)
    with pytest.raises(UserError, match=r"orbax cannot be written: .*No space left"):
        convert(tmp_path / "hf", tmp_path / "orbax")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_adapters_become_a_directory_for_peft(tmp_path: Path) -> None:
    """Layout and keys as PEFT 0.17 writes them for a Qwen3 model, read by hand."""
    model = dataclasses.replace(MODEL, lora_rank=4, lora_alpha=8.0)
    adapters, checkpoints = run_with_checkpoint(tmp_path, model)
    with pytest.raises(UserError, match="adapters are written as float32, not bfloat16"):
        convert(checkpoints, tmp_path / "adapter", dtype="bfloat16")
    convert(checkpoints, tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= names
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    assert (config["r"], config["lora_alpha"], config["bias"]) == (4, 8.0, "none")
    assert config["base_model_name_or_path"] == "org/base-model"
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert sorted(config["target_modules"]) == sorted(modules)
    stored = safetensors.numpy.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    inputs = dict.fromkeys(modules, 16) | {"down_proj": 24}
    outputs = {"q_proj": 16, "k_proj": 8, "v_proj": 8, "gate_proj": 24, "up_proj": 24}
    expected = {}
    for layer in range(2):
        for module in modules:
            part = "self_attn" if module[0] in "qkvo" else "mlp"
            key = f"base_model.model.model.layers.{layer}.{part}.{module}"
            expected[f"{key}.lora_A.weight"] = (4, inputs[module])
            expected[f"{key}.lora_B.weight"] = (outputs.get(module, 16), 4)
    assert {key: value.shape for key, value in stored.items()} == expected
    q = np.asarray(adapters["attn"]["q"]["a"])[1]  # [inputs, r]
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    np.testing.assert_array_equal(stored[key], q.T)


def test_what_is_neither_a_model_nor_checkpoints_is_named(tmp_path: Path, capsys) -> None:
    assert launch_convert.main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert f"error: {tmp_path} is neither" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"stages": []}')  # a run's
    with pytest.raises(UserError, match="is neither"):
        convert(tmp_path, tmp_path / "out")
    save_hf(tmp_path / "hf", init(jax.random.key(0), MODEL), MODEL)
    convert(tmp_path / "hf", tmp_path / "orbax")
    with pytest.raises(UserError, match="has no step 3; it has 0"):
        convert(tmp_path / "orbax", tmp_path / "out", step=3)
    with pytest.raises(UserError, match="orbax already exists; choose another"):
        convert(tmp_path / "hf", tmp_path / "orbax")
