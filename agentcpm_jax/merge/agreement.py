"""Whether models are of one architecture, by their configurations; equal shapes do not make it so.

Every setting that two models name must agree, but for those known not to change what a layer
computes. Rope settings are compared in both spellings: `rope_theta` with `rope_scaling`, and
`rope_parameters`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from agentcpm_jax.hf.names import embedding_names, text_config
from agentcpm_jax.merge.inputs import MergeInput
from agentcpm_jax.types import UserError

#: May differ: names, training, what is not asked at inference, and what shapes and tokens show.
FREE = re.compile(
    r"_.*|.*_version|.*_token_id|.*dropout|.*_pdrop|.*_coef|architectures|auto_map|base_model.*|"
    r"(torch_)?dtype|use_cache|initializer_range|output_.*|return_dict|id2label|label2id|"
    r"num_labels|problem_type|finetuning_task|task_specific_params|quantization_config|"
    r"pretraining_tp|name_or_path|unsloth_.*|use_return_dict|is_(encoder_)?decoder|torchscript|"
    r"vocab_size|text_vocab_size|num_hidden_layers|layer_types|max_window_layers|"
    r"max_position_embeddings|text_config|do_sample|temperature|top_[kp]|max_length|min_length"
)
#: What transformers takes where a configuration is silent, of the types that share these.
DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
}
SAME_DEFAULTS = ("qwen2", "qwen3", "llama", "mistral")
#: Where null is a value; elsewhere it says nothing.
SWITCHED_OFF = ("sliding_window", "final_logit_softcapping", "attn_logit_softcapping")
ROPE = ("rope_theta", "rope_scaling", "rope_parameters")


def check_models(configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises UserError if two configs describe different models; depth may differ, for slices."""
    settings = {name: _settings(config) for name, config in configs.items()}
    first_name, first = next(iter(settings.items()))
    for name, config in settings.items():
        for key in sorted(first.keys() & config.keys()):
            if first[key] != config[key]:
                raise UserError(
                    f"{key} is {first[key]!r} in {first_name} but {config[key]!r} in {name}; "
                    "merge models of one architecture"
                )


def check_rows(models: Mapping[str, MergeInput]) -> None:
    """Raises UserError if a config's vocab_size is not the number of its embedding's rows."""
    for name, model in models.items():
        wanted = text_config(model.config).get("vocab_size")
        for tensor in embedding_names(model.config, model.tensors):
            rows = model.tensors[tensor].shape[0]
            if "embed" in tensor and wanted is not None and rows != wanted:
                raise UserError(
                    f"vocab_size is {wanted} in config.json of {name}, but {tensor} has {rows} "
                    "rows; correct config.json, or copy the checkpoint again"
                )


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What must agree, rope settings in one spelling."""
    found = {k: v for k, v in text_config(config).items() if v is not None or k in SWITCHED_OFF}
    if found.get("model_type") in SAME_DEFAULTS:
        found = {**DEFAULTS, **found}
    rope = _rope(found)
    if not found.get("use_sliding_window", True):
        found["sliding_window"] = None
    kept = {k: v for k, v in found.items() if not FREE.fullmatch(k) and k not in ROPE}
    return {**kept, **rope}


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """{rope_theta, if it is said; rope_scaling, None where there is none}."""
    nested = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if any(isinstance(value, Mapping) for value in nested.values()):  # by type of layer
        return {"rope_theta": None, "rope_scaling": {k: _rope_of(v) for k, v in nested.items()}}
    scaling = _rope_of(nested)
    theta = scaling.pop("rope_theta", config.get("rope_theta"))
    kind = scaling.get("rope_type")
    rope: dict[str, Any] = {"rope_scaling": None if kind == "default" else scaling}
    return rope if theta is None else {**rope, "rope_theta": float(theta)}


def _rope_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    found = {k: v for k, v in settings.items() if k != "type" and v is not None}
    return {"rope_type": settings.get("type") or "default", **found}
