"""Where the live SQLite log lies, and the snapshots that outlive its disk.

SQLite's locks and its WAL need a local file system. A workdir on a network, FUSE or bucket mount
keeps everything but the live database, which goes to a local directory; each checkpoint carries a
snapshot of it, from which a machine without that directory resumes.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sqlite3
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from agentcpm_jax.files import naming, sync_directory

#: Network file systems, and those of user-space programs (gcsfuse, s3fs, sshfs: `fuse.*`).
REMOTE = re.compile(
    r"nfs\d?|cifs|smb\w*|9p|afs|ceph|lustre|gpfs|beegfs\w*|glusterfs|virtiofs|fuse(\..+)?"
)
MOUNTS = Path("/proc/mounts")


@dataclass(frozen=True)
class LogLocation:
    """`url`: for `ExperienceLog.open`; `note`: what the user should know, or empty."""

    url: str
    note: str = ""


def locate_log(workdir: Path, log_url: str | None = None, mounts: Path = MOUNTS) -> LogLocation:
    """The live log of a workdir: `log_url` if there is one, else a file on a local disk."""
    if log_url:
        return LogLocation(log_url)
    kind = filesystem(workdir, mounts)
    if not REMOTE.fullmatch(kind):
        return LogLocation(str(workdir / "experience.db"))
    digest = hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:16]
    live = _local_directory(mounts) / "agentcpm_jax" / digest / "experience.db"
    return LogLocation(
        str(live),
        f"{workdir} is on {kind}, where SQLite cannot live: the experience log is {live}, and "
        "every checkpoint holds a snapshot of it",
    )


def filesystem(path: Path, mounts: Path = MOUNTS) -> str:
    """The type of the file system that holds `path` (which need not exist); '' when unknown."""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:  # not Linux
        return ""
    where, best, found = Path(os.path.realpath(path)), -1, ""
    for line in lines:
        _, point, kind, *_ = line.split(" ")
        # Spaces and the like are written in octal.
        point = re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), point)
        if where.is_relative_to(point) and len(point) >= best:  # later mounts cover earlier ones
            best, found = len(point), kind
    return found


def take_snapshot(database: Path, target: Path) -> None:
    """A consistent copy of a database in use; `target` may lie on any file system.

    Writers are not blocked. The copy is made next to the database, since SQLite writes at random
    offsets, and then copied to `target` in one stream.
    """
    with tempfile.TemporaryDirectory(dir=database.parent, prefix=".snapshot-") as scratch:
        copy = Path(scratch) / database.name
        with (
            closing(sqlite3.connect(database, timeout=60)) as source,
            closing(sqlite3.connect(copy)) as sink,
        ):
            source.backup(sink)
            sink.execute("PRAGMA journal_mode = DELETE")  # one file, without a WAL
        _copy_durably(copy, target)


def restore_snapshot(snapshot: Path, database: Path) -> None:
    """Replaces the live database with a snapshot, atomically."""
    database.parent.mkdir(parents=True, exist_ok=True)
    arriving = database.with_name(f".{database.name}.arriving")
    try:
        _copy_durably(snapshot, arriving)
        for part in ("-wal", "-shm"):  # of a database that is gone
            database.with_name(database.name + part).unlink(missing_ok=True)
        os.replace(arriving, database)
        sync_directory(database.parent)
    finally:
        arriving.unlink(missing_ok=True)


def replacement(database: str | Path, spare: Path | None) -> str:
    """What to do about a damaged log whose newest snapshot is `spare`."""
    then = f"the snapshot {spare} takes its place" if spare else "start again elsewhere"
    return f"move it away (mv {database} {database}.broken), and {then}"


def _local_directory(mounts: Path) -> Path:
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    choices = [Path(state), Path("/var/tmp"), Path(tempfile.gettempdir())]
    local = (path for path in choices if not REMOTE.fullmatch(filesystem(path, mounts)))
    return next(local, choices[-1])


def _copy_durably(source: Path, target: Path) -> None:
    with naming(target), source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)
        writer.flush()
        os.fsync(writer.fileno())
