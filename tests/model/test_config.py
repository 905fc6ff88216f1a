from __future__ import annotations

import dataclasses

import pytest

from agentcpm_jax.model.config import (
    QWEN3_0_6B,
    QWEN3_4B,
    TINY,
    ModelConfig,
    from_hf_config,
    to_hf_config,
)
from agentcpm_jax.types import UserError

# What Qwen publishes for Qwen3-4B-Thinking-2507.
PUBLISHED_4B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 9728,
    "max_position_embeddings": 262144,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_published_config_is_the_constant():
    assert from_hf_config(PUBLISHED_4B) == QWEN3_4B


def test_both_spellings_of_rope_agree():
    new = {k: v for k, v in PUBLISHED_4B.items() if k not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e6}
    new["layer_types"] = ["full_attention"] * 36
    assert from_hf_config(new) == QWEN3_4B


@pytest.mark.parametrize("cfg", [QWEN3_4B, QWEN3_0_6B, TINY])
def test_round_trip(cfg):
    # Files have one dtype; computing in another is the user's choice.
    written = to_hf_config(dataclasses.replace(cfg, tied_embeddings=False, rope_theta=123.5))
    expected = dataclasses.replace(
        cfg, tied_embeddings=False, rope_theta=123.5, dtype=cfg.param_dtype
    )
    assert from_hf_config(written) == expected


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling .*yarn"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling .*linear"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e6}}, "rope_parameters .*dyn"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters .*full"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (
            {"rope_parameters": {"rope_theta": 1e6}},
            "5e.06 as rope_theta and 1e.06",
        ),
        ({"rope_parameters": {"rope_theta": 5e6, "factor": 2.0}}, "remove factor"),
        ({"logit_scale": 0.5}, "logit_scale 0.5 is not known"),
        ({"use_qk_norm": False}, "use_qk_norm False"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"tie_word_embeddings": "true"}, "tie_word_embeddings is 'true'"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'"),
        ({"layer_types": ["full_attention"]}, "1 entries for num_hidden_layers 36"),
        ({"model_type": None}, "no model_type"),
        ({"rope_theta": "big"}, "rope_theta is 'big'"),
        (
            {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 4},
            "use_sliding_window True with sliding_window 512",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"layer_types": 36}, "layer_types is 36; it must be a list"),
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": "4"}, "is '4'"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "architectures .*Classification"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"hidden_size": "2560"}, "hidden_size is '2560'"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"num_key_value_heads": 5}, "num_kv_heads 5"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(change, named):
    with pytest.raises(UserError, match=named):
        from_hf_config({**PUBLISHED_4B, **change})


def test_what_only_describes_and_what_is_null_is_read_over():
    more = {"pad_token_id": 1, "transformers_version": "5.0", "_name_or_path": "x", "new": None}
    assert from_hf_config({**PUBLISHED_4B, **more, "head_dim": None}) == QWEN3_4B


def test_sliding_window_that_no_layer_uses_is_accepted():
    unused = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 36}
    assert from_hf_config({**PUBLISHED_4B, **unused}) == QWEN3_4B


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("head_dim", 3, " is 3; rotary"),
        ("num_layers", 0, "=0; it is at least 1"),
        ("dtype", "float16", " 'float16'; .*did you mean 'bfloat16'"),
        ("remat", "some", " 'some'; use one of none, full"),
    ],
)
def test_impossible_fields_are_named(field, value, said):
    with pytest.raises(UserError, match=f"model.{field}{said}"):
        ModelConfig(**{field: value})
