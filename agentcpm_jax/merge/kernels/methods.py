"""The merge methods by mergekit's names, and `merge_tensors`, which runs any of them on one tensor.

The formulas are in `task_vectors`, `spherical` and `consensus`. Each is written once, over the
operations that `chunked` (numpy: a few rows in cache at a time) and `device` (JAX: sharded,
traceable) both offer. `trees` has the two simplest methods as arithmetic on nested dicts.

Deviations from the common tool, mergekit 0.1.5; 1 to 3 are undone by `compat`:
1. Arithmetic is in float32 (float64 if an input is), rounded once at the end. mergekit rounds
   bfloat16 models after every operation of most methods.
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from agentcpm_jax.merge.kernels.chunked import Chunked
from agentcpm_jax.merge.kernels.consensus import (
    arcee_fusion,
    model_stock,
    nearswap,
    passthrough,
    ram,
    sce,
    weighted_mean,
)
from agentcpm_jax.merge.kernels.spherical import karcher, multislerp, nuslerp, slerp
from agentcpm_jax.merge.kernels.task_vectors import merge_task_vectors
from agentcpm_jax.merge.kernels.trees import check_leaves, linear, task_arithmetic
from agentcpm_jax.types import UserError

__all__ = [
    "METHODS",
    "REQUIRED",
    "MethodSpec",
    "linear",
    "merge_tensors",
    "result_dtype",
    "task_arithmetic",
]
REQUIRED = object()  # of a parameter without a default


@dataclass(frozen=True)
class MethodSpec:
    """What a method is called with.

    Attributes:
      fn: (operations, tensors, base, shared, own) -> tensor; called through `merge_tensors`.
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
    name: str, sparsify: str, elected: bool, normalize: bool, rescale: bool, **own: float
) -> MethodSpec:
    fn = functools.partial(merge_task_vectors, sparsify=sparsify, elected=elected)
    shared: dict[str, Any] = {"normalize": normalize, "rescale": rescale, "lambda": 1.0}
    shared["int8_mask"] = False  # changes the dtype of a temporary of mergekit, never a result
    if elected:
        shared["elect"] = "weighted"
    per_model = {"weight": REQUIRED} if sparsify == "none" else {"weight": REQUIRED, "density": 1.0}
    if sparsify == "magnitude":
        shared["trim_scope"] = "tensor"
        per_model["keep"] = None
    return MethodSpec(name, fn, shared, {**per_model, **own}, True)


WEIGHT = {"weight": REQUIRED}
METHODS: dict[str, MethodSpec] = {
    spec.name: spec
    for spec in (
        MethodSpec("linear", weighted_mean, {"normalize": True}, WEIGHT, False),
        MethodSpec("slerp", slerp, {"t": REQUIRED}, {}, True, 1, 1),
        MethodSpec(
            *("nuslerp", nuslerp, {"nuslerp_flatten": True, "nuslerp_row_wise": False}),
            *(WEIGHT, "optional", 2, 2),
        ),
        MethodSpec(
            *("multislerp", multislerp, {"normalize_weights": True, "eps": 1e-8}),
            *(WEIGHT, "optional"),
        ),
        MethodSpec("karcher", karcher, {"max_iter": 10, "tol": 1e-5}, {}, False),
        _task_vector_method("task_arithmetic", "none", False, False, False),
        _task_vector_method("ties", "magnitude", True, True, False),
        _task_vector_method("breadcrumbs", "outliers", False, False, False, gamma=0.01),
        _task_vector_method("breadcrumbs_ties", "outliers", True, False, False, gamma=0.01),
        _task_vector_method("dare_linear", "bernoulli", False, False, True),
        _task_vector_method("dare_ties", "bernoulli", True, False, True),
        _task_vector_method("della_linear", "della", False, False, True, epsilon=0.15),
        _task_vector_method("della", "della", True, True, True, epsilon=0.15),
        MethodSpec("model_stock", model_stock, {"filter_wise": False}, {}, True, 2),
        MethodSpec("sce", sce, {"select_topk": 1.0, "int8_mask": False}, {}, True),
        MethodSpec("ram", ram, {"epsilon": 1e-5}, {}, True),
        MethodSpec(
            *("ramplus_tl", functools.partial(ram, amplify=True)),
            *({"epsilon": 1e-5, "r": 0.1, "alpha": 0.2}, {}, True),
        ),
        MethodSpec("nearswap", nearswap, {"t": REQUIRED}, {}, True, 1, 1),
        MethodSpec("arcee_fusion", arcee_fusion, {}, {}, True, 1, 1),
        MethodSpec("passthrough", passthrough, {}, {"scale": None}, False, 1, 1),
    )
}
#: Methods that mergekit computes in float32 whatever the inputs are.
FLOAT32_IN_MERGEKIT = ("linear", "slerp", "karcher", "arcee_fusion", "passthrough")


def merge_tensors(
    method: str,
    tensors: Sequence[Any],
    *,
    base: Any = None,
    global_params: Mapping[str, Any] | None = None,
    model_params: Sequence[Mapping[str, Any]] = (),
    name: str = "tensor",
    seed: int = 0,
    compat: bool = False,
    dtype: Any = None,
    labels: Sequence[str] = (),
    keys: Any = None,
) -> Any:
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
      keys: of JAX arrays: [models, 2] uint32 that take the place of `seed` and `name`.

    Raises:
      UserError: unknown method, parameter or number of models; unequal shapes; NaN or infinite
        inputs (numpy only); weights that cannot be normalised; impossible parameters.
    """
    spec = _spec(method)
    own = [dict(p) for p in model_params] or [{} for _ in tensors]
    if len(own) != len(tensors):
        raise UserError(f"{len(own)} sets of parameters for {len(tensors)} models; give one each")
    _check_inputs(spec, len(tensors), base is not None)
    shared = _complete(spec, spec.global_params, global_params or {}, name)
    own = [_complete(spec, spec.model_params, p, name) for p in own]
    if shared.get("trim_scope", "tensor") not in ("tensor", "model"):
        raise UserError(f"trim_scope {shared['trim_scope']!r} is not tensor or model")
    if shared.get("trim_scope") == "model" and any(p["keep"] is None for p in own):
        raise UserError(f"trim_scope model of {name} needs `keep`; see selection.keep_counts")
    arrays = list(tensors) if base is None else [*tensors, base]
    names = list(labels) or [f"model {i + 1}" for i in range(len(tensors))] + ["the base"]
    check_leaves(arrays, name)
    stored = [np.dtype(x.dtype) for x in arrays]
    promoted = np.result_type(*stored)
    native = compat and method not in FLOAT32_IN_MERGEKIT
    on_host = all(isinstance(x, np.ndarray) for x in arrays)
    compute = promoted if native and on_host else np.result_type(np.float32, promoted)
    out = np.dtype(result_dtype(method, stored, compat) if dtype is None else dtype)
    rest = (tuple(arrays[0].shape), dict(zip(map(id, arrays), names, strict=False)))
    if on_host:
        ops: Any = Chunked(name, *rest, out, compute, seed, compat)
        return spec.fn(ops, list(tensors), base, shared, own)
    from agentcpm_jax.merge.kernels.device import on_device

    return on_device(
        *(spec.fn, name, list(tensors), base, shared, own, out, compute, seed, compat, keys)
    )


def result_dtype(method: str, dtypes: Sequence[Any], compat: bool) -> np.dtype:
    """What `merge_tensors` returns: the promoted dtype; float32 of mergekit's arcee_fusion."""
    promoted = np.result_type(*(np.dtype(d) for d in dtypes))
    if compat and method == "arcee_fusion":
        return np.result_type(promoted, np.float32)
    return promoted


def _spec(method: str) -> MethodSpec:
    if method not in METHODS:
        raise UserError(f"unknown merge_method {method!r}; use one of {', '.join(METHODS)}")
    return METHODS[method]


def _check_inputs(spec: MethodSpec, count: int, has_base: bool) -> None:
    if spec.needs_base is True and not has_base:
        raise UserError(f"{spec.name} needs base_model; name the model to start from")
    if spec.needs_base is False and has_base:
        raise UserError(f"{spec.name} has no base_model; list it under `models` instead")
    if count < spec.min_models or (spec.max_models is not None and count > spec.max_models):
        limit = (
            f"{spec.min_models}"
            if spec.max_models == spec.min_models
            else (f"{spec.min_models} or more")
        )
        besides = " besides the base" if has_base else ""
        raise UserError(f"{spec.name} merges {limit} models{besides}, not {count}")


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
