"""Fields of what a server sent: each has exactly its type and range, or is a named error.

Whatever is not listed as expected is refused. A wrong value that passed here would raise something
else elsewhere, or be trained on.
"""

from __future__ import annotations

from typing import Any

from agentcpm_jax.pool.errors import PoolError, PoolErrorKind, shown
from agentcpm_jax.records import parse_json

#: Ids, lengths and positions are 32-bit integers.
LIMIT = 2**31


class Fields:
    """One JSON object. Each method gives a field, None where it is absent or null.

    All of them raise `PoolError`, a bad answer, that names the field and what it holds.
    """

    def __init__(self, value: Any, url: str, place: str = "the answer") -> None:
        self.url, self._place = url, place
        if type(value) is not dict:
            raise self.bad(f"{place} is {shown(value)}, not an object")
        self.values: dict[str, Any] = value

    def text(self, key: str) -> str | None:
        return self._typed(key, str, "a text")

    def flag(self, key: str) -> bool | None:
        return self._typed(key, bool, "true or false")

    def rows(self, key: str) -> list[Any] | None:
        return self._typed(key, list, "a list")

    def inner(self, key: str) -> Fields | None:
        value = self.values.get(key)
        return None if value is None else Fields(value, self.url, f"{self._place}.{key}")

    def count(self, key: str) -> int | None:
        value = self.values.get(key)
        return value if value is None or is_count(value) else self._wrong(key, value, "a count")

    def counts(self, key: str) -> list[int] | None:
        """A list of integers from 0 on, such as ids."""
        rows = self.rows(key)
        if rows is not None and not all(map(is_count, rows)):
            bad = next(row for row in rows if not is_count(row))
            self._wrong(key, bad, "a list of integers of at least 0")
        return rows

    def bad(self, said: str) -> PoolError:
        """The error to raise when fields that are each in order disagree."""
        return PoolError(PoolErrorKind.BAD_ANSWER, self.url, said)

    def _typed(self, key: str, kind: type, words: str) -> Any:
        value = self.values.get(key)
        return value if value is None or type(value) is kind else self._wrong(key, value, words)

    def _wrong(self, key: str, value: Any, words: str) -> Any:
        raise self.bad(f"{self._place}.{key} is {shown(value)}, not {words}")


def is_count(value: Any) -> bool:
    """Whether it is an integer from 0 to 2^31 - 1; true and false are none."""
    return type(value) is int and 0 <= value < LIMIT


def parse(payload: bytes, url: str) -> Any:
    """The JSON of a body; raises `PoolError`, a bad answer, whatever is wrong with it."""
    try:
        return parse_json(payload)
    except ValueError as error:
        said = f"no JSON: {shown(payload[:60])} ({error})"
        raise PoolError(PoolErrorKind.BAD_ANSWER, url, said) from None
