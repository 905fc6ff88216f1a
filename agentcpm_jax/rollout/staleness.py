"""How old may a sample be? Admission (a budget of groups) and the age check (a hard bound).

Admission: accepted + running <= (eta + v + 1) * B, where v = completed batches, B = groups per
batch, eta = `max_staleness` (AReaL, arXiv 2505.24298, eq. 3; state machine as in its
`StalenessManager`). That bounds an aggregate only: one slow group may still grow too old, so the
age v - (version of the oldest trained token) is checked again when a batch is shipped.

Deviations from AReaL: groups are counted, not samples; a group that is dropped after acceptance
leaves `accepted`, so its refill is exact; after a restart the counts come from the log.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from agentcpm_jax.types import Segment


class Admission:
    """Counts groups. Pure bookkeeping: no clock, no I/O, one thread.

    `version` is v. A negative capacity (after a restart at an older version) admits nothing.
    """

    def __init__(
        self, batch_size: int, max_staleness: int, max_concurrent: int, version: int = 0
    ) -> None:
        self.batch_size = max(1, batch_size)
        self.max_staleness = max_staleness
        self.max_concurrent = max(1, max_concurrent)
        self.version = version
        self.accepted = 0  # finished and kept: waiting for a batch, or shipped
        self.running = 0
        self.rejected = 0
        self.enqueued = 0

    def get_capacity(self) -> int:
        """How many groups may start now."""
        budget = (self.max_staleness + self.version + 1) * self.batch_size
        return min(self.max_concurrent - self.running, budget - self.accepted - self.running)

    def submit(self) -> None:
        """A group starts."""
        self.running += 1

    def enqueue(self) -> None:
        """A group waits outside; it takes no slot yet."""
        self.enqueued += 1

    def dequeue_submit(self) -> None:
        """A waiting group starts."""
        self.enqueued -= 1
        self.running += 1

    def accept(self) -> None:
        """A running group finished and is kept."""
        self.running -= 1
        self.accepted += 1

    def reject(self) -> None:
        """A running group ended in any other way; its slot is free again."""
        self.running -= 1
        self.rejected += 1

    def drop(self) -> None:
        """An accepted group turned out to be over-age: it leaves `accepted`."""
        self.accepted -= 1

    def recover(self, version: int, accepted: int | None = None) -> None:
        """Restart at `version` with nothing running; `accepted` defaults to v * B."""
        self.version = version
        self.accepted = version * self.batch_size if accepted is None else accepted
        self.running = self.enqueued = 0

    def stats(self) -> tuple[int, int, int, int]:
        """(accepted, running, rejected, enqueued)."""
        return self.accepted, self.running, self.rejected, self.enqueued


def oldest_trained(segment: Segment, keep: np.ndarray) -> int | None:
    """Version of the oldest trained token (sampled and kept); None when nothing is trained."""
    trained = segment.sampled & np.asarray(keep, bool)
    return int(segment.version[trained].min()) if trained.any() else None


@dataclass(frozen=True)
class BatchChoice:
    """`ship`: B issue ids, oldest first, or empty (wait). `over_age`: issue ids to drop."""

    ship: tuple[int, ...]
    over_age: tuple[int, ...]


def choose(
    ready: Mapping[int, Sequence[int]],
    running: Iterable[int],
    step: int,
    batch_size: int,
    max_staleness: int,
    wait: bool,
) -> BatchChoice:
    """Choose the groups of batch `step`, which is trained at version v = `step`.

    ready: issue id -> oldest trained version of each of its segments; running: for each group in
    flight a lower bound of its oldest version. A segment is over-age when step - version >
    max_staleness; a group is when all its segments are. With `wait` the batch is held back until
    the deadlines (version + eta) of everything left over can still be met by later batches of B
    (earliest deadline first), so that with admission's budget nothing ever grows over-age. That can
    happen only when the engine lags behind admission's version; then waiting ends with the last
    running group, and the age check decides.
    """
    limit = step - max_staleness  # the oldest version still allowed
    alive = {i: min(v for v in vs if v >= limit) for i, vs in ready.items() if max(vs) >= limit}
    over_age = tuple(sorted(set(ready) - set(alive)))
    order = sorted(alive, key=lambda i: (alive[i], i))
    if len(order) < batch_size:
        return BatchChoice((), over_age)
    running = list(running)
    if wait and running:  # without running groups there is nothing to wait for
        left = sorted([alive[i] for i in order[batch_size:]] + running)
        # The k-th oldest of what is left ships in batch step + 1 + k // B at the earliest.
        if any(v + max_staleness < step + 1 + k // batch_size for k, v in enumerate(left)):
            return BatchChoice((), over_age)
    return BatchChoice(tuple(order[:batch_size]), over_age)
