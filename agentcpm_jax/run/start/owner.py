"""A workdir has one owner: an advisory lock that the kernel takes back when the process ends.

The file `OWNER` names the process for people; the lock on it (POSIX, of the whole file) is what
counts, so that neither SIGKILL nor a requeued job leaves anything to remove. A lock of this kind is
not inherited by children. It is lost when this process closes the file: nothing else opens it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from agentcpm_jax.disk import refusal
from agentcpm_jax.types import UserError

OWNER = "OWNER"
PATIENCE = 1.0  # s: a process that only looks holds the lock for an instant

_mine: set[Path] = set()  # a POSIX lock does not keep its own process out


@contextmanager
def owned(workdir: Path, announce: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """Owns `workdir` (which it makes) inside; one in which nothing was written goes again.

    Raises `UserError`: another process owns it, or it cannot be written.
    """
    path, new = workdir.absolute() / OWNER, not workdir.exists()
    if path in _mine:
        raise UserError(f"{workdir} is in use by this very process; give another --workdir")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(path, announce)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):  # it may hold a run
            raise refusal(error.errno, workdir) from None
        raise UserError(f"{workdir}: {error}; choose a --workdir that can be written") from None
    _mine.add(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        _mine.discard(path)
        if new:
            with suppress(OSError):  # it holds a run
                workdir.rmdir()


def check_place(workdir: Path) -> None:
    """Raises `UserError` when the workdir can be neither made nor written."""
    place = workdir.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        what = "cannot be written" if place.is_dir() else "is no directory"
        raise UserError(f"{workdir}: {place} {what}; choose a --workdir that can be written")


def check_unowned(workdir: Path) -> None:
    """Raises `UserError` when another process owns the workdir; changes nothing."""
    try:
        descriptor = os.open(workdir / OWNER, os.O_RDWR)
    except OSError:
        return
    try:
        if not _try(descriptor):
            raise _refusal(workdir, descriptor)
    except OSError:  # no locks here: the run itself says so
        return
    finally:
        os.close(descriptor)


def _locked(path: Path, announce: Callable[[str], None]) -> int:
    """A descriptor of the locked file, in which this process stands as the owner."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _try(descriptor):
                raise _refusal(path.parent, descriptor)
            if not _is_file(path, descriptor):  # its last owner removed it meanwhile
                os.close(descriptor)
                continue
        except OSError as error:
            announce(
                f"{path.parent} cannot be locked ({error.strerror}): nothing keeps a second "
                "trainer out, so start one only"
            )
        except UserError:
            os.close(descriptor)
            raise
        before, host = _text(descriptor), socket.gethostname()
        if before and f"on {host} " not in before:
            announce(
                f"{path.parent} was last owned by {before}, which did not give it up; some network "
                "file systems do not show locks of other hosts: be sure that it has ended"
            )
        since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {host} since {since}\n".encode(), 0)
        return descriptor


def _try(descriptor: int) -> bool:
    """Whether the lock could be taken. Raises `OSError` where there are no locks."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)


def _refusal(workdir: Path, descriptor: int) -> UserError:
    owner = _text(descriptor) or "another process"
    return UserError(
        f"{workdir} is owned by {owner}, which is still running; wait for it, stop it, or give "
        "another --workdir"
    )


def _text(descriptor: int) -> str:
    return os.pread(descriptor, 300, 0).decode("utf-8", "replace").strip()


def _is_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
