"""Reading the experience log: issues, groups, decisions, recorded batches, results, counts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc as sa_exc

from agentcpm_jax.log import codec
from agentcpm_jax.log import schema as db
from agentcpm_jax.log.engine import LogUnavailable, first_line, is_shared
from agentcpm_jax.log.schema import Issue, Result, ShippedSegment
from agentcpm_jax.types import Decision, StopReason, Task, Trajectory, TrajectoryGroup, Verdict


class LogReader:
    """The half of `ExperienceLog` that changes nothing."""

    def __init__(self, engine: sa.Engine, where: str) -> None:
        self._engine = engine
        self.where = where

    @property
    def shared(self) -> bool:
        """Whether other processes may claim tasks of this log and write into it."""
        return is_shared(self._engine)

    def issues(
        self,
        stage: str,
        kind: str = "train",
        states: Sequence[str] | None = None,
        batch: int | None = None,
    ) -> list[Issue]:
        """Issues of a stage, oldest first."""
        c = db.issue.c
        query = sa.select(db.issue).where(*_of(stage, kind)).order_by(c.issue_id)
        if states is not None:
            query = query.where(c.state.in_(list(states)))
        if batch is not None:
            query = query.where(c.batch == batch)
        return [db.issue_from_row(row) for row in self._rows(query)]

    def in_flight(self, stage: str, kind: str = "train") -> list[Issue]:
        """Issued and not finished, oldest first."""
        return self.issues(stage, kind, ["issued"])

    def ready(self, stage: str) -> list[Issue]:
        """Finished groups that wait for a batch, oldest first."""
        return self.issues(stage, "train", ["ready"])

    def load_group(self, issue_id: int) -> TrajectoryGroup:
        """The last recorded attempt of each sample, in sample order. KeyError when unknown."""
        c = db.trajectory.c
        with self._read() as conn:
            task = conn.scalar(sa.select(db.issue.c.task).where(db.issue.c.issue_id == issue_id))
            query = (
                sa.select(c.payload).where(c.issue_id == issue_id, db.is_last()).order_by(c.sample)
            )
            blobs = conn.scalars(query).all()
        if task is None:
            raise KeyError(f"issue {issue_id} is not in {self.where}")
        trajectories = tuple(codec.decode_trajectory(blob) for blob in blobs)
        return TrajectoryGroup(issue_id, Task.from_json(json.loads(task)), trajectories)

    def attempts(self, issue_id: int) -> list[Trajectory]:
        """Every recorded attempt of an issue, by sample and attempt."""
        c = db.trajectory.c
        query = sa.select(c.payload).where(c.issue_id == issue_id).order_by(c.sample, c.attempt)
        return [codec.decode_trajectory(row.payload) for row in self._rows(query)]

    def decisions(self, issue_id: int) -> list[Decision]:
        """What the filters decided about a group, in the order in which they did."""
        c = db.decision.c
        query = sa.select(c.sample, c.filter, c.reason).where(c.issue_id == issue_id)
        return [Decision(*row) for row in self._rows(query.order_by(c.decision_id))]

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
        found = {(b.issue_id, b.sample): codec.decode_trajectory(b.payload).segments for b in blobs}
        return [
            ShippedSegment(
                r.issue_id,
                r.sample,
                r.segment,
                found[r.issue_id, r.sample][r.segment],
                codec.decode_credit(r.credit),
            )
            for r in rows
        ]

    def last_shipped_step(self, stage: str) -> int:
        """The newest recorded step; -1 when there is none."""
        query = sa.select(sa.func.max(db.shipped.c.step)).where(db.shipped.c.stage == stage)
        step = self._scalar(query)
        return -1 if step is None else int(step)

    def results(self, stage: str, kind: str = "eval") -> list[Result]:
        """The last attempt of every sample of a stage, by issue and sample, without tokens."""
        t = db.trajectory.c
        columns = [t[name] for name in Result.__annotations__ if name in t]
        query = (
            sa.select(db.issue, *columns)
            .select_from(db.trajectory.join(db.issue))
            .where(*_of(stage, kind), db.is_last())
            .order_by(t.issue_id, t.sample)
        )
        found = []
        for row in self._rows(query):
            values = {column.name: getattr(row, column.name) for column in columns}
            values |= {"stop": StopReason(row.stop), "verdict": Verdict(row.verdict)}
            found.append(Result(issue=db.issue_from_row(row), **values))
        return found

    def counts(self, stage: str | None = None) -> dict[str, Counter[str]]:
        """Issues by `state` and, of those with a reason, by `reason`; `event` counter totals."""
        c, e = db.issue.c, db.event.c
        issues = sa.select(c.state, c.reason, sa.func.count()).group_by(c.state, c.reason)
        events = sa.select(e.name, sa.func.sum(e["count"])).group_by(e.name)
        if stage is not None:
            issues, events = issues.where(c.stage == stage), events.where(e.stage == stage)
        found: dict[str, Counter[str]] = {n: Counter() for n in ("state", "reason", "event")}
        with self._read() as conn:
            for state, reason, n in conn.execute(issues):
                found["state"][state] += n
                if reason:
                    found["reason"][reason] += n
            for name, n in conn.execute(events):
                found["event"][name] += int(n)
        return found

    def next_ordinal(self, stage: str, kind: str = "train") -> int:
        """The first index of the task sequence that was never issued."""
        query = sa.select(sa.func.max(db.issue.c.ordinal)).where(*_of(stage, kind))
        last = self._scalar(query)
        return 0 if last is None else int(last) + 1

    def drop_counts(self, stage: str, kind: str, reason: str) -> dict[int, tuple[int, int]]:
        """Ordinals dropped for `reason` at least once -> (times dropped for it, times issued)."""
        c = db.issue.c
        hits = sa.func.sum(sa.case((sa.and_(c.state == "dropped", c.reason == reason), 1), else_=0))
        query = sa.select(c.ordinal, hits, sa.func.count()).where(*_of(stage, kind))
        rows = self._rows(query.group_by(c.ordinal).having(hits > 0))
        return {int(ordinal): (int(dropped), int(issued)) for ordinal, dropped, issued in rows}

    def position(self) -> dict[str, int]:
        """How far the log has come, in issues and recorded segments: neither ever shrinks."""
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
        except (sa_exc.OperationalError, sa_exc.InterfaceError) as err:
            fix = "start the database" if self.shared else "make room on its disk"
            raise LogUnavailable(
                f"experience log {self.where}: {first_line(err)}; {fix}, then the same command "
                "resumes"
            ) from err

    def _rows(self, query: sa.Executable) -> Sequence[Any]:
        with self._read() as conn:
            return conn.execute(query).all()

    def _scalar(self, query: sa.Executable) -> Any:
        with self._read() as conn:
            return conn.scalar(query)


def _of(stage: str, kind: str) -> list[sa.ColumnElement[bool]]:
    return [db.issue.c.stage == stage, db.issue.c.kind == kind]
