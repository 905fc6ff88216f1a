"""Full-text search over a world's pages (SQLite FTS5).

Title matches come first (number of matching title words, then the shorter title, then bm25), the
rest is filled from body matches. The titles are presented in a seeded order, so that the position
says nothing about the rank.
"""

from __future__ import annotations

import random
import re
import sqlite3
import threading
from functools import lru_cache

from agentcpm_jax.world.graph import World, WorldConfig, build_world
from agentcpm_jax.world.pages import page_html, page_lines, page_titles

#: Query words beyond these are ignored: an untrusted query must not exhaust FTS5's parser.
MAX_QUERY_WORDS = 32

_WORD = re.compile(r"[^\W_]+")


class SearchIndex:
    """The pages of one world and the index over them, which is built at the first search."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.titles = page_titles(world)
        self._known = frozenset(self.titles)
        self._db: sqlite3.Connection | None = None
        self._lock = threading.Lock()

    def html(self, title: str) -> str | None:
        """The page of that exact title, or None."""
        return page_html(self.world, title) if title in self._known else None

    def search(self, query: str) -> list[str]:
        """At most `config.results` titles; none when no word of the query is known."""
        words = list(dict.fromkeys(w.casefold() for w in _WORD.findall(query)))[:MAX_QUERY_WORDS]
        if not words:
            return []
        # bytes, since an untrusted query may hold lone surrogates, which str seeds reject
        seed = f"search/{self.world.config.key}/{query}".encode("utf-8", "surrogatepass")
        rng = random.Random(seed)
        found = self._ranked(words, rng)[: self.world.config.results]
        rng.shuffle(found)
        return found

    def _ranked(self, words: list[str], rng: random.Random) -> list[str]:
        any_word = " OR ".join(f'"{word}"' for word in words)
        title_hits = self._rows(f"title : ({any_word})")
        rng.shuffle(title_hits)  # equal ranks fall in a seeded order
        wanted = set(words)

        def rank(hit: tuple[str, float]) -> tuple[int, int, float]:
            title_words = [w.casefold() for w in _WORD.findall(hit[0])]
            return -len(wanted.intersection(title_words)), len(title_words), hit[1]

        ranked = [title for title, _ in sorted(title_hits, key=rank)]
        missing = self.world.config.results - len(ranked)
        if missing > 0:
            body_hits = self._rows(f"body : ({any_word})", self.world.config.results)
            ranked += [title for title, _ in body_hits if title not in ranked][:missing]
        return ranked

    def _rows(self, match: str, limit: int = -1) -> list[tuple[str, float]]:
        with self._lock:
            rows = self._open().execute(
                "SELECT title, bm25(page) FROM page WHERE page MATCH ? "
                "ORDER BY bm25(page), rowid LIMIT ?",
                (match, limit),
            )
            return rows.fetchall()

    def _open(self) -> sqlite3.Connection:
        if self._db is None:
            self._db = sqlite3.connect(":memory:", check_same_thread=False)
            self._db.execute("CREATE VIRTUAL TABLE page USING fts5(title, body)")
            self._db.executemany(
                "INSERT INTO page VALUES (?, ?)",
                (
                    (t, "\n".join(f"{words} {link}" for words, link in page_lines(self.world, t)))
                    for t in self.titles
                ),
            )
        return self._db


@lru_cache(maxsize=512)
def search_index(cfg: WorldConfig) -> SearchIndex:
    """The pages of a world by its config: the process-wide cache of worlds."""
    return SearchIndex(build_world(cfg))
