"""A checkpoint with a LoRA adapter added, without writing it anywhere.

    W + s B A                                                   Hu et al. 2021
    m / |W + s B A| (W + s B A), |.| of every output, DoRA      Liu et al. 2024
    W - U_r S_r V_r^T  in place of W, U S V^T = W, PiSSA        Meng et al. 2024
    W - s Q_r R_r  in place of W, Q R = W, OLoRA                Büyükakyüz 2024

in float32, rounded to the dtype W is stored in. The adapter is a PEFT directory; `peft` reads its
settings. A tensor in it that fits nothing is an error.

Of a base with tied embeddings PEFT changes both matrices when it adds to one of them, and unties
them when one is replaced (`modules_to_save`); so does this.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from agentcpm_jax.hf.files import FLOATS, Checkpoint, not_finite, read_file
from agentcpm_jax.hf.names import (
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    check_shape,
    embedding_names,
    text_config,
)
from agentcpm_jax.merge.peft import AdapterSettings
from agentcpm_jax.types import UserError

PREFIX = "base_model.model."
HEAD = "lm_head"
FACTOR = re.compile(
    r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.default)?(?:\.(weight|bias))?$"
)
TOKENS = ".token_adapter.trainable_tokens_delta"
OTHER = "the adapter was trained on another model"
#: Model types whose matrices are stored [inputs, outputs], transformers' Conv1D.
TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


@dataclasses.dataclass
class Factors:
    """What an adapter adds to one module: B A, of DoRA a magnitude, and B's bias."""

    a: np.ndarray | None = None  # [r, inputs]
    b: np.ndarray | None = None  # [outputs, r]
    magnitude: np.ndarray | None = None
    bias: np.ndarray | None = None
    embedding: bool = False


class AdaptedCheckpoint(Checkpoint):
    """A Checkpoint whose `read` gives adapted tensors; `notes` are for people."""

    def __init__(self, directory: Path, adapter: Path):
        super().__init__(directory)
        self.adapter = adapter
        self.notes: list[str] = []
        self._settings = AdapterSettings(adapter)
        self._path = adapter / PEFT_WEIGHTS
        self._factors: dict[str, Factors] = {}  # module -> what is added
        self._tokens: dict[str, np.ndarray] = {}  # module -> rows that are replaced
        self._replaced: dict[str, np.ndarray] = {}  # tensor -> what stands in its place
        self._added: dict[str, list[Callable[[np.ndarray], np.ndarray]]] = {}  # by tensor, in order
        self._tied: tuple[str, ...] = ()  # input embedding and head, where they are one matrix

    def __enter__(self) -> AdaptedCheckpoint:
        super().__enter__()
        if not self._path.is_file():
            raise UserError(f"{self._path} is missing; save the adapter with safetensors")
        self.files += [self.adapter / PEFT_CONFIG, self._path]
        names = embedding_names(self.config, self.tensors)
        self._embedding = next((n for n in names if not n.startswith(HEAD)), "")
        if text_config(self.config).get("tie_word_embeddings") and self._embedding:
            self._tied = (self._embedding, f"{HEAD}.weight")
        stored = read_file(self._path)
        self._untie(stored)
        for name, value in stored.items():
            if count := not_finite(value):
                raise UserError(
                    f"{self._path}: tensor {name} has {count} values that are not finite; use an "
                    "earlier adapter"
                )
            self._sort(name, value)
        self._check_whole()
        for module in sorted(self._factors, key=_head_last):
            self._add_factors(module, self._factors[module])
        for module in sorted(self._tokens, key=_head_last):
            self._add_rows(module, self._tokens[module])
        return self

    def read(self, name: str) -> np.ndarray:
        """The adapted tensor in its stored dtype."""
        value = self._base(name)
        if name not in self._added:
            return value
        total = value.astype(np.float32)
        for change in self._added[name]:
            total = change(total)
        with np.errstate(over="ignore"):
            value = total.astype(value.dtype)
        if count := not_finite(value):
            raise UserError(
                f"tensor {name} has {count} values that {value.dtype} cannot hold once "
                f"{self.adapter} is added; store the base in bfloat16 or float32"
            )
        return value

    def release(self, name: str) -> None:
        """As of Checkpoint; a tensor that is the adapter's own has nothing to release."""
        if name in self._mapped:
            super().release(name)

    def copies(self, name: str) -> bool:
        """Whether the adapter changes this tensor."""
        return name in self._added

    def _base(self, name: str) -> np.ndarray:
        if name in self._replaced:
            return self._replaced[name]
        return super().read(name if name in self._mapped else self._embedding)

    def _untie(self, stored: dict[str, np.ndarray]) -> None:
        """Two matrices from one, when one of them was trained apart from the other."""
        modules = [self._settings.saves(n.removesuffix(".weight")) for n in self._tied]
        if not any(modules) or self._settings.on("ensure_weight_tying"):
            return
        embedding, head = self._tied
        self.config = {**self.config, "tie_word_embeddings": False}
        if isinstance(nested := self.config.get("text_config"), dict):
            self.config["text_config"] = {**nested, "tie_word_embeddings": False}
        self.tensors.setdefault(head, self.tensors[embedding])
        self._tied = ()
        self.notes.append(
            f"{self.adapter} trained one of two tied matrices; the output has tie_word_embeddings "
            f"false and a tensor {head}"
        )

    def _sort(self, name: str, value: np.ndarray) -> None:
        """Finds out what a tensor of the adapter is."""
        key = name.removeprefix(PREFIX)
        if found := FACTOR.search(key):
            module = key[: found.start()]
            if self._targets(module):
                self._note_factor(module, found[1], found[2] == "bias", value)
                return
        elif TOKENS in key:
            self._tokens[key[: key.index(TOKENS)]] = value
            return
        else:
            target = key.replace(".modules_to_save.default", "").replace(".base_layer", "")
            if target not in self.tensors and target in self._tied:
                target = self._embedding
            if target in self.tensors:
                self._replace(name, target, value, frozen=".base_layer." in key)
                return
        raise UserError(f"{self._path}: tensor {name} fits nothing in {self.directory}; {OTHER}")

    def _targets(self, module: str) -> bool:
        if not self._names(f"{module}.weight"):
            return False
        if not self._settings.targets(module):
            if f"{module}.weight" in self._tied and self._settings.on("ensure_weight_tying"):
                raise self._twice()
            raise UserError(
                f"{self._path} has factors of {module}, which target_modules, exclude_modules, "
                "layers_to_transform and target_parameters do not name; correct "
                f"{self._settings.path}"
            )
        return True

    def _twice(self) -> UserError:
        return UserError(
            f"{self._settings.path} has ensure_weight_tying with factors of tied matrices, which "
            "PEFT adds twice when it merges; untie the base before training"
        )

    def _note_factor(self, module: str, kind: str, bias: bool, value: np.ndarray) -> None:
        factors = self._factors.setdefault(module, Factors())
        if bias:
            factors.bias = value
        elif kind == "lora_magnitude_vector":
            factors.magnitude = value
        elif kind.startswith("lora_embedding"):  # stored [r, rows] and [columns, r]
            factors.embedding = True
            if kind.endswith("A"):
                factors.b = value.T
            else:
                factors.a = value.T
        elif kind == "lora_A":
            factors.a = value
        else:
            factors.b = value

    def _replace(self, name: str, target: str, value: np.ndarray, frozen: bool) -> None:
        kept = self.tensors[target]
        check_shape(f"{self._path}: {name}", value.shape, kept.shape, OTHER)
        for tensor in self._names(target):
            earlier = self._replaced.get(tensor)
            if earlier is not None and not np.array_equal(earlier, value):
                raise UserError(
                    f"{self._path} has two values of the tied matrices {', '.join(self._tied)}; "
                    "train with ensure_weight_tying, or untie the base first"
                )
            if frozen:  # goes into the base's parameter, which keeps its dtype
                value = value.astype(self._base(tensor).dtype)
            self._replaced[tensor] = value
            self.tensors[tensor] = dataclasses.replace(kept, dtype=value.dtype.name)

    def _names(self, tensor: str) -> list[str]:
        """The tensors that one of them stands for: of tied matrices all that are stored."""
        group = self._tied if tensor in self._tied else (tensor,)
        return [name for name in group if name in self.tensors]

    def _check_whole(self) -> None:
        """Raises UserError for what the settings name and the adapter does not have."""
        lacking = [("trained tokens", "trainable_token_indices")]
        lacking = lacking if self._settings.trains_tokens() and not self._tokens else []
        for name, info in self.tensors.items():
            module = name.removesuffix(".weight")
            if self._settings.saves(name.rpartition(".")[0]) and name not in self._replaced:
                lacking.append((name, "modules_to_save"))
            elif module != name and len(info.shape) == 2 and module not in self._factors:
                wanted = self._settings.wants(module)
                lacking += [(f"factors of {module}", "target_modules")] if wanted else []
        if lacking:
            what, setting = lacking[0]
            raise UserError(
                f"{self._path} lacks {what}, which {setting} names; save the adapter again"
            )

    def _add_factors(self, module: str, factors: Factors) -> None:
        a, b = factors.a, factors.b
        if a is None or b is None:
            raise UserError(f"{self._path} has only one of the two factors of {module}; {OTHER}")
        tensors = self._names(f"{module}.weight")
        if self._tied and f"{module}.weight" in self._tied:
            self._check_tied_factors(module, factors)
        transposed = (
            self.config.get("model_type") in TRANSPOSED
            and module != HEAD
            and not factors.embedding
            and not self._settings.of_parameter(module)
        )
        kept = self.tensors[tensors[0]]
        if kept.dtype not in FLOATS:
            raise UserError(
                f"{self.directory}: tensor {tensors[0]} is stored as {kept.dtype}; an adapter is "
                "added to floats alone, so name the base that is not quantised"
            )
        shape = (b.shape[0], a.shape[1])
        named = f"{self._path}: B A of {module}"
        check_shape(named, shape[::-1] if transposed else shape, kept.shape, OTHER)
        rank = self._settings.rank(module)
        if (a.shape[0], b.shape[1]) != (rank, rank):
            raise UserError(
                f"{self._path}: the factors of {module} have ranks {a.shape[0]} and {b.shape[1]}, "
                f"{PEFT_CONFIG} says {rank}; correct r or rank_pattern"
            )
        if self._settings.on("use_dora") != (factors.magnitude is not None):
            raise UserError(
                f"{self._path}: use_dora and the magnitude of {module} do not go together; save "
                "the adapter again"
            )
        scale = np.float32(self._settings.scale(module))
        # what lies beside the factors is the changed matrix itself
        as_it_is = factors.embedding or tensors[0] in self._replaced
        begun = "" if as_it_is else self._settings.begun

        def change(weight: np.ndarray) -> np.ndarray:
            if begun:
                rest = without_strongest(weight.T if transposed else weight, begun, rank, scale)
                weight = (rest.T if transposed else rest).astype(FLOATS[kept.dtype])
                weight = weight.astype(np.float32)  # rounded as PEFT keeps it
            delta = b.astype(np.float32) @ a.astype(np.float32)
            delta *= scale
            total = np.add(weight, delta.T if transposed else delta, out=weight)
            if factors.magnitude is None:
                return total
            axis = 0 if transposed or factors.embedding else 1
            norm = np.linalg.norm(total, axis=axis, keepdims=True)
            total *= factors.magnitude.astype(np.float32).reshape(norm.shape) / norm
            return total

        for tensor in tensors:
            self._added.setdefault(tensor, []).append(change)
        if factors.bias is not None:
            self._add_bias(module, factors.bias.astype(np.float32) * scale)

    def _check_tied_factors(self, module: str, factors: Factors) -> None:
        """Refuses what PEFT itself merges otherwise than it was trained, or in no clear order."""
        both = all(n.removesuffix(".weight") in self._factors for n in self._tied)
        if both and self._settings.on("ensure_weight_tying"):
            raise self._twice()
        if both and factors.magnitude is not None:
            raise UserError(
                f"{self._settings.path} has use_dora for both of two tied matrices, which have "
                "one magnitude only; untie the base before training"
            )
        if both and self._settings.begun and self._tied[0] not in self._replaced:
            raise UserError(
                f"{self._settings.path} has init_lora_weights {self._settings.begun!r} for both of "
                "two tied matrices; untie the base before training"
            )
        note = (
            f"{self.adapter} was trained on {module} alone of two tied matrices; what it adds "
            "changes both, as in PEFT"
        )
        self.notes += [note] if not both else []

    def _add_bias(self, module: str, value: np.ndarray) -> None:
        name = f"{module}.bias"
        if name not in self.tensors:
            raise UserError(
                f"{self._settings.path} has lora_bias, but {module} has no bias to add it to; PEFT "
                "cannot merge it either"
            )
        check_shape(f"{self._path}: bias of {module}", value.shape, self.tensors[name].shape, OTHER)
        self._added.setdefault(name, []).append(lambda bias: bias + value)

    def _add_rows(self, module: str, values: np.ndarray) -> None:
        """Rows of an embedding that were trained: `trainable_token_indices`."""
        tensors = self._names(f"{module}.weight")
        rows = list(self._settings.tokens(module, self._embedding.removesuffix(".weight")))
        if not tensors or not rows:
            raise UserError(
                f"{self._path} has trained tokens of {module}, which trainable_token_indices or "
                f"the base does not name; {OTHER}"
            )
        shape = self.tensors[tensors[0]].shape
        check_shape(f"{self._path}: tokens of {module}", values.shape, (len(rows), shape[1]), OTHER)
        if not all(type(i) is int and -shape[0] <= i < shape[0] for i in rows):
            raise UserError(
                f"{self._settings.path} has trainable_token_indices beyond the {shape[0]} rows of "
                f"{module}; {OTHER}"
            )
        if any(tensor in self._added and module in self._factors for tensor in tensors):
            raise UserError(
                f"{self._path} has factors and trained tokens of {module}; merge it with peft"
            )

        def change(weight: np.ndarray) -> np.ndarray:
            weight[rows] = values.astype(np.float32)
            return weight

        for tensor in tensors:
            self._added.setdefault(tensor, []).append(change)


def without_strongest(weight: np.ndarray, begun: str, rank: int, scale: np.float32) -> np.ndarray:
    """What is left of a matrix whose strongest part was made the factors before training."""
    if begun == "pissa":
        left, strengths, right = np.linalg.svd(weight, full_matrices=False)
        return weight - (left[:, :rank] * strengths[:rank]) @ right[:rank]
    q, r = np.linalg.qr(weight)
    return weight - scale * (q[:, :rank] @ r[:rank])


def _head_last(module: str) -> tuple[bool, str]:
    return (module == HEAD, module)
