"""The processes of `kill_points.py`: real runs that kill themselves, or their database, on cue."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rollout_worker
import sqlalchemy as sa
import train as launch_train

from agentcpm_jax import tree
from agentcpm_jax.checkpoint import Checkpointer
from agentcpm_jax.log.claims import Claims
from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.run import stages
from agentcpm_jax.run import worker as run_worker
from agentcpm_jax.run.observe.metrics import MetricsWriter
from agentcpm_jax.run.sampler import Sampler
from agentcpm_jax.weights.store import VersionWriter
from tests.log.postgres_server import PostgresServer, kill_server

POINTS: dict[str, tuple[Any, str]] = {
    "issue": (ExperienceLog, "issue_round"),
    "record": (ExperienceLog, "record_trajectory"),
    "settle": (ExperienceLog, "finish_group"),
    "ship": (ExperienceLog, "ship"),
    "publish": (Sampler, "publish"),
    "weights": (VersionWriter, "commit"),
    "metrics": (MetricsWriter, "write"),
    "save": (Checkpointer, "save"),
    "snapshot": (ExperienceLog, "snapshot"),
    "take": (Claims, "take"),
    "deliver": (Claims, "deliver"),
}
#: Fewer and shorter episodes than the configuration's.
SMALL = ("--config.episode.max_turns=3", "--config.stage.rl.stream.group_size=3")
LIMIT = 900  # seconds a child may take, on the busiest machine


class Life:
    """One workdir. `kind`: lockstep | async on SQLite, shared on a PostgreSQL server of its own."""

    phase = ""  # what a victim did is its point

    def __init__(self, kind: str, workdir: Path, cache: Path) -> None:
        self.kind, self.workdir, self._cache = kind, workdir, cache
        workdir.mkdir(parents=True)
        variant = "" if kind == "lockstep" else ":async"
        self._flags = [f"--config=configs/tiny.py{variant}", f"--workdir={workdir}", *SMALL]
        self.log_url, self._server, self._worker = str(workdir / "experience.db"), None, 0
        if kind == "shared":
            self._server = PostgresServer()
            self.log_url = self._server.url()
            self._flags += [f"--config.log_url={self.log_url}"]
            self._flags += ["--config.stage.rl.workers.lease=3.0"]

    def trial(self, victim: str, spec: str) -> str:
        """Starts the run with a kill ahead: 'killed', or 'finished' when it never came."""
        server = self._server.pid if self._server is not None and victim == "database" else 0
        if self._server is not None and (victim == "worker" or not self._worker):
            self._end_worker()
            self._worker = self._spawn(rollout_worker.main, spec if victim == "worker" else "", 0)
        if victim == "worker":
            trainer = self._spawn(launch_train.main, "", 0)
            code = wait(self._worker)
            self._worker = 0
            send(trainer, signal.SIGKILL)
            wait(trainer)
        else:
            code = wait(self._spawn(launch_train.main, spec, server))
        if server and self._server is not None and not self._server.running():
            self._server.start()
            return "killed"
        return "killed" if code == -signal.SIGKILL else self._finished(code)

    def finish(self) -> None:
        """Runs to the end without a kill; raises RuntimeError when it does not get there."""
        if (self.workdir / "rl" / "DONE").exists():
            return
        code = wait(self._spawn(launch_train.main, "", 0))
        self._finished(code)

    def close(self) -> None:
        """Ends the worker and the server."""
        self._end_worker()
        if self._server is not None:
            self._server.stop()

    def _finished(self, code: int) -> str:
        if code:
            output = self.workdir.with_suffix(".out").read_text()[-3000:]
            raise RuntimeError(f"{self.workdir.name}: exit code {code}:\n{output}")
        return "finished"

    def _end_worker(self) -> None:
        if self._worker:
            send(self._worker, signal.SIGKILL)
            wait(self._worker)
            self._worker = 0

    def _spawn(self, program: Any, spec: str, server: int) -> int:
        """Forks: the parent has imported everything and never touches a device."""
        while program is rollout_worker.main and not (self.workdir / "config.json").exists():
            wait(self._spawn(launch_train.main, "ship:before:1", 0))
        arms = [partial(crash, spec, server)] if spec else []
        output = self.workdir.with_suffix(".out")
        watch = partial(witness, self.workdir)
        return spawn(program, self._flags, output, self._cache, watch, *arms)


def spawn(
    program: Any, flags: list[str], output: Path, cache: Path, *prepare: Callable[[], None]
) -> int:
    """Forks: the parent has imported everything and never touches a device."""
    if pid := os.fork():
        return pid
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.setpgid(0, 0)
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with its parent
        jax.config.update("jax_platforms", "cpu")  # forked several times, and small
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        for step in prepare:
            step()
        code = program(flags)
    except BaseException as error:
        print(repr(error), flush=True)
        code = 70
    os._exit(code)


def crash(spec: str, server: int = 0) -> None:
    """Arms one kill in this process: of itself, or of the PostgreSQL server `server`."""
    name, when, count = spec.split(":")

    def die() -> None:
        if not server:
            os.kill(os.getpid(), signal.SIGKILL)
        kill_server(server)

    if name == "moment":  # seconds after the stages begin, imports and set-up excluded
        run_stage = stages.run_stage

        def timed(*args: Any) -> bool:
            timer = threading.Timer(float(count), die)
            timer.daemon = True
            timer.start()
            return run_stage(*args)

        if "rollout_worker" in sys.modules:
            work = run_worker._work

            def timed_work(*args: Any) -> int:
                timer = threading.Timer(float(count), die)
                timer.daemon = True
                timer.start()
                return work(*args)

            run_worker._work = timed_work
        stages.run_stage = timed
        return
    owner, attribute = POINTS[name]
    method, within, calls = getattr(owner, attribute), threading.local(), iter(range(1, 10**9))

    def armed(*args: Any, **kwargs: Any) -> Any:
        due = next(calls) == int(count)
        if due and when == "before":
            die()
        within.due = due and when == "inside"
        result = method(*args, **kwargs)
        if due and when != "before":  # `inside` of what commits nothing is after it
            die()
        within.due = False
        return result

    def committing(conn: Any) -> None:
        if getattr(within, "due", False):
            die()

    sa.event.listen(sa.Engine, "commit", committing)
    setattr(owner, attribute, armed)


def witness(workdir: Path) -> None:
    """Writes the SHA-256 of a version's parameters, and once themselves, before it is published."""
    publish, kept = Sampler.publish, workdir.with_suffix(".versions")
    kept.mkdir(exist_ok=True)

    def witnessed(sampler: Sampler, version: int, params: Any) -> None:
        sha, leaves = hashlib.sha256(), tree.flatten(jax.device_get(params))
        for leaf in jax.tree.leaves(jax.device_get(params)):
            sha.update(np.asarray(leaf).tobytes())
        work = kept / f".{version}.npz"
        np.savez(work, **leaves)
        work.replace(kept / f"{version}.npz")
        with workdir.with_suffix(".witness").open("a") as file:
            file.write(json.dumps([version, sha.hexdigest()]) + "\n")
        publish(sampler, version, params)

    Sampler.publish = witnessed


def witnessed(workdir: Path) -> dict[int, set[str]]:
    """version -> SHA-256s of its weights, of every time they were computed."""
    found: defaultdict[int, set[str]] = defaultdict(set)
    for line in workdir.with_suffix(".witness").read_text().splitlines():
        with contextlib.suppress(ValueError):  # killed within the line
            version, sha = json.loads(line)
            found[version].add(sha)
    return dict(found)


def wait(pid: int) -> int:
    """Exit code, negative for a signal; a child that hangs is killed and raises TimeoutError."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    send(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"child {pid} did not end within {LIMIT} s")


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
