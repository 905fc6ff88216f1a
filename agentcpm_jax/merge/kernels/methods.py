"""The merge methods by mergekit's names, and `merge_tensors`, which runs any of them on one tensor.

The formulas are in `means`, `pairs`, `spherical` and `task_vectors`, each written once over the
operations of `ops`. `trees.merge_tree` runs a method on whole models.

Deviations from the common tool, mergekit 0.1.5; 1 to 3 are undone by `compat`:
1. Arithmetic is in float32 (float64 if an input is), rounded once at the end. mergekit rounds
   16-bit models after every operation of most methods; `compat` in another order than PyTorch.
2. DARE and DELLA rescale what they keep by the inverse of the probability of keeping it, as the
   papers do. mergekit matches the L1 norm of the whole tensor instead, which is biased for DELLA.
3. Guards against division by zero are relative to the tensor (model_stock, sce): reinforcement
   learning moves weights by less than mergekit's absolute 1e-6, which then counts as nothing.
4. Randomness is a function of (seed, tensor name, model, element), not of a global generator.
5. Of equal magnitudes at a threshold those of the lowest index are kept, and DELLA ranks them in
   the order of their index. mergekit's order is unspecified.
6. Weights that sum to zero under `normalize`, NaN and infinite inputs are errors that name the
   tensor. A model of weight 0 is left out, so that it cannot disturb even the sign of a zero.
"""

from __future__ import annotations

import functools
import keyword
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from agentcpm_jax.hf.files import FLOATS
from agentcpm_jax.merge.kernels.chunked import Chunked
from agentcpm_jax.merge.kernels.means import model_stock, ram, sce, weighted_mean
from agentcpm_jax.merge.kernels.ops import Array, Ops
from agentcpm_jax.merge.kernels.pairs import arcee_fusion, nearswap, passthrough
from agentcpm_jax.merge.kernels.spherical import karcher, multislerp, nuslerp, slerp
from agentcpm_jax.merge.kernels.task_vectors import merge_task_vectors
from agentcpm_jax.types import UserError

REQUIRED = object()  # of a parameter without a default
#: Switches of mergekit that change its use of memory, never a result.
WITHOUT_EFFECT = ("int8_mask",)
#: Parameters that no kernel takes: the scope of trimming reaches it as each model's `keep`.
NOT_OF_KERNELS = (*WITHOUT_EFFECT, "trim_scope")


@dataclass(frozen=True)
class MethodSpec:
    """What a method is called with: the one place that says which parameters it takes.

    Attributes:
      fn: (operations, tensors, *, parameters...) -> tensor; called through `merge_tensors`.
        Parameters come by their names: `base` if it can have one, shared ones as they are, those of
        the models as sequences with one entry per tensor.
      global_params: shared parameters with their defaults, or REQUIRED.
      model_params: parameters of each input other than the base, likewise.
      needs_base: True; False (a base is an input like any other, without rights); or "optional".
      min_models, max_models: how many inputs, not counting the base; None: any number.
    """

    name: str
    fn: Callable[..., Any]
    global_params: Mapping[str, Any]
    model_params: Mapping[str, Any]
    needs_base: bool | Literal["optional"]
    min_models: int = 1
    max_models: int | None = None


def _task_vector_method(
    name: str,
    sparsify: str,
    *,
    elected: bool = False,
    normalize: bool = False,
    rescale: bool = False,
    **own: float,
) -> MethodSpec:
    fn = functools.partial(merge_task_vectors, sparsify=sparsify, elected=elected)
    shared: dict[str, Any] = {"normalize": normalize, "rescale": rescale, "lambda": 1.0}
    shared["int8_mask"] = False
    if elected:
        shared["elect"] = "weighted"
    per_model = {"weight": REQUIRED} if sparsify == "none" else {"weight": REQUIRED, "density": 1.0}
    if sparsify == "magnitude":
        shared["trim_scope"] = "tensor"
        per_model["keep"] = None
    return MethodSpec(name, fn, shared, {**per_model, **own}, needs_base=True)


WEIGHT = {"weight": REQUIRED}
METHODS: dict[str, MethodSpec] = {
    spec.name: spec
    for spec in (
        MethodSpec("linear", weighted_mean, {"normalize": True}, WEIGHT, needs_base=False),
        MethodSpec("slerp", slerp, {"t": REQUIRED}, {}, needs_base=True, max_models=1),
        MethodSpec(
            "nuslerp",
            nuslerp,
            {"nuslerp_flatten": True, "nuslerp_row_wise": False},
            WEIGHT,
            needs_base="optional",
            min_models=2,
            max_models=2,
        ),
        MethodSpec(
            "multislerp",
            multislerp,
            {"normalize_weights": True, "eps": 1e-8},
            WEIGHT,
            needs_base="optional",
        ),
        MethodSpec("karcher", karcher, {"max_iter": 10, "tol": 1e-5}, {}, needs_base=False),
        _task_vector_method("task_arithmetic", "none"),
        _task_vector_method("ties", "magnitude", elected=True, normalize=True),
        _task_vector_method("breadcrumbs", "outliers", gamma=0.01),
        _task_vector_method("breadcrumbs_ties", "outliers", elected=True, gamma=0.01),
        _task_vector_method("dare_linear", "bernoulli", rescale=True),
        _task_vector_method("dare_ties", "bernoulli", elected=True, rescale=True),
        _task_vector_method("della_linear", "della", rescale=True, epsilon=0.15),
        _task_vector_method(
            "della", "della", elected=True, normalize=True, rescale=True, epsilon=0.15
        ),
        MethodSpec(
            "model_stock", model_stock, {"filter_wise": False}, {}, needs_base=True, min_models=2
        ),
        MethodSpec("sce", sce, {"select_topk": 1.0, "int8_mask": False}, {}, needs_base=True),
        MethodSpec("ram", ram, {"epsilon": 1e-5}, {}, needs_base=True),
        MethodSpec(
            "ramplus_tl", ram, {"epsilon": 1e-5, "r": 0.1, "alpha": 0.2}, {}, needs_base=True
        ),
        MethodSpec("nearswap", nearswap, {"t": REQUIRED}, {}, needs_base=True, max_models=1),
        MethodSpec("arcee_fusion", arcee_fusion, {}, {}, needs_base=True, max_models=1),
        MethodSpec("passthrough", passthrough, {}, {"scale": None}, needs_base=False, max_models=1),
    )
}
#: Methods that mergekit computes in float32 whatever the inputs are.
FLOAT32_IN_MERGEKIT = ("linear", "slerp", "karcher", "arcee_fusion", "passthrough")


def merge_tensors(
    method: str,
    tensors: Sequence[Array],
    *,
    base: Array | None = None,
    global_params: Mapping[str, Any] | None = None,
    model_params: Sequence[Mapping[str, Any]] = (),
    name: str = "tensor",
    seed: int = 0,
    compat: bool = False,
    dtype: Any = None,
    labels: Sequence[str] = (),
) -> Array:
    """Merges one tensor of several models.

    Args:
      method: a key of METHODS.
      tensors: the inputs other than the base, in the recipe's order; equal shapes [...], floating
        dtypes, all numpy (no JAX is imported) or all JAX (arrays or tracers).
      base: the base model's tensor; None where there is none or it is an input like the others.
      global_params: resolved shared parameters; the spec's defaults where absent.
      model_params: one mapping per tensor, likewise.
      name: of the output tensor; with `seed` and a model's position it decides all randomness.
      compat: reproduce mergekit 0.1.5, see the module. Of JAX arrays, the formulas alone.
      dtype: of the result; default `result_dtype(...)`.
      labels: what to call `tensors`, and then the base, in messages.

    Raises:
      UserError: unknown method, parameter or number of models; unequal shapes; NaN or infinite
        inputs (numpy only); weights that cannot be normalised; impossible parameters.
    """
    spec = spec_of(method)
    own = [dict(p) for p in model_params] or [{} for _ in tensors]
    if len(own) != len(tensors):
        raise UserError(f"{len(own)} sets of parameters for {len(tensors)} models; give one each")
    _check_inputs(spec, len(tensors), base is not None)
    arguments = _arguments(spec, global_params or {}, own, name)
    arrays = list(tensors) if base is None else [*tensors, base]
    names = list(labels) or [f"model {i + 1}" for i in range(len(tensors))] + ["the base"]
    _check_arrays(arrays, name)
    stored = [np.dtype(x.dtype) for x in arrays]
    promoted = promoted_dtype(stored)
    native = compat and method not in FLOAT32_IN_MERGEKIT
    on_host = all(isinstance(x, np.ndarray) for x in arrays)
    compute = promoted if native and on_host else np.result_type(np.float32, promoted)
    out = np.dtype(result_dtype(method, stored, compat) if dtype is None else dtype)
    if spec.needs_base is not False:
        arguments["base"] = base
    if on_host:
        labelled = dict(zip(map(id, arrays), names, strict=False))
        ops: Ops = Chunked(name, arrays[0].shape, out, compute, seed, compat, labelled)
        return spec.fn(ops, list(tensors), **arguments)
    from agentcpm_jax.merge.kernels.device import on_device

    return on_device(spec.fn, tensors, arguments, name, out, compute, seed, compat)


def result_dtype(method: str, dtypes: Sequence[Any], compat: bool) -> np.dtype:
    """What `merge_tensors` returns: the promoted dtype; float32 of mergekit's arcee_fusion."""
    promoted = promoted_dtype(dtypes)
    if compat and method == "arcee_fusion":
        return np.result_type(promoted, np.float32)
    return promoted


def promoted_dtype(dtypes: Sequence[Any]) -> np.dtype:
    """The least dtype that holds all: float32 of float16 and bfloat16, as in PyTorch."""
    kinds = {np.dtype(d) for d in dtypes}
    halves = {FLOATS["float16"], FLOATS["bfloat16"]}
    return np.result_type(*((kinds - halves) | {FLOATS["float32"]} if halves <= kinds else kinds))


def spec_of(method: Any) -> MethodSpec:
    """What `method` is called with; UserError when there is none of that name."""
    if not isinstance(method, str) or method not in METHODS:
        raise UserError(f"unknown merge_method {method!r}; use one of {', '.join(METHODS)}")
    return METHODS[method]


def _check_inputs(spec: MethodSpec, count: int, has_base: bool) -> None:
    if spec.needs_base is True and not has_base:
        raise UserError(f"{spec.name} needs base_model; name the model to start from")
    if spec.needs_base is False and has_base:
        raise UserError(f"{spec.name} has no base_model; list it under `models` instead")
    if count < spec.min_models or (spec.max_models is not None and count > spec.max_models):
        limit = f"{spec.min_models}" if spec.max_models else f"{spec.min_models} or more"
        besides = " besides the base" if has_base else ""
        raise UserError(f"{spec.name} merges {limit} models{besides}, not {count}")


def _check_arrays(arrays: Sequence[Array], name: str) -> None:
    shapes = [tuple(x.shape) for x in arrays]
    if len(set(shapes)) > 1:
        raise UserError(
            f"tensor {name} has different shapes {', '.join(map(str, shapes))}; "
            "merge models of one architecture and one vocabulary"
        )
    for x in arrays:
        if np.dtype(x.dtype).name not in FLOATS:
            raise UserError(
                f"tensor {name} has dtype {x.dtype}: only floating tensors can be "
                "merged; convert the model first"
            )


def _arguments(
    spec: MethodSpec, given: Mapping[str, Any], own: Sequence[Mapping[str, Any]], name: str
) -> dict[str, Any]:
    """What the kernel takes by keyword, but for the base."""
    shared = _complete(spec, spec.global_params, given, name)
    own = [_complete(spec, spec.model_params, p, name) for p in own]
    scope = shared.get("trim_scope", "tensor")
    if scope not in ("tensor", "model"):
        raise UserError(f"trim_scope {scope!r} is not tensor or model")
    if scope == "model" and any(p["keep"] is None for p in own):
        raise UserError(f"trim_scope model of {name} needs `keep`; see selection.keep_counts")
    of_kernel = {k: v for k, v in shared.items() if k not in NOT_OF_KERNELS}
    of_kernel |= {k: [p[k] for p in own] for k in spec.model_params}
    # `lambda` is a word of Python's
    return {f"{k}_" if keyword.iskeyword(k) else k: v for k, v in of_kernel.items()}


def _complete(
    spec: MethodSpec, defaults: Mapping[str, Any], given: Mapping[str, Any], name: str
) -> dict[str, Any]:
    """Defaults overridden by what is given."""
    for key in given:
        if key not in defaults:
            raise UserError(
                f"{spec.name} has no parameter {key!r} here; it takes "
                f"{', '.join(defaults) or 'none'}"
            )
    values = {**defaults, **given}
    for key, value in values.items():
        if value is REQUIRED:
            raise UserError(f"{spec.name} needs parameter {key!r} for tensor {name}; set it")
    return values
