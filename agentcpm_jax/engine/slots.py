"""What the rows of the cache hold, and which row a new prompt should take.

Plain book-keeping on the host. A row keeps its text after its request has ended, so the next turn
of an episode finds its earlier turns; the samples of a group find their common prompt in each
other's rows. The least recently used row is evicted first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_COPY = 8  # tokens; a shorter prefix is fed again rather than copied
BLOCK = 256  # tokens compared at once


@dataclass(frozen=True)
class CacheSlot:
    """The row chosen for a prompt.

    It holds the first `kept` tokens; row `source` (-1: none) holds the first `shared` tokens, or
    will once they have been fed.
    """

    slot: int
    kept: int
    source: int = -1
    shared: int = 0


class Slots:
    """The text of each row: ids `text[s, :known[s]]`, of which the first `fed[s]` are cached."""

    def __init__(self, count: int, capacity: int) -> None:
        self.text = np.zeros((count, capacity), np.int32)
        self.known = np.zeros(count, np.int32)
        self.fed = np.zeros(count, np.int32)
        self.busy = np.zeros(count, bool)
        self._used = np.zeros(count, np.int64)
        self._clock = 0

    def place(self, prompt: np.ndarray, *, reuse: bool) -> CacheSlot:
        """Choose a row for a prompt; one must be free. Without `reuse`: the first free, emptied."""
        free = np.flatnonzero(~self.busy)
        if not reuse:
            return CacheSlot(int(free[0]), 0)
        # At least one token must be fed to get logits, so the last is never taken as cached.
        shared = np.minimum(self.shared(prompt), len(prompt) - 1)
        best, own = int(shared.argmax()), free[shared[free].argmax()]
        # Overwriting a row whose text is mostly our prefix loses little.
        if shared[own] + MIN_COPY > shared[best] and 2 * shared[own] >= self.known[own] > 0:
            return CacheSlot(int(own), int(shared[own]))
        slot = int(free[self._used[free].argmin()])
        if shared[best] < shared[slot] + MIN_COPY:
            return CacheSlot(slot, int(shared[slot]))
        return CacheSlot(slot, int(shared[slot]), best, int(shared[best]))

    def shared(self, prompt: np.ndarray) -> np.ndarray:
        """Length of the longest common prefix of the prompt with each row's text, i64[slots]."""
        length = np.minimum(self.known, len(prompt)).astype(np.int64)
        alive = np.flatnonzero(length)
        for start in range(0, len(prompt), BLOCK):
            part = prompt[start : start + BLOCK]
            different = self.text[alive, start : start + len(part)] != part
            ends = different.any(axis=1)
            found = start + different[ends].argmax(axis=1)
            length[alive[ends]] = np.minimum(length[alive[ends]], found)
            alive = alive[~ends & (length[alive] > start + len(part))]
            if not len(alive):
                break
        return length

    def take(self, place: CacheSlot, prompt: np.ndarray) -> None:
        """Give the row to a running request with this prompt."""
        self.text[place.slot, : len(prompt)] = prompt
        self.known[place.slot] = len(prompt)
        self.fed[place.slot] = min(place.kept, self.fed[place.slot])
        self.busy[place.slot] = True

    def release(self, slot: int) -> None:
        """Free the row of a finished request; its cache stays until the row is needed."""
        self._clock += 1
        self.busy[slot], self._used[slot] = False, self._clock
        self.known[slot] = self.fed[slot]

    def append(self, slot: int, ids: np.ndarray) -> None:
        """Append sampled ids; all but the last have been fed, and so has the token before them."""
        known = self.known[slot]
        self.text[slot, known : known + len(ids)] = ids
        self.known[slot] += len(ids)
        self.fed[slot] += len(ids)

    def holds(self, slot: int, prefix: np.ndarray) -> bool:
        """Whether the row's text still begins with `prefix`."""
        n = len(prefix)
        return self.known[slot] >= n and bool((self.text[slot, :n] == prefix).all())

    def replace(self, busy: Sequence[int]) -> list[CacheSlot]:
        """After `forget`: for each busy row, the earlier busy row that shares the most text."""
        known, self.known = self.known, np.zeros_like(self.known)
        places = []
        for slot in busy:
            text = self.text[slot, : known[slot]]
            shared = np.minimum(self.shared(text), len(text) - 1)
            places.append(CacheSlot(slot, 0, int(shared.argmax()), int(shared.max())))
            self.known[slot] = known[slot]
        return places

    def forget(self) -> None:
        """Drop everything cached, because the weights have changed."""
        self.fed[:] = 0
        self.known[~self.busy] = 0
