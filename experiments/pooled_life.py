"""A run of `kill_points.py` on a pool: a trainer, two servers and the agent of their host.

All four are real: launch/train.py, launch/serve.py, launch/pool_agent.py. The parent kills any of
them and starts it again by the same command, on the same port, as a supervisor would; the others
run on meanwhile. What a process does is in memory that it shares with the parent, where it is also
told in which phase to end.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import kill_children as children
import pool_agent  # pyright: ignore[reportMissingImports]
import serve  # pyright: ignore[reportMissingImports]
import train as launch_train  # pyright: ignore[reportMissingImports]

from agentcpm_jax.engine.local import LocalEngine
from agentcpm_jax.engine.server import EngineServer
from agentcpm_jax.engine.serving import ServedLocal
from agentcpm_jax.engine.sessions import Sessions
from agentcpm_jax.files import SHIPPED
from agentcpm_jax.run import loop
from agentcpm_jax.weights.mirror import Mirror
from configs.tiny import CONTEXT

#: victim -> phase -> seconds after it began within which the kill comes
PHASES = {
    "trainer": {
        "waiting for the batch": 0.5,
        "train step": 0.2,
        "publishing the weights": 0.3,
        "saving the checkpoint": 0.1,
    },
    "server": {"loading": 0.03, "paused": 0.02, "sampling": 0.2},
    "agent": {"copying": 0.01},
}
#: Of several at once the first is shown.
NAMES = ["starting", *(phase for phases in PHASES.values() for phase in phases), "waiting"]
ROLES = ("agent", "server-0", "server-1", "trainer")
PAUSE = 1.0  # s, at most, until what was killed is started again
PATIENCE = 600.0  # s for a phase to come; then the kill comes all the same


class Slot:
    """One process: what it does (`begin`, `end`), and in which phase it is to end (`arm`)."""

    def __init__(self, shared: memoryview, place: int) -> None:
        self._shared, self._at = shared, 3 * place
        self._active: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def phase(self) -> str:
        return NAMES[int(self._shared[self._at])]

    def arm(self, phase: str, seconds: float = 0.0) -> None:
        """Kill the process `seconds` after `phase` begins; an empty phase: not at all."""
        self._shared[self._at + 2] = seconds
        self._shared[self._at + 1] = NAMES.index(phase) if phase else -1

    def begin(self, phase: str) -> None:
        with self._lock:
            self._active[phase] += 1
            self._show()
        if self._shared[self._at + 1] == NAMES.index(phase):
            seconds = self._shared[self._at + 2]
            self.arm("")
            timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()

    def end(self, phase: str) -> None:
        with self._lock:
            self._active[phase] = max(0, self._active[phase] - 1)
            self._show()

    def turn(self, phase: str) -> None:
        """A phase follows on the one before."""
        self._active.clear()
        self.begin(phase)

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        self.begin(phase)
        try:
            yield
        finally:
            self.end(phase)

    def _show(self) -> None:
        now = next((name for name in NAMES if self._active[name]), "waiting")
        self._shared[self._at] = NAMES.index(now)


class PooledLife:
    """One workdir and its four processes."""

    def __init__(self, kind: str, workdir: Path, cache: Path) -> None:
        self.kind, self.workdir, self._cache, self.phase = kind, workdir, cache, ""
        workdir.mkdir(parents=True)
        self.log_url = str(workdir / "experience.db")
        self._rng = random.Random(workdir.name)
        self._pids: dict[str, int] = {}
        shared = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("d")
        self._slots = {role: Slot(shared, place) for place, role in enumerate(ROLES)}
        agent, *ports = free_ports(3)
        published = workdir.with_suffix(".published")
        published.mkdir()
        served = [str(SHIPPED["shipped:sft"]), "--slots=8", f"--context={CONTEXT}", "--chunk=8"]
        pool = "--config.stage.rl.pool"
        urls = tuple(f"http://127.0.0.1:{port}" for port in ports)
        flags = ["--config=configs/tiny.py:async", f"--workdir={workdir}", *children.SMALL]
        flags += [f"{pool}.urls={urls!r}", f"{pool}.agent_port={agent}"]
        flags += [f"{pool}.weights_dir={published}", f"{pool}.health_every=0.5"]
        # However busy the machine is: what is killed breaks its connections at once.
        flags += [f"{pool}.{name}_timeout=600.0" for name in ("start", "control", "update")]
        copies = [f"--source={published}", f"--directory={workdir.with_suffix('.copies')}"]
        self._commands: dict[str, tuple[Any, list[str], Callable[[Slot], None]]] = {
            "agent": (pool_agent.main, [*copies, f"--port={agent}"], watch_agent),
            "trainer": (launch_train.main, flags, partial(watch_trainer, workdir)),
        }
        for n, port in enumerate(ports):
            self._commands[f"server-{n}"] = serve.main, [*served, f"--port={port}"], watch_server

    def trial(self, victim: str, spec: str) -> str:
        """Kills one process while all run: 'killed', or 'finished' when the run was over before."""
        role = f"server-{self._rng.randrange(2)}" if victim == "server" else victim
        phase, _, seconds = spec.split(":")
        self._start_missing()
        moment, slot = phase == "moment", self._slots[role]
        due = not moment  # a phase is one of the run, not of a trainer's start
        deadline = time.monotonic() + (float(seconds) if moment else PATIENCE)
        while role not in (gone := self._gone()):
            if "trainer" in gone:
                slot.arm("")
                return "finished"
            if due and self._slots["trainer"].phase != "starting":
                slot.arm(phase, float(seconds))
                due = False
            if time.monotonic() > deadline:
                children.send(self._pids[role], signal.SIGKILL)
            time.sleep(0.005)
        self.phase = slot.phase
        return "killed"

    def finish(self) -> None:
        """Runs to the end without a kill; raises RuntimeError when it does not get there."""
        if not (self.workdir / "rl" / "DONE").exists():
            self._start_missing()
        deadline = time.monotonic() + children.LIMIT
        while "trainer" in self._pids:
            self._gone()
            if time.monotonic() > deadline:
                raise TimeoutError(f"no end within {children.LIMIT} s:\n{self._output('trainer')}")
            time.sleep(0.05)

    def close(self) -> None:
        """Ends what still runs; raises RuntimeError when a server or the agent does not stop."""
        ends = {}
        for role, pid in self._pids.items():
            children.send(pid, signal.SIGKILL if role == "trainer" else signal.SIGTERM)
        for role, pid in self._pids.items():
            ends[role] = children.wait(pid)
        self._pids = {}
        stopped = (0, 130)  # after or before it served
        if bad := {r: n for r, n in ends.items() if n not in stopped and r != "trainer"}:
            raise RuntimeError(f"SIGTERM, and the exit codes are {bad}")

    def _start_missing(self) -> None:
        """Starts what does not run, after a pause when something else does."""
        if self._pids:
            time.sleep(self._rng.uniform(0.0, PAUSE))
        for role in self._commands.keys() - self._pids.keys():
            program, flags, watch = self._commands[role]
            slot, output = self._slots[role], self._file(role)
            slot.arm("")
            slot.turn("starting")  # in the parent: nothing is killed before it says what it does
            prepare = partial(watch, slot)
            self._pids[role] = children.spawn(program, flags, output, self._cache, prepare)

    def _gone(self) -> set[str]:
        """Which processes ended: killed, or the trainer at its end. Raises RuntimeError else."""
        gone = set()
        for role, pid in list(self._pids.items()):
            found, status = os.waitpid(pid, os.WNOHANG)
            if not found:
                continue
            del self._pids[role]
            gone.add(role)
            code = os.waitstatus_to_exitcode(status)
            if code != -signal.SIGKILL and (code or role != "trainer"):
                raise RuntimeError(f"{role} ended by itself, {code}:\n{self._output(role)}")
        return gone

    def _file(self, role: str) -> Path:
        return self.workdir.with_suffix(f".{role}.out")

    def _output(self, role: str) -> str:
        return self._file(role).read_text()[-3000:]


def watch_trainer(workdir: Path, slot: Slot) -> None:
    """In the trainer's memory: its weights are witnessed, and its phases are those of the loop."""
    children.witness(workdir)
    watched = loop.watched

    @contextlib.contextmanager
    def noting(*args: Any, **named: Any) -> Iterator[Callable[[int, str], None]]:
        with watched(*args, **named) as on_phase:

            def note(step: int, phase: str) -> None:
                on_phase(step, phase)
                slot.turn(phase)

            yield note

    loop.watched = noting


def watch_server(slot: Slot) -> None:
    """In a server's memory: it starts, is paused, loads weights, samples."""
    start, load, sample = EngineServer.start, ServedLocal.load, LocalEngine.sample
    pause, resume = Sessions.pause, Sessions.resume

    async def starting(*args: Any, **named: Any) -> Any:
        found = await start(*args, **named)
        slot.end("starting")
        return found

    def loading(*args: Any, **named: Any) -> None:
        with slot.during("loading"):
            load(*args, **named)

    async def sampling(*args: Any, **named: Any) -> Any:
        with slot.during("sampling"):
            return await sample(*args, **named)

    async def pausing(*args: Any, **named: Any) -> None:
        slot.begin("paused")
        await pause(*args, **named)

    def resuming(*args: Any, **named: Any) -> None:
        slot.end("paused")
        resume(*args, **named)

    EngineServer.start, ServedLocal.load, LocalEngine.sample = starting, loading, sampling
    Sessions.pause, Sessions.resume = pausing, resuming


def watch_agent(slot: Slot) -> None:
    """In the agent's memory: it starts, and copies weights."""
    opened, copy = pool_agent.open_agent, Mirror._copy

    def opening(*args: Any, **named: Any) -> Any:
        found = opened(*args, **named)
        slot.end("starting")
        return found

    def copying(*args: Any, **named: Any) -> Any:
        with slot.during("copying"):
            return copy(*args, **named)

    pool_agent.open_agent, Mirror._copy = opening, copying


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on."""
    with contextlib.ExitStack() as closing:
        found = [closing.enter_context(socket.socket()) for _ in range(count)]
        for each in found:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in found]
