"""Linear merging and task arithmetic of whole nested dicts of arrays.

    linear           out = sum_m w_m W_m / Z                     Wortsman et al. 2022 (model soups)
    task arithmetic  out = B + lambda * sum_m w_m (W_m - B) / Z  Ilharco et al. 2023

with Z = sum_m w_m when `normalize`, else 1. Only operators that numpy and JAX arrays share are
used, so a merge runs on checkpoints without JAX, and inside `jit` or `grad` on live parameters.

Deviations from the common tool, mergekit:
1. Arithmetic is in float32 (float64 if a leaf is), rounded once at the end. mergekit's task
   arithmetic rounds bfloat16 models after every operation; `compute_dtype=None` does the same.
2. Weights that sum to zero under `normalize` are an error; they do not write NaN.
3. A model of weight 0 is left out, so that it cannot disturb even the sign of a zero.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from agentcpm_jax.hf.files import FLOATS
from agentcpm_jax.merge.kernels.ops import SMALLEST_SUM, Array, Scalar
from agentcpm_jax.types import UserError

Tree = Any  # a nested dict of arrays, or one array


def linear(
    trees: Sequence[Tree],
    weights: Sequence[Scalar],
    normalize: bool = True,
    dtype: Any = None,
    compute_dtype: Any = np.float32,
) -> Tree:
    """Weighted sum of models, divided by the sum of the weights if `normalize`.

    Args:
      trees: M nested dicts of floating arrays with equal keys and shapes (numpy or JAX).
      weights: M numbers, or traced scalars (differentiable; a zero sum is then not noticed).
      normalize: divide by sum(weights).
      dtype: of the result; default: the promoted dtype of each group of leaves.
      compute_dtype: least precise dtype to calculate in; None: the promoted one.

    Raises:
      UserError: unequal structure or shape (names the tensor), weights that sum to zero.
    """
    coefficients = _coefficients(weights, len(trees), normalize, 1.0)

    def leaf(*leaves: Array) -> Array:
        return _weighted_sum(leaves, coefficients)

    return _map_leaves(leaf, trees, dtype, compute_dtype)


def task_arithmetic(
    base: Tree,
    trees: Sequence[Tree],
    weights: Sequence[Scalar],
    lambda_: Scalar = 1.0,
    normalize: bool = False,
    dtype: Any = None,
    compute_dtype: Any = np.float32,
) -> Tree:
    """Adds weighted task vectors (model - base) to the base; a negative weight unlearns.

    Args:
      base: nested dict of floating arrays.
      trees: M nested dicts like `base`.
      weights: M numbers or traced scalars.
      lambda_: multiplies the summed task vectors.
      normalize: divide the sum by sum(weights).
      dtype: of the result; default: the promoted dtype of each group of leaves.
      compute_dtype: least precise dtype to calculate in; None: the promoted one.

    Raises:
      UserError: as `linear`.
    """
    coefficients = _coefficients(weights, len(trees), normalize, lambda_)

    def leaf(b: Array, *leaves: Array) -> Array:
        mix = _weighted_sum([x - b for x in leaves], coefficients)
        return b if mix is None else b + mix

    return _map_leaves(leaf, [base, *trees], dtype, compute_dtype)


def _coefficients(
    weights: Sequence[Scalar], count: int, normalize: bool, lambda_: Scalar
) -> list[Scalar]:
    """What each model is multiplied with: w, or w / sum(w), times lambda."""
    if count == 0:
        raise UserError("nothing to merge: 0 models; give at least one")
    if len(weights) != count:
        raise UserError(f"{len(weights)} weights for {count} models; give one weight per model")
    # numpy scalars would drag float32 leaves to float64; plain floats do not
    w = [float(x) if isinstance(x, numbers.Real) else x for x in weights]
    total = sum(w[1:], start=w[0])
    if not normalize:
        return [x * lambda_ for x in w]
    if isinstance(total, float) and not abs(total) > SMALLEST_SUM:
        raise UserError(
            f"weights {w} sum to {total:g}, which cannot be normalised; "
            "change them or set normalize to false"
        )
    return [x / total * lambda_ for x in w]


def _weighted_sum(leaves: Sequence[Array], coefficients: Sequence[Scalar]) -> Array | None:
    """sum_m c_m x_m over the models whose c is not a plain 0; None if none is left."""
    total = None
    for x, c in zip(leaves, coefficients, strict=True):
        if isinstance(c, float):
            if c == 0.0:
                continue
            c = x.dtype.type(c)  # numpy would calculate bfloat16 * float in float32
        total = x * c if total is None else total + x * c
    return total


def _map_leaves(
    f: Callable[..., Any], trees: Sequence[Tree], dtype: Any, compute_dtype: Any
) -> Tree:
    """Applies `f` to corresponding leaves in the compute dtype and rounds its result once."""

    def leaf(*values: Array) -> Array:
        promoted = np.result_type(*(np.dtype(x.dtype) for x in values))
        compute = promoted if compute_dtype is None else np.result_type(compute_dtype, promoted)
        leaves = [x.astype(compute) for x in values]
        out = f(*leaves)
        if out is None:  # every coefficient was 0
            out = leaves[0] * 0
        return out.astype(promoted if dtype is None else dtype)

    return map_leaves(leaf, trees)


def map_leaves(
    f: Callable[..., Any], trees: Sequence[Tree], named: bool = False, path: str = ""
) -> Tree:
    """`f(*leaves)`, or `f(path, *leaves)` if `named`, at every path that all trees must share.

    Raises:
      UserError: unequal structure, shape, or a leaf that is no float; names the tensor.
    """
    if any(isinstance(t, Mapping) for t in trees):
        return {
            k: map_leaves(f, [t[k] for t in trees], named, _join(path, k))
            for k in _common_keys(trees, path)
        }
    check_leaves(trees, path or "root")
    return f(path, *trees) if named else f(*trees)


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _common_keys(trees: Sequence[Tree], path: str) -> list[str]:
    for i, tree in enumerate(trees):
        if not isinstance(tree, Mapping):
            raise UserError(
                f"{path or 'the root'} is one tensor in input {i} and a group in another; "
                "merge models of one architecture"
            )
    union = {k for t in trees for k in t}
    for i, tree in enumerate(trees):
        for k in sorted(union - set(tree)):
            raise UserError(
                f"tensor {_join(path, k)} is missing from input {i}; "
                "merge models of one architecture"
            )
    return list(trees[0])


def check_leaves(leaves: Sequence[Array], name: str) -> None:
    """UserError unless all are floating arrays of one shape."""
    shapes = [tuple(x.shape) for x in leaves]
    if len(set(shapes)) > 1:
        raise UserError(
            f"tensor {name} has different shapes {', '.join(map(str, shapes))}; "
            "merge models of one architecture and one vocabulary"
        )
    for x in leaves:
        if np.dtype(x.dtype).name not in FLOATS:
            raise UserError(
                f"tensor {name} has dtype {x.dtype}: only floating tensors can be "
                "merged; convert the model first"
            )
