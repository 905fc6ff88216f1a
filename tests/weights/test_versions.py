"""Versions are handed out again after a restart; one that is gone is not waited for."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from agentcpm_jax import tree
from agentcpm_jax.model.config import ModelConfig
from agentcpm_jax.model.params import init
from agentcpm_jax.types import UserError
from agentcpm_jax.weights.versions import VersionCollected, VersionStore

SMALL = ModelConfig(vocab_size=32, width=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4)


def params(version: int) -> Any:
    return init(jax.random.key(version), SMALL)


def wait(store: VersionStore, version: int, seconds: float = 5.0) -> Any:
    return asyncio.run(asyncio.wait_for(store.wait(version), seconds))


def filled(directory: Path) -> VersionStore:
    """Versions 0 to 3, of which 0 and 1 were collected."""
    store = VersionStore(directory, SMALL, enabled=True)
    for version in range(4):
        store.put(version, params(version))
    store.collect_garbage(2)
    return store


def test_a_restarted_run_reads_what_was_published(tmp_path: Path) -> None:
    filled(tmp_path)
    restarted = VersionStore(tmp_path, SMALL, enabled=True)
    for version in (2, 3):
        found, expected = tree.flatten(wait(restarted, version)), tree.flatten(params(version))
        assert all(np.array_equal(found[path], expected[path]) for path in expected)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_collected_version_is_an_error_at_once(tmp_path: Path, restarted: bool) -> None:
    store = filled(tmp_path)
    if restarted:
        store = VersionStore(tmp_path, SMALL, enabled=True)
    with pytest.raises(VersionCollected, match=r"version 1 .* was collected; there are 2, 3:"):
        wait(store, 1)


def test_a_damaged_version_names_what_to_remove_and_is_computed_again(tmp_path: Path) -> None:
    filled(tmp_path)
    for step in ("1", "2", "3"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
    file = tmp_path / "weights" / "v000002" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    restarted = VersionStore(tmp_path, SMALL, enabled=True)
    places = f"{tmp_path}/checkpoints/3 {tmp_path}/weights/v000002"
    with pytest.raises(UserError, match=rf"{file} are damaged: .*\(rm -r {places}\), and the"):
        wait(restarted, 2)
    shutil.rmtree(file.parent)
    restarted.put(2, params(2))  # as the run does that goes on from checkpoint 2
    assert wait(restarted, 2) is not None


def test_a_version_to_come_is_waited_for(tmp_path: Path) -> None:
    store = filled(tmp_path)
    with pytest.raises(TimeoutError):
        wait(store, 4, seconds=0.1)
    store.put(4, params(4))
    assert wait(store, 4) is not None
