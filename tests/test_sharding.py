from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from agentcpm_jax import tree
from agentcpm_jax.model.config import TINY
from agentcpm_jax.model.params import param_specs
from agentcpm_jax.sharding import AXES, RULES, MeshConfig, make_mesh, param_shardings
from agentcpm_jax.types import UserError

PROGRAM = """
import dataclasses, json
import jax, numpy as np
from agentcpm_jax.model import config, logprobs
from agentcpm_jax import tree
from agentcpm_jax.model.params import param_specs
from agentcpm_jax.sharding import MeshConfig, batch_sharding, make_mesh, param_shardings

cfg = dataclasses.replace(config.TINY, num_layers=2, width=32, vocab_size=64, ffw=64, head_dim=8)
rng = np.random.default_rng(0)
params = tree.map_with_path(
    lambda _, spec: (0.1 * rng.standard_normal(spec.shape)).astype(np.float32), param_specs(cfg)
)
tokens = rng.integers(0, cfg.vocab_size, (8, 16)).astype(np.int32)
positions = np.broadcast_to(np.arange(8), (8, 2, 8)).reshape(8, 16).astype(np.int32)
segments = np.repeat(np.array([[1, 2]], np.int32), 8, axis=1).repeat(8, axis=0)

def loss(params, *batch):
    return -logprobs.token_logprobs(params, cfg, *batch).mean()

def run(mesh):
    shardings, rows = param_shardings(param_specs(cfg), mesh), batch_sharding(mesh)
    step = jax.jit(
        jax.value_and_grad(loss),
        in_shardings=(shardings, rows, rows, rows),
        out_shardings=(None, shardings),
    )
    placed = jax.device_put(params, shardings)
    batch = [jax.device_put(x, rows) for x in (tokens, positions, segments)]
    value, grads = step(placed, *batch)
    q = placed["layers"]["attn"]["q"]
    share = q.addressable_shards[0].data.size / q.size
    norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(jax.device_get(grads))))
    return [float(value), float(norm), share]

meshes = json.loads(input())
out = [run(make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1]))]
out += [run(make_mesh(MeshConfig(*sizes))) for sizes in meshes]
print(json.dumps(out))
"""


def test_loss_and_gradient_do_not_depend_on_the_mesh():
    """Eight virtual devices against one; the query projection is really split."""
    meshes = [(1, 4, 1, 2), (2, 1, 2, 2)]
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(meshes),
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (loss, norm, whole), *others = json.loads(done.stdout.splitlines()[-1])
    assert whole == 1
    for (_, fsdp, _, tensor), (value, gradient, share) in zip(meshes, others, strict=True):
        assert value == pytest.approx(loss, rel=1e-6)
        assert gradient == pytest.approx(norm, rel=1e-5)
        assert share == 1 / (fsdp * tensor)


@pytest.mark.parametrize(
    ("cfg", "named"),
    [
        (MeshConfig(1, 3, 1, 2), "fsdp 3 .*tensor 2 .*multiply to 6, there are 8 devices"),
        (MeshConfig(1, -1, 1, 3), "tensor 3 .*multiply to 6, there are 8 devices"),
        (MeshConfig(1, -1, 1, 16), "multiply to 16, there are 8 devices"),
        (MeshConfig(-1, -1, 1, 1), "one may be -1"),
        (MeshConfig(0, 1, 1, 1), "data 0"),
    ],
)
def test_impossible_meshes_are_refused_by_name(cfg, named):
    with pytest.raises(UserError, match=named):
        make_mesh(cfg, jax.devices()[:1] * 8)


def test_axes_that_do_not_divide_are_refused_except_key_value_heads():
    wide = jax.sharding.AbstractMesh((1, 1, 1, 4), AXES)
    shardings = tree.flatten(param_shardings(param_specs(TINY), wide))
    assert shardings["layers/attn/q"].spec[2] == "tensor"
    assert shardings["layers/attn/k"].spec[2] is None  # 2 heads over 4 devices: replicated
    with pytest.raises(UserError, match=r"fsdp of 3 devices does not divide width 128"):
        param_shardings(param_specs(TINY), jax.sharding.AbstractMesh((1, 3, 1, 1), AXES))


def test_every_logical_axis_has_a_rule():
    used = {axis for spec in tree.flatten(param_specs(TINY)).values() for axis in spec.axes}
    assert used | {"batch", "time"} == set(RULES)
