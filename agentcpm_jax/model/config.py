"""Shape and numerics of a Qwen3 decoder, and its Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from agentcpm_jax.ranges import check_choice, check_least
from agentcpm_jax.types import UserError

DTYPES = ("float32", "bfloat16")
ATTENTIONS = ("auto", "reference", "blockwise", "splash", "cudnn")
REMATS = ("none", "full", "attention", "matmuls", "offload")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A dense Qwen3 decoder.

    Attributes:
      vocab_size: rows of the embedding (may exceed the tokenizer's vocabulary).
      width: residual stream, D.
      num_layers: L.
      num_heads: query heads, N; a multiple of `num_kv_heads`.
      num_kv_heads: key and value heads, K.
      head_dim: H, even; independent of width / num_heads.
      ffw: hidden size of the SwiGLU, F.
      rope_theta: base of the rotary frequencies.
      max_positions: positions the checkpoint was trained for (recorded, not enforced).
      norm_eps: epsilon of every RMSNorm.
      tied_embeddings: the output matrix is the transposed embedding.
      dtype: of activations and matrix products (norms, softmax and logits are float32).
      param_dtype: of the stored parameters.
      lm_head_fp32: the last product is taken in float32 from float32 operands.
      remat: which activations are kept for the backward pass, see `remat`.
      attention: the kernel, see `attention.choice`; 'auto' takes the platform's.
      logits_chunk: tokens on a device whose logits exist at once; 0: no number is set, as many as
        fit 16 MiB, at least 512.
      lora_rank: of the adapters that are trained in place of the parameters, see `lora`; 0:
        none. Their product counts `lora_alpha / lora_rank` times.

    Raises:
      UserError: a field is out of its range.
    """

    vocab_size: int = 512
    width: int = 128
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    ffw: int = 320
    rope_theta: float = 1e6
    max_positions: int = 1024
    norm_eps: float = 1e-6
    tied_embeddings: bool = True
    dtype: str = "float32"
    param_dtype: str = "float32"
    lm_head_fp32: bool = True
    remat: str = "none"
    attention: str = "auto"
    logits_chunk: int = 0
    lora_rank: int = 0
    lora_alpha: float = 32.0

    def __post_init__(self) -> None:
        check_least(self, "model", dict.fromkeys(_SIZES, 1) | {"logits_chunk": 0, "lora_rank": 0})
        check_choice(self, "model", _NAMES)
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_heads is {self.num_heads}, not a multiple of "
                f"num_kv_heads {self.num_kv_heads}; choose heads that group evenly"
            )
        if self.head_dim % 2:
            raise UserError(f"model.head_dim is {self.head_dim}; rotary pairs need an even number")


#: What a checkpoint's config.json gives; the other fields are numerics, which a run chooses.
SHAPE = (
    "vocab_size",
    "width",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "ffw",
    "rope_theta",
    "max_positions",
    "norm_eps",
    "tied_embeddings",
)
_NAMES = {"dtype": DTYPES, "param_dtype": DTYPES, "attention": ATTENTIONS, "remat": REMATS}
_SIZES = tuple(name for name in SHAPE[:9] if name != "rope_theta")

# Qwen3-4B-Thinking-2507 and -Instruct-2507; the first Qwen3-4B has theta 1e6 and 40,960 positions.
QWEN3_4B = ModelConfig(
    vocab_size=151_936,
    width=2560,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    ffw=9728,
    rope_theta=5e6,
    max_positions=262_144,
    dtype="bfloat16",
    param_dtype="bfloat16",
)

QWEN3_0_6B = ModelConfig(
    vocab_size=151_936,
    width=1024,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    ffw=3072,
    rope_theta=1e6,
    max_positions=40_960,
    dtype="bfloat16",
    param_dtype="bfloat16",
)

TINY = ModelConfig(rope_theta=1e4)

#: By the last part of their name on the Hub: what `--explain` plans for before a download.
PUBLISHED = {
    "Qwen3-0.6B": QWEN3_0_6B,
    "Qwen3-4B": dataclasses.replace(QWEN3_4B, rope_theta=1e6, max_positions=40_960),
    "Qwen3-4B-Instruct-2507": QWEN3_4B,
    "Qwen3-4B-Thinking-2507": QWEN3_4B,
}


#: Keys of config.json that say something else of the architecture -> the values this backbone has.
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("qwen3",),
    "architectures": (["Qwen3ForCausalLM"], []),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0.0,),
    "use_qk_norm": (True,),
    "use_mrope": (False,),
    "partial_rotary_factor": (1.0,),
    "pretraining_tp": (1,),
    "quantization_config": (None,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "is_decoder": (True, False),
    "is_causal": (True,),
}
_READ = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
    *("tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "dtype"),
    *("torch_dtype", "layer_types", "use_sliding_window", "sliding_window", "max_window_layers"),
)
#: Keys that describe, or that only generation, training from scratch or a library reads.
_DESCRIBES = (
    *("transformers_version", "_name_or_path", "name_or_path", "initializer_range"),
    *("use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id"),
    *("decoder_start_token_id", "tokenizer_class", "prefix", "task_specific_params"),
    *("problem_type", "finetuning_task", "id2label", "label2id", "num_labels"),
    *("chunk_size_feed_forward", "output_attentions", "output_hidden_states", "return_dict"),
    *("torchscript", "use_bfloat16", "tf_legacy_loss", "_attn_implementation"),
    *("_attn_implementation_autoset", "attn_implementation", "unsloth_fixed", "unsloth_version"),
    *("transformers.js_config", "license", "model_name", "base_model"),
)


def from_hf_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face Qwen3 `config.json`.

    Reads both spellings of the rotary embedding: `rope_theta` with `rope_scaling`, and
    `rope_parameters` (transformers 5). Keys that are absent take the defaults of `Qwen3Config`.

    Raises:
      UserError: a key is missing, unknown, or describes a model this backbone does not compute.
    """
    _reject_unknown(hf)
    num_layers = _integer(hf, "num_hidden_layers")
    _reject_sliding_window(hf, num_layers)
    num_heads = _integer(hf, "num_attention_heads")
    dtype = hf.get("dtype") or hf.get("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise UserError(f"config.json: dtype {dtype!r} is not supported; use {' or '.join(DTYPES)}")
    tied = hf.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise UserError(f"config.json: tie_word_embeddings is {tied!r}; it must be true or false")
    return ModelConfig(
        vocab_size=_integer(hf, "vocab_size"),
        width=_integer(hf, "hidden_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_integer(hf, "num_key_value_heads", num_heads),
        head_dim=_integer(hf, "head_dim", 128),
        ffw=_integer(hf, "intermediate_size"),
        rope_theta=_rope_theta(hf),
        max_positions=_integer(hf, "max_position_embeddings", 32_768),
        norm_eps=_positive("rms_norm_eps", hf.get("rms_norm_eps", 1e-6)),
        tied_embeddings=tied,
        dtype=dtype,
        param_dtype=dtype,
    )


def to_hf_config(cfg: ModelConfig) -> dict[str, Any]:
    """`config.json` of `cfg`, in both spellings, so that old and new readers agree."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.width,
        "intermediate_size": cfg.ffw,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": cfg.max_positions,
        "initializer_range": 0.02,
        "rms_norm_eps": cfg.norm_eps,
        "use_cache": True,
        "tie_word_embeddings": cfg.tied_embeddings,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": cfg.num_layers,
        "dtype": cfg.param_dtype,
        "torch_dtype": cfg.param_dtype,
    }


def _reject_unknown(hf: Mapping[str, Any]) -> None:
    """An unknown key may change what the model computes; null says nothing."""
    if hf.get("model_type") is None:
        raise UserError("config.json has no model_type; this backbone computes 'qwen3'")
    for key, value in hf.items():
        if value is None:
            continue
        if key in _FIXED and value not in _FIXED[key]:
            raise UserError(
                f"config.json: {key} {value!r} is not supported; this backbone needs "
                + " or ".join(repr(allowed) for allowed in _FIXED[key])
            )
        if key not in (*_FIXED, *_READ, *_DESCRIBES):
            raise UserError(
                f"config.json: {key} {value!r} is not known here, and may change what the model "
                "computes; remove it if it does not"
            )


def _integer(hf: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = hf.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"config.json: {key} is {value!r}; it must be an integer")
    return value


def _rope_theta(hf: Mapping[str, Any]) -> float:
    found = {}  # where it is said -> theta
    if hf.get("rope_theta") is not None:
        found["rope_theta"] = _positive("rope_theta", hf["rope_theta"])
    for key in ("rope_parameters", "rope_scaling"):
        rope = hf.get(key)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise UserError(f"config.json: {key} is {rope!r}; it must be an object or null")
        plain = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
        for name, value in rope.items():
            if name != "rope_theta" and value is not None and plain.get(name) != value:
                raise UserError(
                    f"config.json: {key} {dict(rope)!r} is not supported; only plain rotary "
                    f"embeddings (rope_type 'default') are: remove {name}"
                )
        if rope.get("rope_theta") is not None:
            found[key] = _positive("rope_theta", rope["rope_theta"])
    if len(set(found.values())) > 1:
        said = " and ".join(f"{value:g} as {key}" for key, value in found.items())
        raise UserError(f"config.json says rope_theta {said}; make them agree")
    return next(iter(found.values()), 10_000.0)


def _positive(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise UserError(f"config.json: {key} is {value!r}; it must be a positive number")
    return float(value)


def _reject_sliding_window(hf: Mapping[str, Any], num_layers: int) -> None:
    kinds = hf.get("layer_types")
    if kinds is not None and not isinstance(kinds, list):
        raise UserError(f"config.json: layer_types is {kinds!r}; it must be a list, one per layer")
    if kinds is not None:
        odd = [kind for kind in kinds if kind != "full_attention"]
        if odd:
            raise UserError(
                f"config.json: layer_types has {odd[0]!r}, which is not supported; "
                "every layer must be 'full_attention'"
            )
        if len(kinds) != num_layers:
            raise UserError(
                f"config.json: layer_types has {len(kinds)} entries for num_hidden_layers "
                f"{num_layers}; make them agree"
            )
    elif (
        hf.get("use_sliding_window")
        and hf.get("sliding_window", 4096) is not None
        and _integer(hf, "max_window_layers", 28) < num_layers
    ):
        raise UserError(
            f"config.json: use_sliding_window True with sliding_window "
            f"{hf.get('sliding_window', 4096)} is not supported; set use_sliding_window to false"
        )
