"""Shape and numerics of a Qwen3 decoder, and its Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from agentcpm_jax.ranges import check_least
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
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        check_least(self, "model", {"logits_chunk": 0, "lora_rank": 0})
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_heads is {self.num_heads}, not a multiple of "
                f"num_kv_heads {self.num_kv_heads}; choose heads that group evenly"
            )
        if self.head_dim % 2:
            raise UserError(f"model.head_dim is {self.head_dim}; rotary pairs need an even number")
        for name, allowed in _NAMES.items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"model.{name} is {getattr(self, name)!r}; use one of {', '.join(allowed)}"
                )


_NAMES = {"dtype": DTYPES, "param_dtype": DTYPES, "attention": ATTENTIONS, "remat": REMATS}
_SIZES = (
    "vocab_size",
    "width",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "ffw",
    "max_positions",
)

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


def from_hf_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face Qwen3 `config.json`.

    Reads both spellings of the rotary embedding: `rope_theta` with `rope_scaling`, and
    `rope_parameters` (transformers 5). Keys that are absent take the defaults of `Qwen3Config`.

    Raises:
      UserError: a key is missing or describes a model this backbone does not compute.
    """
    _require(hf, "model_type", ("qwen3",))
    _require(hf, "hidden_act", ("silu",), default="silu")
    _require(hf, "attention_bias", (False,), default=False)
    _require(hf, "quantization_config", (None,), default=None)
    num_layers = _integer(hf, "num_hidden_layers")
    _reject_sliding_window(hf, num_layers)
    num_heads = _integer(hf, "num_attention_heads")
    dtype = hf.get("dtype") or hf.get("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise UserError(f"config.json: dtype {dtype!r} is not supported; use {' or '.join(DTYPES)}")
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
        norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
        tied_embeddings=bool(hf.get("tie_word_embeddings", False)),
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


def _require(hf: Mapping[str, Any], key: str, allowed: tuple[Any, ...], **default: Any) -> None:
    value = hf.get(key, *default.values())
    if value not in allowed:
        raise UserError(
            f"config.json: {key} {value!r} is not supported; this backbone needs "
            + " or ".join(repr(a) for a in allowed)
        )


def _integer(hf: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = hf.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"config.json: {key} is {value!r}; it must be an integer")
    return value


def _rope_theta(hf: Mapping[str, Any]) -> float:
    key = "rope_parameters" if hf.get("rope_parameters") is not None else "rope_scaling"
    rope = hf.get(key) or {}
    if not isinstance(rope, Mapping):
        raise UserError(f"config.json: {key} is {rope!r}; it must be an object or null")
    kind = rope.get("rope_type", rope.get("type", "default"))
    per_layer = any(isinstance(value, Mapping) for value in rope.values())
    if kind != "default" or per_layer:
        raise UserError(
            f"config.json: {key} {dict(rope)!r} is not supported; only plain rotary embeddings "
            "(rope_type 'default') are: remove the scaling"
        )
    if rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError("config.json: partial_rotary_factor is not supported; it must be 1.0")
    theta = rope.get("rope_theta", hf.get("rope_theta", 10_000.0))
    if isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 0:
        raise UserError(f"config.json: rope_theta is {theta!r}; it must be a positive number")
    return float(theta)


def _reject_sliding_window(hf: Mapping[str, Any], num_layers: int) -> None:
    kinds = hf.get("layer_types")
    if kinds is not None:
        odd = sorted({kind for kind in kinds if kind != "full_attention"})
        if odd:
            raise UserError(
                f"config.json: layer_types has {odd[0]!r}, which is not supported; "
                "every layer must be 'full_attention'"
            )
    elif (
        hf.get("use_sliding_window")
        and hf.get("sliding_window", 4096) is not None
        and hf.get("max_window_layers", 28) < num_layers
    ):
        raise UserError(
            f"config.json: use_sliding_window True with sliding_window "
            f"{hf.get('sliding_window', 4096)} is not supported; set use_sliding_window to false"
        )
