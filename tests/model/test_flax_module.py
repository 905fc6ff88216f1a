from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from agentcpm_jax.model import qwen3
from agentcpm_jax.model.config import TINY
from agentcpm_jax.model.flax_module import Qwen3
from agentcpm_jax.model.params import abstract_params, init

CFG = dataclasses.replace(
    TINY, vocab_size=61, width=32, num_layers=1, head_dim=8, ffw=48, tied_embeddings=False
)
TOKENS = jnp.arange(12).reshape(2, 6)
forward = jax.jit(qwen3.forward, static_argnums=1)
BATCH = (TOKENS, jnp.broadcast_to(jnp.arange(6), TOKENS.shape), jnp.ones_like(TOKENS))


def test_init_and_apply_are_the_functions():
    key = jax.random.key(3)
    expected = init(key, CFG)  # eager, as Flax users call it
    for rngs in (key, {"params": key}):
        variables = Qwen3(CFG).init(rngs, *BATCH)
        assert list(variables) == ["params"]
        assert jax.tree.all(jax.tree.map(jnp.array_equal, variables["params"], expected))
    np.testing.assert_array_equal(
        jax.jit(Qwen3(CFG).apply)(variables, *BATCH), forward(expected, CFG, *BATCH)
    )


def test_composes_as_a_submodule():
    class Value(nn.Module):
        """A scalar per token from the backbone's logits."""

        @nn.compact
        def __call__(self, *batch):
            return nn.Dense(1)(Qwen3(CFG, name="backbone")(*batch))[..., 0]

    variables = jax.jit(Value().init)(jax.random.key(0), *BATCH)
    backbone = variables["params"]["backbone"]
    assert jax.eval_shape(lambda: backbone) == abstract_params(CFG)
    dense = variables["params"]["Dense_0"]
    np.testing.assert_allclose(
        jax.jit(Value().apply)(variables, *BATCH),
        (forward(backbone, CFG, *BATCH) @ dense["kernel"] + dense["bias"])[..., 0],
        atol=1e-6,
    )
