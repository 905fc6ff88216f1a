"""A checkpoint with a LoRA adapter added, without writing it anywhere.

    W + s B A,   s = alpha / r, or alpha / sqrt(r) with `use_rslora`          Hu et al. 2021

in float32, rounded to the dtype W is stored in. The adapter is a PEFT directory
(adapter_config.json, adapter_model.safetensors); a tensor in it that fits nothing is an error.
"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import numpy as np

from agentcpm_jax.hf.files import Checkpoint, read_file, read_json
from agentcpm_jax.hf.names import PEFT_CONFIG, PEFT_WEIGHTS, check_shape
from agentcpm_jax.types import UserError

PREFIX = "base_model.model."
PART = re.compile(r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B)(\.\w+)?(\.weight)?$")
OTHER = "the adapter was trained on another model"
#: Kinds of adapter that are not a product of two matrices.
UNSUPPORTED = ("use_dora", "use_qalora", "layer_replication", "alora_invocation_tokens")


class AdaptedCheckpoint(Checkpoint):
    """A Checkpoint whose `read` gives adapted tensors."""

    def __init__(self, directory: Path, adapter: Path):
        super().__init__(directory)
        self.adapter = adapter
        self._settings = read_json(adapter / PEFT_CONFIG)
        if self._settings.get("peft_type", "LORA") != "LORA":
            raise UserError(
                f"{adapter} is a {self._settings['peft_type']} adapter; only LoRA can be merged"
            )
        for key in UNSUPPORTED:
            if self._settings.get(key):
                raise UserError(f"{adapter} has {key}, which is not supported; merge it with peft")
        self._factors: dict[str, dict[str, np.ndarray]] = {}  # tensor -> A and B
        self._replaced: dict[str, np.ndarray] = {}  # modules_to_save

    def __enter__(self) -> AdaptedCheckpoint:
        super().__enter__()
        path = self.adapter / PEFT_WEIGHTS
        if not path.is_file():
            raise UserError(f"{path} is missing; save the adapter with safetensors")
        self.files += [self.adapter / PEFT_CONFIG, path]
        for name, value in read_file(path).items():
            self._place(path, name, value)
        for name, pair in self._factors.items():
            if set(pair) != {"A", "B"}:
                raise UserError(f"{path} has only one of the two factors of {name}; save it again")
            shape = (pair["B"].shape[0], pair["A"].shape[1])
            if self._settings.get("fan_in_fan_out"):
                shape = shape[::-1]
            check_shape(f"{path}: B A of {name}", shape, self.tensors[name].shape, OTHER)
        return self

    def read(self, name: str) -> np.ndarray:
        """The adapted tensor in its stored dtype."""
        if name in self._replaced:
            return self._replaced[name]
        if name not in self._factors:
            return super().read(name)
        a, b = (self._factors[name][x].astype(np.float32) for x in "AB")
        delta = b @ a
        delta *= np.float32(self._scale(name, a.shape[0]))
        delta = delta.T if self._settings.get("fan_in_fan_out") else delta
        stored = super().read(name)
        out = np.empty(stored.shape, stored.dtype)
        np.add(stored.astype(np.float32), delta, out=delta)
        out[...] = delta
        return out

    def copies(self, name: str) -> bool:
        """Whether the adapter changes this tensor."""
        return name in self._factors

    def _place(self, path: Path, name: str, value: np.ndarray) -> None:
        module = name.removeprefix(PREFIX)
        if found := PART.search(module):
            kind = found.group(1)
            target = module[: found.start()] + ".weight"
            # an embedding's factors are stored transposed: [r, rows] and [columns, r]
            if kind.startswith("lora_embedding"):
                kind, value = ("lora_B" if kind.endswith("A") else "lora_A"), value.T
            if target in self.tensors:
                self._factors.setdefault(target, {})[kind[-1]] = value
                return
        target = module.replace(".modules_to_save.default", "")
        target = target.replace(".base_layer", "")
        if not found and target in self.tensors:
            check_shape(f"{path}: {name}", value.shape, self.tensors[target].shape, OTHER)
            self._replaced[target] = value
            kept = self.tensors[target]
            self.tensors[target] = dataclasses.replace(kept, dtype=value.dtype.name)
            return
        raise UserError(f"{path}: tensor {name} fits nothing in {self.directory}; {OTHER}")

    def _scale(self, name: str, rank: int) -> float:
        module = name.removesuffix(".weight")
        alpha = self._settings.get("lora_alpha", rank)
        for pattern, value in (self._settings.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
        return alpha / (math.sqrt(rank) if self._settings.get("use_rslora") else rank)
