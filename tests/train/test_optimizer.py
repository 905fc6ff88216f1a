"""Schedules against their formulas and against transformers; who decays, who is orthogonalised."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from agentcpm_jax import tree
from agentcpm_jax.model import params as model_params
from agentcpm_jax.model.config import TINY
from agentcpm_jax.train import optimizer
from agentcpm_jax.train.config import OptimizerConfig
from agentcpm_jax.train.optimizer import decay_mask, make_optimizer
from agentcpm_jax.types import UserError

SMALL = dataclasses.replace(
    TINY, vocab_size=32, width=16, num_layers=2, num_heads=4, num_kv_heads=1, head_dim=8, ffw=24
)
UNTIED = dataclasses.replace(SMALL, tied_embeddings=False)


def random_tree(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    abstract = model_params.abstract_params(UNTIED)
    return jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), abstract)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant_with_warmup"])
def test_schedules_equal_those_of_transformers(name: str) -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    theirs = torch.optim.SGD([weight], lr=2e-5)
    lr = transformers.get_scheduler(name, theirs, num_warmup_steps=3, num_training_steps=40)
    cfg = OptimizerConfig(lr=2e-5, schedule=name.split("_")[0], warmup=0.06)
    _, schedule = make_optimizer(cfg, 40)
    for step in range(41):
        np.testing.assert_allclose(schedule(step), lr.get_last_lr()[0], rtol=1e-5, atol=1e-12)
        theirs.step()
        lr.step()


def test_golden_values_of_the_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "FLAT", 0.3)

    def at(*steps: int, **changes) -> list[float]:
        cfg = OptimizerConfig(lr=1.0, warmup=10.0, **changes)
        return [float(make_optimizer(cfg, 110)[1](step)) for step in steps]

    assert at(0, 5, 10, 60, 110, 999, schedule="cosine") == pytest.approx([0, 0.5, 1, 0.5, 0, 0])
    assert at(35, schedule="cosine") == pytest.approx([0.5 * (1 + math.cos(math.pi / 4))])
    assert at(60, 110, schedule="cosine", final_fraction=0.1) == pytest.approx([0.55, 0.1])
    assert at(0, 10, 32, 33, schedule="flat_linear") == pytest.approx([0, 1, 1, 1])
    assert at(110, schedule="flat_linear") == pytest.approx([0.05])
    half = (33 + 110) / 2  # between the end of the flat part and the end
    assert at(int(half), int(half) + 1, schedule="flat_linear") == pytest.approx(
        [1 - 0.95 * (71 - 33) / 77, 1 - 0.95 * (72 - 33) / 77]
    )


def test_only_matrices_decay() -> None:
    params = random_tree(0)
    cfg = OptimizerConfig(lr=0.1, weight_decay=0.5, schedule="constant")
    tx, _ = make_optimizer(cfg)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    decays = tree.flatten(decay_mask(params))
    assert {path for path, decayed in decays.items() if not decayed} == {
        "final_norm",
        "layers/attn_norm",
        "layers/mlp_norm",
        "layers/attn/q_norm",
        "layers/attn/k_norm",
    }
    for path, update in tree.flatten(updates).items():
        expected = -0.1 * 0.5 * tree.flatten(params)[path] * decays[path]
        np.testing.assert_allclose(update, expected, rtol=1e-6)


def test_muon_orthogonalises_each_layers_matrix_and_leaves_the_rest_to_adam() -> None:
    params = random_tree(0)
    cfg = OptimizerConfig(
        name="muon", lr=1.0, adam_lr=0.01, clip_norm=0.0, weight_decay=0.0, schedule="constant"
    )
    tx, _ = make_optimizer(cfg)
    grads = random_tree(1)
    updates = tree.flatten(jax.jit(tx.update)(grads, tx.init(params), params)[0])
    width, heads, kv, head, ffw = 16, 4, 1, 8, 24
    matrices = {
        "layers/attn/q": (width, heads * head),
        "layers/attn/k": (width, kv * head),
        "layers/attn/v": (width, kv * head),
        "layers/attn/o": (heads * head, width),
        "layers/mlp/gate": (width, ffw),
        "layers/mlp/up": (width, ffw),
        "layers/mlp/down": (ffw, width),
    }
    for path, (fan_in, fan_out) in matrices.items():
        scale = math.sqrt(max(1, fan_out / fan_in))
        for layer in updates.pop(path):
            values = np.linalg.svd(layer.reshape(fan_in, fan_out), compute_uv=False) / scale
            # Newton-Schulz's quintic does not converge to 1, it lands in a band round it.
            assert values.min() > 0.6 and values.max() < 1.3, path
    # The first update of Adam with Nesterov's look-ahead: the rate, 1 + b1 (1 - b1) / (1 - b1^2).
    first = 0.01 * (1 + 0.9 * 0.1 / (1 - 0.9**2))
    for path, update in updates.items():
        np.testing.assert_allclose(jnp.abs(update), first, rtol=1e-3, err_msg=path)


def test_clipping_bounds_the_gradient_not_the_update() -> None:
    params = {"layers": {"w": jnp.zeros((1, 2, 2))}}
    grads = {"layers": {"w": jnp.full((1, 2, 2), 100.0)}}
    tx, _ = make_optimizer(OptimizerConfig(lr=1.0, eps=1.0, schedule="constant", clip_norm=1.0))
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["layers"]["w"], -0.5 / (0.5 + 1.0), rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "lion"}, "unknown optimizer.name 'lion'"),
        ({"schedule": "step"}, "unknown optimizer.schedule 'step'"),
        ({"schedule": "cosine"}, "total_steps=None; set total_steps > 0"),
        ({"schedule": "constant", "warmup": 0.1}, "set total_steps > 0"),
    ],
)
def test_bad_configurations_name_the_value(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_optimizer(OptimizerConfig(**changes))
