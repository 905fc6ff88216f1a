"""Ctrl-C and SIGTERM: answered at once, in whatever the process is doing."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

RESUMABLE = 130  # exit code
#: Seconds to leave what is under way; compiled code (XLA's compiler) listens to no signal.
GRACE = 7.0
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """The run was asked to stop and left a resumable workdir."""


def say(line: str) -> None:
    """A whole line on stderr, where other threads may write too."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


class StopSignal:
    """In its context the first SIGINT or SIGTERM sets `requested`; a second one acts as usual.

    With `answer`, which is called with one line at once, the process also stops by itself, since a
    killed run resumes as well as a stopped one: KeyboardInterrupt is raised, and what has not come
    to an end after `GRACE` seconds ends with exit code 130. Not so while `patient`: a training loop
    then takes its step to the end and saves it; nor in an import, which ends the process at once:
    an extension module that is interrupted crashes. `promise`: what is said of the next start.
    """

    def __init__(
        self,
        answer: Callable[[str], None] | None = None,
        promise: str = "the same command resumes",
    ) -> None:
        self.requested = self.patient = False
        self._answer, self._promise = answer, promise
        self._answered = threading.Event()
        self._previous: dict[int, Any] = {}
        self._over = threading.Event()
        self._listener: threading.Thread | None = None

    def __enter__(self) -> StopSignal:
        if self._answer is not None:
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._listener = threading.Thread(target=self._listen, name="signals", daemon=True)
            self._listener.start()
        try:
            if self._listener is not None:
                signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._on_signal)
        except ValueError:  # not the main thread (notebooks, tests): there is nothing to catch
            self._previous = {}
        except KeyboardInterrupt:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._restore()
        if sys.unraisablehook == self._on_swallowed:
            sys.unraisablehook = sys.__unraisablehook__
        if self._listener is not None:
            with suppress(ValueError):
                signal.set_wakeup_fd(-1)
            os.write(self._pipe[1], b"\0")
            self._listener.join()  # it may still have to answer; it closes the pipe

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()
        if self._answer is None or self.patient:
            return
        if _in_import(frame):
            self._answered.wait(GRACE)
            os._exit(RESUMABLE)
        sys.unraisablehook = self._on_swallowed
        raise KeyboardInterrupt

    def _on_swallowed(self, unraisable: Any) -> None:
        """A callback, of the garbage collector's say, cannot raise: once more, behind it."""
        if unraisable.exc_type is KeyboardInterrupt:
            threading.Timer(0.05, _thread.interrupt_main).start()
        else:
            sys.__unraisablehook__(unraisable)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _listen(self) -> None:
        """In its own thread, which the interpreter wakes even when the main one cannot run."""
        assert self._answer is not None
        while (number := os.read(self._pipe[0], 1)[0]) not in (0, *SIGNALS):
            pass
        if number:
            patient = self.patient
            rest = "stopping after this step" if patient else self._promise
            self._answer(f"interrupted by {signal.Signals(number).name}: {rest}")
            self._answered.set()
            if not patient and not self._over.wait(GRACE):
                os._exit(RESUMABLE)
            while os.read(self._pipe[0], 1)[0]:
                pass
        for end in self._pipe:
            os.close(end)


def _in_import(frame: FrameType | None) -> bool:
    """Whether this frame, or one that called it, imports a module."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None
