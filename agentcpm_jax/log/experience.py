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
import sqlite3
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import exc as sa_exc

from agentcpm_jax.database import (
    LogBroken,
    LogUnavailable,
    is_shared,
    open_engine,
    sqlite_remedy,
)
from agentcpm_jax.log import codec
from agentcpm_jax.log import schema as db
from agentcpm_jax.log.claims import Claims, check_holds
from agentcpm_jax.log.schema import Issue, Result, ShipEntry, ShippedCredit
from agentcpm_jax.log.signals import Signals, listen_postgres, notify
from agentcpm_jax.log.snapshots import replacement, take_snapshot
from agentcpm_jax.types import (
    Credit,
    Decision,
    ShippedSegment,
    StopReason,
    Task,
    Trajectory,
    TrajectoryGroup,
    Verdict,
)

T = TypeVar("T")
#: Why the groups of a batch that was recorded and could not be trained were dropped.
SET_ASIDE = "set_aside"


class ExperienceLog:
    """The log of a run. Make one with `open`; `close` it or use it as a context manager.

    Every method raises `LogUnavailable` when the database cannot be reached or written, and
    `LogBroken` when what it reads there is not what was written.
    """

    def __init__(
        self, engine: sa.Engine, durable: sa.Engine, where: str, spare: Callable[[], Path | None]
    ) -> None:
        self.where, self._spare = where, spare
        self._engine = engine
        self._durable = durable  # its commits survive a power cut: used by `ship`
        self._writing = threading.Lock()
        self.signals = Signals(partial(listen_postgres, engine) if is_shared(engine) else None)
        self.claims = Claims(self._read, self._write)

    @classmethod
    def open(
        cls, url_or_path: str | Path, spare: Callable[[], Path | None] = lambda: None
    ) -> ExperienceLog:
        """Opens or creates a log; one of an older schema version is migrated.

        Args:
            spare: the snapshot, if any, that takes the place of a missing SQLite file.

        Raises:
            UserError: not a log, not a URL, not reachable, or a log of a newer schema version.
        """
        engine = open_engine(url_or_path, durable=False)
        where = engine.url.database or ""
        if is_shared(engine):
            where = engine.url.render_as_string(hide_password=True)
        log = cls(engine, open_engine(url_or_path, durable=True), where, spare)
        try:
            with log._available():
                db.create_or_check(engine, where)
        except BaseException:
            log.close()
            raise
        return log

    def close(self) -> None:
        self.signals.close()
        self._engine.dispose()
        self._durable.dispose()

    def __enter__(self) -> ExperienceLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def shared(self) -> bool:
        """Whether other processes may claim tasks of this log and write into it."""
        return is_shared(self._engine)

    def wait(self, kind: str, timeout: float, after: int | None = None) -> int:
        """Sleeps until a change of `kind` may have happened; see `Signals.wait`."""
        return self.signals.wait(kind, timeout, after)

    def announce(self, kind: str) -> None:
        """Wakes the waiters for `kind` in every process, after a change outside the log."""
        with self._write(announces=(kind,)):
            pass

    def snapshot(self, target: Path) -> bool:
        """Writes a consistent copy to `target`; False for PostgreSQL, which has its own backups."""
        if self.shared:
            return False
        with self._available():
            take_snapshot(Path(self.where), target)
        return True

    # ---- issuing

    def issue(self, stage: str, kind: str, task: Task, epoch: int, ordinal: int) -> int:
        """Hands out one task; returns its issue_id."""
        return self.issue_round(stage, kind, [(task, epoch, ordinal)])[0]

    def issue_round(
        self,
        stage: str,
        kind: str,
        tasks: Sequence[tuple[Task, int, int]],
        batch: int | None = None,
    ) -> list[int]:
        """Hands out (task, epoch, ordinal) triples, all or none; returns their ids, ascending."""
        now = time.time()
        with self._write() as conn:
            db.lock_issuing(conn)
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
        """Stores one attempt; deletes this and later attempts of the sample by an earlier run.

        worker: the worker that must hold the claim; "": the process that issued the issue.

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
            # Shared lock: nobody settles the group between this read and the commit.
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
        """Sets an issue in flight to `ready`, `dropped` or `done` and stores its decisions.

        One transaction: recorded samples do not count until it commits. Raises ValueError when
        the issue is not in flight.
        """
        if state not in ("ready", "dropped", "done"):
            raise ValueError(f"a group finishes ready, dropped or done, not {state!r}")
        with self._write(announces=("settled",)) as conn:
            _move(conn, issue_id, ("issued",), state, reason)
            _decide(conn, issue_id, decisions)

    def drop(self, issue_id: int, reason: str) -> None:
        """An issue in flight or ready ends `dropped`. Raises ValueError when it has ended."""
        with self._write(announces=("settled",)) as conn:
            _move(conn, issue_id, ("issued", "ready"), "dropped", reason)

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

    def set_aside(self, stage: str, step: int, reason: str) -> list[int]:
        """Takes back the batch of `step`, the newest, which cannot be trained; returns its issues.

        They end `dropped` as `SET_ASIDE`, with a decision that holds the reason. The step is then
        the next one to ship. Raises ValueError when a later step is recorded, or this one is not.
        """
        c = db.shipped.c
        with self._write(durable=True, announces=("settled",)) as conn:
            newest = conn.scalar(sa.select(sa.func.max(c.step)).where(c.stage == stage))
            if newest != step:
                raise ValueError(f"stage {stage!r} step {step} is not the newest, {newest} is")
            here = [c.stage == stage, c.step == step]
            query = sa.select(c.issue_id).where(*here).distinct().order_by(c.issue_id)
            issues = list(conn.scalars(query))
            conn.execute(sa.delete(db.shipped).where(*here))
            for issue_id in issues:
                _move(conn, issue_id, ("shipped",), "dropped", SET_ASIDE)
                _decide(conn, issue_id, [Decision(-1, SET_ASIDE, f"step {step + 1}: {reason}")])
        return issues

    # ---- reading

    def issues(
        self,
        stage: str,
        kind: str = "train",
        states: Sequence[str] | None = None,
    ) -> list[Issue]:
        """Issues of a stage, oldest first."""
        c = db.issue.c
        query = sa.select(db.issue).where(*_of(stage, kind)).order_by(c.issue_id)
        if states is not None:
            query = query.where(c.state.in_(list(states)))
        return [db.issue_from_row(row) for row in self._all(query)]

    def ready(self, stage: str) -> list[Issue]:
        """Finished groups that wait for a batch, oldest first."""
        return self.issues(stage, "train", ["ready"])

    def find_issue(self, issue_id: int) -> Issue | None:
        """One issue; None when the log does not have it."""
        found = self._all(sa.select(db.issue).where(db.issue.c.issue_id == issue_id))
        return db.issue_from_row(found[0]) if found else None

    def id_range(self) -> tuple[int, int] | None:
        """The lowest and the highest issue_id; None in an empty log."""
        c = db.issue.c.issue_id
        low, high = self._all(sa.select(sa.func.min(c), sa.func.max(c)))[0]
        return None if low is None else (int(low), int(high))

    def load_group(self, issue_id: int) -> TrajectoryGroup:
        """The last recorded attempt of each sample, in sample order. KeyError when unknown."""
        c = db.trajectory.c
        with self._read() as conn:
            task = conn.scalar(sa.select(db.issue.c.task).where(db.issue.c.issue_id == issue_id))
            query = (
                sa.select(c.issue_id, c.payload)
                .where(c.issue_id == issue_id, db.is_last())
                .order_by(c.sample)
            )
            rows = conn.execute(query).all()
        if task is None:
            raise KeyError(f"issue {issue_id} is not in {self.where}")
        trajectories = tuple(map(self._trajectory, rows))
        return TrajectoryGroup(issue_id, Task.from_json(json.loads(task)), trajectories)

    def attempts(self, issue_id: int) -> list[Trajectory]:
        """Every recorded attempt of an issue, by sample and attempt."""
        c = db.trajectory.c
        query = sa.select(c.issue_id, c.payload).where(c.issue_id == issue_id)
        return list(map(self._trajectory, self._all(query.order_by(c.sample, c.attempt))))

    def decisions(self, issue_id: int) -> list[Decision]:
        """The filters' decisions about a group, in the order in which they were made."""
        c = db.decision.c
        query = sa.select(c.sample, c.filter, c.reason).where(c.issue_id == issue_id)
        return [Decision(*row) for row in self._all(query.order_by(c.decision_id))]

    def shipped(self, stage: str, step: int) -> list[ShippedSegment]:
        """The ordered batch of a step, bit for bit; empty when the step is not recorded."""
        c, t = db.shipped.c, db.trajectory.c
        here = [c.stage == stage, c.step == step]
        pairs = sa.select(c.issue_id, c.sample).where(*here).distinct().subquery()
        match = (t.issue_id == pairs.c.issue_id) & (t.sample == pairs.c.sample)
        payloads = (
            sa.select(t.issue_id, t.sample, t.payload)
            .select_from(db.trajectory.join(pairs, match))
            .where(db.is_last())
        )
        with self._read() as conn:
            rows = conn.execute(sa.select(db.shipped).where(*here).order_by(c.ordinal)).all()
            blobs = conn.execute(payloads).all() if rows else []
        found = {(b.issue_id, b.sample): self._trajectory(b).segments for b in blobs}
        return [
            ShippedSegment(
                r.issue_id,
                r.sample,
                r.segment,
                found[r.issue_id, r.sample][r.segment],
                self._credit(r),
            )
            for r in rows
        ]

    def credits(self, issue_id: int) -> dict[tuple[int, int], ShippedCredit]:
        """(sample, segment) -> credit, for each shipped segment of an issue, in batch order."""
        c = db.shipped.c
        query = sa.select(db.shipped).where(c.issue_id == issue_id).order_by(c.ordinal)
        return {
            (r.sample, r.segment): ShippedCredit(r.step, r.ordinal, self._credit(r))
            for r in self._all(query)
        }

    def last_shipped_step(self, stage: str) -> int:
        """The newest recorded step; -1 when there is none."""
        query = sa.select(sa.func.max(db.shipped.c.step)).where(db.shipped.c.stage == stage)
        step = self._scalar(query)
        return -1 if step is None else int(step)

    def results(self, stage: str) -> list[Result]:
        """The last attempt of every evaluated sample, by issue and sample, without its tokens."""
        t = db.trajectory.c
        columns = [t[name] for name in Result.__annotations__ if name in t]
        query = (
            sa.select(db.issue, *columns)
            .select_from(db.trajectory.join(db.issue))
            .where(*_of(stage, "eval"), db.is_last())
            .order_by(t.issue_id, t.sample)
        )
        found = []
        for row in self._all(query):
            values = {column.name: getattr(row, column.name) for column in columns}
            values |= {"stop": StopReason(row.stop), "verdict": Verdict(row.verdict)}
            found.append(Result(issue=db.issue_from_row(row), **values))
        return found

    def lengths_and_losses(
        self, stage: str, reason: str, recent: int | None = None, steps: int | None = None
    ) -> list[tuple[int, bool]]:
        """(tokens, lost) of every sample of the groups that were shipped or dropped for `reason`.

        A sample is lost if its group was dropped, or if the filter `reason` decided about it when
        its group was shipped. `recent`: only the newest `recent` issues; `steps`: not what was
        shipped to later steps than the first `steps` (a resumed run recomputes an earlier one).
        """
        i, t, d, s = db.issue.c, db.trajectory.c, db.decision.c, db.shipped.c
        fate = sa.or_(i.state == "shipped", sa.and_(i.state == "dropped", i.reason == reason))
        later = sa.exists().where(s.issue_id == i.issue_id, s.step >= (steps or 0))
        issues = sa.select(i.issue_id, i.state).where(*_of(stage, "train"), fate)
        issues = issues if steps is None else issues.where(~later)
        chosen = issues.order_by(i.issue_id.desc()).limit(recent).subquery()
        about = [d.issue_id == t.issue_id, d.sample == t.sample, d.filter == reason]
        query = (
            sa.select(t.num_tokens, sa.or_(chosen.c.state == "dropped", sa.exists().where(*about)))
            .select_from(db.trajectory.join(chosen, chosen.c.issue_id == t.issue_id))
            .where(db.is_last())
            .order_by(t.issue_id, t.sample)
        )
        return [(int(tokens), bool(lost)) for tokens, lost in self._all(query)]

    def rows(self, table: str) -> Iterator[dict[str, Any]]:
        """Every row of a table of the schema as it is stored, in the order of its primary key.

        Rows are read in portions. Other methods may be called between two rows.
        """
        found = db.metadata.tables[table]
        query = sa.select(found).order_by(*found.primary_key)
        with self._read() as conn:
            for row in conn.execution_options(yield_per=1000).execute(query):
                yield row._asdict()

    def counts(self, stage: str | None = None) -> dict[str, Counter[str]]:
        """Issues by `state` and, of those with a reason, by `reason`."""
        c = db.issue.c
        query = sa.select(c.state, c.reason, sa.func.count()).group_by(c.state, c.reason)
        if stage is not None:
            query = query.where(c.stage == stage)
        found: dict[str, Counter[str]] = {"state": Counter(), "reason": Counter()}
        for state, reason, n in self._all(query):
            found["state"][state] += n
            if reason:
                found["reason"][reason] += n
        return found

    def next_ordinal(self, stage: str) -> int:
        """The first index of the sequence of training tasks that was never issued."""
        query = sa.select(sa.func.max(db.issue.c.ordinal)).where(*_of(stage, "train"))
        last = self._scalar(query)
        return 0 if last is None else int(last) + 1

    def drop_counts(self, stage: str, kind: str, reason: str) -> dict[int, tuple[int, int]]:
        """Ordinals dropped for `reason` at least once -> (times dropped for it, times issued)."""
        c = db.issue.c
        hits = sa.func.sum(sa.case((sa.and_(c.state == "dropped", c.reason == reason), 1), else_=0))
        query = sa.select(c.ordinal, hits, sa.func.count()).where(*_of(stage, kind))
        rows = self._all(query.group_by(c.ordinal).having(hits > 0))
        return {int(ordinal): (int(dropped), int(issued)) for ordinal, dropped, issued in rows}

    def position(self) -> dict[str, int]:
        """The numbers of issues and of shipped segments: neither ever decreases."""
        last = self._scalar(sa.select(sa.func.max(db.issue.c.issue_id)))
        segments = self._scalar(sa.select(sa.func.count()).select_from(db.shipped))
        return {"issues": int(last or 0), "segments": int(segments)}

    # ---- connections

    @contextmanager
    def _read(self) -> Iterator[sa.Connection]:
        with self._available(), self._engine.connect() as conn, conn.begin():
            yield conn

    @contextmanager
    def _available(self) -> Iterator[None]:
        try:
            yield
        except (sa_exc.DBAPIError, sqlite3.Error) as err:
            cause = err if isinstance(err, sqlite3.Error) else err.orig or err
            try:
                fix = sqlite_remedy(cause, Path(self.where))
            except LogBroken as broken:
                raise self._broken(str(broken)) from err
            if not fix and not isinstance(err, sa_exc.OperationalError | sa_exc.InterfaceError):
                raise
            if not fix:
                fix = "start the database" if self.shared else "give it back this run's own file"
            said = str(cause).strip().partition("\n")[0]  # the other lines repeat it
            raise LogUnavailable(
                f"experience log {self.where}: {said}; {fix}, then the same command resumes"
            ) from err

    def _trajectory(self, row: Any) -> Trajectory:
        return self._decoded(codec.decode_trajectory, row.payload, row.issue_id)

    def _credit(self, row: Any) -> Credit:
        return self._decoded(codec.decode_credit, row.credit, row.issue_id)

    def _decoded(self, decode: Callable[[bytes], T], blob: bytes, issue_id: int) -> T:
        try:
            return decode(blob)
        except (ValueError, KeyError, TypeError, IndexError, struct.error, zlib.error) as error:
            raise self._broken(f"a row of issue {issue_id} is damaged ({error})") from error

    def _broken(self, said: str) -> LogBroken:
        fix = "restore the database from a backup"
        if not self.shared:
            fix = replacement(self.where, self._spare())
        return LogBroken(f"experience log {self.where}: {said}; {fix}")

    @contextmanager
    def _write(
        self, durable: bool = False, announces: tuple[str, ...] = ()
    ) -> Iterator[sa.Connection]:
        """A write transaction; its commit announces the signals `announces`."""
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

    def _all(self, query: sa.Executable) -> Sequence[Any]:
        with self._read() as conn:
            return conn.execute(query).all()

    def _scalar(self, query: sa.Executable) -> Any:
        with self._read() as conn:
            return conn.scalar(query)


def _of(stage: str, kind: str) -> list[sa.ColumnElement[bool]]:
    return [db.issue.c.stage == stage, db.issue.c.kind == kind]


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
