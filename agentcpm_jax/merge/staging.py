"""The directory beside the output in which a result grows; it becomes the output whole or never.

    .<out>.partial/journal.json    {"key": ...}, then the number of tensors that are safely on disk

The key is a digest of recipe, seed and inputs. A killed merge leaves the directory, and the same
merge goes on after the last tensor in the journal; any other one starts again. Errors remove it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO

from agentcpm_jax.files import sync_directory
from agentcpm_jax.hf.place import check_free
from agentcpm_jax.types import UserError

JOURNAL = "journal.json"


class Staging:
    """An open staging directory; `done` tensors are in it already."""

    def __init__(self, path: Path, journal: IO[bytes], done: int):
        self.path, self.done = path, done
        self._journal = journal
        self._executor = ThreadPoolExecutor(1, "journal")
        self._pending: Future[None] | None = None

    def record(self, fd: int, count: int, wait: bool = False) -> None:
        """Notes, in the background, that `count` tensors are written, once they are on disk."""
        if self._pending is not None:
            self._pending.result()  # raises what went wrong
        self._pending = self._executor.submit(self._sync, os.dup(fd), count)
        if wait:
            self._pending.result()

    def close(self) -> None:
        """Waits for the journal."""
        self._executor.shutdown()
        self._journal.close()

    def _sync(self, fd: int, count: int) -> None:
        try:
            os.fdatasync(fd)
        finally:
            os.close(fd)
        self._journal.write(f"{count}\n".encode())
        self._journal.flush()
        os.fdatasync(self._journal.fileno())


@contextlib.contextmanager
def staging(out: Path, key: str) -> Iterator[Staging]:
    """A Staging whose directory is renamed to `out` at the end of the block.

    Raises:
      UserError: `out` is taken or being written by another process, or the disk is full.
    """
    check_free(out)
    path = staging_path(out)
    _check_ours(path)
    with contextlib.ExitStack() as stack:
        try:
            path.mkdir(parents=True, exist_ok=True)
            journal = stack.enter_context((path / JOURNAL).open("a+b"))
        except OSError as e:
            raise UserError(f"output {out} cannot be created: {e}; choose another") from None
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"output {out} is being written by another process; wait for it"
            ) from None
        except OSError:
            pass  # a disk without locks: nobody can be told apart, and the work is none the worse
        done = _continued(journal, key)
        if done is None:
            _restart(path, journal, key)
        grown = Staging(path, journal, done or 0)
        try:
            yield grown
            grown.close()
        except KeyboardInterrupt:
            grown.close()
            raise  # the same command goes on
        except BaseException as e:
            with contextlib.suppress(OSError):
                grown.close()
            shutil.rmtree(path, ignore_errors=True)
            if isinstance(e, OSError):  # a full disk, most of the time
                raise UserError(
                    f"output {out} cannot be written: {e}; free space or choose another disk"
                ) from e
            raise
        _finish(path, out)


def _check_ours(path: Path) -> None:
    """Raises UserError if what is at `path` is no unfinished merge: it would be emptied."""
    if not os.path.lexists(path):
        return
    plain = path.is_dir() and not path.is_symlink()
    if not plain or (not (path / JOURNAL).is_file() and any(path.iterdir())):
        raise UserError(f"{path} is no unfinished merge of ours; remove or rename it")


def _finish(path: Path, out: Path) -> None:
    """Gives the result its name; raises UserError that says where it lies when that fails."""
    try:
        (path / JOURNAL).unlink()
        os.replace(path, out)
    except OSError as e:
        raise UserError(
            f"the output is whole but cannot be renamed to {out}: {e}; move {path} by hand"
        ) from None
    with contextlib.suppress(OSError):  # not every disk syncs directories
        sync_directory(out.parent)


def staging_path(out: Path) -> Path:
    """Where the unfinished output lies."""
    return out.with_name(f".{out.name}.partial")


def _continued(journal: IO[bytes], key: str) -> int | None:
    """Tensors done, if the journal is of the same merge; None otherwise."""
    journal.seek(0)
    lines = journal.read().split(b"\n")[:-1]  # what follows the last newline was cut short
    with contextlib.suppress(ValueError, KeyError, TypeError, IndexError):
        if json.loads(lines[0])["key"] == key:
            return max((int(line) for line in lines[1:]), default=0)
    return None


def _restart(path: Path, journal: IO[bytes], key: str) -> None:
    for child in path.iterdir():
        if child.name != JOURNAL:
            shutil.rmtree(child) if child.is_dir() else child.unlink()
    journal.truncate(0)
    journal.write(json.dumps({"key": key}).encode() + b"\n")
    journal.flush()
