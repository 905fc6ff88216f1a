"""The recipe of a merge: mergekit's YAML, read strictly.

    merge_method: ties
    base_model: checkpoints/base          # a directory, or org/name[@revision] of the Hub cache
    models:                               # or slices: [{sources: [{model, layer_range}, ...]}, ...]
    - model: checkpoints/sft+adapters/x   # a LoRA adapter is added first
      parameters: {weight: 0.6, density: 0.5}
    - model: checkpoints/rl
      parameters:
        weight:
        - {filter: mlp, value: [0.2, 0.8]}  # a gradient over the layers
        - {value: 0.5}
        density: 0.5
    parameters: {lambda: 1.0, normalize: true}
    dtype: float32        # inputs are cast to this first; default: the dtype they have
    out_dtype: bfloat16   # the result is rounded to this; default: `dtype`
    tokenizer: {source: union}
    chat_template: auto
    compat: mergekit-0.1.5                # its formulas and quirks, see below

A setting of a parameter is a value; a list of values, which is a gradient over the layers of a
slice; or a list of `{filter, value}`, whose first entry that fits the tensor's name counts.

    position of layer i of L:  t = i / (L - 1), 1 of a single layer, 0 outside the layers
    gradient of K numbers:     s = t (K - 1), i = floor(s), (1 - s + i) v_i + (s - i) v_(i+1)
    gradient of K others:      v_floor(s)

`compat` gives mergekit's numbers up to the order of sums in float32: 2e-6 relative. In 16 bits,
where mergekit rounds after every operation of most methods, linear, slerp, passthrough and ram come
within one step of the dtype (entries that cancel excepted, 1 in 20,000), the others within 2 % of a
tensor's largest entry; but ties, breadcrumbs and sce may keep other entries of equal magnitude.
ramplus_tl keeps the dtype, where mergekit writes float32. Random masks come from a generator of
PyTorch's and are not reproduced.

Deviation from mergekit: what is unknown, misspelt or without effect is an error. Under `compat`
such keys are ignored, as there, but reported as notes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from agentcpm_jax.merge.kernels.methods import METHODS, WITHOUT_EFFECT, MethodSpec, spec_of
from agentcpm_jax.merge.kernels.task_vectors import ELECTIONS, RESCALES
from agentcpm_jax.merge.vocabulary import TokenizerOptions, parse_tokenizer
from agentcpm_jax.types import UserError

COMPAT = "mergekit-0.1.5"
DTYPES = ("float64", "float32", "float16", "bfloat16")
BODY = ("models", "slices", "modules")
TOP = (
    "merge_method",
    "base_model",
    *BODY,
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer",
    "tokenizer_source",
    "chat_template",
    "compat",
)
CHOICES = {"rescale": RESCALES, "elect": ELECTIONS, "trim_scope": ("tensor", "model")}


MISSING: Any = object()  # None is a value


@dataclass(frozen=True)
class Source:
    """One input of a slice: a model, and which of its layers [first, last); None: all."""

    model: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[int, int] | None = None


@dataclass(frozen=True)
class Slice:
    """Consecutive layers of the output, merged from as many layers of each source."""

    sources: tuple[Source, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    base_model: str = ""


@dataclass(frozen=True)
class MergeRecipe:
    """A checked merge; made by `parse_recipe`.

    Attributes:
      slices: in the order of the output's layers; `models:` is one slice of all layers.
      scopes: shared parameter settings, those of the module before those of the top level.
      notes: what was ignored under `compat`, for people.
      raw: the YAML as it was read, for the model card.
    """

    merge_method: str
    slices: tuple[Slice, ...]
    base_model: str = ""
    scopes: tuple[Mapping[str, Any], ...] = ()
    dtype: str = ""
    out_dtype: str = ""
    tokenizer: TokenizerOptions | None = None
    chat_template: str = ""
    compat: bool = False
    notes: tuple[str, ...] = ()
    raw: Mapping[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> MethodSpec:
        """What the method needs."""
        return METHODS[self.merge_method]

    @property
    def base_apart(self) -> bool:
        """Whether the method treats the base differently from its other inputs."""
        return self.spec.needs_base is not False

    @property
    def models(self) -> tuple[str, ...]:
        """Every model once: as listed, then the bases that are not listed."""
        listed = [s.model for part in self.slices for s in part.sources]
        bases = [part.base_model or self.base_model for part in self.slices]
        return tuple(dict.fromkeys([*listed, *(b for b in bases if b)]))

    def to_yaml(self) -> str:
        """The recipe as it was read, with `compat` if that was a flag."""
        return yaml.safe_dump(dict(self.raw), sort_keys=False, allow_unicode=True)


def load_recipe(path: Path, compat: str = "") -> MergeRecipe:
    """Reads a YAML file; `compat`, if given, replaces its key of that name.

    Raises UserError, with the file's name, for whatever is wrong in it.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"recipe {path} does not exist; check the path") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"recipe {path} cannot be read: {e}; give a YAML file") from None
    except yaml.YAMLError as e:
        raise UserError(f"recipe {path} is not YAML: {' '.join(str(e).split())}") from None
    try:
        return parse_recipe(data, compat)
    except UserError as e:
        raise UserError(f"recipe {path}: {e}") from None


def parse_recipe(data: Any, compat: str = "") -> MergeRecipe:
    """A recipe from parsed YAML.

    Raises:
      UserError: unknown or misspelt key, wrong type, impossible combination.
    """
    if isinstance(data, Mapping) and "x_agentcpm" in data:
        raise UserError(f"x_agentcpm is no longer read; write `compat: {COMPAT}` instead")
    compat = compat or (data.get("compat") or "" if isinstance(data, Mapping) else "")
    if compat not in ("", COMPAT):
        raise UserError(f"compat is {compat!r}; write {COMPAT} or leave it out")
    reader = _Reader(compat=bool(compat))
    top = reader.mapping(data, "the recipe", TOP)
    method = top.get("merge_method")
    if method is None:
        raise UserError(f"merge_method is missing; add one of {', '.join(METHODS)}")
    reader.spec = spec_of(method)
    base = _model_name(top["base_model"], "base_model") if top.get("base_model") else ""
    shared = reader.parameters(top.get("parameters"), "parameters")
    slices, module = _body(reader, top)
    template = top.get("chat_template") or ""
    if not isinstance(template, str):
        raise UserError(f"chat_template is {template!r}; write text")
    recipe = MergeRecipe(
        merge_method=method,
        base_model=base,
        slices=slices,
        scopes=(module, shared),
        dtype=_dtype(top.get("dtype"), "dtype"),
        out_dtype=_dtype(top.get("out_dtype"), "out_dtype"),
        tokenizer=parse_tokenizer(top.get("tokenizer"), top.get("tokenizer_source"), _model_name),
        chat_template=template,
        compat=bool(compat),
        notes=tuple(reader.notes),
        raw={**data, "compat": compat} if compat else dict(data),
    )
    _check_models(recipe)
    return recipe


def value_for(key: str, tensor: str, t: float, scopes: Sequence[Mapping[str, Any]]) -> Any:
    """The value of parameter `key` for `tensor`: from the first scope that has one, or MISSING.

    Args:
      tensor: name the filters are matched against, as substrings.
      t: position of the tensor's layer in its slice, 0 to 1.
      scopes: settings by parameter name, the most specific first.
    """
    for scope in scopes:
        if key in scope and (value := _fitting(scope[key], tensor)) is not MISSING:
            return _at(value, t)
    return MISSING


def filters(setting: Any) -> Iterator[str]:
    """The name filters of a setting, but for those that fit every tensor."""
    if _is_filtered(setting):
        for entry in setting:
            if entry.get("filter") not in (None, "*"):
                yield entry["filter"]


class _Reader:
    """Reads mappings; an unknown key is an error or, under `compat`, a note."""

    def __init__(self, compat: bool):
        self.compat = compat
        self.notes: list[str] = []
        self.spec: MethodSpec

    def mapping(self, data: Any, where: str, known: Sequence[str]) -> dict[str, Any]:
        if not isinstance(data, Mapping):
            raise UserError(f"{where} is {type(data).__name__}, not `key: value` lines")
        return {k: v for k, v in data.items() if self._known(k, where, known)}

    def parameters(self, data: Any, where: str, per_model: bool = False) -> dict[str, Any]:
        """Settings by name, each checked against the method's parameters."""
        shared, own = self.spec.global_params, dict(self.spec.model_params)
        own.pop("keep", None)  # computed, see `streaming`
        known = {**own} if per_model else {**shared, **own}
        if data is None:
            return {}
        if not isinstance(data, Mapping):
            raise UserError(f"{where} is {type(data).__name__}, not `key: value` lines")
        out = {}
        for key, value in data.items():
            if key in WITHOUT_EFFECT and key not in shared:
                continue
            if per_model and key in shared and not self.compat:
                raise UserError(
                    f"{key} in {where} is shared by all models; move it to the top-level parameters"
                )
            if self._known(key, where, tuple(known), f" of {self.spec.name}"):
                _check_setting(value, known[key], f"{key} in {where}", CHOICES.get(key, ()))
                out[key] = value
        return out

    def _known(self, key: Any, where: str, known: Sequence[str], of: str = "") -> bool:
        if key in known:
            return True
        text = f"unknown key {key!r} in {where}; known{of}: {', '.join(known) or 'none'}"
        if not self.compat:
            raise UserError(text)
        self.notes.append(f"{text}; ignored")
        return False


def _check_setting(setting: Any, default: Any, where: str, choices: Sequence[str] = ()) -> None:
    """Raises UserError, naming `where`, unless every value is of the kind of `default`."""
    if _is_filtered(setting):
        for entry in setting:
            if not isinstance(entry, Mapping):
                raise UserError(f"{where} mixes filters and values; give every value a filter")
            if "value" not in entry or not set(entry) <= {"filter", "value"}:
                raise UserError(f"{where}: {dict(entry)!r} is not {{filter: ..., value: ...}}")
            if not isinstance(entry.get("filter", ""), str | None):
                raise UserError(
                    f"{where}: filter {entry['filter']!r} is no part of a tensor's name"
                )
            if _is_filtered(entry["value"]):
                raise UserError(f"{where} has filters within a filter; list them one by one")
            _check_setting(entry["value"], default, where, choices)
        return
    values = setting if isinstance(setting, list) else [setting]
    if not values:
        raise UserError(f"{where} is an empty list; write one value per knot of the gradient")
    for value in values:
        _check_value(value, default, where, choices)


def _check_value(value: Any, default: Any, where: str, choices: Sequence[str]) -> None:
    if choices:
        wrong = value not in choices and not (isinstance(default, bool) and value in (True, False))
        expected = ", ".join([*choices, *(["true", "false"] if isinstance(default, bool) else [])])
    elif isinstance(default, bool):
        wrong, expected = value not in (True, False), "true or false"
    else:
        number = _number(value)
        numeric = isinstance(number, int | float) and not isinstance(number, bool)
        wrong, expected = not (numeric and math.isfinite(number)), "a finite number"
    if wrong:
        raise UserError(f"{where} is {value!r}; write {expected}")


def _number(value: Any) -> Any:
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def _body(reader: _Reader, top: Mapping[str, Any]) -> tuple[tuple[Slice, ...], dict[str, Any]]:
    """The slices, and the parameters of the module if there is one."""
    given = [key for key in BODY if top.get(key) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        raise UserError(f"give one of models, slices and modules; the recipe has {found}")
    if given == ["models"]:
        return (_models_slice(reader, top["models"]),), {}
    if given == ["slices"]:
        return _slices(reader, top["slices"]), {}
    modules = top["modules"]
    if not isinstance(modules, Mapping) or list(modules) != ["default"]:
        names = ", ".join(map(str, modules)) if isinstance(modules, Mapping) else repr(modules)
        raise UserError(f"modules are {names}; a text model has one, called default")
    module = reader.mapping(
        modules["default"], "module default", ("models", "slices", "parameters")
    )
    parameters = reader.parameters(module.get("parameters"), "parameters of module default")
    body = {key: module.get(key) for key in ("models", "slices")}
    return _body(reader, body)[0], parameters


def _models_slice(reader: _Reader, data: Any) -> Slice:
    if not isinstance(data, list):
        raise UserError("`models` is not a list; write one `- model: ...` per input")
    if not data:
        raise UserError("the recipe lists no models; add at least one under `models`")
    return Slice(tuple(_source(reader, entry, "models", ("model", "parameters")) for entry in data))


def _slices(reader: _Reader, data: Any) -> tuple[Slice, ...]:
    if not isinstance(data, list) or not data:
        raise UserError("`slices` is not a list of `- sources: [...]` entries; add at least one")
    slices = []
    for i, entry in enumerate(data):
        where = f"slice {i}"
        part = reader.mapping(entry, where, ("sources", "parameters", "base_model"))
        sources = part.get("sources")
        if not isinstance(sources, list) or not sources:
            raise UserError(f"{where} has no sources; add `sources: [{{model, layer_range}}]`")
        known = ("model", "layer_range", "parameters")
        read = tuple(_source(reader, s, f"sources of {where}", known) for s in sources)
        for s in read:
            if s.layers is None:
                raise UserError(f"{s.model} in {where} has no layer_range; add [first, last]")
        lengths = {s.layers[1] - s.layers[0] for s in read if s.layers}
        if len(lengths) > 1:
            ranges = ", ".join(f"{s.model} {list(s.layers or ())}" for s in read)
            raise UserError(f"layer ranges of {where} differ in length: {ranges}; make them equal")
        base = _model_name(part["base_model"], "base_model") if part.get("base_model") else ""
        parameters = reader.parameters(part.get("parameters"), f"parameters of {where}")
        slices.append(Slice(read, parameters, base))
    return tuple(slices)


def _source(reader: _Reader, data: Any, where: str, known: Sequence[str]) -> Source:
    entry = reader.mapping(data, f"an entry of {where}", known)
    if "model" not in entry:
        raise UserError(f"an entry of {where} names no model; add `model: ...`")
    name = _model_name(entry["model"], "model")
    layers = entry.get("layer_range")
    if layers is not None and not _is_range(layers):
        raise UserError(
            f"layer_range of {name} is {layers!r}; write [first, last] with 0 <= first < last "
            "(last is not included)"
        )
    parameters = reader.parameters(entry.get("parameters"), f"parameters of {name}", True)
    return Source(name, parameters, (layers[0], layers[1]) if layers else None)


def _is_range(value: Any) -> bool:
    whole = isinstance(value, list) and len(value) == 2 and all(type(v) is int for v in value)
    return whole and 0 <= value[0] < value[1]


def _check_models(recipe: MergeRecipe) -> None:
    spec = recipe.spec
    for part in recipe.slices:
        names = [s.model for s in part.sources]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"model {name} is listed twice; add its weights up")
        base = part.base_model or recipe.base_model
        if spec.needs_base is True and not base:
            raise UserError(f"{spec.name} needs base_model; name the model to start from")
        inputs, besides = set(names), ""
        if part.sources[0].layers is None and base:
            inputs |= {base}
        if recipe.base_apart and base:
            inputs, besides = inputs - {base}, " besides the base"
        found = f"model(s){besides}, found {len(inputs)}"
        if len(inputs) < spec.min_models:
            raise UserError(f"{spec.name} needs at least {spec.min_models} {found}; list more")
        if spec.max_models is not None and len(inputs) > spec.max_models:
            raise UserError(f"{spec.name} takes at most {spec.max_models} {found}; list fewer")


def _model_name(value: Any, where: str) -> str:
    """`path`, `path@revision` or `path+lora`; mergekit's mapping form becomes such text."""
    if isinstance(value, str) and value:
        return value
    if isinstance(value, Mapping) and set(value) <= {"model", "lora", "override_architecture"}:
        if value.get("override_architecture"):
            raise UserError(f"{where}: override_architecture is not supported; remove it")
        lora = value.get("lora")
        return _pinned(value.get("model"), where) + (f"+{_pinned(lora, where)}" if lora else "")
    raise UserError(f"{where} is {value!r}; write the name of a model")


def _pinned(value: Any, where: str) -> str:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, Mapping) and set(value) <= {"path", "revision"} and value.get("path"):
        revision = value.get("revision")
        return f"{value['path']}@{revision}" if revision else str(value["path"])
    raise UserError(f"{where} is {value!r}; write a path, or {{path: ..., revision: ...}}")


def _dtype(value: Any, where: str) -> str:
    if value is None:
        return ""
    name = str(value).removeprefix("torch.")
    if name not in DTYPES:
        raise UserError(f"{where} {value!r} is not one of {', '.join(DTYPES)}")
    return name


def _is_filtered(setting: Any) -> bool:
    return isinstance(setting, list) and any(isinstance(entry, Mapping) for entry in setting)


def _fitting(setting: Any, tensor: str) -> Any:
    if not _is_filtered(setting):
        return setting
    for entry in setting:
        wanted = entry.get("filter")
        if wanted in (None, "*") or wanted in tensor:
            return entry["value"]
    return MISSING


def _at(value: Any, t: float) -> Any:
    if not isinstance(value, list):
        return _number(value)
    knots = [_number(v) for v in value]
    s = t * (len(knots) - 1)
    i = math.floor(s)
    if any(isinstance(v, bool | str) for v in knots):
        return knots[i]
    fraction = s - i
    return (1 - fraction) * knots[i] + fraction * knots[min(i + 1, len(knots) - 1)]
