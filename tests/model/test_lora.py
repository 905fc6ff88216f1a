"""Adapters: at the start nothing, in training themselves alone, merged the same model, for PEFT."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy

from agentcpm_jax import tree
from agentcpm_jax.data.pack import fill
from agentcpm_jax.data.rows import text_row
from agentcpm_jax.hf.names import PEFT_CONFIG, PEFT_WEIGHTS
from agentcpm_jax.hf.save import save_peft
from agentcpm_jax.model import lora
from agentcpm_jax.model.config import TINY
from agentcpm_jax.model.params import init
from agentcpm_jax.model.qwen3 import forward
from agentcpm_jax.train.step import Frozen, TrainState, make_sft_step
from tests.hf.naive_tensors import naive_tensors

CFG = dataclasses.replace(
    TINY, vocab_size=16, width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, ffw=24
)
CFG = dataclasses.replace(CFG, lora_rank=2, lora_alpha=6.0)
TOKENS = jnp.array([[3, 1, 4, 1, 5, 9]])


def logits(params):
    positions = jnp.arange(TOKENS.shape[1])[None]
    return jax.jit(forward, static_argnums=1)(params, CFG, TOKENS, positions, jnp.ones_like(TOKENS))


def trained():
    """(base, adapters before, adapters after a few steps, losses)."""
    base = init(jax.random.key(0), CFG)
    base["embed"] = 30 * base["embed"]  # frozen: as peaked as a trained one
    start = lora.init_adapters(jax.random.key(1), CFG)
    tx = optax.adam(0.03)
    step = make_sft_step(CFG, tx)
    state = TrainState.create(jax.tree.map(jnp.array, start), tx)
    batch = fill([[text_row(np.asarray(TOKENS[0]))]], 6, 1)
    losses = []
    for _ in range(30):
        state, metrics = step(state, batch, Frozen(base))
        losses.append(float(metrics["train/loss"]))
    return base, start, state.params, losses


def test_adapters_learn_while_the_base_rests_and_merge_into_a_plain_model(tmp_path: Path) -> None:
    base, start, adapters, losses = trained()
    np.testing.assert_array_equal(logits(base), logits({**base, "adapters": start}))
    assert losses[-1] < 0.9 * losses[0]  # unit-length states bound the logits of tied random rows
    merged = lora.merge(base, adapters, CFG)
    ours = logits({**base, "adapters": adapters})
    assert float(jnp.abs(ours - logits(base)).max()) > 0.1
    np.testing.assert_allclose(logits(merged), ours, atol=1e-5)

    save_peft(tmp_path, adapters, CFG, "base")
    stored = safetensors.numpy.load_file(tmp_path / PEFT_WEIGHTS)
    config = json.loads((tmp_path / PEFT_CONFIG).read_text())
    assert config["r"] == 2 and config["lora_alpha"] == 6.0
    names = ("down", "gate", "k", "o", "q", "up", "v")
    assert config["target_modules"] == [f"{name}_proj" for name in names]
    before, after = naive_tensors(base, CFG), naive_tensors(merged, CFG)
    pairs = {key.rpartition(".lora_")[0] for key in stored}
    assert len(pairs) == 7 * CFG.num_layers
    for key in pairs:  # PEFT's formula, on the tensors of the file format
        product = stored[f"{key}.lora_B.weight"] @ stored[f"{key}.lora_A.weight"]
        name = f"{key.removeprefix('base_model.model.')}.weight"
        np.testing.assert_allclose(before[name] + 3.0 * product, after[name], atol=1e-5)


def test_adapters_are_small_and_start_as_pefts() -> None:
    adapters = tree.flatten(lora.init_adapters(jax.random.key(1), CFG))
    for path, spec in tree.flatten(lora.adapter_specs(CFG)).items():
        assert 2 in spec.shape and adapters[path].shape == spec.shape
        if path.endswith("/b"):
            assert not adapters[path].any()
    down = adapters["mlp/down/a"]
    assert 0.7 < float(np.std(down)) * math.sqrt(3 * CFG.ffw) < 1.3
