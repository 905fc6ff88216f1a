"""Where published weights lie: one directory per version, complete or absent. No arrays here.

    <root>/weights/v000017/  config.json  *.safetensors  tokenizer files   what engines load
                             manifest.json   sizes and checksums of every file
                             STABLE          empty, written last

`root` is a directory or any URL that fsspec knows (gs://bucket/run, s3://..., memory://...).
Readers look at stable versions only. A version number names one set of weights for ever: what was
published is not published again, neither when a resumed run computes the same step a second time
nor after the version was collected. One process publishes into a root.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from agentcpm_jax.files import sync_directory
from agentcpm_jax.manifest import CHECKSUM, MANIFEST, checksum, differs
from agentcpm_jax.types import UserError

SCHEMA = 3
WEIGHTS, STABLE = "weights", "STABLE"
FLUSH_BYTES = 128 << 20
_FOLDER = re.compile(r"\.?v(\d{6})(\..*)?")  # of a version, or of one that is being written


@dataclass(frozen=True)
class WeightsRoot:
    """A root, opened."""

    fs: fsspec.AbstractFileSystem
    path: str
    shown: str  # as the user wrote it

    @property
    def local(self) -> bool:
        """Whether its files are files of this machine (a network mount is one, too)."""
        return isinstance(self.fs, LocalFileSystem)

    def version(self, version: int) -> str:
        """The directory of one version."""
        return f"{self.path}/{version_folder(version)}"


def open_root(root: str | Path) -> WeightsRoot:
    """Raises `UserError` for a protocol that fsspec does not know, or whose package is missing."""
    try:
        fs, path = fsspec.url_to_fs(str(root))
    except (ValueError, ImportError) as error:
        raise UserError(
            f"weights cannot lie at {root}: {error}; name a directory, or install the package of "
            "its protocol (gs://: gcsfs, s3://: s3fs)"
        ) from None
    return WeightsRoot(fs, path.rstrip("/"), str(root))


def version_folder(version: int) -> str:
    """Of a version, below its root; raises ValueError when it is not within 0..999999."""
    if not 0 <= version < 10**6:
        raise ValueError(f"version {version} is not within 0..999999")
    return f"{WEIGHTS}/v{version:06d}"


def folders(directory: Path) -> Iterator[tuple[str, int, Path]]:
    """(root's name, version, folder) below the roots of a directory, unfinished ones included."""
    for path in sorted(directory.glob(f"*/{WEIGHTS}/*")):
        if number := _FOLDER.fullmatch(path.name):
            yield path.parents[1].name, int(number[1]), path


def version_path(root: str, version: int) -> str:
    """What a worker, or its agent, reads a version from: a directory, or the URL of one."""
    place = open_root(root)
    return place.version(version) if place.local else f"{root}/{version_folder(version)}"


def versions(root: str | Path) -> list[int]:
    """Stable versions, ascending; versions being written do not count."""
    place = open_root(root)
    if place.local:  # asked often by those who wait
        return sorted(int(p.parent.name[1:]) for p in _weights(place).glob(f"v*/{STABLE}"))
    place.fs.invalidate_cache()
    names = (name.split("/") for name in place.fs.find(f"{place.path}/{WEIGHTS}", maxdepth=2))
    return sorted(int(name[-2][1:]) for name in names if name[-1] == STABLE)


def is_collected(version: int, stable: Sequence[int]) -> bool:
    """Whether a version is older than the oldest of the `stable` ones."""
    return bool(stable) and version < stable[0]


def manifest(root: str | Path, version: int) -> dict[str, Any]:
    """`files` {name: {bytes, xxh3_128}} and facts for people, of a stable version.

    Raises `UserError`: the version is not there, or its manifest is of another schema.
    """
    place = open_root(root)
    directory = place.version(version)
    place.fs.invalidate_cache()
    if not place.fs.exists(f"{directory}/{STABLE}"):
        there = versions(root) or "none"
        raise UserError(f"no stable weights {directory}; versions there: {there}")
    try:
        found = json.loads(place.fs.cat_file(f"{directory}/{MANIFEST}"))
        found["files"].items()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"weights {directory} are damaged: {MANIFEST} cannot be read; remove them: the trainer "
            "publishes its weights anew"
        ) from None
    if found.get("schema") != SCHEMA:
        raise UserError(
            f"weights {directory} have schema {found.get('schema')}, this version reads {SCHEMA}; "
            "remove them: the trainer publishes its weights anew"
        )
    return found


def check_file(path: Path, expected: Mapping[str, Any]) -> None:
    """Size and checksum against the manifest's. Raises `UserError`."""
    if said := differs(path, expected["bytes"], expected[CHECKSUM]):
        raise UserError(
            f"weights {path} are damaged: the file {said}; remove {path.parent} and load another "
            "version"
        )


class VersionWriter:
    """A version being written. Nobody sees it before `commit`; `discard` removes it.

    On a local disk it is written beside its place, synced and renamed. An object store has no
    rename: there the marker alone makes a version.
    """

    def __init__(self, root: str | Path, version: int) -> None:
        self._place = open_root(root)
        self.version, self._target = version, self._place.version(version)
        self._files: dict[str, dict[str, Any]] = {}
        # The process id keeps two writers apart; what a killed writer left is removed by
        # `collect_garbage`.
        self._work = self._target
        if self._place.local:
            target = Path(self._target)
            self._work = str(target.with_name(f".{target.name}.{os.getpid()}.tmp"))
        self.discard()
        self._place.fs.makedirs(self._work, exist_ok=True)

    def write(self, name: str, pieces: Iterable[Any]) -> None:
        """One file from bytes-like pieces, each done with when the next is asked for."""
        digest, size = checksum(), 0
        with self._open(name) as file:
            for piece in pieces:
                digest.update(piece)
                file.write(piece)
                size += len(piece)
        self._files[name] = {"bytes": size, CHECKSUM: digest.hexdigest()}

    def commit(self, facts: Mapping[str, Any]) -> None:
        """The manifest, then everything at its place, then the marker."""
        content = {"schema": SCHEMA, "version": self.version, "files": self._files, **facts}
        self.write(MANIFEST, [json.dumps(content, indent=1).encode()])
        fs = self._place.fs
        if self._place.local:
            target = Path(self._target)
            # Without the marker: a writer was killed before the last line.
            _remove(fs, self._target)
            os.rename(self._work, target)
            sync_directory(target.parent)
        with fs.open(f"{self._target}/{STABLE}", "wb"):
            pass
        if self._place.local:
            sync_directory(Path(self._target))

    def discard(self) -> None:
        """Removes what was written, unless it was committed."""
        _remove(self._place.fs, self._work)

    def _open(self, name: str) -> Any:
        if self._place.local:
            return _Synced(Path(self._work) / name)
        return self._place.fs.open(f"{self._work}/{name}", "wb")


def collect_garbage(root: str | Path, keep_from: int) -> list[int]:
    """Removes stable versions below `keep_from` and what killed writers left; returns them.

    The newest stable version always stays, so that an engine that starts late finds one. Call it
    from the process that publishes.
    """
    place = open_root(root)
    if place.local:
        for leftover in _weights(place).glob(".v*.tmp"):
            _remove(place.fs, str(leftover))
    removed = [v for v in versions(root)[:-1] if v < keep_from]
    for version in removed:
        # First, so that no reader takes a half-removed version for a whole one.
        place.fs.rm_file(f"{place.version(version)}/{STABLE}")
        _remove(place.fs, place.version(version))
    return removed


def remove_roots(where: str | Path, prefix: str, but: str = "") -> None:
    """Removes the roots directly below `where` whose names begin with `prefix`, `but` one."""
    place = open_root(where)
    place.fs.invalidate_cache()
    if not place.fs.exists(place.path):
        return
    for entry in place.fs.ls(place.path, detail=False):
        name = entry.rstrip("/").rpartition("/")[2]
        if name.startswith(prefix) and name != but:
            _remove(place.fs, entry)


class _Synced:
    """A file that is on the disk when it is closed; the disk begins before the last byte comes."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb", buffering=0)
        self._flusher = ThreadPoolExecutor(1)
        self._flush: Future[None] | None = None
        self._unflushed = 0

    def write(self, piece: Any) -> None:
        rest = memoryview(piece)
        while len(rest):  # one call writes at most 2 GiB
            rest = rest[self._file.write(rest) :]
        self._unflushed += len(piece)
        if self._unflushed >= FLUSH_BYTES and (self._flush is None or self._flush.done()):
            self._unflushed = 0
            self._wait()
            self._flush = self._flusher.submit(os.fsync, self._file.fileno())

    def __enter__(self) -> _Synced:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            self._flusher.shutdown()
            if kind is None:
                self._wait()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def _wait(self) -> None:
        if self._flush is not None:
            self._flush.result()  # raises what the disk said


def _remove(fs: fsspec.AbstractFileSystem, path: str) -> None:
    fs.invalidate_cache()
    if fs.exists(path):
        fs.rm(path, recursive=True)


def _weights(place: WeightsRoot) -> Path:
    return Path(place.path) / WEIGHTS
