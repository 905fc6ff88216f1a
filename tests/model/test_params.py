from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from agentcpm_jax import tree
from agentcpm_jax.model.config import QWEN3_0_6B, QWEN3_4B, TINY
from agentcpm_jax.model.params import abstract_params, count, init, param_specs


def test_published_sizes():
    assert count(QWEN3_4B) == 4_022_468_096
    assert count(QWEN3_0_6B) == 596_049_920


def test_description_is_the_tree():
    cfg = dataclasses.replace(TINY, tied_embeddings=False, param_dtype="bfloat16")
    made = jax.eval_shape(lambda key: init(key, cfg), jax.random.key(0))
    assert made == abstract_params(cfg)
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(made)) == count(cfg)
    for path, spec in tree.flatten(param_specs(cfg)).items():
        assert len(spec.axes) == len(spec.shape), path
        assert (spec.axes[0] == "layers") == path.startswith("layers/"), path


def test_draws_follow_the_description_and_their_own_path():
    params = tree.flatten(jax.jit(init, static_argnums=1)(jax.random.key(0), TINY))
    for path, spec in tree.flatten(param_specs(TINY)).items():
        x = np.asarray(params[path])
        if spec.init == "ones":
            assert (x == 1).all(), path
        else:
            assert abs(x.std() / spec.init - 1) < 0.05 and abs(x.mean()) < 0.1 * spec.init, path
    untied = dataclasses.replace(TINY, tied_embeddings=False)
    other = tree.flatten(jax.jit(init, static_argnums=1)(jax.random.key(0), untied))
    assert other.pop("lm_head").shape == (TINY.width, TINY.vocab_size)
    assert all(jnp.array_equal(other[path], params[path]) for path in params)
    assert not jnp.array_equal(params["layers/attn/k"], params["layers/attn/v"])
