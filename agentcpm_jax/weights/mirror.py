"""Published weights, copied once from where the trainer writes them to a disk of this host.

Copies resume at the byte where they stopped, are checked against the manifest before anybody sees
them, and few stay, within a quota: the versions that were asked for last are removed last.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from agentcpm_jax.disk import refusals
from agentcpm_jax.files import size_text, sync_directory, write_atomically
from agentcpm_jax.manifest import CHECKSUM, MANIFEST, checksum
from agentcpm_jax.types import UserError
from agentcpm_jax.weights.store import (
    STABLE,
    WeightsRoot,
    folders,
    manifest,
    open_root,
    version_folder,
)

T = TypeVar("T")
CHUNK = 16 << 20
KEEP = 3  # copies: of the newest version, the one before, and another run's
ATTEMPTS = 5  # of one read, in a row
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


@dataclass
class Pull:
    """How far one copy is; `reason` is one line."""

    state: str = "pulling"  # pulling | ready | failed
    path: str = ""
    done: int = 0  # bytes
    total: int = 0
    reason: str = ""  # why it failed


class Mirror:
    """Copies of `<source>/<name>/weights/vNNNNNN`, below `directory`.

    Args:
      source: the trainer's `pool.weights_dir`.
      quota: bytes that all copies together may take; 0: what the disk has, less 1 GiB.
      pause: seconds before a failed read is tried again; doubles.
    """

    def __init__(
        self, source: str | Path, directory: str | Path, quota: int = 0, pause: float = 0.5
    ) -> None:
        open_root(source)
        self.source, self.directory = str(source).rstrip("/"), Path(directory).absolute()
        self._quota, self._pause = quota, pause
        self._pulls: dict[tuple[str, int], Pull] = {}
        self._asked: list[tuple[str, int]] = []  # oldest first
        self._lock, self._room = threading.Lock(), threading.Lock()

    def pull(self, name: str, version: int) -> Pull:
        """Starts a copy, or says how far it is; one that failed is begun again where it stopped.

        Raises `UserError`: `name` or `version` are none.
        """
        if not NAME.fullmatch(name) or not 0 <= version < 10**6:
            raise UserError(
                f"no weights are called {name!r} version {version}; ask as the pool does"
            )
        key = name, version
        with self._lock:
            self._asked = [k for k in self._asked if k != key] + [key]
            pull = self._pulls.get(key)
            if pull is None or (pull.state == "ready" and not Path(pull.path).is_dir()):
                pull = self._pulls[key] = Pull()
                threading.Thread(target=self._run, args=(*key, pull), daemon=True).start()
            elif pull.state == "failed":  # reported once, then tried again
                del self._pulls[key]
            return pull

    def versions(self) -> dict[str, list[int]]:
        """{name: versions that are here, ascending}."""
        found: dict[str, list[int]] = {}
        for name, version, path in folders(self.directory):
            if (path / STABLE).exists():
                found.setdefault(name, []).append(version)
        return found

    def used(self) -> int:
        """Bytes of all copies, finished or not."""
        return sum(_size(path) for *_, path in folders(self.directory))

    def _run(self, name: str, version: int, pull: Pull) -> None:
        try:
            with refusals(self.directory, "then ask again"):
                path = self._copy(name, version, pull)
            pull.path, pull.state = str(path), "ready"
        except UserError as error:
            pull.reason, pull.state = str(error), "failed"
        except Exception as error:  # whatever the protocol's package raises
            pull.reason, pull.state = f"{type(error).__name__}: {error}", "failed"

    def _copy(self, name: str, version: int, pull: Pull) -> Path:
        root = f"{self.source}/{name}"
        target = self.directory / name / version_folder(version)
        if (target / STABLE).exists():
            return target
        content = self._patiently(root, lambda: manifest(root, version))
        files = content["files"]
        pull.total = sum(f["bytes"] for f in files.values())
        work = target.with_name(f".{target.name}.part")
        with self._room:
            self._make_room(pull.total - _size(work), (name, version))
            work.mkdir(parents=True, exist_ok=True)
        place = open_root(root)
        for file, expected in files.items():

            def count(size: int) -> None:
                pull.done += size

            self._fetch(place, f"{place.version(version)}/{file}", work / file, expected, count)
        write_atomically(work / MANIFEST, json.dumps(content))
        _remove(target)  # without the marker: an agent was killed as it wrote or removed it
        os.rename(work, target)
        sync_directory(target.parent)
        (target / STABLE).touch()
        for path in self._removable((name, version))[: 1 - KEEP]:
            _remove(path)
        return target

    def _fetch(
        self,
        place: WeightsRoot,
        remote: str,
        path: Path,
        expected: dict[str, Any],
        count: Callable[[int], None],
    ) -> None:
        for _ in range(2):  # a resumed copy that turns out wrong is made anew once
            digest, size = checksum(), 0
            if path.exists() and path.stat().st_size <= expected["bytes"]:
                with path.open("rb") as file:
                    while piece := file.read(CHUNK):
                        digest.update(piece)
                        size += len(piece)
                        count(len(piece))
            with path.open("ab" if size else "wb") as file:
                while size < expected["bytes"]:
                    end = min(size + CHUNK, expected["bytes"])
                    piece = self._read(place, remote, size, end)
                    file.write(piece)
                    digest.update(piece)
                    size += len(piece)
                    count(len(piece))
                file.flush()
                os.fsync(file.fileno())
            if digest.hexdigest() == expected[CHECKSUM]:
                return
            path.unlink()
            count(-size)
        raise UserError(
            f"{remote} is damaged: its checksum is not the one in {MANIFEST}; "
            "the next version of the run replaces it"
        )

    def _read(self, place: WeightsRoot, remote: str, start: int, end: int) -> bytes:
        """A range of a remote file, whole."""

        def read() -> bytes:
            piece: Any = place.fs.cat_file(remote, start=start, end=end)
            if len(piece) != end - start:
                raise OSError(f"{len(piece)} bytes instead of {end - start} at byte {start}")
            return piece

        return self._patiently(remote, read)

    def _patiently(self, remote: str, read: Callable[[], T]) -> T:
        """Broken connections are tried again; what is not there is not waited for."""
        pause = self._pause
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return read()
            except UserError:
                raise
            except FileNotFoundError:
                raise UserError(f"{remote} was collected; ask for the newest version") from None
            except Exception as error:  # each protocol has its own
                said = f"{type(error).__name__}: {error}"
            if attempt < ATTEMPTS:
                time.sleep(pause)
                pause *= 2
        raise UserError(f"{remote} cannot be read: {said}; is its store reachable?")

    def _make_room(self, needed: int, asked: tuple[str, int]) -> None:
        """Removes copies, those asked for longest ago first, until `needed` bytes fit."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for path in self._removable(asked):
            if self._fits(needed):
                return
            _remove(path)
        if not self._fits(needed):
            free = shutil.disk_usage(self.directory).free
            raise UserError(
                f"{size_text(needed)} of weights do not fit in {self.directory}: quota "
                f"{size_text(self._quota)}, {size_text(free)} free on the disk; raise "
                "--quota-gb or free the disk"
            )

    def _fits(self, needed: int) -> bool:
        if self._quota and self.used() + needed > self._quota:
            return False
        return shutil.disk_usage(self.directory).free - needed > (0 if self._quota else 1 << 30)

    def _removable(self, asked: tuple[str, int]) -> list[Path]:
        """Finished and abandoned copies; what is being copied now stays."""
        with self._lock:
            busy = {k for k, p in self._pulls.items() if p.state == "pulling"} | {asked}
            rank = {key: i for i, key in enumerate(self._asked)}
        found = [(rank.get((n, v), -1), n, v, path) for n, v, path in folders(self.directory)]
        return [path for _, n, v, path in sorted(found) if (n, v) not in busy]


def _remove(path: Path) -> None:
    (path / STABLE).unlink(missing_ok=True)  # first: nobody takes a half-removed copy for a whole
    shutil.rmtree(path, ignore_errors=True)


def _size(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
