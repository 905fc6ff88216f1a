"""Claims: issues in flight that any worker may take, and holds while it renews its lease.

The trainer offers an issue; a worker claims it for a lease, renews the lease while it samples, and
delivers the issue when all its samples are recorded. After the lease another worker may take the
issue; the former holder then gets `ClaimLost` at its next write. Leases are measured by the
database's clock. The row is deleted when the trainer settles the group.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import sqlalchemy as sa

from agentcpm_jax.database import clock
from agentcpm_jax.log import schema as db
from agentcpm_jax.types import Task


class ClaimLost(RuntimeError):
    """The lease ran out and another worker has the issue, or the trainer ended it."""


@dataclass(frozen=True)
class Claim:
    """An issue held by a worker; `version`: the oldest weights it may be sampled with."""

    issue_id: int
    task: Task
    version: int


class Claims:
    """The claims of a log; `read` and `write` open its transactions."""

    def __init__(
        self,
        read: Callable[[], AbstractContextManager[sa.Connection]],
        write: Callable[..., AbstractContextManager[sa.Connection]],
    ) -> None:
        self._read, self._write = read, write

    def offer(self, stage: str, issue_id: int, version: int) -> None:
        """Lets workers claim an issue in flight; a repeated offer changes nothing."""
        c = db.claim.c
        row = {"issue_id": issue_id, "stage": stage, "version": version}
        row |= {"worker": "", "until": 0.0, "delivered": 0}
        with self._write(announces=("offered",)) as conn:
            if conn.scalar(sa.select(c.issue_id).where(c.issue_id == issue_id)) is None:
                conn.execute(sa.insert(db.claim).values(row))

    def take(self, stage: str, worker: str, limit: int, lease: float) -> list[Claim]:
        """Claims up to `limit` free issues for `lease` seconds, oldest first."""
        c = db.claim.c
        with self._write() as conn:
            now = clock(conn)
            free = (
                sa.select(c.issue_id, c.version, db.issue.c.task)
                .select_from(db.claim.join(db.issue))
                .where(c.stage == stage, c.delivered == 0, c.until < now)
                .order_by(c.issue_id)
                .limit(limit)
                .with_for_update(skip_locked=True, of=db.claim)
            )
            found = [
                Claim(row.issue_id, Task.from_json(json.loads(row.task)), row.version)
                for row in conn.execute(free)
            ]
            mine = c.issue_id.in_([claim.issue_id for claim in found])
            if found:
                values = {"worker": worker, "until": now + lease}
                conn.execute(sa.update(db.claim).where(mine).values(values))
        return found

    def renew(self, worker: str, lease: float) -> set[int]:
        """Extends a worker's claims to `lease` seconds from now; returns the issues it holds."""
        c = db.claim.c
        mine = [c.worker == worker, c.delivered == 0]
        with self._write() as conn:
            conn.execute(sa.update(db.claim).where(*mine).values(until=clock(conn) + lease))
            return set(conn.scalars(sa.select(c.issue_id).where(*mine)))

    def release(self, worker: str, issue_ids: Iterable[int] | None = None) -> None:
        """Gives a worker's claims on `issue_ids` (None: all) back at once."""
        c = db.claim.c
        mine = [c.worker == worker, c.delivered == 0]
        if issue_ids is not None:
            mine.append(c.issue_id.in_(list(issue_ids)))
        with self._write(announces=("offered",)) as conn:
            conn.execute(sa.update(db.claim).where(*mine).values(worker="", until=0.0))

    def deliver(self, issue_id: int, worker: str) -> None:
        """Hands in a group whose samples are all recorded. Raises ClaimLost."""
        with self._write(announces=("delivered",)) as conn:
            check_holds(conn, issue_id, worker)
            done = sa.update(db.claim).where(db.claim.c.issue_id == issue_id)
            conn.execute(done.values(delivered=1))

    def delivered(self, stage: str) -> set[int]:
        """Issues whose groups were handed in and not yet settled."""
        c = db.claim.c
        with self._read() as conn:
            query = sa.select(c.issue_id).where(c.stage == stage, c.delivered == 1)
            return set(conn.scalars(query))

    def live(self, stage: str) -> dict[int, str]:
        """issue_id -> worker, for claims within their lease that are not handed in."""
        c = db.claim.c
        with self._read() as conn:
            query = sa.select(c.issue_id, c.worker).where(
                c.stage == stage, c.delivered == 0, c.until >= clock(conn)
            )
            return {row.issue_id: row.worker for row in conn.execute(query)}


def check_holds(conn: sa.Connection, issue_id: int, worker: str) -> None:
    """Locks the claim until the transaction ends; raises ClaimLost when it is not `worker`'s."""
    c = db.claim.c
    query = sa.select(c.worker).where(c.issue_id == issue_id, c.delivered == 0)
    holder = conn.scalar(query.with_for_update())
    if holder != worker:
        now = "settled or handed in" if holder is None else f"held by {holder or 'nobody'}"
        raise ClaimLost(f"issue {issue_id} is {now}, no longer by {worker}")
