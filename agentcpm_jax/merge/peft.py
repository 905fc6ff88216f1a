"""adapter_config.json of a LoRA adapter, read with PEFT's meaning.

    s = alpha / r, or alpha / sqrt(r) with `use_rslora`

r and alpha are those of the first pattern that matches the module's name, else the general ones.
A setting is read, known to leave merged weights alone, or refused by its name: nothing else.
`docs/adapters.md` has the same lists.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agentcpm_jax.hf.files import read_json
from agentcpm_jax.hf.names import PEFT_CONFIG
from agentcpm_jax.types import UserError

#: Settings that decide what is added to which tensor.
READ = (
    "peft_type",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "target_parameters",
    "modules_to_save",
    "trainable_token_indices",
    "ensure_weight_tying",
    "bias",
    "lora_bias",
)
#: Settings of training and book-keeping: any value gives the same merged weights. PEFT corrects
#: `fan_in_fan_out` by the kind of layer; the `*_config` count with their `init_lora_weights` only.
WITHOUT_EFFECT = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
)
#: Settings that must have their default: other products than B A, a changed base, or no merge.
REFUSED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
#: Values of `init_lora_weights` with which training began at the base as it is stored.
INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
#: Those with which it began at a changed base that can be computed again.
CHANGED_BASE = ("pissa", "olora")
DEFAULTS = (None, False, {}, [], "")
EXPECTED: Mapping[str, tuple[type, ...]] = {
    "rank_pattern": (dict, type(None)),
    "alpha_pattern": (dict, type(None)),
    "target_modules": (list, str, type(None)),
    "exclude_modules": (list, str, type(None)),
    "target_parameters": (list, type(None)),
    "modules_to_save": (list, type(None)),
    "trainable_token_indices": (list, dict, type(None)),
    "layers_to_transform": (list, int, type(None)),
    "layers_pattern": (list, str, type(None)),
}


class AdapterSettings:
    """The settings of one adapter; raises UserError for what would not be merged as PEFT does."""

    def __init__(self, directory: Path):
        self.path = directory / PEFT_CONFIG
        self._found = read_json(self.path)
        self._check()

    def on(self, key: str) -> bool:
        """Whether a switch is set."""
        return bool(self._found.get(key))

    def names(self, key: str) -> Sequence[str]:
        """A list of names; empty where there is none."""
        return self._found.get(key) or ()

    def rank(self, module: str) -> int:
        """Of the factors of a module."""
        return self._of(module, "rank_pattern", self._found.get("r", 8))

    def scale(self, module: str) -> float:
        """What the product of a module's factors counts."""
        alpha = self._of(module, "alpha_pattern", self._found.get("lora_alpha", 8))
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.on("use_rslora") else rank)

    @property
    def begun(self) -> str:
        """One of CHANGED_BASE where training began so; else empty."""
        start = self._start()
        return start if start in CHANGED_BASE else ""

    def tokens(self, module: str, embedding: str) -> Sequence[int]:
        """Rows of a module that were trained; `embedding` is the one a plain list is of."""
        found = self._found.get("trainable_token_indices") or {}
        if isinstance(found, list):
            return found if module == embedding else ()
        return next((rows for name, rows in found.items() if module.endswith(name)), ())

    def trains_tokens(self) -> bool:
        """Whether rows of an embedding were trained."""
        return bool(self._found.get("trainable_token_indices"))

    def of_parameter(self, module: str) -> bool:
        """Whether the factors are of the parameter `weight` itself, by `target_parameters`."""
        return _ends(f"{module}.weight", self.names("target_parameters"))

    def targets(self, module: str) -> bool:
        """Whether PEFT adds factors to this module."""
        if self.of_parameter(module):
            return True
        excluded = self._found.get("exclude_modules") or ()
        if isinstance(excluded, str):
            if re.fullmatch(excluded, module):
                return False
        elif _ends(module, excluded):
            return False
        if self.saves(module):
            return False
        wanted = self._found.get("target_modules")
        if wanted in (None, "all-linear"):
            return True
        if isinstance(wanted, str):
            return bool(re.fullmatch(wanted, module))
        return module in wanted or (_ends(module, wanted) and self._transforms(module))

    def wants(self, module: str) -> bool:
        """Whether the adapter must have factors of this matrix."""
        wanted = self._found.get("target_modules")
        open_ended = wanted in (None, "all-linear") and not self.of_parameter(module)
        # a model may hold its experts as one parameter, whatever its files do
        return not open_ended and ".experts." not in module and self.targets(module)

    def saves(self, module: str) -> bool:
        """Whether `modules_to_save` names the module or what it lies in."""
        return any(re.match(rf"(^|.*\.){m}($|\..*)", module) for m in self.names("modules_to_save"))

    def _transforms(self, module: str) -> bool:
        layers = self._found.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        patterns = self._found.get("layers_pattern") or [r"[^.]*"]
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module):
                return int(found[1]) in ([layers] if isinstance(layers, int) else layers)
        return False

    def _of(self, module: str, patterns: str, default: Any) -> Any:
        name = f"{module}.weight" if self.of_parameter(module) else module
        for pattern, value in (self._found.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        return default

    def _check(self) -> None:
        found = self._found
        if found.get("peft_type", "LORA") != "LORA":
            raise UserError(
                f"{self.path} is a {found['peft_type']} adapter; only LoRA can be merged"
            )
        for key, value in found.items():
            if key in READ or key in WITHOUT_EFFECT or value in DEFAULTS:
                continue
            known = "which cannot be merged exactly" if key in REFUSED else "which is not known"
            raise UserError(f"{self.path} has {key} {value!r}, {known}; merge it with peft")
        for key, kinds in EXPECTED.items():
            if not isinstance(found.get(key), kinds):
                raise UserError(f"{self.path} has {key} {found[key]!r}; save the adapter again")
        self._check_numbers()
        self._check_start()
        for name in self.names("target_parameters"):
            if name.rpartition(".")[2] != "weight":
                raise UserError(
                    f"{self.path} has target_parameters {name!r}, which is no matrix of its own; "
                    "merge it with peft"
                )

    def _start(self) -> Any:
        start = self._found.get("init_lora_weights", True)
        return start.lower() if isinstance(start, str) else start

    def _check_start(self) -> None:
        if self._start() not in (*INITIALISATIONS, *CHANGED_BASE):
            raise UserError(
                f"{self.path} has init_lora_weights {self._found['init_lora_weights']!r}, with "
                "which training began at a changed base; save it with "
                "path_initial_model_for_weight_conversion, or merge it with peft"
            )

    def _check_numbers(self) -> None:
        ranks = [("r", self._found.get("r", 8)), *self._items("rank_pattern")]
        for key, value in ranks:
            if type(value) is not int or value < 1:
                raise UserError(f"{self.path} has {key} {value!r}; a rank is a whole number from 1")
        alphas = [("lora_alpha", self._found.get("lora_alpha", 8)), *self._items("alpha_pattern")]
        for key, value in alphas:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and math.isfinite(value)):
                raise UserError(f"{self.path} has {key} {value!r}; it must be a finite number")
        if self._found.get("bias", "none") not in ("none", "all", "lora_only"):
            raise UserError(
                f"{self.path} has bias {self._found['bias']!r}; it is none, all or lora_only"
            )

    def _items(self, key: str) -> list[tuple[str, Any]]:
        patterns = self._found.get(key) or {}
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as e:
                raise UserError(f"{self.path} has {key} {pattern!r}: {e}; correct it") from None
        return [(f"{key} {pattern!r}", value) for pattern, value in patterns.items()]


def _ends(module: str, names: Sequence[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)
