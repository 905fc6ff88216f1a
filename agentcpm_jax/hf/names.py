"""Which tensors the files of a model hold: keys, shapes, and what part of which parameter each is.

A parameter may be described by anything that has the four fields of `Spec`, as
`model.params.ParamSpec` has: this module needs neither JAX nor the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from agentcpm_jax.types import UserError

CONFIG, GENERATION = "config.json", "generation_config.json"
#: Keys of both that are ids of tokens.
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@runtime_checkable
class Spec(Protocol):
    """A parameter: layers are stacked on its first axis; see `ParamSpec`."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def axes(self) -> tuple[str, ...]: ...
    @property
    def hf_key(self) -> str: ...
    @property
    def hf_inputs(self) -> int: ...


def file_tensors(flat: Mapping[str, Spec]) -> dict[str, tuple[str, int | None]]:
    """{key in the files: (path of the parameter, its layer; None: all of it)}."""
    return {
        key: (path, layer if stacked(spec) else None)
        for path, spec in flat.items()
        for layer, key in enumerate(keys(spec))
    }


def file_shapes(flat: Mapping[str, Spec]) -> dict[str, tuple[int, ...]]:
    """{key: shape} of every tensor of the files."""
    return {key: file_shape(spec) for spec in flat.values() for key in keys(spec)}


def keys(spec: Spec) -> list[str]:
    """The keys of a parameter's layers; one key of a parameter without layers."""
    if not stacked(spec):
        return [spec.hf_key]
    return [spec.hf_key.format(layer) for layer in range(spec.shape[0])]


def stacked(spec: Spec) -> bool:
    """Whether the first axis counts layers."""
    return spec.axes[0] == "layers"


def file_shape(spec: Spec) -> tuple[int, ...]:
    """Of one tensor in the files: [outputs, inputs] of a matrix."""
    inputs, outputs = inputs_outputs(spec)
    return (math.prod(outputs), math.prod(inputs)) if inputs else outputs


def inputs_outputs(spec: Spec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Our axes of one layer that make a matrix's inputs, and the others; no inputs: no matrix."""
    shape = spec.shape[1:] if stacked(spec) else spec.shape
    return shape[: spec.hf_inputs], shape[spec.hf_inputs :]


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the language model, which a multimodal model nests."""
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, Mapping) else config


def embedding_names(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> list[str]:
    """Matrices with one row per token, by shape and place: outside the layers, `vocab_size` rows.

    Where no matrix has so many rows, those with the most. `tensors` have a `shape`.
    """
    shapes = {name: tuple(info.shape) for name, info in tensors.items()}
    outside = [n for n, s in shapes.items() if len(s) == 2 and not _in_layer(n)]
    rows = text_config(config).get("vocab_size")
    if not any(shapes[name][0] == rows for name in outside):
        rows = max((shapes[name][0] for name in outside), default=0)
    found = [name for name in outside if shapes[name][0] == rows]
    words = [name for name in found if "position" not in name and "wpe" not in name]
    return words or found


def _in_layer(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def check_shape(
    tensor: str,
    found: Sequence[int],
    expected: Sequence[int],
    fix: str,
    error: type[Exception] = UserError,
) -> None:
    """Raises `error` when a tensor has another shape than it must have."""
    if tuple(found) != tuple(expected):
        raise error(f"{tensor} has shape {tuple(found)}, expected {tuple(expected)}; {fix}")
