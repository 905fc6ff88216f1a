from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentcpm_jax import tree

NAMES = st.text("abc_0", min_size=1, max_size=3)
TREES = st.recursive(
    st.dictionaries(NAMES, st.integers(), min_size=1, max_size=3),
    lambda sub: st.dictionaries(NAMES, st.integers() | sub, min_size=1, max_size=3),
    max_leaves=12,
)


@given(TREES)
def test_flatten_then_unflatten_is_identity(nested):
    flat = tree.flatten(nested)
    assert list(flat) == sorted(flat, key=lambda path: path.split("/"))
    assert tree.unflatten(flat) == nested
    assert tree.map_with_path(lambda path, leaf: flat[path] == leaf, nested) == tree.map_with_path(
        lambda path, leaf: True, nested
    )


def test_paths_of_a_parameter_tree():
    assert tree.flatten({"layers": {"attn": {"q": 1}, "norm": 2}, "embed": 3}) == {
        "embed": 3,
        "layers/attn/q": 1,
        "layers/norm": 2,
    }


def test_map_over_two_trees_sums_leaves():
    assert tree.map_with_path(lambda _, a, b: a + b, {"x": {"y": 1}}, {"x": {"y": 2}}) == {
        "x": {"y": 3}
    }


@pytest.mark.parametrize("bad", [{"a/b": 1}, {"a": {}}])
def test_trees_that_would_not_come_back_are_refused(bad):
    with pytest.raises(ValueError):
        tree.flatten(bad)


def test_conflicts_are_named():
    with pytest.raises(ValueError, match="'a/b'"):
        tree.unflatten({"a": 1, "a/b": 2})
    with pytest.raises(ValueError, match="'a'"):
        tree.unflatten({"a/b": 2, "a": 1})
    with pytest.raises(ValueError, match="'b'"):
        tree.map_with_path(lambda *_: None, {"a": 1}, {"a": 1, "b": 2})
