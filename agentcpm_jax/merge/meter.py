"""Progress of a merge on a terminal: bytes, rate, time left."""

from __future__ import annotations

import time
from typing import TextIO


class Meter:
    """Rewrites one line of a terminal; silent when the stream is none."""

    def __init__(self, stream: TextIO):
        self._stream = stream if stream.isatty() else None
        self._start = time.monotonic()
        self._first: int | None = None
        self._shown = 0.0

    def show(self, done: int, total: int) -> None:
        """`done` of `total` bytes are written; at most ten lines a second."""
        now = time.monotonic()
        if self._first is None:  # what an earlier run left says nothing about the rate
            self._first, self._start = done, now
        if self._stream is None or (done < total and now - self._shown < 0.1):
            return
        self._shown = now
        line = progress_line(done, total, done - self._first, now - self._start)
        self._stream.write(f"\r{line}\x1b[K" + ("\n" if done >= total else ""))
        self._stream.flush()


def progress_line(done: int, total: int, since: int, seconds: float) -> str:
    """`done` of `total` bytes, of which `since` took `seconds`."""
    text = f"{done / 1e9:.2f} of {total / 1e9:.2f} GB, {done / max(total, 1):.0%}"
    if since <= 0 or seconds <= 0:
        return text
    rate = since / seconds
    return f"{text}, {rate / 1e6:,.0f} MB/s, {duration((total - done) / rate)} left"


def duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `1 h 05 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )
