"""Where inputs come from: directories, the Hub cache, adapters, training checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from agentcpm_jax.checkpoint import Checkpointer
from agentcpm_jax.hf.locate import locate
from agentcpm_jax.hf.save import save_hf
from agentcpm_jax.merge.adapters import AdaptedCheckpoint
from agentcpm_jax.merge.recipe import parse_recipe
from agentcpm_jax.merge.streaming import merge_checkpoints
from agentcpm_jax.merge.trained import TrainingStep, is_training_step
from agentcpm_jax.model import params
from agentcpm_jax.model.config import ModelConfig
from agentcpm_jax.types import UserError

MODEL = ModelConfig(vocab_size=32, width=16, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=8)
QUERY = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """org/name with commits abc1234 (main) and def5678 (v1)."""
    repository = tmp_path / "hub" / "models--org--name"
    for commit, ref in [("abc1234" + "0" * 33, "main"), ("def5678" + "0" * 33, "v1")]:
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    return repository / "snapshots"


def test_names_are_directories_then_snapshots(hub, tmp_path, monkeypatch):
    (tmp_path / "sft").mkdir()
    (tmp_path / "odd@name+x").mkdir()
    roots = [tmp_path / "nowhere", tmp_path]
    assert locate("sft", roots).model == tmp_path / "sft"
    assert locate("odd@name+x", roots).model == tmp_path / "odd@name+x"
    assert locate("org/name", roots).model.name.startswith("abc1234")
    assert locate("org/name@v1", roots).model.name.startswith("def5678")
    assert locate("org/name@def5678", roots).model.name.startswith("def5678")
    both = locate("sft+org/name@v1", roots)
    assert both.model == tmp_path / "sft"
    assert both.adapter is not None and both.adapter.name.startswith("def5678")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HOME", "/nonexistent")
    assert locate("org/name", roots).model.name.startswith("abc1234")


def test_what_is_not_found_says_where_it_was_looked_for(hub, tmp_path):
    (tmp_path / "sft").mkdir()
    with pytest.raises(UserError) as error:
        locate("org/other", [tmp_path])
    assert str(tmp_path / "org/other") in str(error.value)
    assert "models--org--other" in str(error.value)
    with pytest.raises(UserError, match=r"has no snapshot v9 \(it has abc1234"):
        locate("org/name@v9", [tmp_path])
    with pytest.raises(UserError, match="is a directory and has no revisions"):
        locate("sft@v1", [tmp_path])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_hf(tmp_path / "base", params.init(jax.random.key(0), MODEL), MODEL)
    return tmp_path / "base"


def write_adapter(directory: Path, tensors: dict[str, np.ndarray], **settings) -> Path:
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    text = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6, **settings})
    (directory / "adapter_config.json").write_text(text)
    return directory


def factors(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, columns)), rng.standard_normal((rows, 2))
    return a.astype(np.float32), b.astype(np.float32)


def test_an_adapter_is_added_in_the_merge(base, tmp_path):
    a, b = factors(16, 16)
    norm = np.full(16, 7.0, np.float32)
    adapter = {
        f"base_model.model.{QUERY}.lora_A.weight": a,
        f"base_model.model.{QUERY}.lora_B.weight": b,
        "base_model.model.model.norm.weight": norm,  # modules_to_save
    }
    write_adapter(tmp_path / "lora", adapter)
    data = {"merge_method": "passthrough", "models": [{"model": "base+lora"}]}
    merge_checkpoints(parse_recipe(data), tmp_path / "out", [tmp_path])
    got, stored = (load_file(d / "model.safetensors") for d in (tmp_path / "out", base))
    for name, value in stored.items():
        want = value + 3.0 * b @ a if name == f"{QUERY}.weight" else value
        want = norm if name == "model.norm.weight" else want
        np.testing.assert_allclose(got[name], want, rtol=1e-6, atol=1e-6)
    assert "adapter_model.safetensors" in (tmp_path / "out" / "README.md").read_text()


def test_scales_by_rank_and_pattern_and_embeddings(base, tmp_path):
    a, b = factors(16, 16)
    ea, eb = factors(32, 16)
    adapter = {
        f"base_model.model.{QUERY}.lora_A.weight": a,
        f"base_model.model.{QUERY}.lora_B.weight": b,
        "base_model.model.model.embed_tokens.lora_embedding_A": np.ascontiguousarray(eb.T),
        "base_model.model.model.embed_tokens.lora_embedding_B": np.ascontiguousarray(ea.T),
    }
    settings = {"use_rslora": True, "alpha_pattern": {"q_proj": 10}}
    write_adapter(tmp_path / "lora", adapter, **settings)
    stored = load_file(base / "model.safetensors")
    with AdaptedCheckpoint(base, tmp_path / "lora") as model:
        delta = model.read(f"{QUERY}.weight") - stored[f"{QUERY}.weight"]
        np.testing.assert_allclose(delta, 10 / 2**0.5 * b @ a, rtol=1e-4, atol=1e-5)
        embed = "model.embed_tokens.weight"
        delta = model.read(embed) - stored[embed]
        np.testing.assert_allclose(delta, 6 / 2**0.5 * eb @ ea, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shapes", "settings", "message"),
    [
        ("model.layers.9.self_attn.q_proj", (16, 16), {}, "fits nothing in"),
        (QUERY, (16, 8), {}, "trained on another model"),
        (QUERY, (16, 16), {"use_qalora": True}, "has use_qalora True, which cannot be merged"),
        (
            QUERY,
            (16, 16),
            {"use_dora": True},
            "use_dora and the magnitude of .* do not",
        ),
        (QUERY, (16, 16), {"use_vectors": 3}, "has use_vectors 3, which is not known"),
        (QUERY, (16, 16), {"r": 4}, "have ranks 2 and 2, adapter_config.json says 4"),
        (QUERY, (16, 16), {"r": 0}, "has r 0; a rank is a whole number"),
        (QUERY, (16, 16), {"lora_alpha": "6"}, "has lora_alpha '6'; it must be a finite number"),
        (QUERY, (16, 16), {"rank_pattern": {"(": 2}}, "has rank_pattern '[(]'"),
        (QUERY, (16, 16), {"rank_pattern": [2]}, "has rank_pattern .2.; save the adapter again"),
        (QUERY, (16, 16), {"init_lora_weights": "pissa_niter_4"}, "has init_lora_weights 'pissa_"),
        (QUERY, (16, 16), {"init_lora_weights": "loftq"}, "began at a changed base"),
        (
            QUERY,
            (16, 16),
            {"target_modules": ["k_proj"]},
            "has factors of model.layers.1.self_attn",
        ),
        (
            QUERY,
            (16, 16),
            {"exclude_modules": ".*q_proj"},
            "has factors of model.layers.1.self_attn",
        ),
        (
            QUERY,
            (16, 16),
            {"target_modules": ["q_proj"], "layers_to_transform": 0},
            "has factors of model.layers.1.self_attn",
        ),
        (QUERY, (16, 16), {"modules_to_save": ["norm"]}, "lacks .*norm.*which modules_to_save"),
        (QUERY, (16, 16), {"target_parameters": ["mlp.experts.up"]}, "has target_parameters"),
        (QUERY, (16, 16), {"bias": "some"}, "has bias 'some'"),
        (QUERY, (16, 16), {"peft_type": "IA3"}, "is a IA3 adapter; only LoRA"),
        (QUERY, (16, 16), {"target_modules": ["q_proj"]}, "lacks factors of model.layers.0.self"),
        (QUERY, (16, 16), {"target_modules": r".*\.[01]\..*q_proj"}, "lacks factors of model.lay"),
        (QUERY, (16, 16), {"trainable_token_indices": [3]}, "lacks trained tokens"),
    ],
)
def test_adapters_that_do_not_fit_are_named(base, tmp_path, name, shapes, settings, message):
    a, b = factors(*shapes)
    adapter = {
        f"base_model.model.{name}.lora_A.weight": a,
        f"base_model.model.{name}.lora_B.weight": b,
    }
    write_adapter(tmp_path / "lora", adapter, **settings)
    with pytest.raises(UserError, match=message), AdaptedCheckpoint(base, tmp_path / "lora"):
        pass


def test_an_adapter_that_is_damaged_is_named(base, tmp_path):
    a, b = factors(16, 16)
    names = [f"base_model.model.{QUERY}.lora_{x}.weight" for x in "AB"]
    b[3, 1] = np.nan
    write_adapter(tmp_path / "nan", dict(zip(names, (a, b), strict=True)))
    with (
        pytest.raises(UserError, match=r"lora_B.weight has 1 values that are not finite"),
        AdaptedCheckpoint(base, tmp_path / "nan"),
    ):
        pass
    (tmp_path / "nan" / "adapter_model.safetensors").rename(tmp_path / "nan" / "adapter_model.bin")
    with (
        pytest.raises(UserError, match=r"missing; save the adapter with safetensors"),
        AdaptedCheckpoint(base, tmp_path / "nan"),
    ):
        pass


def test_a_full_name_is_a_target_whatever_the_layers(base, tmp_path):
    a, b = factors(16, 16)
    names = [f"base_model.model.{QUERY}.lora_{x}.weight" for x in "AB"]
    settings = {"target_modules": [QUERY], "layers_to_transform": [0]}  # as PEFT reads it
    write_adapter(tmp_path / "lora", dict(zip(names, (a, b), strict=True)), **settings)
    with AdaptedCheckpoint(base, tmp_path / "lora") as model:
        assert model.copies(f"{QUERY}.weight")


def test_factors_are_not_added_to_a_quantised_base(base, tmp_path):
    a, b = factors(16, 16)
    names = [f"base_model.model.{QUERY}.lora_{x}.weight" for x in "AB"]
    write_adapter(tmp_path / "lora", dict(zip(names, (a, b), strict=True)))
    tensors = load_file(base / "model.safetensors")
    tensors[f"{QUERY}.weight"] = np.zeros((128, 1), np.uint8)
    (base / "model.safetensors").unlink()
    save_file(tensors, base / "model.safetensors")
    with (
        pytest.raises(UserError, match=r"is stored as U8; .* name the base that is not quantised"),
        AdaptedCheckpoint(base, tmp_path / "lora"),
    ):
        pass


def test_what_the_base_cannot_hold_once_an_adapter_is_added_is_named(base, tmp_path):
    a, b = factors(16, 16)
    names = [f"base_model.model.{QUERY}.lora_{x}.weight" for x in "AB"]
    write_adapter(tmp_path / "lora", dict(zip(names, (a, 1e6 * b), strict=True)))
    tensors = {k: v.astype(np.float16) for k, v in load_file(base / "model.safetensors").items()}
    (base / "model.safetensors").unlink()
    save_file(tensors, base / "model.safetensors")
    with (
        pytest.raises(UserError, match=r"values that float16 cannot hold once .*lora is added"),
        AdaptedCheckpoint(base, tmp_path / "lora") as model,
    ):
        model.read(f"{QUERY}.weight")


def test_tokens_that_an_adapter_was_trained_with_are_not_lost(base, tmp_path):
    a, b = factors(16, 16)
    names = [f"base_model.model.{QUERY}.lora_{x}.weight" for x in "AB"]
    write_adapter(tmp_path / "lora", dict(zip(names, (a, b), strict=True)))
    vocabulary = {"model": {"vocab": {"a": 0, "b": 1}}}
    (base / "tokenizer.json").write_text(json.dumps(vocabulary))
    data = {"merge_method": "passthrough", "models": [{"model": "base+lora"}]}
    recipe = parse_recipe(data)
    for i, (tokens, said) in enumerate(
        [({}, ""), ({"<t>": 5}, "'<t>' has id 5 in"), ({"b": 0, "a": 1}, "has id . in .* but . in")]
    ):
        added = [{"content": token, "id": i} for token, i in tokens.items()]
        text = json.dumps({**vocabulary, "added_tokens": added})
        (tmp_path / "lora" / "tokenizer.json").write_text(text)
        if not said:
            merge_checkpoints(recipe, tmp_path / f"out{i}", [tmp_path])
            continue
        with pytest.raises(UserError, match=said):
            merge_checkpoints(recipe, tmp_path / f"out{i}", [tmp_path])


def test_a_training_checkpoint_is_an_input(base, tmp_path):
    tuned = params.init(jax.random.key(1), MODEL)
    steps = Checkpointer(tmp_path / "run" / "sft" / "checkpoints", async_=False)
    model = {f: getattr(MODEL, f) for f in MODEL.__dataclass_fields__}
    steps.save(7, state={"params": tuned}, loader_state=0, config={"model": model})
    steps.close()
    step = tmp_path / "run" / "sft" / "checkpoints" / "7"
    assert is_training_step(step) and not is_training_step(base)
    save_hf(tmp_path / "tuned", tuned, MODEL)
    inputs = [("base", 0.25), ("run/sft/checkpoints/7", 0.75)]
    listed = [{"model": m, "parameters": {"weight": w}} for m, w in inputs]
    merge_checkpoints(
        parse_recipe({"merge_method": "linear", "models": listed}), tmp_path / "out", [tmp_path]
    )
    listed[1]["model"] = "tuned"
    merge_checkpoints(
        parse_recipe({"merge_method": "linear", "models": listed}), tmp_path / "want", [tmp_path]
    )
    got, want = ((tmp_path / d / "model.safetensors").read_bytes() for d in ("out", "want"))
    assert got == want
    steps = Checkpointer(tmp_path / "lora" / "checkpoints", async_=False)
    for changed, said in (({"lora_rank": 4}, "holds LoRA adapters alone"), ({"odd": 1}, "version")):
        number = len(steps.steps())
        steps.save(number, state={"a": tuned["embed"]}, config={"model": {**model, **changed}})
        with pytest.raises(UserError, match=said):
            TrainingStep(tmp_path / "lora" / "checkpoints" / str(number))
    steps.close()
    for data in (step / "state" / "ocdbt.process_0" / "d").iterdir():
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(
        UserError, match=r"is damaged: state/.* bytes, \d+ were written; use another"
    ):
        TrainingStep(step)
    (step / "manifest.json").unlink()  # older releases wrote none
    with (
        pytest.raises(UserError, match=r"parameter .* (is truncated|cannot be read)"),
        TrainingStep(step) as damaged,
    ):
        for name in damaged.tensors:
            damaged.read(name)
