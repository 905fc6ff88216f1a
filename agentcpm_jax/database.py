"""Opens SQLite files and PostgreSQL servers.

All code that is specific to one of the two is here, except for the locks and the signals of the
log.
"""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event as sa_event
from sqlalchemy import exc as sa_exc

from agentcpm_jax.disk import REMEDIES, disk_errno
from agentcpm_jax.types import UserError

BUSY_SECONDS = 60.0  # that a writer waits for another process


class LogUnavailable(UserError):
    """The database cannot be reached or written; a restarted process resumes from it."""


class LogBroken(UserError):
    """What a database file holds is not what was written; only another file helps."""


def open_engine(url_or_path: str | Path, durable: bool) -> sa.Engine:
    """An engine on a database URL or an SQLite path; `durable`: commits survive a power cut.

    Other commits still survive a killed process. A server's commits are always durable, since its
    processes can be killed too. Raises `UserError` for a bad URL.
    """
    text = str(url_or_path)
    try:
        url = sa.make_url(text) if "://" in text else sa.URL.create("sqlite", database=text)
        options = {} if url.get_backend_name() == "sqlite" else {"pool_pre_ping": True}
        engine = sa.create_engine(url, **options)
    except (sa_exc.ArgumentError, ModuleNotFoundError) as err:
        raise UserError(
            f"experience log: cannot use {text!r} ({err}); give a file path or a "
            "postgresql+psycopg:// URL with its driver installed (pip install psycopg[binary])"
        ) from err
    if is_shared(engine):
        return engine
    if not url.database or url.database == ":memory:":
        raise UserError("experience log: SQLite in memory is not durable; give a file path")
    Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    _prepare_sqlite(engine, durable)
    return engine


def try_writing(url: str) -> tuple[str, float]:
    """Write and roll back; returns (URL without its password, seconds our clock is ahead).

    Raises `UserError` when the server refuses.
    """
    engine = open_engine(url, durable=True)
    shown = engine.url.render_as_string(hide_password=True)
    try:
        with engine.connect() as conn, conn.begin() as transaction:
            conn.execute(sa.text("CREATE TEMPORARY TABLE doctor (x INTEGER)"))
            conn.execute(sa.text("INSERT INTO doctor VALUES (1)"))
            skew = time.time() - clock(conn)
            transaction.rollback()
    except sa_exc.DBAPIError as error:
        fix = "start the server and check host, user, rights and database of config.log_url"
        raise UserError(f"{shown}: {first_line(error)}; {fix}") from None
    finally:
        engine.dispose()
    return shown, skew


def is_shared(engine: sa.Engine) -> bool:
    """Whether several processes may use the log at once."""
    return engine.dialect.name != "sqlite"


def clock(conn: sa.Connection) -> float:
    """Seconds since 1970 by the one clock that all processes on this log share."""
    if conn.dialect.name == "postgresql":
        now = conn.scalar(sa.select(sa.func.extract("epoch", sa.func.clock_timestamp())))
        return float(now or 0.0)
    return time.time()


def sqlite_remedy(error: BaseException, path: Path) -> str:
    """What to do about an error of SQLite; empty when it is neither its file's nor its disk's.

    Raises `LogBroken`: the file is damaged.
    """
    if not isinstance(error, sqlite3.Error):
        return ""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    text = str(error).startswith("Could not decode")  # Python's own error has no code
    if text or code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        raise LogBroken(str(error))
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return f"{_holder(path)} holds it: close it there, or end that process"
    number = disk_errno(error, path)
    return "" if number is None else REMEDIES[number]


def _holder(path: Path) -> str:
    """The other process that has a lock for writing on a database's files, as Linux knows it."""
    files = (path, path.with_name(f"{path.name}-shm"))
    inodes = {str(file.stat().st_ino) for file in files if file.exists()}
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/locks").read_text().splitlines():
            _, _, _, kind, pid, where, *_ = line.split()  # a waiting one has an arrow before these
            held = kind == "WRITE" and where.rpartition(":")[2] in inodes
            if held and int(pid) not in (os.getpid(), -1, 0):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
                words = " ".join(command.decode(errors="replace").split())
                return f"process {pid} ({words[:80]})"
    return f"another program (fuser {path} names it)"


def first_line(err: sa_exc.DBAPIError) -> str:
    """The first line of the database's message; the others repeat it."""
    return str(err.orig).strip().split("\n")[0]


def _prepare_sqlite(engine: sa.Engine, durable: bool) -> None:
    @sa_event.listens_for(engine, "connect")
    def _connect(dbapi: Any, _record: Any) -> None:
        dbapi.isolation_level = None  # no implicit BEGIN: `_begin` sends it
        dbapi.execute(f"PRAGMA busy_timeout = {1000 * BUSY_SECONDS:.0f}")
        dbapi.execute("PRAGMA page_size = 16384")  # of a new file: a trajectory is a few pages
        dbapi.execute("PRAGMA journal_mode = WAL")
        # A checkpoint of the WAL waits for the disk, so it is made rarely, for 64 MB at a time.
        dbapi.execute("PRAGMA wal_autocheckpoint = 4096")
        dbapi.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        dbapi.execute("PRAGMA foreign_keys = ON")

    @sa_event.listens_for(engine, "begin")
    def _begin(conn: sa.Connection) -> None:
        # A reader that upgrades to a writer gets SQLITE_BUSY at once: writers begin as such.
        writes = conn.get_execution_options().get("writes", False)
        conn.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
