"""A PostgreSQL server of a test session: its own data directory, its own socket, no TCP port.

The binaries are those of Debian's package `postgresql` (or any on PATH). The server refuses to run
as root, so root hands it to an unprivileged account. Nothing is skipped: without a server the tests
that need one fail.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

INSTALL = "apt-get install postgresql (its own service need not run)"


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One server for all tests of the session."""
    server = PostgresServer()
    yield server
    server.stop()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def log_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new log on each database; the server's part belongs to `make test-postgres`."""
    if request.param == "sqlite":
        return str(tmp_path / "new" / "experience.db")
    return request.getfixturevalue("postgres").url()


class PostgresServer:
    """`url()` makes an empty database; `kill` is kill -9 of all its processes."""

    def __init__(self) -> None:
        self._account = "nobody" if os.geteuid() == 0 else None
        # Not pytest's directory: a socket's path is short, and root's is closed to others.
        self.home = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
        if self._account:
            shutil.chown(self.home, self._account)
        self._data, self._process = self.home / "data", None
        options = ["--auth=trust", "--username=postgres", "--no-sync", "--encoding=UTF8"]
        self._run(_binary("initdb"), "-D", str(self._data), "--locale=C", *options)
        self.start()

    def start(self) -> None:
        """Starts the server, after a kill from what its log recovers."""
        for _ in range(5):  # what was killed may still be leaving: then its memory is in use
            if self._start():
                return
        raise RuntimeError(f"PostgreSQL did not start:\n{(self.home / 'server.log').read_text()}")

    def _start(self) -> bool:
        command = [_binary("postgres"), "-D", str(self._data), "-k", str(self.home)]
        # The tests kill processes, not the machine: what was written need not reach the disk.
        command += ["-c", "listen_addresses=", "-c", "max_connections=60", "-c", "fsync=off"]
        with (self.home / "server.log").open("a") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, user=self._account, cwd=self.home
            )
        control = [_binary("pg_isready"), "-q", "-h", str(self.home), "-t", "1"]
        while subprocess.run(control).returncode:
            try:  # a pause that ends with the server
                self._process.wait(0.1)
                return False
            except subprocess.TimeoutExpired:
                continue
        return True

    @property
    def pid(self) -> int:
        """Of the server."""
        assert self._process is not None
        return self._process.pid

    def running(self) -> bool:
        """Whether the server lives."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """kill -9 of the server and all its processes."""
        assert self._process is not None
        kill_server(self._process.pid)
        self._process.wait()

    def stop(self) -> None:
        """Ends the server and removes its directory."""
        if self._process is not None and self._process.poll() is None:
            self.kill()
        shutil.rmtree(self.home, ignore_errors=True)

    def url(self) -> str:
        """The URL of a new, empty database."""
        name = f"t{uuid.uuid4().hex[:12]}"
        engine = sa.create_engine(self._url("postgres"), isolation_level="AUTOCOMMIT")
        with engine.connect() as conn:
            conn.execute(sa.text(f"CREATE DATABASE {name} TEMPLATE template0"))
        engine.dispose()
        return self._url(name)

    def _url(self, database: str) -> str:
        return f"postgresql+psycopg://postgres@/{database}?host={self.home}"

    def _run(self, *command: str) -> None:
        done = subprocess.run(
            command, user=self._account, cwd=self.home, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{command[0]} failed: {done.stderr[-1000:]}")


def kill_server(pid: int) -> None:
    """kill -9 of a server's process and its children; none of them is asked."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for one in [pid, *map(int, children)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


def _binary(name: str) -> str:
    """Debian keeps the server's programs off PATH, one directory per major version."""
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda p: p.parts[4])
    found = shutil.which(name) or (str(versions[-1]) if versions else None)
    if found is None:
        raise RuntimeError(f"the PostgreSQL tests need `{name}`: {INSTALL}")
    return found
