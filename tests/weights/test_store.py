"""A published version is complete, final and collected in order, on disks and object stores."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from agentcpm_jax.types import UserError
from agentcpm_jax.weights.store import (
    VersionWriter,
    collect_garbage,
    manifest,
    open_root,
    remove_roots,
    versions,
)


@pytest.fixture(params=["disk", "object store"])
def root(request, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "disk" else f"memory://{uuid.uuid4().hex}/run"


def write(root: str, version: int, content: bytes = b"weights") -> None:
    writer = VersionWriter(root, version)
    writer.write("model.safetensors", [content[:3], content[3:]])
    writer.commit({})


def read(root: str, version: int) -> bytes:
    place = open_root(root)
    return place.fs.cat_file(f"{place.version(version)}/model.safetensors")


def test_a_version_appears_with_its_marker(root: str) -> None:
    writer = VersionWriter(root, 3)
    writer.write("model.safetensors", [b"weights"])
    assert versions(root) == []
    with pytest.raises(UserError, match=r"no stable weights .*v000003; versions there: none"):
        manifest(root, 3)
    writer.commit({"dtype": "bfloat16"})
    found = manifest(root, 3)
    assert versions(root) == [3] and read(root, 3) == b"weights"
    assert found["files"]["model.safetensors"]["bytes"] == 7 and found["dtype"] == "bfloat16"


def test_what_a_killed_writer_left_is_replaced(root: str) -> None:
    write(root, 1)
    write(root, 2, b"half written")
    place = open_root(root)
    place.fs.rm_file(f"{place.version(2)}/STABLE")  # as if killed before the last line
    assert versions(root) == [1]
    write(root, 2, b"whole")
    assert versions(root) == [1, 2] and read(root, 2) == b"whole"


def test_garbage_collection_keeps_the_newest(root: str) -> None:
    for version in range(4):
        write(root, version, b"w%d" % version)
    assert collect_garbage(root, keep_from=2) == [0, 1]
    assert versions(root) == [2, 3] and read(root, 2) == b"w2"
    assert collect_garbage(root, keep_from=99) == [2]
    assert versions(root) == [3] and read(root, 3) == b"w3"
    place = open_root(root)
    assert {p.split("/")[-2] for p in place.fs.find(place.path)} == {"v000003"}


def test_what_dead_writers_left_on_a_disk_is_collected(tmp_path: Path) -> None:
    write(str(tmp_path), 1)
    leftover = tmp_path / "weights" / ".v000004.123.tmp"
    leftover.mkdir()
    collect_garbage(tmp_path, 0)
    assert not leftover.exists() and versions(tmp_path) == [1]


def test_a_place_without_weights_has_no_versions(root: str) -> None:
    assert versions(root) == []
    assert collect_garbage(root, 5) == []


def test_roots_of_earlier_starts_are_removed(root: str) -> None:
    for name in ("run-a.1", "run-a.2", "run-b.1"):
        write(f"{root}/{name}", 0)
    remove_roots(root, "run-a.", but="run-a.2")
    assert [versions(f"{root}/{name}") for name in ("run-a.1", "run-a.2", "run-b.1")] == [
        [],
        [0],
        [0],
    ]


def test_weights_of_an_older_schema_say_so(tmp_path: Path) -> None:
    write(str(tmp_path), 0)
    path = tmp_path / "weights" / "v000000" / "manifest.json"
    path.write_text(path.read_text().replace('"schema": 3', '"schema": 2'))
    with pytest.raises(UserError, match="schema 2, this version reads 3; remove them"):
        manifest(tmp_path, 0)


@pytest.mark.parametrize("place", ["nowhere://bucket/run", "gs"])
def test_a_place_nobody_can_read_is_named(place: str) -> None:
    if place == "gs":
        assert open_root(place).local  # a directory of that name
    else:
        with pytest.raises(UserError, match=r"weights cannot lie at nowhere://bucket/run"):
            open_root(place)


def test_versions_have_six_digits(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1000000 is not within"):
        VersionWriter(tmp_path, 10**6)
