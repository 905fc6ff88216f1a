"""The experience log: what was asked, sampled, graded, rejected and shipped to which step.

One durable log serves every stage and the evaluation. An issue (one task in one epoch = one group)
goes `issued -> ready -> shipped`, or ends `dropped` (with a reason) or `done` (evaluation); the
transitions are guarded in SQL, so each issue has exactly one terminal state. What is trained is
what is stored: a step's batch is committed before the step runs and read back from here.

SQLite (WAL) is the embedded default, for one process; a `postgresql+psycopg://` URL runs the same
statements for any number of them (`claims`). Methods are synchronous, take milliseconds and may be
called from any thread.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import sqlalchemy as sa

from agentcpm_jax.log import codec
from agentcpm_jax.log import schema as db
from agentcpm_jax.log.claims import Claims, check_holds
from agentcpm_jax.log.engine import (
    create_or_check,
    is_shared,
    lock_issuing,
    open_engine,
)
from agentcpm_jax.log.reader import LogReader
from agentcpm_jax.log.schema import ShipEntry
from agentcpm_jax.log.signals import Signals, listen_postgres, notify
from agentcpm_jax.log.snapshots import take_snapshot
from agentcpm_jax.types import Decision, Task, Trajectory


class ExperienceLog(LogReader):
    """See the module's text. Make one with `open`; `close` it or use it as a context manager."""

    def __init__(self, engine: sa.Engine, durable: sa.Engine, where: str) -> None:
        super().__init__(engine, where)
        self._durable = durable  # its commits survive a power cut: used by `ship`
        self._writing = threading.Lock()
        self.signals = Signals(partial(listen_postgres, engine) if is_shared(engine) else None)
        self.claims = Claims(self._read, self._write)

    @classmethod
    def open(cls, url_or_path: str | Path) -> ExperienceLog:
        """Opens or creates a log; one of an older schema version is migrated.

        Raises:
            UserError: not a log, not a URL, not reachable, or a log of a newer schema version.
        """
        engine = open_engine(url_or_path, durable=False)
        where = engine.url.database or ""
        if is_shared(engine):
            where = engine.url.render_as_string(hide_password=True)
        try:
            create_or_check(engine, where)
        except BaseException:
            engine.dispose()
            raise
        return cls(engine, open_engine(url_or_path, durable=True), where)

    def close(self) -> None:
        self.signals.close()
        self._engine.dispose()
        self._durable.dispose()

    def __enter__(self) -> ExperienceLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait(self, kind: str, timeout: float, after: int | None = None) -> int:
        """Sleeps until a change of `kind` may have happened; see `Signals.wait`."""
        return self.signals.wait(kind, timeout, after)

    def announce(self, kind: str) -> None:
        """Wakes those who wait for `kind`, in every process: for changes outside the log."""
        with self._write(announces=(kind,)):
            pass

    def snapshot(self, target: Path) -> bool:
        """A consistent copy in the file `target`; False for a server, which is backed up itself."""
        if self.shared:
            return False
        take_snapshot(Path(self.where), target)
        return True

    # ---- issuing

    def issue(
        self, stage: str, kind: str, task: Task, epoch: int, ordinal: int, batch: int | None = None
    ) -> int:
        """Hands out one task; returns its issue_id."""
        return self.issue_round(stage, kind, [(task, epoch, ordinal)], batch)[0]

    def issue_round(
        self,
        stage: str,
        kind: str,
        tasks: Sequence[tuple[Task, int, int]],
        batch: int | None = None,
    ) -> list[int]:
        """Hands out (task, epoch, ordinal)s, all or none; returns their ids, ascending."""
        now = time.time()
        with self._write() as conn:
            lock_issuing(conn)
            # Not the database's own counter: PostgreSQL's skips ids when a transaction is lost, and
            # a resumed run would then sample with other keys. Issues are never deleted.
            first = int(conn.scalar(sa.select(sa.func.max(db.issue.c.issue_id))) or 0) + 1
            ids = list(range(first, first + len(tasks)))
            for issue_id, (task, epoch, ordinal) in zip(ids, tasks, strict=True):
                row = {
                    "issue_id": issue_id,
                    "stage": stage,
                    "kind": kind,
                    "task_uid": task.uid,
                    "task": json.dumps(task.to_json()),
                    "epoch": epoch,
                    "ordinal": ordinal,
                    "batch": batch,
                    "state": "issued",
                    "issued_at": now,
                    "changed_at": now,
                }
                conn.execute(sa.insert(db.issue).values(row))
        return ids

    # ---- recording

    def record_trajectory(self, traj: Trajectory, worker: str = "") -> None:
        """Stores one attempt. Later attempts of an earlier run of the same sample are forgotten.

        worker: who must hold the claim on its issue; "": the process that issued it.

        Raises:
            ValueError: its issue is not in flight.
            ClaimLost: `worker` does not hold the issue any more.
        """
        oldest, newest = traj.versions
        row = {
            "issue_id": traj.issue_id,
            "sample": traj.sample,
            "attempt": traj.attempt,
            "stop": str(traj.stop),
            "verdict": str(traj.verdict),
            "reward": None if traj.reward is None else float(traj.reward),
            "answer": None if traj.answer is None else db.plain(traj.answer),
            "error": db.plain(traj.error),
            "num_turns": len(traj.turns),
            "num_tokens": traj.num_tokens,
            "oldest_version": oldest,
            "newest_version": newest,
            "seconds": float(traj.seconds),
            "payload": codec.encode_trajectory(traj),
        }
        c = db.trajectory.c
        stale = [c.issue_id == traj.issue_id, c.sample == traj.sample, c.attempt >= traj.attempt]
        with self._write() as conn:
            if worker:
                check_holds(conn, traj.issue_id, worker)
            # Shared lock: nobody settles the group between this look and the commit.
            query = sa.select(db.issue.c.state).where(db.issue.c.issue_id == traj.issue_id)
            state = conn.scalar(query.with_for_update(read=True))
            if state != "issued":
                raise ValueError(f"issue {traj.issue_id} is {state}, not in flight: nothing stored")
            conn.execute(sa.delete(db.trajectory).where(*stale))
            conn.execute(sa.insert(db.trajectory).values(row))

    def finish_group(
        self,
        issue_id: int,
        state: str,
        reason: str = "",
        decisions: Iterable[Decision] = (),
    ) -> None:
        """An issue in flight becomes `ready`, `dropped` or `done`, with its decisions.

        One transaction: recorded samples do not count until it commits. Raises ValueError when
        the issue is not in flight.
        """
        if state not in ("ready", "dropped", "done"):
            raise ValueError(f"a group finishes ready, dropped or done, not {state!r}")
        with self._write(announces=("settled",)) as conn:
            _move(conn, issue_id, ("issued",), state, reason)
            _decide(conn, issue_id, decisions)

    def drop(self, issue_id: int, reason: str, decisions: Iterable[Decision] = ()) -> None:
        """An issue in flight or ready ends `dropped`. Raises ValueError when it has ended."""
        with self._write(announces=("settled",)) as conn:
            _move(conn, issue_id, ("issued", "ready"), "dropped", reason)
            _decide(conn, issue_id, decisions)

    def ship(
        self,
        stage: str,
        step: int,
        entries: Sequence[ShipEntry],
        decisions: Sequence[tuple[int, Decision]] = (),
    ) -> None:
        """Commits the ordered batch of `step`, durably; its groups become `shipped`.

        decisions: (issue_id, decision) pairs made at shipping, stored with it.

        Raises:
            ValueError: the step is recorded already, is empty, or a group is not ready.
        """
        if not entries:
            raise ValueError(f"stage {stage!r} step {step}: an empty batch cannot be shipped")
        rows = [
            {
                "stage": stage,
                "step": step,
                "ordinal": n,
                "issue_id": e.issue_id,
                "sample": e.sample,
                "segment": e.segment_index,
                "credit": codec.encode_credit(e.credit.advantage, e.credit.keep),
            }
            for n, e in enumerate(entries)
        ]
        c = db.shipped.c
        with self._write(durable=True, announces=("shipped",)) as conn:
            taken = sa.select(c.ordinal).where(c.stage == stage, c.step == step).limit(1)
            if conn.scalar(taken) is not None:
                raise ValueError(f"stage {stage!r} step {step} is shipped already")
            for issue_id in dict.fromkeys(e.issue_id for e in entries):
                _move(conn, issue_id, ("ready",), "shipped", "")
            conn.execute(sa.insert(db.shipped), rows)
            for issue_id, decision in decisions:
                _decide(conn, issue_id, [decision])

    def event(self, stage: str, name: str, count: int = 1, detail: str = "") -> None:
        """Adds to a named counter."""
        row = {"stage": stage, "name": name, "count": count, "detail": db.plain(detail)}
        with self._write() as conn:
            conn.execute(sa.insert(db.event).values(row | {"at": time.time()}))

    # ---- connections

    @contextmanager
    def _write(
        self, durable: bool = False, announces: tuple[str, ...] = ()
    ) -> Iterator[sa.Connection]:
        """A transaction; `announces` the kinds of `signals` that change with its commit."""
        engine = self._durable if durable else self._engine
        with (
            self._available(),
            self._writing,
            engine.connect().execution_options(writes=True) as conn,
            conn.begin(),
        ):
            yield conn
            notify(conn, announces)
        self.signals.announce(*announces)


def _move(conn: sa.Connection, issue_id: int, old: Sequence[str], new: str, reason: str) -> None:
    """The only place where a state changes: guarded in SQL, so an ended issue stays ended."""
    conn.execute(sa.delete(db.claim).where(db.claim.c.issue_id == issue_id))
    c = db.issue.c
    update = (
        sa.update(db.issue)
        .where(c.issue_id == issue_id, c.state.in_(list(old)))
        .values(state=new, reason=reason, changed_at=time.time())
    )
    if conn.execute(update).rowcount != 1:
        state = conn.scalar(sa.select(c.state).where(c.issue_id == issue_id))
        raise ValueError(f"issue {issue_id} is {state or 'unknown'}: it cannot become {new}")


def _decide(conn: sa.Connection, issue_id: int, decisions: Iterable[Decision]) -> None:
    rows = [
        {"issue_id": issue_id, "sample": d.sample, "filter": d.filter, "reason": db.plain(d.reason)}
        for d in decisions
    ]
    if rows:
        conn.execute(sa.insert(db.decision), rows)
