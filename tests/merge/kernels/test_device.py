"""Merging JAX arrays: the same bits on 1, 2, 4 and 8 devices, and what numpy computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentcpm_jax.merge.kernels.device import exact_sum
from agentcpm_jax.merge.kernels.methods import METHODS, merge_tensors

W, D = {"weight": 0.7}, {"weight": 0.5, "density": 0.4}
CASES = {
    "linear": ({}, W),
    "slerp": ({"t": 0.3}, {}),
    "nuslerp": ({"nuslerp_flatten": False}, W),
    "multislerp": ({}, W),
    "karcher": ({}, {}),
    "task_arithmetic": ({"lambda": 0.9}, W),
    "ties": ({"rescale": True}, D),
    "breadcrumbs": ({}, {**D, "gamma": 0.1}),
    "breadcrumbs_ties": ({}, {**D, "gamma": 0.1}),
    "dare_linear": ({}, D),
    "dare_ties": ({"rescale": "l1"}, D),
    "della": ({}, {**D, "epsilon": 0.2}),
    "della_linear": ({"rescale": False}, {**D, "epsilon": 0.2}),
    "model_stock": ({}, {}),
    "sce": ({"select_topk": 0.3}, {}),
    "ram": ({}, {}),
    "ramplus_tl": ({}, {}),
    "nearswap": ({"t": 0.01}, {}),
    "arcee_fusion": ({}, {}),
    "passthrough": ({}, {"scale": 0.5}),
}
WITHOUT_BASE = ("linear", "karcher", "passthrough")
PROGRAM = """
import hashlib, json
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from agentcpm_jax.merge.kernels.trees import merge_tree
from tests.merge.kernels.test_device import CASES, inputs

SOME = ("ties", "della", "model_stock")
digests = []
for shape, spec, methods in [((1, 1), P("a", "b"), CASES), ((2, 1), P("a", "b"), SOME),
                             ((2, 2), P("b", "a"), SOME), ((4, 2), P("a", "b"), CASES)]:
    mesh = Mesh(np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape), ("a", "b"))
    place = lambda t: jax.device_put(t, NamedSharding(mesh, spec))
    row = {}
    for method in methods:
        base, trees, shared, own = inputs(method)
        args = {"own": own, "shared": shared, "seed": 3}
        out = merge_tree(method, [place(t) for t in trees], base and place(base), **args)["w"]
        assert out.sharding == place(trees[0])["w"].sharding, method
        row[method] = hashlib.sha256(np.asarray(out).tobytes()).hexdigest()
        if shape == (1, 1):
            want = merge_tree(method, trees, base, **args)["w"]
            assert out.dtype == want.dtype
            np.testing.assert_allclose(out, want, rtol=2e-6, atol=2e-7, err_msg=method)
    digests.append(row)
print(json.dumps(digests))
"""


def inputs(
    method: str,
) -> tuple[dict[str, np.ndarray] | None, list[dict[str, np.ndarray]], dict[str, Any], list[Any]]:
    """(base, trees, shared, own) for one method; bfloat16-like ties in the deltas."""
    rng = np.random.default_rng(5)
    base = {"w": rng.normal(size=(48, 64))}
    count = METHODS[method].max_models or 3

    def moved(x):
        delta = np.round(rng.normal(size=x.shape) * 20) * 2.0**-10
        return (np.round(x * 2**12) * 2.0**-12 + delta * (rng.random(x.shape) < 0.8)).astype("f4")

    trees = [{k: moved(v) for k, v in base.items()} for _ in range(count)]
    base = {k: (np.round(v * 2**12) * 2.0**-12).astype("f4") for k, v in base.items()}
    shared, own = CASES[method]
    return None if method in WITHOUT_BASE else base, trees, shared, [own] * count


@pytest.mark.mesh
def test_every_method_gives_numpys_result_and_the_same_bits_on_every_mesh():
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    first, *others = json.loads(done.stdout)
    assert first.keys() == METHODS.keys()
    for other in others:
        assert len(other) >= 3
        assert other == {method: first[method] for method in other}


def test_integer_sums_are_as_exact_as_float64():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(64, 1000)) * 10.0 ** rng.integers(-9, 3, (64, 1000))).astype(np.float32)
    with jax.enable_x64(True):
        total, rows = exact_sum(jnp.asarray(x), None), exact_sum(jnp.asarray(x), -1)
        assert total.dtype == np.float64
        np.testing.assert_allclose(total, x.sum(dtype=np.float64), rtol=1e-12)
        np.testing.assert_allclose(rows[:, 0], x.sum(-1, dtype=np.float64), rtol=1e-11)
        assert exact_sum(jnp.zeros((3, 4)), None) == 0


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "slerp"])
def test_gradients_flow_through_the_merge(method):
    base, trees, _, _ = inputs(method)
    trees, base = [t["w"] for t in trees], base and base["w"]
    count = len(trees)

    def merged(x, arrays, origin):
        own = [{"weight": x * (i + 1)} if method != "slerp" else {} for i in range(count)]
        shared = {"t": x} if method == "slerp" else {"normalize": False}
        return merge_tensors(method, arrays, base=origin, global_params=shared, model_params=own)

    def loss(x):
        origin = None if base is None else jnp.asarray(base)
        return jnp.mean(merged(x, [jnp.asarray(t) for t in trees], origin) ** 2)

    x = 0.3
    wide = [t.astype(np.float64) for t in trees]
    origin = None if base is None else base.astype(np.float64)
    above, below = (np.mean(merged(x + h, wide, origin) ** 2) for h in (1e-5, -1e-5))
    got = jax.jit(jax.grad(loss))(jnp.float32(x))
    assert np.isfinite(got) and got != 0
    np.testing.assert_allclose(got, (above - below) / 2e-5, rtol=1e-3)
