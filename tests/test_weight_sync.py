"""A published version is complete, exact and final."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentcpm_jax import weight_sync
from agentcpm_jax.types import UserError


@dataclass(frozen=True)
class Config:
    width: int = 8
    tied: bool = True


def make_params(seed: int) -> dict:
    key = jax.random.key(seed)
    return {
        "embed": jax.random.normal(key, (16, 8)),
        "layers": {
            "attn": {"q": jax.random.normal(key, (2, 8, 8), jnp.bfloat16)},
            "steps": jnp.arange(3, dtype=jnp.int32),
        },
        "scale": jnp.float32(seed),
    }


def bits(params: dict) -> list[tuple]:
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    return [(path, leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()) for path, leaf in flat]


@pytest.mark.parametrize("max_file_bytes", [1, 300, 1 << 30])
def test_loaded_equals_published_however_it_is_split(tmp_path: Path, max_file_bytes: int) -> None:
    params = make_params(1)
    assert weight_sync.publish(tmp_path, 17, params, Config(), max_file_bytes)
    assert bits(weight_sync.load(tmp_path, 17)) == bits(params)
    path = tmp_path / "weights" / "v000017"
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["version"] == 17 and manifest["model"] == {"width": 8, "tied": True}
    assert sorted(manifest["files"]) == sorted(p.name for p in path.glob("*.safetensors"))
    assert len(manifest["files"]) == {1: 4, 300: 2, 1 << 30: 1}[max_file_bytes]
    assert (path / "STABLE").exists() and not list(path.parent.glob(".*"))


def test_an_existing_version_is_never_published_again(tmp_path: Path) -> None:
    assert weight_sync.publish(tmp_path, 3, make_params(1))
    assert not weight_sync.publish(tmp_path, 3, make_params(2))
    assert bits(weight_sync.load(tmp_path, 3)) == bits(make_params(1))


def test_a_version_without_its_marker_does_not_exist_yet(tmp_path: Path) -> None:
    weight_sync.publish(tmp_path, 1, make_params(1))
    weight_sync.publish(tmp_path, 2, make_params(2))
    (tmp_path / "weights" / "v000002" / "STABLE").unlink()  # as if killed before the last line
    assert weight_sync.versions(tmp_path) == [1]
    with pytest.raises(UserError, match=r"no stable weights .*v000002; versions there: \[1\]"):
        weight_sync.load(tmp_path, 2)
    assert weight_sync.publish(tmp_path, 2, make_params(5))
    assert bits(weight_sync.load(tmp_path, 2)) == bits(make_params(5))


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_files_are_refused(tmp_path: Path, damage: str) -> None:
    weight_sync.publish(tmp_path, 1, make_params(1))
    (file,) = (tmp_path / "weights" / "v000001").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(content if damage == "flip" else content[:-1])
    with pytest.raises(UserError, match=r"model-00000\.safetensors are damaged"):
        weight_sync.load(tmp_path, 1)


def test_garbage_collection_keeps_the_newest_and_closes_the_numbers_below(tmp_path: Path) -> None:
    for version in range(4):
        weight_sync.publish(tmp_path, version, make_params(version))
    leftover = tmp_path / "weights" / ".v000004.123.tmp"
    leftover.mkdir()
    assert weight_sync.collect_garbage(tmp_path, keep_from=2) == [0, 1]
    assert weight_sync.versions(tmp_path) == [2, 3] and not leftover.exists()
    assert not weight_sync.publish(tmp_path, 1, make_params(9))
    assert weight_sync.collect_garbage(tmp_path, keep_from=99) == [2]
    assert bits(weight_sync.load(tmp_path, 3)) == bits(make_params(3))


def test_a_directory_without_weights_has_no_versions(tmp_path: Path) -> None:
    assert weight_sync.versions(tmp_path) == []
    assert weight_sync.collect_garbage(tmp_path, 5) == []
