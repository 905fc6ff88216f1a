"""What a disk refuses is one line that names the place and the remedy; all else passes."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from pathlib import Path

import pytest

from agentcpm_jax.disk import REMEDIES, DiskError, disk_errno, read_state, refusals
from agentcpm_jax.files import append_line, write_atomically
from agentcpm_jax.types import UserError
from tests.doubles.full_disk import files_up_to

FULL = f"[Errno {errno.ENOSPC}] No space left on device"


@pytest.mark.parametrize("number", sorted(REMEDIES))
def test_every_refusal_names_place_cause_and_remedy(tmp_path: Path, number: int) -> None:
    for name, place in ("/other/file", "/other/file"), (None, str(tmp_path)):
        with pytest.raises(DiskError) as error, refusals(tmp_path):
            raise OSError(number, "as the system says it", name)
        said = f"{place}: {os.strerror(number)}; {REMEDIES[number]}, then the same command resumes"
        assert str(error.value) == said


@pytest.mark.parametrize(
    "error",
    [
        shutil.Error([("a", "b", FULL)]),
        ValueError("RESOURCE_EXHAUSTED: Error writing \"x\": No space [os_error_code='28']"),
        RuntimeError("Failed to write: OS error 28: ENOSPC"),
    ],
)
def test_libraries_say_it_in_their_text(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(DiskError, match="make room on its disk"), refusals(tmp_path):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(errno.ECONNRESET, "reset"),
        ValueError("RESOURCE_EXHAUSTED: out of memory"),
        UserError("what is wrong: x; how to fix it"),
        FileNotFoundError(errno.ENOENT, "none", "x"),
        sqlite3.IntegrityError("UNIQUE constraint failed"),
    ],
)
def test_what_is_not_the_disks_passes(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as found, refusals(tmp_path):
        raise error
    assert found.value is error


def test_a_file_that_cannot_grow_is_named(tmp_path: Path) -> None:
    for write in write_atomically, append_line:
        path = tmp_path / write.__name__
        write(path, "old")
        before = path.read_bytes()
        refused = pytest.raises(DiskError, match=f"{path}: File too large")
        with files_up_to(0), refused, refusals(tmp_path):
            write(path, "new")
        assert path.read_bytes() == before and len(list(tmp_path.glob(f".{path.name}*"))) == 0


def test_sqlite_says_less_than_its_disk_knows(tmp_path: Path) -> None:
    where = tmp_path / "x.db"
    with sqlite3.connect(where) as db:
        db.execute("CREATE TABLE t (x BLOB)")
        with files_up_to(1 << 14), pytest.raises(sqlite3.Error) as full:
            db.execute("INSERT INTO t VALUES (zeroblob(100000))")
            db.commit()
        with files_up_to(1 << 14):
            assert disk_errno(full.value, where) == errno.EFBIG
    db.close()
    with pytest.raises(sqlite3.Error) as absent:
        sqlite3.connect(tmp_path / "no" / "x.db")
    assert disk_errno(absent.value, where) == errno.EACCES


@pytest.mark.parametrize("torn", [b"", b"{", b"[]", b"7", b"\xff\xfe", b"{}", b"\0" * 50])
def test_a_torn_state_file_is_refused_with_its_fix(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "DONE"
    path.write_bytes(torn)
    with pytest.raises(UserError, match=rf"{path} is damaged: .*; remove it"):
        read_state(path, ("stage",), "remove it")
    path.write_text('{"stage": "rl", "more": 1}')
    assert read_state(path, ("stage",), "remove it") == {"stage": "rl", "more": 1}
