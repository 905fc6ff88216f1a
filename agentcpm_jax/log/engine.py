"""Databases of the experience log: SQLite files and PostgreSQL servers, opened, checked, migrated.

Everything that only one of the two understands stands here.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event as sa_event
from sqlalchemy import exc as sa_exc

from agentcpm_jax.log import schema as db
from agentcpm_jax.types import UserError

#: Key of the advisory lock under which PostgreSQL issues ids: they are dense and ascending.
_ISSUING = 0x61677063


class LogUnavailable(UserError):
    """The database went away; whoever was writing starts again from what it holds."""


def open_engine(url_or_path: str | Path, durable: bool) -> sa.Engine:
    """An engine on a database URL or an SQLite path; `durable`: commits survive a power cut.

    Ordinary commits survive a killed process either way; of a server every commit is durable, since
    its processes can be killed too. Raises `UserError` for a bad URL.
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


def is_shared(engine: sa.Engine) -> bool:
    """Whether several processes may use the log at once."""
    return engine.dialect.name != "sqlite"


def create_or_check(engine: sa.Engine, where: str) -> None:
    """Creates the tables of a new log and migrates an old one.

    Raises:
        UserError: not a database, not reachable, or a log of a newer schema version.
    """
    try:
        with engine.connect().execution_options(writes=True) as conn, conn.begin():
            lock_issuing(conn)  # two processes may open a new log at the same moment
            db.metadata.create_all(conn)
            version = sa.select(db.meta.c.value).where(db.meta.c.key == "schema_version")
            found = int(conn.scalar(version) or 0)
            if found == 0:
                row = {"key": "schema_version", "value": str(db.SCHEMA_VERSION)}
                conn.execute(sa.insert(db.meta).values(row))
            elif found < db.SCHEMA_VERSION:  # 1 -> 2 added a table, which `create_all` has made
                conn.execute(sa.update(db.meta).values(value=str(db.SCHEMA_VERSION)))
    except sa_exc.DBAPIError as err:
        fix = "start the server and check host, user and database of the URL"
        if not is_shared(engine):
            fix = "give the path of an experience.db or of a file that does not exist yet"
        raise UserError(f"experience log {where}: {first_line(err)}; {fix}") from err
    if found > db.SCHEMA_VERSION:
        raise UserError(
            f"experience log {where} has schema version {found}, this release reads up to "
            f"{db.SCHEMA_VERSION}; upgrade agentcpm_jax or start a new workdir"
        )


def lock_issuing(conn: sa.Connection) -> None:
    """Until the transaction ends, nobody else allocates ids."""
    if conn.dialect.name == "postgresql":
        conn.execute(sa.select(sa.func.pg_advisory_xact_lock(_ISSUING)))


def clock(conn: sa.Connection) -> float:
    """Seconds since 1970 by the one clock that all processes on this log share."""
    if conn.dialect.name == "postgresql":
        now = conn.scalar(sa.select(sa.func.extract("epoch", sa.func.clock_timestamp())))
        return float(now or 0.0)
    return time.time()


def first_line(err: sa_exc.DBAPIError) -> str:
    """What the database said, without the lines that say it again."""
    return str(err.orig).strip().split("\n")[0]


def _prepare_sqlite(engine: sa.Engine, durable: bool) -> None:
    @sa_event.listens_for(engine, "connect")
    def _connect(dbapi: Any, _record: Any) -> None:
        dbapi.isolation_level = None  # no implicit BEGIN: `_begin` sends it
        dbapi.execute("PRAGMA busy_timeout = 60000")
        dbapi.execute("PRAGMA page_size = 16384")  # of a new file: a trajectory is a few pages
        dbapi.execute("PRAGMA journal_mode = WAL")
        # Moving the WAL into the database waits for the disk: seldom, 64 MB at a time.
        dbapi.execute("PRAGMA wal_autocheckpoint = 4096")
        dbapi.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        dbapi.execute("PRAGMA foreign_keys = ON")

    @sa_event.listens_for(engine, "begin")
    def _begin(conn: sa.Connection) -> None:
        # A reader that upgrades to a writer gets SQLITE_BUSY at once: writers say so first.
        writes = conn.get_execution_options().get("writes", False)
        conn.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
