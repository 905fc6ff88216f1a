from __future__ import annotations

import dataclasses
import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

from agentcpm_jax import tree
from agentcpm_jax.hf import save
from agentcpm_jax.hf.companions import FILES
from agentcpm_jax.hf.load import load_hf
from agentcpm_jax.hf.names import INDEX, SINGLE, file_shapes
from agentcpm_jax.hf.save import save_hf
from agentcpm_jax.model.config import TINY, to_hf_config
from agentcpm_jax.model.params import param_specs
from agentcpm_jax.types import UserError

CFG = dataclasses.replace(TINY, vocab_size=61, width=32, num_layers=2, head_dim=8, ffw=48)


def make(cfg):
    """Parameters of arbitrary bits, as finite floats."""
    rng = np.random.default_rng(0)

    def draw(path, spec):
        return jnp.asarray(rng.standard_normal(spec.shape), cfg.param_dtype)

    return tree.map_with_path(draw, param_specs(cfg))


def same_bits(a, b):
    a, b = tree.flatten(a), tree.flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype, path
        assert np.asarray(a[path]).tobytes() == np.asarray(b[path]).tobytes(), path


@pytest.mark.parametrize(
    ("dtype", "tied", "limit"),
    list(itertools.product(["float32", "bfloat16"], [True, False], [1 << 30, 9_000])),
)
def test_round_trip_is_bit_exact(tmp_path, monkeypatch, dtype, tied, limit):
    monkeypatch.setattr(save, "MAX_FILE_BYTES", limit)
    cfg = dataclasses.replace(CFG, param_dtype=dtype, dtype=dtype, tied_embeddings=tied)
    params = make(cfg)
    save_hf(tmp_path / "a", params, cfg)
    loaded, found = load_hf(tmp_path / "a")
    assert found == cfg
    same_bits(loaded, params)

    shards = sorted((tmp_path / "a").glob("*.safetensors"))
    assert (len(shards) > 1) == (limit == 9_000) == (tmp_path / "a" / INDEX).is_file()
    stored = {}
    for shard in shards:
        tensors = safetensors.numpy.load_file(shard)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= limit
        stored.update(tensors)
    assert {key: value.shape for key, value in stored.items()} == file_shapes(
        tree.flatten(param_specs(cfg))
    )
    if len(shards) > 1:
        index = json.loads((tmp_path / "a" / INDEX).read_text())
        assert index["weight_map"].keys() == stored.keys()
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())

    save_hf(tmp_path / "b", loaded, found)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_matrices_are_stored_outputs_by_inputs(tmp_path):
    params = make(CFG)
    save_hf(tmp_path / "m", params, CFG)
    with safe_open(tmp_path / "m" / SINGLE, "numpy") as f:
        q = f.get_tensor("model.layers.1.self_attn.q_proj.weight")  # [N H, D]
        o = f.get_tensor("model.layers.1.self_attn.o_proj.weight")  # [D, N H]
    attn = params["layers"]["attn"]
    assert q[2 * 8 + 3, 5] == attn["q"][1, 5, 2, 3]
    assert o[5, 2 * 8 + 3] == attn["o"][1, 2, 3, 5]


def test_dtypes_are_the_callers_choice(tmp_path):
    params = make(CFG)
    save_hf(tmp_path / "m", params, CFG, dtype="bfloat16")
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    loaded, found = load_hf(tmp_path / "m")
    assert found.param_dtype == found.dtype == "bfloat16"
    same_bits(loaded, rounded)
    wanted = dataclasses.replace(CFG, remat="full")
    loaded, found = load_hf(tmp_path / "m", wanted)
    assert found == wanted
    same_bits(loaded, jax.tree.map(lambda x: x.astype(jnp.float32), rounded))
    assert load_hf(tmp_path / "m", param_dtype="float32")[1].param_dtype == "float32"


def test_stored_copy_of_a_tied_head_is_ignored(tmp_path):
    directory = _saved(tmp_path)
    tensors = safetensors.numpy.load_file(directory / SINGLE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    safetensors.numpy.save_file(tensors, directory / SINGLE)
    same_bits(load_hf(directory)[0], make(CFG))


def test_tokenizer_files_travel_and_a_checkpoint_is_replaced_whole(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    for name in (*FILES, "notes.txt"):
        (source / name).write_text(name)
    params = make(CFG)
    with monkeypatch.context() as patch:
        patch.setattr(save, "MAX_FILE_BYTES", 9_000)
        save_hf(tmp_path / "x" / "m", params, CFG, tokenizer_from=source)
    assert {"tokenizer.model", "chat_template.json"} < set(FILES)
    names = {path.name for path in (tmp_path / "x" / "m").iterdir()}
    assert set(FILES) < names and "notes.txt" not in names
    # From itself: the files are read before the old directory goes.
    save_hf(tmp_path / "x" / "m", params, CFG, tokenizer_from=tmp_path / "x" / "m")
    names = {path.name for path in (tmp_path / "x" / "m").iterdir()}
    assert names == {"config.json", SINGLE, *FILES}
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["m"]


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    directory = _saved(tmp_path)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    def full_disk(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(save, "json_text", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_hf(directory, jax.tree.map(jnp.zeros_like, make(CFG)), CFG)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert list(tmp_path.iterdir()) == [directory]


def test_save_refuses_foreign_places_and_wrong_trees(tmp_path):
    params = make(CFG)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"home already exists and holds thesis\.tex"):
        save_hf(tmp_path / "home", params, CFG)
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        save_hf(tmp_path / "m", params, CFG, tokenizer_from=tmp_path / "home")
    with pytest.raises(UserError, match="'float16' is not supported"):
        save_hf(tmp_path / "m", params, CFG, dtype="float16")
    with pytest.raises(ValueError, match=r"embed has shape \(61, 32\), expected \(62, 32\)"):
        save_hf(tmp_path / "m", params, dataclasses.replace(CFG, vocab_size=62))
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_damaged_directories_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(save, "MAX_FILE_BYTES", 9_000)
    good = _saved(tmp_path)
    shard = sorted(good.glob("*.safetensors"))[1].name
    for damage, named in [
        (lambda d: shutil.rmtree(d), "bad is not a directory"),
        (lambda d: (d / "config.json").unlink(), r"config\.json is missing"),
        (lambda d: (d / "config.json").write_text("{"), r"config\.json cannot be read"),
        (lambda d: (d / shard).unlink(), f"{shard} is missing"),
        (lambda d: (d / INDEX).write_text("{}"), "no weight_map"),
        (lambda d: (d / INDEX).unlink(), f"{SINGLE} is missing"),
        (lambda d: _cut(d / shard, -1), f"{shard} is not a whole safetensors file"),
        (lambda d: _cut(d / shard, 20), f"{shard} is not a whole safetensors file"),
        (
            lambda d: _edit(d, ffw=50),
            r"down_proj.weight has shape \(32, 48\), expected \(32, 50\)",
        ),
        (lambda d: _edit(d, num_layers=3), "lacks tensor model.layers.2.* of shape"),
        (lambda d: _edit(d, num_layers=1), "has tensor model.layers.1.*does not have"),
        (lambda d: _edit(d, tied_embeddings=False), r"lacks tensor lm_head.weight .*\(61, 32\)"),
    ]:
        bad = tmp_path / "bad"
        shutil.copytree(good, bad)
        damage(bad)
        with pytest.raises(UserError, match=named):
            load_hf(bad)
        shutil.rmtree(bad, ignore_errors=True)
    with pytest.raises(UserError, match=r"rope_theta 10000\.0, the config says 5000000\.0"):
        load_hf(good, dataclasses.replace(CFG, rope_theta=5e6))


def test_a_model_may_be_named_as_in_the_hubs_cache(tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / ("ab" * 20)
    shutil.copytree(_saved(tmp_path), snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    same_bits(load_hf("org/name")[0], make(CFG))
    assert load_hf("shipped:base")[1].vocab_size > 500


def test_files_whose_tensors_overlap_are_refused(tmp_path):
    path = _saved(tmp_path) / SINGLE
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    first, second, *_ = (key for key in header if key.endswith("norm.weight"))
    header[first] = header[second]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(UserError, match="leave a gap or overlap"):
        load_hf(tmp_path / "good")


def test_strange_dtypes_are_named(tmp_path):
    directory = _saved(tmp_path)
    tensors = safetensors.numpy.load_file(directory / SINGLE)
    key = "model.embed_tokens.weight"
    tensors[key] = tensors[key].astype(np.int8)
    safetensors.numpy.save_file(tensors, directory / SINGLE)
    for dtype in (None, "float32"):
        with pytest.raises(UserError, match=f"{key} is stored as I8"):
            load_hf(directory, param_dtype=dtype)


def _saved(tmp_path):
    save_hf(tmp_path / "good", make(CFG), CFG)
    return tmp_path / "good"


def _cut(path, end):
    path.write_bytes(path.read_bytes()[:end])


def _edit(directory, **changes):
    cfg = dataclasses.replace(CFG, **changes)
    (directory / "config.json").write_text(json.dumps(to_hf_config(cfg)))
