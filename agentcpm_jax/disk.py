"""What a disk refuses or gives back torn, in one line: the place, and what to do about it."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from agentcpm_jax.files import nearest_existing
from agentcpm_jax.types import UserError

RESUMES = "then the same command resumes"
_MOUNT = "mount its disk again"
#: What to do, by errno. Other errors are not a disk's.
REMEDIES = {
    errno.ENOSPC: "make room on its disk",
    errno.EDQUOT: "make room within your quota on its disk",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
    errno.EROFS: "mount its disk for writing",
    errno.EACCES: "give this user the right to use it",
    errno.EPERM: "give this user the right to use it",
    errno.EIO: "its disk fails (dmesg says how): mend it, or copy the rest to another one",
    errno.ESTALE: _MOUNT,
    errno.ENODEV: _MOUNT,
    errno.ENXIO: _MOUNT,
    errno.ENOTCONN: _MOUNT,
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close some of the files that are open on this machine",
}
#: SQLite's own names for the same. It does not say what a failed write or a missing file is due to.
_SQLITE = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_READONLY: errno.EACCES,
    sqlite3.SQLITE_IOERR: errno.EIO,
    sqlite3.SQLITE_CANTOPEN: errno.EACCES,
    sqlite3.SQLITE_PERM: errno.EACCES,
}
_NEARLY_FULL = 1 << 20  # bytes: SQLite takes its space in pieces
#: Libraries that write files themselves put the number into their text.
_NUMBER = re.compile(r"\[Errno (\d+)\]|os_error_code='(\d+)'|OS error (\d+)")


class DiskError(UserError):
    """A file cannot be written, or not be read; what is on the disk is as it was before."""


@contextmanager
def refusals(place: str | Path, then: str = RESUMES) -> Iterator[None]:
    """Turns what a disk refuses in the body into a `DiskError`.

    Args:
      place: what is named when the error itself names no file.
      then: what follows once the remedy was applied.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (number := disk_errno(error, place)) is None:
            raise
        raise refusal(number, getattr(error, "filename", None) or place, then) from error


def refusal(number: int, place: str | Path, then: str = RESUMES) -> DiskError:
    """The error of one of `REMEDIES`."""
    return DiskError(f"{place}: {os.strerror(number)}; {REMEDIES[number]}, {then}")


def read_state(path: Path, keys: Iterable[str], fix: str) -> dict[str, Any]:
    """A small JSON file that a run wrote for itself.

    Raises `UserError`, which ends with `fix`: it is no object with these keys, as after a power cut
    on a disk that does not keep its promises.
    """
    with suppress(ValueError):
        found = json.loads(path.read_bytes())
        if isinstance(found, dict) and found.keys() >= set(keys):
            return found
    raise UserError(f"{path} is damaged: it is not what a run writes there; {fix}")


def disk_errno(error: BaseException, place: str | Path) -> int | None:
    """The number of a disk's error about `place`; None when it is not a disk's."""
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", 0)  # an error of Python's own has none
        number = _SQLITE.get(code & 0xFF)
        return number if number in (None, errno.ENOSPC) else _cause(number, Path(place))
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (said := _NUMBER.search(str(error))):
        number = int(next(filter(None, said.groups())))
    return number if number in REMEDIES else None


def _cause(number: int, file: Path) -> int:
    """Why SQLite cannot use a file, as far as its disk tells."""
    disk = os.statvfs(nearest_existing(file))
    if disk.f_flag & os.ST_RDONLY:
        return errno.EROFS
    if disk.f_bavail * disk.f_frsize < _NEARLY_FULL:
        return errno.ENOSPC
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max((p.stat().st_size for p in file.parent.glob(f"{file.name}*")), default=0)
    if number == errno.EIO and 0 <= limit < largest + _NEARLY_FULL:
        return errno.EFBIG
    return number
