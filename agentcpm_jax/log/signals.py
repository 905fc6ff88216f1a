"""Waiting for changes of the experience log without polling it.

Within a process a condition wakes the waiters; between processes PostgreSQL's LISTEN/NOTIFY does.
A lost notification costs at most `POLL` seconds: then every waiter looks again by itself.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa

#: What can be waited for: issues offered to workers, their groups handed in, groups settled,
#: batches recorded, new weights.
KINDS = ("offered", "delivered", "settled", "shipped", "version")
CHANNEL = "agentcpm_experience"
POLL = 1.0


class Signals:
    """Counts changes by kind. `listen`, if given, runs in a thread as soon as someone waits."""

    def __init__(self, listen: Callable[[Signals], None] | None = None) -> None:
        self._changed = threading.Condition()
        self._counts: Counter[str] = Counter()
        self._listen, self._thread = listen, None
        self.closed = False

    def announce(self, *kinds: str) -> None:
        """Wakes those who wait for one of `kinds`."""
        with self._changed:
            self._counts.update(kinds)
            self._changed.notify_all()

    def mark(self, kind: str) -> int:
        """How many changes of `kind` were seen so far."""
        _check(kind)
        with self._changed:
            return self._counts[kind]

    def wait(self, kind: str, timeout: float, after: int | None = None) -> int:
        """Returns the count of changes as soon as it exceeds `after`, or when time is up (s).

        after: an earlier result; None: the count now. With it no change is missed between two
        calls. A return says that something may have changed: look, and wait again.
        """
        _check(kind)
        if self._listen is not None and self._thread is None:
            self._thread = threading.Thread(
                target=self._listen, args=(self,), name="log-signals", daemon=True
            )
            self._thread.start()
        with self._changed:
            base = self._counts[kind] if after is None else after
            self._changed.wait_for(lambda: self.closed or self._counts[kind] > base, timeout)
            return self._counts[kind]

    def closes_within(self, timeout: float) -> bool:
        """Sleeps (s), at most until `close`; whether that was called."""
        with self._changed:
            return self._changed.wait_for(lambda: self.closed, timeout)

    def close(self) -> None:
        """Wakes everybody for the last time and ends the listener."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(2 * POLL)


def notify(conn: sa.Connection, kinds: tuple[str, ...]) -> None:
    """Announces `kinds` to the other processes when the transaction commits."""
    if conn.dialect.name == "postgresql":
        for kind in kinds:
            conn.execute(sa.select(sa.func.pg_notify(CHANNEL, kind)))


def listen_postgres(engine: sa.Engine, signals: Signals) -> None:
    """Turns notifications into `announce`, for as long as `signals` is open.

    Without a connection it only wakes everybody every `POLL` seconds, and tries again.
    """
    while not signals.closed:
        try:
            _listen(engine, signals)
        except Exception:  # the server went away; those who wait meet it in their own queries
            if signals.closed:
                return
            signals.announce(*KINDS)
            signals.closes_within(POLL)


def _listen(engine: sa.Engine, signals: Signals) -> None:
    holder = engine.raw_connection()
    try:
        connection: Any = holder.driver_connection
        connection.autocommit = True
        connection.execute(f"LISTEN {CHANNEL}")
        while not signals.closed:
            signals.announce(*KINDS)  # what happened before LISTEN, or since the last second
            for note in connection.notifies(timeout=POLL):
                signals.announce(note.payload)
                if signals.closed:
                    return
    finally:
        holder.invalidate()  # it listens and commits by itself: nothing for the pool
        holder.close()


def _check(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"nothing announces {kind!r}; one of {', '.join(KINDS)}")
