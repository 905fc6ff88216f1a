"""Merging whole parameter trees where they live: on the mesh, every leaf keeping its sharding.

Each leaf is one compiled program whose result has the sharding of the base (or of the first model).
Bits do not depend on the mesh: see `device`. Randomness is that of the leaf's name, so that a mask
is the same here and in numpy.

Deviation from merging checkpoints: leaves are as this package keeps them, [in, out] with layers
stacked on axis 0, where files hold [out, in]. `stacked` names the sub-trees whose leaves are merged
layer by layer; methods that look at rows (DELLA, filter-wise model_stock, row-wise nuslerp,
arcee_fusion) see rows along the last axis of the leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agentcpm_jax import tree as paths
from agentcpm_jax.merge.kernels.methods import merge_tensors
from agentcpm_jax.merge.kernels.ops import Array
from agentcpm_jax.merge.kernels.random_bits import stream_key
from agentcpm_jax.types import UserError

Tree = Mapping[str, Any]


def merge_tree(
    method: str,
    trees: Sequence[Tree],
    base: Tree | None = None,
    *,
    global_params: Mapping[str, Any] | Callable[[str], Mapping[str, Any]] | None = None,
    model_params: Sequence[Mapping[str, Any]] | Callable[[str], Sequence[Any]] = (),
    seed: int = 0,
    compat: bool = False,
    stacked: Sequence[str] = (),
) -> dict[str, Any]:
    """Merges nested dicts of JAX arrays.

    Args:
      method: a key of `methods.METHODS`.
      trees: M nested dicts of floating arrays with the same paths, shapes and shardings.
      base: the base model's, for methods that have one.
      global_params, model_params: as `methods.merge_tensors`, or functions of the leaf's path
        (`layers/attn/q`, and `layers/attn/q/3` for layer 3 of a stacked leaf).
      seed: of all randomness.
      compat: mergekit's formulas.
      stacked: first keys of the paths whose leaves hold layers on axis 0.

    Returns:
      A nested dict like `base` (or the first tree), each leaf with its sharding.

    Raises:
      UserError: trees that differ, and as `methods.merge_tensors`.
    """
    if not trees:
        raise UserError("nothing to merge: 0 models; give at least one")
    flat = [paths.flatten(t) for t in (trees if base is None else [*trees, base])]
    like = flat[0 if base is None else -1]
    for other in flat:
        if odd := sorted(other.keys() ^ like.keys()):
            raise UserError(
                f"tensor {odd[0]} is missing from an input; merge models of one architecture"
            )

    def merged(path: str) -> Array:
        leaves = [f[path] for f in flat]
        layers = range(like[path].shape[0]) if path.split("/")[0] in stacked else None
        names = [path] if layers is None else [f"{path}/{i}" for i in layers]
        shared = [global_params(n) if callable(global_params) else global_params for n in names]
        own = [model_params(n) if callable(model_params) else model_params for n in names]
        keys = np.array([[stream_key(seed, n, m) for m in range(len(trees))] for n in names])

        def one(i: int, key: Array, values: Sequence[Array]) -> Array:
            return merge_tensors(
                method,
                values if base is None else values[:-1],
                base=None if base is None else values[-1],
                global_params=shared[i],
                model_params=own[i],
                name=names[i],
                compat=compat,
                keys=key,
            )

        def run(*values: Array) -> Array:
            if layers is None:
                return one(0, keys[0], values)
            if all(s == shared[0] for s in shared) and all(o == own[0] for o in own):
                return jax.lax.map(lambda layer: one(0, layer[0], layer[1:]), (keys, *values))
            return jnp.stack([one(i, keys[i], [v[i] for v in values]) for i in layers])

        sharding = like[path].sharding if isinstance(like[path], jax.Array) else None
        return jax.jit(run, out_shardings=sharding)(*leaves)

    return paths.unflatten({path: merged(path) for path in like})
