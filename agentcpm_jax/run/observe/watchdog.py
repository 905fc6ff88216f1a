"""Ends a process whose step hangs, and says which process of the job it waits for.

A collective waits forever when one process stalls. Every process therefore posts what it is doing
on a board (the job's key-value store). A process whose step exceeds the deadline reads the board,
names those that are behind, and exits with the code that asks to repeat the same command.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from agentcpm_jax.types import UserError

RESUMABLE = 130
#: The first step compiles: it may take this many times the deadline.
FIRST = 10
_BOARD = "agentcpm/board"


@dataclass(frozen=True)
class Post:
    """What one process is doing; `count`: its posts so far, the same sequence on every process."""

    process: int
    host: str
    step: int
    phase: str
    count: int
    since: float  # unix seconds

    def text(self, now: float) -> str:
        """The post in words, for users."""
        where = f"step {self.step}, {self.phase}" if self.count else "before its first step"
        return f"process {self.process} ({self.host}): {where}, for {now - self.since:.0f} s"


class Watchdog:
    """Watches the steps of a stage, only inside `watching`.

    Args:
      seconds: longest duration of a step; 0: no limit.
      announce: is called with the verdict.
      directory: gets `hang-process-<i>.txt`, with the verdict and every thread's stack.

    Raises `UserError` for negative seconds.
    """

    def __init__(
        self,
        seconds: float = 0.0,
        announce: Callable[[str], None] = lambda line: None,
        directory: Path | None = None,
        leave: Callable[[int], Any] = os._exit,
    ) -> None:
        if not seconds >= 0:
            raise UserError(f"hang_seconds={seconds} must be 0 (never) or more; correct it")
        self._seconds, self._announce, self._directory = seconds, announce, directory
        self._leave = leave
        self._post: Post | None = None
        self._step_began, self._first = 0.0, 0

    @contextmanager
    def watching(self) -> Iterator[Callable[[int, str], None]]:
        """Yields the function to call with (step, phase) whenever a phase of a step begins."""
        if not self._seconds or jax.process_count() == 1:
            yield lambda step, phase: None
            return
        me = Post(jax.process_index(), socket.gethostname(), 0, "", 0, time.time())
        self._post, self._step_began, self._first = me, time.monotonic(), -1
        done = threading.Event()
        thread = threading.Thread(target=self._watch, args=(done,), name="watchdog", daemon=True)
        thread.start()
        try:
            yield self._on_phase
        finally:
            done.set()
            thread.join()

    def _on_phase(self, step: int, phase: str) -> None:
        old = self._post
        assert old is not None
        if step != old.step or not old.count:
            self._step_began = time.monotonic()
        if self._first < 0:
            self._first = step
        count = old.count + 1
        self._post = Post(old.process, old.host, step, phase, count, time.time())

    def _watch(self, done: threading.Event) -> None:
        period = min(self._seconds / 4, 5.0)
        posted = -1
        while not done.wait(period):
            mine = self._post
            assert mine is not None
            if mine.count != posted:
                self._put(mine)
                posted = mine.count
            allowed = self._seconds * (FIRST if mine.step == self._first or not mine.count else 1)
            if time.monotonic() - self._step_began > allowed:
                done.wait(period)  # the others post what they are doing
                self._end(mine, period)

    def _end(self, mine: Post, period: float) -> None:
        said = verdict(mine, self._board() or [mine], time.time())
        self._announce(said)
        if self._directory is not None:
            path = self._directory / f"hang-process-{mine.process}.txt"
            with suppress(OSError), path.open("w") as file:  # the disk may be what hangs
                file.write(said + "\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        if mine.process == 0:  # it hosts the board, which the others still have to read
            time.sleep(2 * period)
        self._leave(RESUMABLE)

    def _put(self, post: Post) -> None:
        text = json.dumps(asdict(post))
        _store().key_value_set(f"{_BOARD}/{post.process}", text, allow_overwrite=True)

    def _board(self) -> list[Post]:
        try:
            return [Post(**json.loads(text)) for _, text in _store().key_value_dir_get(_BOARD)]
        except Exception:  # the coordinator itself may be what hangs: jaxlib's errors are many
            return []


def verdict(mine: Post, board: list[Post], now: float) -> str:
    """One line: what this process waits in, and the processes that are behind it."""
    behind = [post for post in board if post.count < mine.count]
    said = f"hang: {mine.text(now)}; "
    if behind:
        said += "it waits for " + "; ".join(post.text(now) for post in behind)
    elif len(board) > 1 and all(post.count == mine.count for post in board):
        said += f"all {len(board)} processes are in it: what they wait for together hangs"
    else:
        ahead = [post for post in board if post.count > mine.count]
        said += "the others wait for it" if ahead else "what the others do is not known"
    return f"{said}. Leaving with {RESUMABLE}; the same command resumes from the last checkpoint"


def _store() -> Any:
    from agentcpm_jax.run.multihost import client

    return client()
