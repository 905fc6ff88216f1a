"""Progress on stderr: a bar on a terminal; elsewhere a whole line at most every ten seconds.

The first step, which compiles, is left out of the rate and of the time that is left.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from agentcpm_jax.files import duration_text
from agentcpm_jax.run.observe.metrics import Bar

EVERY = 10.0  # s between lines

#: Shows a line without breaking a bar.
announce: Callable[[str], None] = tqdm.write


def progress(description: str, total: int, initial: int = 0) -> Bar:
    """A `Progress`, by what stderr is."""
    if sys.stderr.isatty():
        return _Steady(desc=description, total=total, initial=initial, ncols=110)
    return Lines(description, total, initial)


class Lines:
    """A bar for files and pipes: the first step at once, then a line when `EVERY` s have passed."""

    def __init__(
        self,
        description: str,
        total: int,
        initial: int = 0,
        write: Callable[[str], Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._total, self._done = description, total, initial
        self._write, self._clock, self._note = write or _to_stderr, clock, ""
        self._first: tuple[int, float] | None = None  # steps and time when it was compiled
        self._shown = -EVERY

    def update(self, n: int = 1) -> None:
        """`n` more are done."""
        now, self._done = self._clock(), self._done + n
        if self._first is None:
            self._first, self._shown = (self._done, now), now - EVERY
        if now - self._shown < EVERY:
            return
        self._shown = now
        steps, seconds = self._done - self._first[0], now - self._first[1]
        line = f"{self._name}: {self._done}/{self._total}"
        if steps and seconds:
            left = (self._total - self._done) * seconds / steps
            line += f", {seconds / steps:.3g} s each, {duration_text(left)} left"
        self._write(line + (f", {self._note}" if self._note else "") + "\n")

    def set_postfix_str(self, s: str) -> None:
        """What the next line ends with."""
        self._note = s.strip()

    def close(self) -> None:
        """Nothing is left open."""


class _Steady(tqdm):
    """tqdm, whose rate begins after the first step."""

    def update(self, n: float | None = 1) -> bool | None:
        """As tqdm's."""
        if self.n == self.initial:
            self.n += n or 0
            self.initial = self.last_print_n = self.n
            self.start_t = self.last_print_t = self._time()
            self.refresh()
            return True
        return super().update(n)


def _to_stderr(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
