"""Parameters become a directory that every engine reads, and come back bit for bit."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentcpm_jax import tree
from agentcpm_jax.files import SHIPPED
from agentcpm_jax.hf import save
from agentcpm_jax.hf.load import load_hf
from agentcpm_jax.hf.save import save_hf
from agentcpm_jax.model import lora
from agentcpm_jax.model import params as model_params
from agentcpm_jax.model.config import ModelConfig
from agentcpm_jax.model.params import abstract_params, param_specs
from agentcpm_jax.types import UserError
from agentcpm_jax.weights import publish
from agentcpm_jax.weights.store import collect_garbage, versions

SMALL = ModelConfig(
    vocab_size=64, width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffw=24
)


def make_params(seed: int, cfg: ModelConfig = SMALL) -> dict:
    return model_params.init(jax.random.key(seed), cfg)


def bits(params: dict) -> list[tuple]:
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    return [(str(path), leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()) for path, leaf in flat]


@pytest.mark.parametrize(
    ("max_file_bytes", "dtype", "tied"),
    [(1, "float32", True), (6000, "bfloat16", False), (1 << 30, "bfloat16", True)],
)
def test_loaded_equals_published_however_it_is_split(
    tmp_path: Path, monkeypatch, max_file_bytes: int, dtype: str, tied: bool
) -> None:
    monkeypatch.setattr(save, "MAX_FILE_BYTES", max_file_bytes)
    cfg = replace(SMALL, param_dtype=dtype, tied_embeddings=tied)
    params = make_params(1, cfg)
    assert publish.publish_version(tmp_path, 17, params, cfg)
    assert bits(publish.load_version(tmp_path, 17)) == bits(params)
    path = tmp_path / "weights" / "v000017"
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["version"] == 17 and manifest["model"]["width"] == 16
    files = {p.name for p in path.iterdir()} - {"manifest.json", "STABLE"}
    assert manifest["files"].keys() == files
    assert ("model.safetensors" in files) == (max_file_bytes == 1 << 30)
    assert (path / "STABLE").exists() and not list(path.parent.glob(".*"))


@pytest.mark.parametrize("form", ["device", "host", "small pieces"])
def test_the_directory_is_what_a_checkpoint_is(tmp_path: Path, monkeypatch, form: str) -> None:
    """Every tensor as `save_hf` writes it, from devices, from the host and piece by piece."""
    params, cfg = load_hf(SHIPPED["shipped:sft"])
    if form == "host":
        params = jax.tree.map(np.asarray, params)
    if form == "small pieces":
        monkeypatch.setattr(save, "PIECE_BYTES", 3000)
    tokenizer = SHIPPED["shipped:sft"]
    publish.publish_version(tmp_path / "a", 0, params, cfg, tokenizer_from=tokenizer)
    save_hf(tmp_path / "b", params, cfg, tokenizer_from=tokenizer)
    published = tmp_path / "a" / "weights" / "v000000"
    assert bits(load_hf(published)[0]) == bits(load_hf(tmp_path / "b")[0])
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        ours, theirs = published / name, tmp_path / "b" / name
        assert ours.exists() == theirs.exists()
        assert not ours.exists() or ours.read_text().strip() == theirs.read_text().strip()


def test_float32_parameters_may_be_published_in_bfloat16(tmp_path: Path) -> None:
    params = make_params(1)
    publish.publish_version(tmp_path, 0, params, SMALL, dtype="bfloat16")
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert bits(publish.load_version(tmp_path, 0)) == bits(expected)
    config = json.loads((tmp_path / "weights" / "v000000" / "config.json").read_text())
    assert "bfloat16" in json.dumps(config)


def test_adapters_are_published_within_their_matrices(tmp_path: Path) -> None:
    cfg = replace(SMALL, lora_rank=2)
    params, adapters = make_params(1), lora.init_adapters(jax.random.key(2), cfg)
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    publish.publish_version(tmp_path, 0, params | {"adapters": adapters}, cfg)
    merged = lora.merge(params, adapters, cfg)
    assert bits(publish.load_version(tmp_path, 0)) == bits(merged) != bits(params)


def test_conversion_streams(tmp_path: Path, monkeypatch) -> None:
    """Python's own peak stays within a few pieces of a model that is far larger."""
    cfg = replace(SMALL, vocab_size=4096, width=256, ffw=1024, num_layers=8, head_dim=64)
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_params(cfg))
    size = sum(leaf.nbytes for leaf in tree.flatten(params).values())
    monkeypatch.setattr(save, "PIECE_BYTES", 1 << 18)
    tracemalloc.start()
    publish.publish_version(tmp_path, 0, params, cfg)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 30 << 20 and peak < 3 << 20, (size, peak)


def test_parameters_of_another_model_are_a_bug(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="embed has shape"):
        publish.publish_version(tmp_path, 0, make_params(0), replace(SMALL, vocab_size=65))
    lacking = {k: v for k, v in make_params(0).items() if k != "embed"} | {"embed": 0}
    assert set(lacking) == set(param_specs(SMALL))
    assert versions(tmp_path) == []


def test_no_version_is_published_again_not_even_one_that_was_collected(tmp_path: Path) -> None:
    for version in range(4):
        assert publish.publish_version(tmp_path, version, make_params(version), SMALL)
    assert collect_garbage(tmp_path, 2) == [0, 1]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for version in range(4):
        assert not publish.publish_version(tmp_path, version, make_params(9), SMALL)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert publish.publish_version(tmp_path, 4, make_params(4), SMALL)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_files_are_refused(tmp_path: Path, damage: str) -> None:
    publish.publish_version(tmp_path, 1, make_params(1), SMALL)
    (file,) = (tmp_path / "weights" / "v000001").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(content if damage == "flip" else content[:-1])
    with pytest.raises(UserError, match=r"model\.safetensors are damaged"):
        publish.load_version(tmp_path, 1)


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("agentcpm_jax.weights.store._Synced.write", full)
    with pytest.raises(UserError, match=r"No space left on device; make room on its disk"):
        publish.publish_version(tmp_path, 0, make_params(0), SMALL)
    assert not list((tmp_path / "weights").iterdir())


def test_weights_that_are_elsewhere_are_not_read_in_place() -> None:
    with pytest.raises(UserError, match="copy them to a local disk"):
        publish.load_version("memory://elsewhere", 0)
