"""Copies of published weights: resumed, checked, once, within a quota."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from agentcpm_jax.types import UserError
from agentcpm_jax.weights.mirror import Mirror, Pull
from agentcpm_jax.weights.store import VersionWriter, collect_garbage, open_root
from tests.doubles.object_store import ObjectStore, register
from tests.doubles.toy_pool import wait_for

WEIGHTS = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8).tobytes()


@pytest.fixture
def store(monkeypatch) -> Iterator[ObjectStore]:
    register()
    monkeypatch.setattr("agentcpm_jax.weights.mirror.CHUNK", 1 << 14)
    running = ObjectStore()
    yield running
    running.close()


def publish(store: ObjectStore, version: int, name: str = "run") -> None:
    writer = VersionWriter(f"{store.url}/{name}", version)
    writer.write("model.safetensors", [WEIGHTS])
    writer.write("config.json", [b"{}"])
    writer.commit({})


def mirror(store: ObjectStore, tmp_path: Path, quota: int = 0) -> Mirror:
    return Mirror(store.url, tmp_path / "host", quota, pause=0.001)


def finish(copies: Mirror, version: int, name: str = "run") -> Pull:
    first = copies.pull(name, version)
    wait_for(lambda: first.state != "pulling")
    return copies.pull(name, version) if first.state == "ready" else first


def key(version: int) -> str:
    return f"bucket/run/weights/v{version:06d}/model.safetensors"


def test_a_copy_is_whole_and_made_once(store: ObjectStore, tmp_path: Path) -> None:
    publish(store, 7)
    copies = mirror(store, tmp_path)
    asked = [copies.pull("run", 7) for _ in range(8)]
    done = finish(copies, 7)
    assert all(pull is done for pull in asked)
    assert (done.state, done.done, done.total) == ("ready", len(WEIGHTS) + 2, len(WEIGHTS) + 2)
    assert (Path(done.path) / "model.safetensors").read_bytes() == WEIGHTS
    assert Path(done.path).is_relative_to(tmp_path / "host")
    assert copies.versions() == {"run": [7]}
    again = mirror(store, tmp_path)  # the agent was started again
    assert finish(again, 7).path == done.path
    assert store.served[key(7)] == len(WEIGHTS)


def test_a_copy_resumes_where_it_stopped(store: ObjectStore, tmp_path: Path) -> None:
    publish(store, 1)
    part = tmp_path / "host" / "run" / "weights" / ".v000001.part"
    part.mkdir(parents=True)
    (part / "model.safetensors").write_bytes(WEIGHTS[:60_000])
    done = finish(mirror(store, tmp_path), 1)
    assert (Path(done.path) / "model.safetensors").read_bytes() == WEIGHTS
    assert store.served[key(1)] == 40_000 and not part.exists()


@pytest.mark.parametrize("left", [b"something else" * 100, WEIGHTS + b"too long"])
def test_a_part_that_is_not_the_files_is_made_anew(store, tmp_path: Path, left: bytes) -> None:
    publish(store, 1)
    part = tmp_path / "host" / "run" / "weights" / ".v000001.part"
    part.mkdir(parents=True)
    (part / "model.safetensors").write_bytes(left)
    done = finish(mirror(store, tmp_path), 1)
    assert (Path(done.path) / "model.safetensors").read_bytes() == WEIGHTS
    assert done.done == done.total


@pytest.mark.parametrize("left", ["model.safetensors", "manifest.json"])
def test_a_copy_without_its_marker_is_made_anew(store, tmp_path: Path, left: str) -> None:
    """An agent was killed between renaming a copy and marking it, or while it removed it."""
    publish(store, 1)
    torn = tmp_path / "host" / "run" / "weights" / "v000001"
    torn.mkdir(parents=True)
    (torn / left).write_bytes(WEIGHTS)
    done = finish(mirror(store, tmp_path), 1)
    assert (done.state, done.reason) == ("ready", "")
    assert (Path(done.path) / "model.safetensors").read_bytes() == WEIGHTS
    assert (Path(done.path) / "config.json").read_bytes() == b"{}"


def test_broken_connections_are_tried_again(store: ObjectStore, tmp_path: Path) -> None:
    publish(store, 1)
    store.broken = 3
    done = finish(mirror(store, tmp_path), 1)
    assert store.broken == 0 and done.state == "ready"
    assert (Path(done.path) / "model.safetensors").read_bytes() == WEIGHTS


def test_what_is_damaged_is_never_ready(store: ObjectStore, tmp_path: Path) -> None:
    publish(store, 1)
    store.objects[key(1)] = WEIGHTS[:-1] + b"!"
    copies = mirror(store, tmp_path)
    done = finish(copies, 1)
    assert done.state == "failed" and "its checksum is not the one in manifest.json" in done.reason
    assert copies.versions() == {}
    assert copies.pull("run", 1) is done  # told once more, then tried again
    publish(store, 1)
    assert finish(copies, 1).state == "ready"


def test_a_version_that_was_collected_or_never_was_is_named(store, tmp_path: Path) -> None:
    publish(store, 1)
    publish(store, 2)
    collect_garbage(f"{store.url}/run", 2)
    done = finish(mirror(store, tmp_path), 1)
    assert done.state == "failed"
    assert re.search(r"no stable weights .*v000001; versions there: \[2\]", done.reason)


def test_the_quota_removes_what_was_asked_for_longest_ago(store, tmp_path: Path) -> None:
    for version in (1, 2, 3, 4):
        publish(store, version)
    copies = mirror(store, tmp_path, quota=2 * len(WEIGHTS) + 5000)
    for version in (1, 2):
        assert finish(copies, version).state == "ready"
    finish(copies, 1)  # asked for again: 2 goes first
    assert finish(copies, 3).state == "ready"
    assert copies.versions() == {"run": [1, 3]}
    assert copies.used() <= 2 * len(WEIGHTS) + 5000
    assert finish(copies, 2).state == "ready"  # and is copied anew when it is wanted


def test_few_copies_stay_on_a_large_disk(store: ObjectStore, tmp_path: Path) -> None:
    copies = mirror(store, tmp_path)
    for version in range(5):
        publish(store, version)
        assert finish(copies, version).state == "ready"
    assert copies.versions() == {"run": [2, 3, 4]}


def test_what_cannot_fit_says_so(store: ObjectStore, tmp_path: Path) -> None:
    publish(store, 1)
    done = finish(mirror(store, tmp_path, quota=50_000), 1)
    assert done.state == "failed"
    assert re.search(
        r"MB of weights do not fit in .*quota 0.05 MB, .*raise --quota-gb", done.reason
    )


@pytest.mark.parametrize("name", ["", "../run", "a/b", ".hidden", "x" * 300])
def test_a_name_cannot_leave_the_source(store: ObjectStore, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="no weights are called"):
        mirror(store, tmp_path).pull(name, 0)


def test_a_source_nobody_can_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="weights cannot lie at nowhere://b"):
        Mirror("nowhere://b", tmp_path)
    assert open_root(tmp_path).local
