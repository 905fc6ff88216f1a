"""Nested dicts keyed by paths: {'layers': {'attn': {'q': x}}} <-> {'layers/attn/q': x}."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def flatten(tree: Mapping[str, Any], *, sep: str = "/") -> dict[str, Any]:
    """{path: leaf} in sorted path order; whatever is not a mapping is a leaf.

    Raises:
      ValueError: a key contains `sep`, or a sub-tree is empty (`unflatten` restores neither).
    """
    flat: dict[str, Any] = {}
    for key in sorted(tree):
        if sep in key:
            raise ValueError(f"key {key!r} contains the separator {sep!r}")
        value = tree[key]
        if not isinstance(value, Mapping):
            flat[key] = value
        elif value:
            flat.update({f"{key}{sep}{path}": v for path, v in flatten(value, sep=sep).items()})
        else:
            raise ValueError(f"sub-tree {key!r} is empty")
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict whose `flatten` is `flat`.

    Raises:
      ValueError: one path is a prefix of another.
    """
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(f"path {path!r} goes through the leaf {key!r}")
        if last in node:
            raise ValueError(f"path {path!r} is taken")
        node[last] = leaf
    return tree


def map_with_path(
    fn: Callable[..., Any], tree: Mapping[str, Any], *rest: Mapping[str, Any]
) -> dict[str, Any]:
    """`fn(path, leaf, *leaves_of_rest)` at every leaf of `tree`; `rest` have the same paths.

    Raises:
      ValueError: the paths differ.
    """
    flat, others = flatten(tree), [flatten(other) for other in rest]
    for other in others:
        if other.keys() != flat.keys():
            odd = sorted(other.keys() ^ flat.keys())
            raise ValueError(f"trees differ at {odd[0]!r} ({len(odd)} paths)")
    return unflatten({p: fn(p, leaf, *(o[p] for o in others)) for p, leaf in flat.items()})
