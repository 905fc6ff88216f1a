"""The recipe of a merge: mergekit's YAML, read strictly.

    merge_method: task_arithmetic
    base_model: checkpoints/base
    models:
    - model: checkpoints/sft
      parameters: {weight: 0.6}
    parameters: {lambda: 1.0, normalize: false}
    dtype: float32        # inputs are cast to this first; default: the dtype they have
    out_dtype: bfloat16   # the result is rounded to this; default: `dtype`
    x_agentcpm:           # what mergekit does not have
      compute_dtype: float32   # or native: task arithmetic in the inputs' dtype, as mergekit does

Deviation from mergekit: what is unknown or misspelt is an error, not ignored.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from agentcpm_jax.merge.methods import FLOATS, SMALLEST_SUM
from agentcpm_jax.types import UserError

METHODS = ("linear", "task_arithmetic")
KNOWN_METHODS = (
    *("ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs"),
    *("breadcrumbs_ties", "slerp", "nuslerp", "multislerp", "karcher", "model_stock"),
    *("nearswap", "arcee_fusion", "passthrough", "sce", "ram", "ramplus_tl"),
)
TOP = ("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "x_agentcpm")
LATER = ("slices", "modules", "tokenizer", "tokenizer_source", "chat_template")


@dataclass(frozen=True)
class ModelEntry:
    """One input: a checkpoint directory and its weight."""

    model: str
    weight: float


@dataclass(frozen=True)
class MergeRecipe:
    """A checked merge. `linear` takes no base; `task_arithmetic` adds task vectors to it.

    `normalize` None stands for the method's own default: true for linear, false for task
    arithmetic. Raises UserError when a value is impossible.
    """

    models: tuple[ModelEntry, ...]
    merge_method: str = "linear"
    base_model: str = ""
    normalize: bool | None = None
    lambda_: float = 1.0
    dtype: str = ""
    out_dtype: str = ""
    compute_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.merge_method in KNOWN_METHODS:
            raise UserError(
                f"not supported yet: merge_method {self.merge_method}; use {' or '.join(METHODS)}"
            )
        if self.merge_method not in METHODS:
            raise UserError(
                f"unknown merge_method {self.merge_method!r}; use {' or '.join(METHODS)}"
            )
        if not self.models:
            raise UserError("the recipe lists no models; add at least one under `models`")
        names = [m.model for m in self.models]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"model {name} is listed twice; add its weights up")
        if self.merge_method == "linear":
            if self.base_model and self.base_model not in names:
                raise UserError(
                    f"linear has no base_model, but {self.base_model} is given; "
                    "list it under `models` with a weight"
                )
            if self.lambda_ != 1.0:
                raise UserError("linear has no lambda; use merge_method: task_arithmetic")
        elif not self.base_model:
            raise UserError("task_arithmetic needs base_model; name the model to add to")
        elif names == [self.base_model]:
            raise UserError(f"{self.base_model} is the only model; list one to add to the base")
        for field, value in (("dtype", self.dtype), ("out_dtype", self.out_dtype)):
            if value and value not in FLOATS:
                raise UserError(f"{field} {value!r} is not one of {', '.join(FLOATS)}")
        if self.compute_dtype not in ("float32", "native"):
            raise UserError(f"compute_dtype {self.compute_dtype!r} is not float32 or native")
        total = sum(m.weight for m in self.inputs)
        if self.normalized and not abs(total) > SMALLEST_SUM:
            raise UserError(
                f"the weights sum to {total:g}, which cannot be normalised; "
                "change them or set normalize: false"
            )

    @property
    def normalized(self) -> bool:
        """`normalize`, or the method's default."""
        return self.merge_method == "linear" if self.normalize is None else self.normalize

    @property
    def inputs(self) -> tuple[ModelEntry, ...]:
        """The weighted models; a listed base has no task vector of its own and is left out."""
        if self.merge_method == "linear":
            return self.models
        return tuple(m for m in self.models if m.model != self.base_model)

    def to_yaml(self) -> str:
        """The same recipe as mergekit YAML, with every default written out."""
        shared: dict[str, Any] = {"normalize": self.normalized}
        if self.merge_method == "task_arithmetic":
            shared["lambda"] = self.lambda_
        body: dict[str, Any] = {"merge_method": self.merge_method}
        if self.base_model:
            body["base_model"] = self.base_model
        body["models"] = [
            {"model": m.model, "parameters": {"weight": m.weight}} for m in self.models
        ]
        body["parameters"] = shared
        for field, value in (("dtype", self.dtype), ("out_dtype", self.out_dtype)):
            if value:
                body[field] = value
        if self.compute_dtype != "float32":
            body["x_agentcpm"] = {"compute_dtype": self.compute_dtype}
        return yaml.safe_dump(body, sort_keys=False)


def load_recipe(path: Path) -> MergeRecipe:
    """Reads a YAML file. Raises UserError, with the file's name, for whatever is wrong in it."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"recipe {path} does not exist; check the path") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"recipe {path} cannot be read: {e}") from None
    except yaml.YAMLError as e:
        raise UserError(f"recipe {path} is not YAML: {' '.join(str(e).split())}") from None
    try:
        return parse_recipe(data)
    except UserError as e:
        raise UserError(f"recipe {path}: {e}") from None


def parse_recipe(data: Any) -> MergeRecipe:
    """A recipe from parsed YAML.

    Raises:
      UserError: unknown or misspelt key, wrong type, or a feature of mergekit that is not here.
    """
    top = _mapping(data, "the recipe", TOP, LATER)
    if "merge_method" not in top:
        raise UserError(f"merge_method is missing; add one of {', '.join(METHODS)}")
    shared = _mapping(
        top.get("parameters") or {}, "parameters", ("weight", "normalize", "lambda"), ()
    )
    extra = _mapping(top.get("x_agentcpm") or {}, "x_agentcpm", ("compute_dtype",), ())
    normalize = shared.get("normalize")
    if normalize is not None and not isinstance(normalize, bool):
        raise UserError(f"normalize is {normalize!r}; write true or false")
    models = top.get("models") or []
    if not isinstance(models, list):
        raise UserError("`models` is not a list; write one `- model: ...` per input")
    method = _text(top["merge_method"], "merge_method")
    base = _text(top.get("base_model") or "", "base_model")
    # a base among the models has no task vector, so it needs no weight; in `linear` it does
    weightless = base if method != "linear" else ""
    return MergeRecipe(
        merge_method=method,
        base_model=base,
        models=tuple(_model_entry(m, shared, weightless) for m in models),
        normalize=normalize,
        lambda_=_number(shared.get("lambda", 1.0), "lambda"),
        dtype=_text(top.get("dtype") or "", "dtype"),
        out_dtype=_text(top.get("out_dtype") or "", "out_dtype"),
        compute_dtype=_text(extra.get("compute_dtype", "float32"), "compute_dtype"),
    )


def _model_entry(data: Any, shared: Mapping[str, Any], weightless: str) -> ModelEntry:
    entry = _mapping(data, "an entry of models", ("model", "parameters"), ())
    name = _text(entry.get("model"), "model")
    where = f"parameters of {name}"
    parameters = _mapping(entry.get("parameters") or {}, where, ("weight",), ())
    weight = parameters.get("weight", shared.get("weight"))
    if weight is None and name == weightless:
        weight = 0.0
    if weight is None:
        raise UserError(f"model {name} has no weight; add `parameters: {{weight: ...}}`")
    return ModelEntry(name, _number(weight, f"weight of {name}"))


def _mapping(
    data: Any, where: str, known: tuple[str, ...], later: tuple[str, ...]
) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise UserError(f"{where} is {type(data).__name__}, not `key: value` lines")
    for key in data:
        if key in later:
            raise UserError(f"not supported yet: {key}")
        if key not in known:
            raise UserError(f"unknown key {key!r} in {where}; known: {', '.join(known)}")
    return data


def _number(value: Any, where: str) -> float:
    if isinstance(value, list):
        kind = "filters" if any(isinstance(v, Mapping) for v in value) else "per-layer gradient"
        raise UserError(f"not supported yet: {kind} ({where}); write one number")
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where} is {value!r}; write a finite number")
    return float(value)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where} is {value!r}; write a name")
    return value
