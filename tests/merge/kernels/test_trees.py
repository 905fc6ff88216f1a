from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from agentcpm_jax.merge.kernels.ops import Array
from agentcpm_jax.merge.kernels.trees import Tree, linear, merge_tree
from agentcpm_jax.types import UserError


def tree(seed: int, dtype: npt.DTypeLike = np.float32) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        "embed": rng.normal(size=(7, 4)).astype(dtype),
        "layers": {"q": {"w": rng.normal(size=(2, 4, 3)).astype(dtype)}},
    }


def task_arithmetic(
    base: Tree,
    trees: Sequence[Tree],
    weights: Sequence[Any],
    lambda_: float = 1.0,
    normalize: bool = False,
) -> Tree:
    shared = {"lambda": lambda_, "normalize": normalize}
    return merge_tree("task_arithmetic", trees, base, [{"weight": w} for w in weights], shared)


def assert_same_bits(a: Array, b: Array) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_a_model_of_weight_zero_changes_no_bit(dtype):
    base, other = tree(0, dtype), tree(1, dtype)
    base["embed"][0] = -0.0
    other["embed"][1] = np.inf
    assert_same_bits(linear([base, other], [1.0, 0.0]), base)
    assert_same_bits(linear([base, other], [49, 0]), base)  # 49 * (1 / 49) is not 1
    assert_same_bits(task_arithmetic(base, [other], [0.0]), base)
    assert_same_bits(task_arithmetic(base, [other], [1.0], lambda_=0), base)


def test_formulas():
    base, a, b = tree(0), tree(1), tree(2)
    got = linear([a, b], [3, 1])
    np.testing.assert_allclose(got["embed"], (3 * a["embed"] + b["embed"]) / 4, rtol=1e-6)
    got = merge_tree("linear", [a, b], None, [{"weight": 3}, {"weight": 1}], {"normalize": False})
    np.testing.assert_allclose(got["embed"], 3 * a["embed"] + b["embed"], rtol=1e-6)
    mix = 0.5 * (a["embed"] - base["embed"]) - 2.0 * (b["embed"] - base["embed"])
    got = task_arithmetic(base, [a, b], [0.5, -2.0], lambda_=0.3)
    np.testing.assert_allclose(got["embed"], base["embed"] + 0.3 * mix, rtol=1e-5, atol=1e-6)
    got = task_arithmetic(base, [a, b], [0.5, -2.0], normalize=True)
    np.testing.assert_allclose(got["embed"], base["embed"] + mix / -1.5, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_accumulated_in_float32_and_rounded_once():
    trees = [tree(s, ml_dtypes.bfloat16) for s in range(8)]
    got = linear(trees, [1.0] * 8)
    exact = sum(t["embed"].astype(np.float64) for t in trees) / 8
    assert got["embed"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(got["embed"], exact.astype(ml_dtypes.bfloat16))


def test_dtype_of_the_result():
    bf16, f32 = tree(0, ml_dtypes.bfloat16), tree(1)
    assert linear([bf16, f32], [1, 1])["embed"].dtype == np.float32
    for other, least, dtype in [
        (bf16, np.float32, np.float32),
        (bf16, np.float64, np.float64),
        (f32, ml_dtypes.bfloat16, np.float32),
    ]:
        got = merge_tree("linear", [bf16, other], own=[{"weight": 1.0}] * 2, dtype=least)
        assert got["embed"].dtype == dtype
    weight = np.float64(0.3)
    assert linear([f32, f32], [weight, weight])["embed"].dtype == np.float32


def test_jax_and_numpy_agree_under_jit():
    base, a, b = tree(0), tree(1), tree(2)
    merge = jax.jit(lambda b_, *m: task_arithmetic(b_, m, [0.7, 0.5], 0.8))
    got, want = merge(base, a, b), task_arithmetic(base, [a, b], [0.7, 0.5], 0.8)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6, atol=2e-7), got, want)


def test_differentiable_in_the_weights():
    base, a = (jax.tree.map(jnp.asarray, tree(seed)) for seed in (0, 1))

    def loss(w):
        return jnp.sum(task_arithmetic(base, [a], [w])["embed"])

    want = np.sum(a["embed"] - base["embed"])
    np.testing.assert_allclose(jax.grad(loss)(jnp.float32(0.4)), want, rtol=1e-4)


def test_mistakes_name_the_tensor():
    a, b = tree(0), tree(1)
    b["layers"]["q"]["w"] = b["layers"]["q"]["w"][:, :2]
    with pytest.raises(UserError, match=r"layers\.q\.w .*\(2, 4, 3\), \(2, 2, 3\)"):
        linear([a, b], [1, 1])
    del b["layers"]["q"]["w"]
    with pytest.raises(UserError, match=r"layers\.q\.w is missing from input 1"):
        task_arithmetic(a, [b], [1])
    b["layers"]["q"] = np.zeros(3, np.float32)
    with pytest.raises(UserError, match=r"layers\.q is one tensor in input 1"):
        linear([a, b], [1, 1])
    a["embed"] = b["embed"] = np.zeros(3, np.int32)
    with pytest.raises(UserError, match="embed has dtype int32"):
        linear([a, a], [1, 1])


def test_weights_that_cannot_work():
    a = tree(0)
    with pytest.raises(UserError, match="sum to 0"):
        linear([a, a], [0.5, -0.5])
    with pytest.raises(UserError, match="sum to 0"):
        task_arithmetic(a, [a, a], [1, -1], normalize=True)
    with pytest.raises(UserError, match="1 sets of parameters for 2 models"):
        linear([a, a], [1.0])
    with pytest.raises(UserError, match="0 models"):
        linear([], [])
