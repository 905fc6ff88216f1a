"""Against transformers' Qwen3 on random models: logits, gradients, and files both ways."""

from __future__ import annotations

import dataclasses

import pytest

torch = pytest.importorskip("torch", reason="the reference implementation needs torch")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM  # noqa: E402

from agentcpm_jax import tree  # noqa: E402
from agentcpm_jax.hf import save  # noqa: E402
from agentcpm_jax.hf.load import load_hf  # noqa: E402
from agentcpm_jax.hf.names import INDEX  # noqa: E402
from agentcpm_jax.hf.save import save_hf  # noqa: E402
from agentcpm_jax.model import qwen3  # noqa: E402
from agentcpm_jax.model.config import ModelConfig  # noqa: E402
from agentcpm_jax.model.params import param_specs  # noqa: E402
from tests.hf.naive_tensors import naive_tensors  # noqa: E402

BASE = ModelConfig(vocab_size=97, width=48, num_layers=2, ffw=80, max_positions=64)
# Query heads, kv heads, head dim, and what else differs from BASE.
SHAPES = {
    "multi_head": (4, 4, 12, {}),
    "multi_query_wide_heads": (4, 1, 32, {"tied_embeddings": False}),
    "grouped_2_narrow_heads": (6, 3, 4, {}),
    "grouped_3_theta_5e6": (6, 2, 16, {"rope_theta": 5e6}),
    "one_head_deep": (1, 1, 64, {"num_layers": 5, "norm_eps": 1e-5}),
    "grouped_4_untied": (8, 2, 8, {"ffw": 33, "rope_theta": 1e4, "tied_embeddings": False}),
}


@pytest.fixture(params=SHAPES, scope="module")
def saved(request, tmp_path_factory):
    """(directory, params, cfg) of a random model in which no norm is the identity."""
    n, k, h, others = SHAPES[request.param]
    cfg = dataclasses.replace(BASE, num_heads=n, num_kv_heads=k, head_dim=h, **others)
    rng = np.random.default_rng(len(request.param))

    def draw(path, spec):
        value = 0.15 * rng.standard_normal(spec.shape) + (spec.init == "ones")
        return jnp.asarray(value.astype(np.float32))

    params = tree.map_with_path(draw, param_specs(cfg))
    directory = tmp_path_factory.mktemp(request.param) / "model"
    save_hf(directory, params, cfg)
    return directory, params, cfg


def _tokens(cfg: ModelConfig) -> np.ndarray:
    return np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 33))


def _logits(params, cfg, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return qwen3.forward(params, cfg, jnp.asarray(tokens), positions, jnp.ones_like(positions))


def _load(directory) -> torch.nn.Module:
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert isinstance(model, Qwen3ForCausalLM) and model.dtype == torch.float32
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model


def test_logits_and_gradients(saved):
    directory, params, cfg = saved
    tokens = _tokens(cfg)
    weights = np.random.default_rng(1).standard_normal((*tokens.shape, cfg.vocab_size))
    weights = weights.astype(np.float32)

    model = _load(directory)
    theirs = model(torch.from_numpy(tokens)).logits
    (theirs * torch.from_numpy(weights)).mean().backward()

    def loss(params):
        logits = _logits(params, cfg, tokens)
        return jnp.mean(logits * weights), logits

    grads, ours = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert np.abs(np.asarray(ours) - theirs.detach().numpy()).max() <= 1e-4

    found = dict(model.named_parameters())
    compared = set()
    for key, grad in naive_tensors(grads, cfg).items():
        reference = found[key].grad.numpy()
        error = np.linalg.norm(grad - reference) / np.linalg.norm(reference)
        assert error <= 1e-4, (key, error)
        compared.add(key)
    assert compared == set(found)


def test_loads_what_transformers_saves(saved, tmp_path):
    directory, params, cfg = saved
    model = _load(directory)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / INDEX).is_file()
    loaded, found = load_hf(tmp_path / "theirs")
    assert found == cfg
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, loaded))


def test_sharded_bfloat16_loads_in_transformers(saved, tmp_path, monkeypatch):
    _, params, cfg = saved
    monkeypatch.setattr(save, "MAX_FILE_BYTES", 20_000)
    save_hf(tmp_path / "m", params, cfg, dtype="bfloat16")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert model.dtype == torch.bfloat16
    state = model.state_dict()
    for key, value in naive_tensors(params, cfg, "bfloat16").items():
        assert (state[key].view(torch.int16).numpy() == value.view(np.int16)).all(), key
