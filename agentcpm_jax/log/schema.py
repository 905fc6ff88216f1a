"""The experience log's tables and rows, created, checked, migrated."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc as sa_exc

from agentcpm_jax.database import first_line, is_shared
from agentcpm_jax.types import Credit, StopReason, Task, UserError, Verdict

#: 2 added `claim`. A log of an earlier release may hold a table `event`, which nobody reads.
SCHEMA_VERSION = 2
#: Key of the advisory lock under which PostgreSQL issues ids: they are dense and ascending.
_ISSUING = 0x61677063

metadata = sa.MetaData()
_Id = sa.BigInteger().with_variant(sa.Integer, "sqlite")  # SQLite assigns only INTEGER keys

meta = sa.Table(
    "meta",
    metadata,
    sa.Column("key", sa.String, primary_key=True),
    sa.Column("value", sa.String, nullable=False),
)
issue = sa.Table(
    "issue",
    metadata,
    sa.Column("issue_id", _Id, primary_key=True, autoincrement=True),
    sa.Column("stage", sa.String, nullable=False),
    sa.Column("kind", sa.String, nullable=False),  # train | eval
    sa.Column("task_uid", sa.String, nullable=False),
    sa.Column("task", sa.Text, nullable=False),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("ordinal", _Id, nullable=False),  # index in the stage's task sequence
    sa.Column("batch", sa.Integer),  # the step it was issued for; deterministic mode only
    sa.Column("state", sa.String, nullable=False),  # issued | ready | shipped | dropped | done
    sa.Column("reason", sa.String, nullable=False, default=""),
    sa.Column("issued_at", sa.Double, nullable=False),  # seconds since 1970
    sa.Column("changed_at", sa.Double, nullable=False),
    sa.Index("issue_by_state", "stage", "kind", "state", "issue_id"),
    sa.Index("issue_by_ordinal", "stage", "kind", "ordinal"),
    sqlite_autoincrement=True,  # an id is never given twice
)
trajectory = sa.Table(
    "trajectory",
    metadata,
    sa.Column("issue_id", _Id, sa.ForeignKey("issue.issue_id"), primary_key=True),
    sa.Column("sample", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("attempt", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("stop", sa.String, nullable=False),
    sa.Column("verdict", sa.String, nullable=False),
    sa.Column("reward", sa.Double),  # for queries; the exact value is in the payload
    sa.Column("answer", sa.Text),
    sa.Column("error", sa.Text, nullable=False),
    sa.Column("num_turns", sa.Integer, nullable=False),
    sa.Column("num_tokens", sa.Integer, nullable=False),
    sa.Column("oldest_version", sa.Integer, nullable=False),
    sa.Column("newest_version", sa.Integer, nullable=False),
    sa.Column("seconds", sa.Double, nullable=False),
    sa.Column("payload", sa.LargeBinary, nullable=False),
)
claim = sa.Table(  # issues offered to workers; deleted when they leave `issued`
    "claim",
    metadata,
    sa.Column("issue_id", _Id, sa.ForeignKey("issue.issue_id"), primary_key=True),
    sa.Column("stage", sa.String, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),  # the oldest weights it may be sampled with
    sa.Column("worker", sa.String, nullable=False),  # "": nobody holds it
    sa.Column("until", sa.Double, nullable=False),  # end of the lease, by the database's clock
    sa.Column("delivered", sa.Integer, nullable=False),  # 1: all its samples are recorded
    sa.Index("claim_by_stage", "stage", "delivered", "until"),
)
decision = sa.Table(
    "decision",
    metadata,
    sa.Column("decision_id", _Id, primary_key=True, autoincrement=True),
    sa.Column("issue_id", _Id, sa.ForeignKey("issue.issue_id"), nullable=False, index=True),
    sa.Column("sample", sa.Integer, nullable=False),  # -1: the whole group
    sa.Column("filter", sa.String, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
)
shipped = sa.Table(
    "shipped",
    metadata,
    sa.Column("stage", sa.String, primary_key=True),
    sa.Column("step", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("ordinal", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("issue_id", _Id, sa.ForeignKey("issue.issue_id"), nullable=False),
    sa.Column("sample", sa.Integer, nullable=False),
    sa.Column("segment", sa.Integer, nullable=False),
    sa.Column("credit", sa.LargeBinary, nullable=False),
    # No segment is ever trained twice: the database itself refuses.
    sa.UniqueConstraint("issue_id", "sample", "segment"),
)


@dataclass(frozen=True)
class Issue:
    """One task handed out once. `batch`: the step it was issued for (deterministic mode only)."""

    issue_id: int
    stage: str
    kind: str  # train | eval
    task: Task
    epoch: int
    ordinal: int
    batch: int | None
    state: str  # issued | ready | shipped | dropped | done
    reason: str = ""


@dataclass(frozen=True)
class ShipEntry:
    """One segment of a batch, with its credit; issue_id, sample and segment identify it."""

    issue_id: int
    sample: int
    segment_index: int
    credit: Credit


@dataclass(frozen=True)
class ShippedCredit:
    """The credit of a recorded segment; `step` and `ordinal` are its place among the batches."""

    step: int
    ordinal: int
    credit: Credit


@dataclass(frozen=True)
class Result:
    """The last attempt at one sample, without its tokens; seconds of wall time."""

    issue: Issue = field(repr=False)
    sample: int
    attempt: int
    stop: StopReason
    verdict: Verdict
    reward: float | None
    answer: str | None
    error: str
    num_turns: int
    num_tokens: int
    seconds: float


def create_or_check(engine: sa.Engine, where: str) -> None:
    """Creates the tables of a new log and migrates an old one.

    Raises:
        UserError: not reachable, or a log of a newer schema version. DBAPIError of SQLite.
    """
    try:
        with engine.connect().execution_options(writes=True) as conn, conn.begin():
            lock_issuing(conn)  # two processes may open a new log at the same moment
            metadata.create_all(conn)
            version = sa.select(meta.c.value).where(meta.c.key == "schema_version")
            found = int(conn.scalar(version) or 0)
            if found == 0:
                row = {"key": "schema_version", "value": str(SCHEMA_VERSION)}
                conn.execute(sa.insert(meta).values(row))
            elif found < SCHEMA_VERSION:  # 1 -> 2 added a table, which `create_all` has made
                conn.execute(sa.update(meta).values(value=str(SCHEMA_VERSION)))
    except sa_exc.DBAPIError as err:
        if not is_shared(engine):
            raise
        fix = "start the server and check host, user and database of the URL"
        raise UserError(f"experience log {where}: {first_line(err)}; {fix}") from err
    if found > SCHEMA_VERSION:
        raise UserError(
            f"experience log {where} has schema version {found}, this release reads up to "
            f"{SCHEMA_VERSION}; upgrade agentcpm_jax or start a new workdir"
        )


def lock_issuing(conn: sa.Connection) -> None:
    """Keeps other transactions from allocating ids until this one ends."""
    if conn.dialect.name == "postgresql":
        conn.execute(sa.select(sa.func.pg_advisory_xact_lock(_ISSUING)))


def is_last() -> sa.ColumnElement[bool]:
    """The SQL condition that a trajectory row has the highest attempt of its sample."""
    other = trajectory.alias()
    same = [
        other.c.issue_id == trajectory.c.issue_id,
        other.c.sample == trajectory.c.sample,
    ]
    newest = sa.select(sa.func.max(other.c.attempt)).where(*same).correlate(trajectory)
    return trajectory.c.attempt == newest.scalar_subquery()


def issue_from_row(row: sa.Row[Any]) -> Issue:
    """An `Issue` from a row that holds the issue table's columns."""
    values: dict[str, Any] = {name: getattr(row, name) for name in Issue.__annotations__}
    values["task"] = Task.from_json(json.loads(row.task))
    return Issue(**values)


def plain(text: str) -> str:
    """`text` without what a database refuses: NUL, lone surrogates (the payload keeps them)."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\ufffd")
