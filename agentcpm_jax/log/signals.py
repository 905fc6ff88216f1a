"""Waiting for changes of the experience log without polling it.

Within a process a condition wakes the waiters; between processes PostgreSQL's LISTEN/NOTIFY does.
A lost notification costs at most `POLL` seconds: then every waiter is woken anyway.
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
    """Counts changes by kind. `listen`, if given, runs in a thread from the first `wait` on."""

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
        """Returns the count of changes once it exceeds `after`, or after `timeout` seconds.

        after: the result of the last call, so that no change in between is missed; None: the count
        now. A return means that something may have changed: check, and wait again.
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
        """Sleeps until `close`, at most `timeout` s; returns whether it was closed."""
        with self._changed:
            return self._changed.wait_for(lambda: self.closed, timeout)

    def close(self) -> None:
        """Wakes all waiters for the last time and ends the listener."""
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

    While disconnected it wakes all waiters every `POLL` seconds and tries to reconnect.
    """
    while not signals.closed:
        try:
            _listen(engine, signals)
        except Exception:  # the server went away; waiters get the error in their own queries
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
        holder.invalidate()  # it is in LISTEN and autocommit mode: not for the pool
        holder.close()


def _check(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"nothing announces {kind!r}; one of {', '.join(KINDS)}")
