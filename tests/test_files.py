"""Whole or absent, on the right disk, and said in words."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from agentcpm_jax import files


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "new" / "page.html"
    files.write_atomically(path, "old")
    files.write_atomically(path, "new \ud800")
    assert path.read_bytes() == b"new ?" and [p.name for p in path.parent.iterdir()] == [path.name]
    files.write_atomically(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"


def test_what_cannot_be_written_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    files.write_atomically(path, "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        files.write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_content_is_on_disk_before_its_name_and_both_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        order.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name[:6]}")
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        order.append("rename")
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", synced)
    monkeypatch.setattr(files.os, "replace", renamed)
    files.write_atomically(tmp_path / "DONE", "{}")
    assert order == ["sync .DONE.", "rename", f"sync {tmp_path.name[:6]}"]


def test_a_torn_line_stays_apart_from_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    files.append_line(path, "one")
    with path.open("a") as file:
        file.write("tor")
    files.append_line(path, "two")
    assert path.read_text() == "one\ntor\ntwo\n"


def test_the_nearest_folder_that_is_there(tmp_path: Path) -> None:
    assert files.nearest_existing(tmp_path / "a" / "b") == tmp_path
    assert files.nearest_existing(tmp_path) == tmp_path
    (tmp_path / "file").write_text("")
    assert files.nearest_existing(tmp_path / "file") == tmp_path


@pytest.mark.parametrize(
    ("nbytes", "decimal", "binary"),
    [(0, "0.00 MB", "0.0 MiB"), (2**20, "1.05 MB", "1.0 MiB"), (2**30, "1.07 GB", "1.00 GiB")],
)
def test_sizes(nbytes: int, decimal: str, binary: str) -> None:
    assert (files.size_text(nbytes), files.size_text(nbytes, binary=True)) == (decimal, binary)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (8.12, "8.1 s"),
        (42.0, "42 s"),
        (-1.0, "0 s"),
        (59.96, "1 min 00 s"),
        (247.0, "4 min 07 s"),
        (11100.0, "3 h 05 min"),
        (math.nan, "n/a"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert files.duration_text(seconds) == text
