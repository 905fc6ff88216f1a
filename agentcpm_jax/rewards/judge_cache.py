"""Verdicts of judges, kept in one SQLite file (or in memory) under a hash of what was judged."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from agentcpm_jax.types import UserError, Verdict

_TABLE = (
    "CREATE TABLE IF NOT EXISTS verdict "
    "(key TEXT PRIMARY KEY, model TEXT NOT NULL, verdict TEXT NOT NULL, reply TEXT NOT NULL)"
)


class JudgeCache:
    """key -> verdict. Any number of processes may share the file; None: memory alone.

    A connection lives for one statement, so that the cache belongs to no thread and needs no
    closing. A file that cannot be read or written later on costs a question, not the run.

    Raises:
      UserError: the file cannot be opened, or is no SQLite database.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self._path = path
        self._known: dict[str, Verdict] = {}
        self.hits = 0
        if path is None:
            return
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(path)) as db, db:
                db.execute("PRAGMA journal_mode=WAL")
                db.execute(_TABLE)
        except (OSError, sqlite3.Error) as error:
            raise UserError(
                f"judge cache {path}: {error}; remove the file or name another in judge.cache"
            ) from None

    def get(self, key: str) -> Verdict | None:
        """The verdict stored under `key`."""
        found = self._known.get(key) or self._read(key)
        if found is not None:
            self.hits += 1
            self._known[key] = found
        return found

    def put(self, key: str, model: str, verdict: Verdict, reply: str) -> None:
        """Store a verdict, with the model and its reply for people who want to check it."""
        self._known[key] = verdict
        self._execute(
            "INSERT OR REPLACE INTO verdict VALUES (?, ?, ?, ?)", (key, model, verdict, reply)
        )

    def _read(self, key: str) -> Verdict | None:
        rows = self._execute("SELECT verdict FROM verdict WHERE key = ?", (key,))
        return Verdict(rows[0][0]) if rows and rows[0][0] in set(Verdict) else None

    def _execute(self, statement: str, values: tuple[str, ...]) -> list[tuple[str]]:
        if self._path is None:
            return []
        # A reply may hold lone surrogates, which SQLite does not store.
        plain = [str(v).encode("utf-8", "replace").decode() for v in values]
        try:
            with closing(sqlite3.connect(self._path, timeout=1.0)) as db, db:
                return db.execute(statement, plain).fetchall()
        except sqlite3.Error:
            return []
