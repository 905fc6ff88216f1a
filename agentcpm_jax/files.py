"""Files: atomic writes, paths, and sizes and durations as text. Standard library only.

Also the paths of the models that come with the package.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: The models in this package, Hugging Face directories made by experiments/make_base.py:
#: 'shipped:base', and 'shipped:sft', the quickstart's agent after SFT (for short runs and tests).
SHIPPED = {
    f"shipped:{name}": Path(__file__).resolve().parent / "assets" / f"tiny_{name}"
    for name in ("base", "sft")
}


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file atomically: an older one stays until then, whatever happens. Makes its folder.

    It is on disk, name and content, when this returns. Text is UTF-8; lone surrogates, which models
    can sample, become question marks. An `OSError` names the file.
    """
    data = content.encode("utf-8", "replace") if isinstance(content, str) else content
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # else the name could be on disk before the content
            os.replace(partial, path)
            sync_directory(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Append a line; what a full disk or a kill tore off before it stays a line of its own.

    An `OSError` names the file.
    """
    with naming(path), path.open("ab+") as file:
        if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
            line = "\n" + line
        file.write(line.encode("utf-8", "replace") + b"\n")


def sync_directory(path: Path) -> None:
    """Fsync a directory, so that names made, renamed or removed in it are on disk.

    Some network disks cannot: what they do with names is up to them.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Fsync all that lies in a directory, so that it can be given its name."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    for folder in (directory, *directory.rglob("*/")):
        sync_directory(folder)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Names the file in an `OSError` of the body that names none: of a write to a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def nearest_existing(path: Path) -> Path:
    """The nearest existing folder at or above the path, which is on the same disk."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def size_text(nbytes: float, binary: bool = False) -> str:
    """`1.23 GB`, `45.60 MB`; with `binary`, as memory is counted, `1.23 GiB`, `45.6 MiB`."""
    if binary:
        return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 0.1 * 2**30 else f"{nbytes / 2**20:.1f} MiB"
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"


def duration_text(seconds: float) -> str:
    """`3 h 05 min`, `4 min 07 s`, `8.1 s`, `n/a` for NaN."""
    if math.isnan(seconds):
        return "n/a"
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{max(0.0, round(seconds, 1)):g} s"
