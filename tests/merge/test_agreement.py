"""What models must share to be merged: architecture in any spelling, ids of tokens, rows."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from agentcpm_jax.hf.names import embedding_names
from agentcpm_jax.merge import staging
from agentcpm_jax.merge.agreement import check_models
from agentcpm_jax.merge.kernels.methods import promoted_dtype
from agentcpm_jax.merge.recipe import parse_recipe
from agentcpm_jax.merge.streaming import MergeResult, merge_checkpoints
from agentcpm_jax.types import UserError

CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 10,
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "tie_word_embeddings": True,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
NORM = "model.norm.weight"


def write(directory: Path, seed: int, dtype: Any = np.float32, prefix="model.", **config) -> None:
    directory.mkdir()
    draw = np.random.default_rng(seed).standard_normal
    shapes = {"tokens.weight": (10, 4), "layers.0.up.weight": (6, 4), "norm.weight": (4,)}
    tensors = {f"{prefix}{name}": draw(shape).astype(dtype) for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({**CONFIG, **config}))


def tokenizer(directory: Path, **added: int) -> None:
    tokens = [{"content": token, "id": i} for token, i in added.items()]
    data = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": tokens}
    (directory / "tokenizer.json").write_text(json.dumps(data))


def merge(root: Path, out: str = "out", **keys) -> MergeResult:
    listed = [{"model": m, "parameters": {"weight": 1.0}} for m in ("x", "y")]
    data = {"merge_method": "linear", "models": listed, **keys}
    return merge_checkpoints(parse_recipe(data), root / out, [root])


@pytest.fixture
def two(tmp_path: Path) -> Path:
    write(tmp_path / "x", 0)
    write(tmp_path / "y", 1)
    return tmp_path


@pytest.mark.parametrize(
    ("first", "second", "named"),
    [
        ({"rope_theta": 1e4}, {"rope_parameters": {"rope_theta": 1e4}}, ""),
        ({"rope_theta": 1e4}, {"rope_parameters": {"rope_theta": 5e6}}, "rope_theta"),
        ({}, {"rope_theta": 5e6}, "rope_theta"),
        ({"rope_scaling": None}, {"rope_scaling": {"type": "yarn", **YARN}}, "rope_scaling"),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **YARN}},
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **YARN}},
            "",
        ),
        ({}, {"hidden_act": "gelu"}, "hidden_act"),
        ({}, {"hidden_act": "silu", "attention_bias": False}, ""),
        ({"rms_norm_eps": 1e-6}, {"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ({"scale_emb": 12}, {"scale_emb": 1}, "scale_emb"),
        ({"torch_dtype": "float16", "eos_token_id": 1}, {"torch_dtype": "float32"}, ""),
        (
            {"eos_token_id": 1, "unsloth_version": "1"},
            {"eos_token_id": 2, "unsloth_version": 2},
            "",
        ),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_settings_that_a_layer_computes_with_must_agree(first, second, named, nested):
    configs = {"x": {**CONFIG, **first}, "y": {**CONFIG, **second}}
    if nested:
        configs = {k: {"model_type": "vl", "text_config": v} for k, v in configs.items()}
    if not named:
        return check_models(configs)
    with pytest.raises(UserError, match=f"^{named} is .* in x but .* in y"):
        check_models(configs)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ({"<t>": 5}, {"<u>": 5}, "id 5 is token '<t>' in x but '<u>' in y"),
        ({"<t>": 5}, {"<t>": 6}, "token '<t>' has id 5 in x but 6 in y"),
        ({}, {"<t>": 5}, "1 tokens are not in the tokenizer of x, such as '<t>' of y"),
        ({"<t>": 10}, {}, "token '<t>' has id 10 in x, whose embedding has 10 rows"),
    ],
)
def test_no_row_stands_for_two_tokens_and_no_token_is_lost(two, x, y, message):
    tokenizer(two / "x", **x)
    tokenizer(two / "y", **y)
    with pytest.raises(UserError) as error:
        merge(two)
    assert message in str(error.value) and not (two / "out").exists()


def test_tokens_that_only_another_file_names_count(two):
    tokenizer(two / "x", **{"<t>": 5})
    tokenizer(two / "y")
    text = json.dumps({"added_tokens_decoder": {"5": {"content": "<u>"}}})
    (two / "y" / "tokenizer_config.json").write_text(text)
    with pytest.raises(UserError, match=r"id 5 is token '<t>' in x but '<u>' in y"):
        merge(two)


def test_what_a_dtype_cannot_hold_is_not_written(tmp_path):
    for seed, name in enumerate("xy"):
        write(tmp_path / name, seed, np.float16)
        tensors = load_file(tmp_path / name / "model.safetensors")
        tensors = {**tensors, NORM: np.full(4, 60_000, np.float16)}
        (tmp_path / name / "model.safetensors").unlink()
        save_file(tensors, tmp_path / name / "model.safetensors")
    parameters = {"normalize": False}
    with pytest.raises(UserError, match=f"tensor {NORM} has 4 values that float16 cannot hold"):
        merge(tmp_path, parameters=parameters)
    assert {p.name for p in tmp_path.iterdir()} == {"x", "y"}
    merge(tmp_path, parameters=parameters, out_dtype="bfloat16")


def test_what_the_dtype_of_the_arithmetic_cannot_hold_is_named_and_its_rounding_said(two):
    notes = merge(two, "half", dtype="bfloat16", out_dtype="float32").notes
    assert notes == ("3 tensors are rounded from float32 to bfloat16",)
    tensors = load_file(two / "y" / "model.safetensors")
    (two / "y" / "model.safetensors").unlink()
    save_file({**tensors, NORM: np.full(4, 3e5, np.float32)}, two / "y" / "model.safetensors")
    with pytest.raises(UserError, match=f"tensor {NORM} of y has 4 values that float16 cannot"):
        merge(two, dtype="float16")


def test_vocabularies_that_cannot_be_read_must_be_the_same_file(two):
    for name, content in (("x", b"one"), ("y", b"two")):
        (two / name / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer.model of x and of y differ"):
        merge(two)
    (two / "y" / "tokenizer.model").write_bytes(b"one")
    merge(two)


def test_two_kinds_of_halves_become_float32_and_rounding_is_said(tmp_path):
    write(tmp_path / "x", 0, np.float16)
    write(tmp_path / "y", 1, ml_dtypes.bfloat16)
    assert merge(tmp_path).notes == ()
    assert load_file(tmp_path / "out" / "model.safetensors")[NORM].dtype == np.float32
    notes = merge(tmp_path, "half", out_dtype="bfloat16").notes
    assert notes == ("3 tensors are rounded from float32 to bfloat16",)
    assert promoted_dtype(["float16", ml_dtypes.bfloat16, "float64"]) == np.float64


def test_a_nested_configuration_is_read_and_written(tmp_path):
    for seed, name in enumerate("xy"):
        write(tmp_path / name, seed, prefix="model.language_model.")
        config = {"model_type": "vl", "text_config": {**CONFIG, "dtype": "float32"}}
        config["quantization_config"] = {"quant_method": "fp8"}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    merge(tmp_path, out_dtype="bfloat16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"
    assert "quantization_config" not in config and "num_hidden_layers" not in config
    assert 'base_model:\n- "x"\n- "y"' in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("x", "y", "united"),
    [
        ({}, {}, None),
        ({"config": 3}, {"config": 3}, None),
        ({"config": 3}, {"generation": 3}, None),
        ({"generation": [3, 4]}, {"config": 4}, None),
        ({"config": 3}, {"config": 4}, [3, 4]),
        ({"generation": 3, "config": 5}, {"generation": [4, 3]}, [3, 4]),
        ({}, {"generation": [4]}, [4]),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_what_stops_a_model_stops_the_merged_one(two, x, y, united, nested):
    for name, said in (("x", x), ("y", y)):
        if "generation" in said:
            text = json.dumps({"eos_token_id": said["generation"], "top_k": 5})
            (two / name / "generation_config.json").write_text(text)
        own = {**CONFIG, **({"eos_token_id": said["config"]} if "config" in said else {})}
        config = {"model_type": "vl", "text_config": own} if nested else own
        (two / name / "config.json").write_text(json.dumps(config))
    notes = merge(two).notes
    assert any("stop" in note for note in notes) == (united is not None)
    config = json.loads((two / "out" / "config.json").read_text())
    if nested:
        config = config["text_config"]
    generation = two / "out" / "generation_config.json"
    found = json.loads(generation.read_text()) if generation.is_file() else {}
    if united is not None:
        assert config["eos_token_id"] == found["eos_token_id"] == united
    else:
        assert config.get("eos_token_id") == x.get("config")
        assert found.get("eos_token_id") == x.get("generation")
    assert found.get("top_k") == (5 if "generation" in x else None)


def test_stop_ids_move_with_their_tokens(two):
    tokenizer(two / "x", **{"<t>": 5})
    tokenizer(two / "y", **{"<u>": 5, "<t>": 6})
    for name, i in (("x", 5), ("y", 5)):
        (two / name / "config.json").write_text(json.dumps({**CONFIG, "eos_token_id": i}))
    merge(two, tokenizer={"source": "union"})
    assert json.loads((two / "out" / "config.json").read_text())["eos_token_id"] == [5, 6]


def test_embeddings_are_found_by_shape_and_place():
    class Info:
        def __init__(self, *shape: int):
            self.shape = shape

    tensors = {
        "net.words": Info(10, 4),
        "net.wpe.weight": Info(10, 4),
        "net.h.0.expand": Info(10, 4),
        "net.norm": Info(10),
        "out": Info(10, 4),
        "adapter": Info(4, 4),
    }
    assert embedding_names({"vocab_size": 10}, tensors) == ["net.words", "out"]
    assert embedding_names({"text_config": {"vocab_size": 4}}, tensors) == ["adapter"]
    assert embedding_names({}, tensors) == ["net.words", "out"]


def test_the_gradient_of_a_single_layer_is_at_its_end(two):
    merge(
        two,
        parameters={"weight": 1.0},
        models=[
            {"model": "x", "parameters": {"weight": [1.0, 0.0]}},
            {"model": "y", "parameters": {"weight": [0.0, 1.0]}},
        ],
    )
    got, x, y = (load_file(two / name / "model.safetensors") for name in ("out", "x", "y"))
    assert np.array_equal(got["model.layers.0.up.weight"], y["model.layers.0.up.weight"])
    assert np.array_equal(got[NORM], x[NORM])


def test_a_disk_without_locks_is_no_other_process(two, monkeypatch):
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(staging.fcntl, "flock", flock)
    merge(two)
    assert (two / "out" / "model.safetensors").is_file()


def test_a_result_that_cannot_be_renamed_is_kept(two, monkeypatch):
    def replace(*_: Any) -> None:
        raise OSError(errno.EBUSY, "busy")

    monkeypatch.setattr(staging.os, "replace", replace)
    with pytest.raises(UserError, match=r"is whole but cannot be renamed .* by hand"):
        merge(two)
    assert (two / ".out.partial" / "model.safetensors").is_file()


@pytest.mark.parametrize("out", ["x/merged", "x", "link/merged"])
def test_an_output_inside_an_input_is_refused(two, out):
    (two / "link").symlink_to(two / "y")
    with pytest.raises(UserError, match=r"lies inside|already exists"):
        merge(two, out)
    assert not list(two.glob("**/*.partial"))
