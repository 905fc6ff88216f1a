"""From a recipe and open checkpoints to one job per output tensor.

Names come from the checkpoints themselves: the first number in a tensor's name is its layer. The
output has every tensor its inputs have; one that an input lacks is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentcpm_jax.hf.files import FLOATS, TensorInfo
from agentcpm_jax.hf.names import text_config
from agentcpm_jax.merge.inputs import MergeInput
from agentcpm_jax.merge.kernels.methods import REQUIRED, promoted_dtype
from agentcpm_jax.merge.kernels.ops import SMALLEST_SUM
from agentcpm_jax.merge.recipe import MISSING, MergeRecipe, Slice, Source, filters, value_for
from agentcpm_jax.types import UserError

#: In names of matrices before the layers, where layers lie at the top and place says nothing.
BEFORE_LAYERS = ("embed", "wte", "wpe")


@dataclass(frozen=True)
class TensorJob:
    """How one output tensor is made.

    Attributes:
      name: in the output.
      info: its shape and the dtype it is stored in.
      inputs: (model, tensor name there), the base not among them if the method keeps it apart.
      base: (model, tensor name) or None.
      shared, own: resolved parameters, of the merge and of each input.
      layer: number in the output, None outside the layers.
    """

    name: str
    info: TensorInfo
    inputs: tuple[tuple[str, str], ...]
    base: tuple[str, str] | None
    shared: Mapping[str, Any]
    own: tuple[Mapping[str, Any], ...]
    layer: int | None = None

    @property
    def places(self) -> list[tuple[str, str]]:
        """(model, tensor name) of all that is read, the base last."""
        return [*self.inputs, self.base] if self.base else [*self.inputs]


def resolve_jobs(recipe: MergeRecipe, models: Mapping[str, MergeInput]) -> list[TensorJob]:
    """The jobs, sorted by name.

    Raises:
      UserError: a tensor, layer or parameter is missing, shapes differ, weights sum to zero.
    """
    layouts = {name: _Layout(model) for name, model in models.items()}
    jobs: dict[str, TensorJob] = {}
    start, last = 0, len(recipe.slices) - 1
    for number, part in enumerate(recipe.slices):
        base = part.base_model or recipe.base_model
        sources = _with_base(recipe, part, base, layouts)
        used = [layouts[s.model] for s in sources]
        for depth in range(_depth(sources, used)):
            for tail in _union(
                u.layer(_first(s) + depth) for u, s in zip(used, sources, strict=True)
            ):
                names = [
                    u.named(_first(s) + depth, tail) for u, s in zip(used, sources, strict=True)
                ]
                out = used[0].named(start + depth, tail)
                place = _Place(out, depth, start + depth)
                jobs[out] = _job(recipe, part, sources, base, names, place, models, used)
        for out in _union(u.outside for u in used):
            before = _before_layers(out, used[0].stem, models[sources[0].model])
            if number == (0 if before else last):
                place = _Place(out, None, None)
                jobs[out] = _job(
                    recipe, part, sources, base, [out] * len(sources), place, models, used
                )
        start += _depth(sources, used)
    return [jobs[name] for name in sorted(jobs)]


def unmatched_filters(recipe: MergeRecipe, jobs: Sequence[TensorJob]) -> list[str]:
    """A note for every filter that fits no tensor."""
    names = {j.name for j in jobs} | {name for j in jobs for _, name in j.places}
    scopes = [*recipe.scopes]
    for part in recipe.slices:
        scopes += [part.parameters, *(s.parameters for s in part.sources)]
    wanted = {(f, key) for scope in scopes for key, value in scope.items() for f in filters(value)}
    return [
        f"filter {f!r} of {key} fits no tensor"
        for f, key in sorted(wanted)
        if not any(f in name for name in names)
    ]


def rounding_notes(
    recipe: MergeRecipe, jobs: Sequence[TensorJob], models: Mapping[str, MergeInput]
) -> list[str]:
    """A note for each dtype of the inputs that `dtype` or the output rounds."""
    rounded: dict[tuple[str, str], int] = {}
    for job in jobs:
        kinds = {models[model].tensors[name].dtype for model, name in job.places}
        stored = promoted_dtype([FLOATS[kind] for kind in kinds]).name
        for kind in {recipe.dtype or job.info.dtype, job.info.dtype}:
            if promoted_dtype([FLOATS[stored], FLOATS[kind]]).name != kind:
                rounded[stored, kind] = rounded.get((stored, kind), 0) + 1
    return [f"{n} tensors are rounded from {a} to {b}" for (a, b), n in sorted(rounded.items())]


def layer_of(name: str) -> tuple[str, int, str] | None:
    """`model.layers.3.mlp.up.weight` -> ('model.layers', 3, 'mlp.up.weight'); None outside."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:i]), int(part), ".".join(parts[i + 1 :])
    return None


class _Layout:
    """Which tensors of a checkpoint are in which layer."""

    def __init__(self, model: MergeInput):
        self.layers: dict[int, list[str]] = {}
        self.outside: list[str] = []
        self.stem = self._stem(model)
        for name in model.tensors:
            place = layer_of(name)
            if place and place[0] == self.stem:
                self.layers.setdefault(place[1], []).append(place[2])
            else:
                self.outside.append(name)

    def layer(self, number: int) -> list[str]:
        return self.layers.get(number, [])

    def named(self, number: int, tail: str) -> str:
        return f"{self.stem}.{number}.{tail}"

    @staticmethod
    def _stem(model: MergeInput) -> str:
        """The prefix of the stack with as many layers as config.json says, else of the deepest."""
        stacks: dict[str, set[int]] = {}
        for name in model.tensors:
            if place := layer_of(name):
                stacks.setdefault(place[0], set()).add(place[1])
        wanted = text_config(model.config).get("num_hidden_layers")
        for stem, numbers in sorted(stacks.items()):
            if len(numbers) == wanted:
                return stem
        return max(sorted(stacks), key=lambda stem: len(stacks[stem]), default="")


def _before_layers(name: str, stem: str, model: MergeInput) -> bool:
    """Matrices beside the stack of layers come before it; norms and what lies above it, after."""
    if name not in model.tensors or len(model.tensors[name].shape) != 2:
        return False
    parent = stem.rpartition(".")[0]
    return name.startswith(f"{parent}.") if parent else any(w in name for w in BEFORE_LAYERS)


@dataclass(frozen=True)
class _Place:
    """Name of an output tensor, its layer within its slice and within the model."""

    name: str
    depth: int | None
    layer: int | None


def _job(
    recipe: MergeRecipe,
    part: Slice,
    sources: Sequence[Source],
    base: str,
    names: Sequence[str],
    place: _Place,
    models: Mapping[str, MergeInput],
    used: Sequence[_Layout],
) -> TensorJob:
    infos = []
    for source, name in zip(sources, names, strict=True):
        if name not in models[source.model].tensors:
            raise UserError(
                f"tensor {name} is missing from {source.model}; merge models of one "
                "architecture, all with tied or all with untied embeddings"
            )
        infos.append(models[source.model].tensors[name])
    for source, info in zip(sources, infos, strict=True):
        if info.shape != infos[0].shape:
            raise UserError(
                f"tensor {place.name} has shape {infos[0].shape} in {sources[0].model} but "
                f"{info.shape} in {source.model}; merge models of one architecture and one "
                "vocabulary, or align vocabularies with `tokenizer: {source: base}`"
            )
    depth = _depth(sources, used)
    t = 0.0 if place.depth is None else place.depth / (depth - 1) if depth > 1 else 1.0
    scopes = (part.parameters, *recipe.scopes)
    shared = {
        key: _value(key, place.name, t, scopes, default)
        for key, default in recipe.spec.global_params.items()
    }
    inputs, own = [], []
    for source, name in zip(sources, names, strict=True):
        if recipe.base_apart and source.model == base:
            continue
        inputs.append((source.model, name))
        own.append(_own(recipe, source, name, t, scopes))
    for key, value in shared.items():
        if value is REQUIRED:
            raise UserError(f"{key} is missing for tensor {place.name}; add it to `parameters`")
    _check_sum(recipe, place.name, shared, own)
    at = next((n for s, n in zip(sources, names, strict=True) if s.model == base), None)
    return TensorJob(
        name=place.name,
        info=TensorInfo(infos[0].shape, _out_dtype(recipe, place.name, infos)),
        inputs=tuple(inputs),
        base=(base, at) if recipe.base_apart and at is not None else None,
        shared=shared,
        own=tuple(own),
        layer=place.layer,
    )


def _own(
    recipe: MergeRecipe, source: Source, name: str, t: float, scopes: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The parameters of one input."""
    values = {}
    for key, default in recipe.spec.model_params.items():
        values[key] = _value(key, name, t, (source.parameters, *scopes), default)
        if values[key] is REQUIRED:
            raise UserError(
                f"model {source.model} has no {key} for tensor {name}; "
                f"add `parameters: {{{key}: ...}}`"
            )
    return values


def _with_base(
    recipe: MergeRecipe, part: Slice, base: str, layouts: Mapping[str, _Layout]
) -> list[Source]:
    """The sources, and the base as the last one if it takes part and is not listed."""
    sources = list(part.sources)
    for s in sources:
        count = len(layouts[s.model].layers)
        if s.layers and s.layers[1] > count:
            raise UserError(
                f"layer_range {list(s.layers)} of {s.model} goes beyond its {count} layers; "
                "the last number is not included"
            )
    whole = sources[0].layers is None
    if base and base not in [s.model for s in sources] and (whole or recipe.base_apart):
        ranges = {s.layers for s in sources}
        if len(ranges) > 1:
            raise UserError(
                f"base_model {base} is not among the sources of a slice whose layer ranges differ; "
                "add it with its layer_range"
            )
        sources.append(Source(base, {}, ranges.pop()))
    return sources


def _depth(sources: Sequence[Source], used: Sequence[_Layout]) -> int:
    ranges = sources[0].layers
    return ranges[1] - ranges[0] if ranges else max(len(u.layers) for u in used)


def _first(source: Source) -> int:
    return source.layers[0] if source.layers else 0


def _union(lists: Iterable[Iterable[str]]) -> list[str]:
    return sorted({name for names in lists for name in names})


def _value(
    key: str, tensor: str, t: float, scopes: Sequence[Mapping[str, Any]], default: Any
) -> Any:
    value = value_for(key, tensor, t, scopes)
    if value is MISSING:
        return default
    return bool(value) if isinstance(default, bool) and not isinstance(value, str) else value


def _check_sum(
    recipe: MergeRecipe,
    tensor: str,
    shared: Mapping[str, Any],
    own: Sequence[Mapping[str, Any]],
) -> None:
    """Raises UserError for weights that sum to zero; elected signs give each element its own."""
    normalize = shared.get("normalize", shared.get("normalize_weights"))
    electing = "ties" in recipe.merge_method or recipe.merge_method in ("della", "sce")
    if not normalize or electing or not all("weight" in o for o in own):
        return
    weights = [float(o["weight"]) for o in own]
    if not abs(sum(weights)) > SMALLEST_SUM:
        raise UserError(
            f"the weights {weights} of tensor {tensor} sum to {sum(weights):g}, which cannot be "
            "normalised; change them or set normalize: false"
        )


def _out_dtype(recipe: MergeRecipe, name: str, infos: Sequence[TensorInfo]) -> str:
    for info in infos:
        if info.dtype not in FLOATS:
            raise UserError(
                f"tensor {name} has dtype {info.dtype}, which cannot be merged; "
                "convert the checkpoint to a float first"
            )
    if recipe.out_dtype:
        return recipe.out_dtype
    promoted = recipe.dtype or promoted_dtype([FLOATS[i.dtype] for i in infos]).name
    if recipe.compat and recipe.merge_method == "arcee_fusion" and promoted != "float64":
        return "float32"  # its score is float32, and mergekit keeps what that promotes to
    return promoted
