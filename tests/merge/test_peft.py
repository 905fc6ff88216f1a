"""LoRA adapters of random settings: merged as PEFT merges them, or refused by name."""

from __future__ import annotations

import copy
import functools
import json
import random
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

from agentcpm_jax.merge.adapters import AdaptedCheckpoint
from agentcpm_jax.merge.peft import CHANGED_BASE, READ, REFUSED, WITHOUT_EFFECT
from agentcpm_jax.types import UserError

SIZES: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
BASES = {
    "tied": Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True),
    "untied": Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=False),
    "biased": Qwen2Config(**SIZES, tie_word_embeddings=False),  # q, k and v have biases
}
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANDOM_BASE = "pissa_niter_2"
SEEDS = 100


@functools.cache
def base_model(kind: str) -> Any:
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(BASES[kind])
    for parameter in model.parameters():  # biases and norms start at constants
        parameter.data += 0.01 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    for kind in BASES:
        base_model(kind).save_pretrained(root / kind)
    return {kind: root / kind for kind in BASES}


def drawn(seed: int) -> tuple[str, dict[str, Any]]:
    """A base and the settings of an adapter for it."""
    rng = random.Random(seed)
    kind = rng.choice(["tied", "untied", "untied", "biased"])
    targets = rng.sample(MATRICES, rng.randint(1, 4))
    settings: dict[str, Any] = {
        "r": rng.choice([1, 2, 4]),
        "lora_alpha": rng.choice([1, 4, 7, 16]),
        "lora_dropout": rng.choice([0.0, 0.1]),
        "use_rslora": rng.random() < 0.3,
        "use_dora": rng.random() < 0.15,
        "fan_in_fan_out": rng.random() < 0.1,
        "bias": rng.choice(["none", "none", "all", "lora_only"]),
        "init_lora_weights": rng.choice([True] * 7 + [False, "gaussian", "orthogonal"]),
    }
    if settings["init_lora_weights"] == "orthogonal":
        settings["r"] = 2
    elif rng.random() < 0.3:
        names = ["layers.0.self_attn.q_proj", "q_proj", r".*\.1\..*", "down_proj", "^model.*v_proj"]
        for key in ("rank_pattern", "alpha_pattern"):
            chosen = sorted(rng.sample(names, rng.randint(1, 3)))  # PEFT sorts as it saves
            settings[key] = {name: rng.choice([1, 2, 3, 8]) for name in chosen}
    settings |= _where(rng, kind, targets)
    settings |= _besides(rng, kind, settings)
    if rng.random() < 0.06:
        settings["init_lora_weights"] = rng.choice((*CHANGED_BASE, RANDOM_BASE))
    return kind, settings


def _where(rng: random.Random, kind: str, targets: list[str]) -> dict[str, Any]:
    """Which modules: a list, a pattern, some layers, embeddings too."""
    form = rng.random()
    if form < 0.1:
        return {"target_modules": "all-linear"}
    if form < 0.25:
        return {"target_modules": rf".*\.({'|'.join(targets)})"}
    if form < 0.4:
        return {"target_modules": targets, "layers_to_transform": rng.choice([[1], 0, [0, 1]])}
    if form < 0.5:
        return {"target_modules": targets, "exclude_modules": [f"layers.1.self_attn.{targets[0]}"]}
    if form < 0.75:
        extra = rng.sample(["embed_tokens", "lm_head"], rng.randint(1, 2))
        return {"target_modules": [*targets, *extra]}
    return {"target_modules": targets}


def _besides(rng: random.Random, kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What is trained beside factors: whole modules, tokens, biases of B, parameters."""
    targets = settings["target_modules"]
    plain = isinstance(targets, list) and not set(targets) & {"embed_tokens", "lm_head"}
    what = rng.random()
    if settings["use_dora"] or not plain:
        return {"ensure_weight_tying": True} if what < 0.1 and kind == "tied" else {}
    if what < 0.2:
        saved = [["norm"], ["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]]
        return {"modules_to_save": rng.choice(saved), "ensure_weight_tying": rng.random() < 0.4}
    if what < 0.35:
        tokens = rng.choice([[0, 3], {"embed_tokens": [5, 1]}, {"lm_head": [2, 3]}])
        return {"trainable_token_indices": tokens, "ensure_weight_tying": rng.random() < 0.3}
    if what < 0.45 and kind == "biased" and set(targets) <= {"q_proj", "k_proj", "v_proj"}:
        return {"lora_bias": True, "init_lora_weights": True}
    if what < 0.55:
        others = [name for name in MATRICES if name not in targets]
        return {
            "target_parameters": [f"{others[0]}.weight"],
            "lora_dropout": 0.0,
            "fan_in_fan_out": False,
        }
    return {}


def refusal(kind: str, settings: dict[str, Any]) -> str:
    """The setting that an adapter is refused for; empty where it is merged."""
    targets = settings["target_modules"]
    if settings["init_lora_weights"] == RANDOM_BASE:
        return "init_lora_weights"
    both = kind == "tied" and isinstance(targets, list) and {"embed_tokens", "lm_head"} & {*targets}
    if both and settings.get("ensure_weight_tying"):
        return "ensure_weight_tying"
    if both and len(both) == 2 and settings["use_dora"]:
        return "use_dora"
    return ""


def merged_by_peft(kind: str, settings: dict[str, Any], directory: Path) -> dict[str, np.ndarray]:
    """Writes a trained adapter; returns the merged model's tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(len(json.dumps(settings)))
        model = get_peft_model(
            copy.deepcopy(base_model(kind)),
            LoraConfig(task_type="CAUSAL_LM", **copy.deepcopy(settings)),
        )
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                spread = 1.0 if "magnitude" in name else 0.2
                parameter.data += spread * torch.rand_like(parameter)
        model.save_pretrained(directory)
        again = PeftModel.from_pretrained(copy.deepcopy(base_model(kind)), directory)
        merged = again.merge_and_unload()
    tied = merged.config.tie_word_embeddings
    state = {k: v.detach().numpy() for k, v in merged.state_dict().items()}
    return {k: v for k, v in state.items() if not (tied and k == "lm_head.weight")}


@pytest.mark.parametrize("seed", range(SEEDS))
def test_is_merged_as_peft_merges_or_refused_by_name(bases, tmp_path, seed):
    kind, settings = drawn(seed)
    want = merged_by_peft(kind, settings, tmp_path / "adapter")
    if named := refusal(kind, settings):
        with (
            pytest.raises(UserError, match=named),
            AdaptedCheckpoint(bases[kind], tmp_path / "adapter"),
        ):
            pass
        return
    with AdaptedCheckpoint(bases[kind], tmp_path / "adapter") as model:
        got = {name: model.read(name) for name in model.tensors}
        assert model.config["tie_word_embeddings"] == ("lm_head.weight" not in want)
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, atol=1e-5, rtol=0, err_msg=name)


@pytest.mark.parametrize("start", CHANGED_BASE)
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("untied", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
        ("tied", {"target_modules": ["down_proj", "lm_head"], "use_rslora": True}),
        ("untied", {"target_modules": ["k_proj"], "target_parameters": ["down_proj.weight"]}),
        ("biased", {"target_modules": "all-linear", "rank_pattern": {"k_proj": 2}}),
    ],
)
def test_a_base_that_was_changed_before_training_is_computed_again(
    bases, tmp_path, start, kind, settings
):
    settings = {"r": 3, "lora_alpha": 5, "init_lora_weights": start, **settings}
    want = merged_by_peft(kind, settings, tmp_path / "adapter")
    with AdaptedCheckpoint(bases[kind], tmp_path / "adapter") as model:
        for name in want:
            np.testing.assert_allclose(model.read(name), want[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_twin_that_peft_adds_by_itself_is_refused_by_the_setting(bases, tmp_path, target):
    settings = {"target_modules": ["q_proj", target], "ensure_weight_tying": True}
    merged_by_peft("tied", settings, tmp_path / "adapter")
    with (
        pytest.raises(UserError, match="has ensure_weight_tying with factors of tied matrices"),
        AdaptedCheckpoint(bases["tied"], tmp_path / "adapter"),
    ):
        pass


def test_most_settings_are_merged():
    merged = [not refusal(*drawn(seed)) for seed in range(SEEDS)]
    assert sum(merged) >= 85


def test_half_precision_is_rounded_once_as_in_peft(tmp_path):
    model = copy.deepcopy(base_model("tied")).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"]))
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn_like(parameter)
        peft.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter")
        want = {k: v.float().numpy() for k, v in again.merge_and_unload().state_dict().items()}
    with AdaptedCheckpoint(tmp_path / "base", tmp_path / "adapter") as adapted:
        for name in adapted.tensors:
            value = adapted.read(name)
            assert value.dtype.name == "bfloat16"
            np.testing.assert_allclose(value.astype(np.float32), want[name], rtol=2**-8)


def test_every_setting_of_peft_is_known_and_in_the_docs():
    fields = {f for f in LoraConfig.__dataclass_fields__ if f != "peft_type"}
    assert fields <= {*READ, *WITHOUT_EFFECT, *REFUSED}
    text = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()
    sections = re.split(r"^## ", text, flags=re.MULTILINE)
    for title, names in (("Read", READ), ("Without", WITHOUT_EFFECT), ("Refused", REFUSED)):
        (section,) = (s for s in sections if s.startswith(title))
        listed = re.findall(r"^\| `(\w+)`", section, flags=re.MULTILINE)
        assert sorted(listed) == sorted(names)
    for value in (*CHANGED_BASE, "pissa_niter", "corda", "loftq", "lora_ga"):
        assert f"`{value}" in text
