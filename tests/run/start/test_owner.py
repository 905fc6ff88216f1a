"""A workdir has one owner, whoever ends it and however."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agentcpm_jax.run.start import owner
from agentcpm_jax.run.start.document import CHECKOUT
from agentcpm_jax.run.start.owner import OWNER, check_unowned, owned
from agentcpm_jax.types import UserError

HOLD = """
import os, sys
from pathlib import Path
from agentcpm_jax.run.start.owner import owned
with owned(Path(sys.argv[1])):
    (Path(sys.argv[1]) / "config.json").touch()
    print("mine", flush=True)
    if "fork" in sys.argv and os.fork() == 0:  # a child that outlives its parent
        os.close(1)
        os.read(0, 1)
        os._exit(0)
    sys.stdin.read(1)
"""


@contextmanager
def another(workdir: Path, *words: str) -> Iterator[subprocess.Popen]:
    """Another process that owns the workdir; sending it a byte ends it."""
    env = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-c", HOLD, str(workdir), *words]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=env) as process:
        assert process.stdout is not None and process.stdout.readline() == b"mine\n"
        yield process
        process.kill()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch) -> None:
    monkeypatch.setattr(owner, "PATIENCE", 0.1)


def refused(workdir: Path) -> str:
    with pytest.raises(UserError) as error, owned(workdir):
        pass
    return str(error.value)


def test_a_second_owner_is_told_who_the_first_is(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    with another(workdir) as process:
        assert f"pid {process.pid} on {os.uname().nodename}" in refused(workdir)
        with pytest.raises(UserError, match=f"pid {process.pid} .* another --workdir"):
            check_unowned(workdir)
        process.communicate(b"x")
    check_unowned(workdir)
    with owned(workdir):
        assert f"pid {os.getpid()} " in (workdir / OWNER).read_text()
    assert not (workdir / OWNER).exists() and (workdir / "config.json").exists()


def test_sigkill_leaves_no_lock_though_a_child_lives_on(tmp_path: Path) -> None:
    said: list[str] = []
    with another(tmp_path, "fork") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert f"pid {process.pid} " in (tmp_path / OWNER).read_text()
        with owned(tmp_path, said.append):
            pass
    assert said == []


def test_looking_disturbs_nobody(tmp_path: Path) -> None:
    with owned(tmp_path / "run"):
        pass
    check_unowned(tmp_path / "run")
    assert list(tmp_path.iterdir()) == [], "a workdir in which nothing was written is not kept"


def test_one_process_does_not_own_a_workdir_twice(tmp_path: Path) -> None:
    with owned(tmp_path):
        assert "this very process" in refused(tmp_path)
    with owned(tmp_path):
        pass


def test_a_lost_owner_on_another_host_is_named(tmp_path: Path) -> None:
    (tmp_path / OWNER).write_text("pid 7 on elsewhere since noon\n")
    said: list[str] = []
    with owned(tmp_path, said.append):
        pass
    assert "pid 7 on elsewhere since noon" in said[0] and "other hosts" in said[0]


def test_where_there_are_no_locks_it_says_so(tmp_path: Path, monkeypatch) -> None:
    def none(descriptor: int, command: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", none)
    said: list[str] = []
    with owned(tmp_path, said.append):
        check_unowned(tmp_path)
    assert "No locks available" in said[0] and "start one only" in said[0]


def test_a_place_that_cannot_be_made_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "choose a --workdir that can be written" in refused(tmp_path / "file" / "run")
