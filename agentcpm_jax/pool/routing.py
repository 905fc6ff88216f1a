"""Which worker gets the next request: the one that holds the trajectory's prefix, unless busy."""

from __future__ import annotations

import asyncio
import enum
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from agentcpm_jax.pool.errors import PoolError
from agentcpm_jax.pool.worker import Server


class State(enum.StrEnum):
    """State of a worker; only `READY` workers get requests."""

    JOINING = "joining"  # not reached yet, or lost: the pool keeps trying
    UPDATING = "updating"
    READY = "ready"
    REFUSED = "refused"  # it answers, but must not be used: `reason` says why


@dataclass(frozen=True)
class Doubt:
    """No answer of a worker was usable since `since` (seconds of the loop's clock)."""

    since: float
    error: PoolError  # the last one


@dataclass(eq=False)
class Worker:
    """A server and what the pool knows about it."""

    server: Server
    state: State = State.JOINING
    reason: str = "not reached yet"
    version: int = -1  # verified; -1: unknown
    context: int = 0  # tokens, prompt and completion; 0: the server does not say
    seeded: bool = False  # honours sampling_seed
    probed: bool = False
    missed: int = 0  # failed health checks in a row
    doubt: Doubt | None = None
    refusals: int = 0  # in a row
    again: float = 0.0  # when a refused one is asked again (loop's clock)
    died: bool = False  # as it loaded the run's first weights: refused without a word of its own
    in_flight: set[asyncio.Task[Any]] = field(default_factory=set)  # requests it has not answered

    @property
    def url(self) -> str:
        return self.server.url

    def drop_requests(self) -> None:
        """Cancel the requests that wait for this worker; the pool sends them to another."""
        for request in list(self.in_flight):
            request.cancel()


def trajectory_key(rid: str) -> str:
    """The part of a rid before its first slash, which all requests of a trajectory share."""
    return rid.partition("/")[0]


#: Requests by which a trajectory's worker may be the busier one: its cached prefix is worth a queue
#: of a few, not of a batch.
SLACK = 8


class Routes:
    """Least-loaded routing; a trajectory stays on its worker up to `slack` more requests there.

    A worker whose last answer was unusable gets requests only when all are like that: what fails
    at once has nothing in flight, so the least loaded would be the broken one.
    """

    def __init__(self, slack: int = SLACK, remembered: int = 65536) -> None:
        self._slack, self._remembered = slack, remembered
        self._homes: OrderedDict[str, str] = OrderedDict()

    def choose(self, workers: Iterable[Worker], key: str) -> Worker | None:
        """A ready worker for the trajectory `key`; None when there is none."""
        usable = [w for w in workers if w.state is State.READY]
        trusted = [w for w in usable if w.doubt is None]
        ready = {w.url: w for w in trusted or usable}
        if not ready:
            return None
        least = min(ready.values(), key=lambda w: len(w.in_flight))
        home = ready.get(self._homes.get(key, ""))
        chosen = (
            home if home and len(home.in_flight) <= len(least.in_flight) + self._slack else least
        )
        self._homes[key] = chosen.url
        self._homes.move_to_end(key)
        while len(self._homes) > self._remembered:
            self._homes.popitem(last=False)
        return chosen
