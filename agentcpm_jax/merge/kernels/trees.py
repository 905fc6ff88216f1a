"""Any merge method on whole models: nested dicts of arrays, merged leaf by leaf.

Leaves are numpy arrays, merged on the host without JAX; or JAX arrays, each merged on the devices
where it lives by one compiled program, whose result is sharded as the leaf of the base (or of the
first model) is; or tracers, inside `jit` and `grad`. The result does not depend on the mesh, see
`device`. Random masks follow from a leaf's name: they are the same on the host and on a mesh.

Deviation from merging checkpoints: leaves are as this package keeps them, [in, out] with all layers
of a parameter stacked on axis 0, where files hold [out, in] of one layer. TIES trims a leaf as one
tensor; methods that look at rows (DELLA, filter-wise model_stock, row-wise nuslerp, arcee_fusion)
see rows along its last axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from agentcpm_jax.merge.kernels.methods import merge_tensors
from agentcpm_jax.merge.kernels.ops import Array, Scalar
from agentcpm_jax.types import UserError

Tree = Any  # a nested dict of arrays, or one array


def merge_tree(
    method: str,
    trees: Sequence[Tree],
    base: Tree | None = None,
    own: Sequence[Mapping[str, Any]] = (),
    shared: Mapping[str, Any] | None = None,
    seed: int = 0,
    dtype: Any = None,
) -> Tree:
    """Merges nested dicts of floating arrays.

    Args:
      method: a key of `methods.METHODS`.
      trees: M nested dicts with the same keys, shapes and shardings.
      base: the base model's, for methods that have one.
      own, shared: parameters of every model and of the merge; see `methods.merge_tensors`.
      seed: of all randomness.
      dtype: the least precise one of the result; default: that of each group of leaves, promoted.

    Raises:
      UserError: trees that differ (names the tensor), and as `methods.merge_tensors`.
    """
    if not trees:
        raise UserError("nothing to merge: 0 models; give at least one")

    def leaf(name: str, *leaves: Array) -> Array:
        def merged(*values: Array) -> Array:
            wide = None if dtype is None else np.result_type(dtype, *(x.dtype for x in values))
            return merge_tensors(
                method,
                values if base is None else values[1:],
                base=None if base is None else values[0],
                global_params=shared,
                model_params=own,
                name=name,
                seed=seed,
                dtype=wide,
            )

        if all(isinstance(x, np.ndarray) for x in leaves):
            return merged(*leaves)
        from agentcpm_jax.merge.kernels.device import compiled

        return compiled(merged, leaves)

    return map_leaves(leaf, trees if base is None else [base, *trees])


def linear(trees: Sequence[Tree], weights: Sequence[Scalar]) -> Tree:
    """The mean of the models with these weights, which need not sum to one."""
    return merge_tree("linear", trees, own=[{"weight": w} for w in weights])


def map_leaves(f: Callable[..., Any], trees: Sequence[Tree], path: str = "") -> Tree:
    """`f(name, *leaves)` at every leaf, with names such as `layers.attn.q`.

    Raises:
      UserError: a key that not all trees have; names the tensor.
    """
    if not any(isinstance(t, Mapping) for t in trees):
        return f(path or "root", *trees)
    for i, tree in enumerate(trees):
        if not isinstance(tree, Mapping):
            raise UserError(
                f"{path or 'the root'} is one tensor in input {i} and a group in another; "
                "merge models of one architecture"
            )
    names = {key: f"{path}.{key}" if path else str(key) for t in trees for key in t}
    for i, tree in enumerate(trees):
        for key in sorted(names.keys() - tree.keys()):
            raise UserError(
                f"tensor {names[key]} is missing from input {i}; merge models of one architecture"
            )
    return {key: map_leaves(f, [t[key] for t in trees], names[key]) for key in trees[0]}
