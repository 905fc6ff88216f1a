"""Everything a run recorded as Parquet: seven tables with documented columns.

Rows are streamed issue by issue, so a long run needs no more memory than a short one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sqlalchemy as sa

from agentcpm_jax.log import schema as db
from agentcpm_jax.log.codec import decode_credit
from agentcpm_jax.log.schema import Issue
from agentcpm_jax.rollout.staleness import oldest_trained
from agentcpm_jax.run.inspect.columns import EXPORT_SCHEMA, TABLES, readme
from agentcpm_jax.run.inspect.opened import Run, open_run
from agentcpm_jax.run.inspect.parquet import TableWriter, require_pyarrow
from agentcpm_jax.run.observe.metrics import read_metrics
from agentcpm_jax.types import Credit, Provenance, Trajectory, UserError


class _Shipped(NamedTuple):
    batch: int  # from 0
    ordinal: int
    credit: Credit


Credits = Mapping[tuple[int, int], _Shipped]  # by (sample, segment)
PROGRESS_EVERY = 500  # issues


def export_run(
    workdir: str | Path, out: str | Path, announce: Callable[[str], None] = lambda line: None
) -> dict[str, int]:
    """Writes `<table>.parquet` and README.md into a new directory; returns rows by table.

    The directory appears whole or not at all. Of a run that is still going, each issue is
    exported as it stands when it is read.

    Raises:
      UserError: no such run, `out` exists, or pyarrow is not installed.
    """
    require_pyarrow()
    target = Path(out)
    if target.exists():
        raise UserError(f"{target} exists; name a directory that does not")
    work = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with open_run(workdir) as run:
            work.mkdir(parents=True)
            counts = _write(run, work, announce)
            title = f"Export of {run.cfg.name}"
            (work / "README.md").write_text(readme(title, counts), encoding="utf-8")
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return counts


def _write(run: Run, directory: Path, announce: Callable[[str], None]) -> dict[str, int]:
    about = {"export_schema": EXPORT_SCHEMA, "run": run.cfg.name}
    writers = {
        name: TableWriter(directory / f"{name}.parquet", doc, about) for name, doc in TABLES.items()
    }
    try:
        for n, (issue, issued, changed) in enumerate(_issues(run)):
            if n and n % PROGRESS_EVERY == 0:
                announce(f"{n:,} issues")
            writers["issues"].row(_issue_row(issue, issued, changed))
            attempts = run.log.attempts(issue.issue_id)
            credits = _credits(run, issue)
            for t in attempts:
                last = t.attempt == max(a.attempt for a in attempts if a.sample == t.sample)
                writers["trajectories"].row(_trajectory_row(t, last))
                for row in _turn_rows(t):
                    writers["turns"].row(row)
                for columns in _token_columns(t, credits if last else {}):
                    writers["tokens"].columns(columns)
            for row in _shipped_rows(issue, attempts, credits):
                writers["shipped"].row(row)
        for row in _decision_rows(run):
            writers["decisions"].row(row)
        for row in _metric_rows(run):
            writers["metrics"].row(row)
        return {name: writer.close() for name, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.close()


def _issues(run: Run) -> Iterator[tuple[Issue, float, float]]:
    """(issue, issued at, changed at), oldest first."""
    query = sa.select(db.issue).order_by(db.issue.c.issue_id)
    with run.tables.connect() as conn:
        for row in conn.execution_options(yield_per=1000).execute(query):
            yield db.issue_from_row(row), row.issued_at, row.changed_at


def _issue_row(issue: Issue, issued: float, changed: float) -> dict[str, Any]:
    return {
        "issue_id": issue.issue_id,
        "stage": issue.stage,
        "kind": issue.kind,
        "task_uid": issue.task.uid,
        "question": issue.task.question,
        "answers": list(issue.task.answers),
        "task_kind": issue.task.kind,
        "epoch": issue.epoch,
        "ordinal": issue.ordinal,
        "batch": issue.batch,
        "state": issue.state,
        "reason": issue.reason,
        "issued_at": issued,
        "changed_at": changed,
    }


def _trajectory_row(t: Trajectory, last: bool) -> dict[str, Any]:
    oldest, newest = t.versions
    return {
        **_key(t),
        "last": last,
        "stop": str(t.stop),
        "verdict": str(t.verdict),
        "reward": t.reward,
        "answer": t.answer,
        "error": t.error,
        "trainable": t.trainable,
        "num_segments": len(t.segments),
        "num_turns": len(t.turns),
        "num_tokens": t.num_tokens,
        "oldest_version": oldest,
        "newest_version": newest,
        "seconds": t.seconds,
    }


def _turn_rows(t: Trajectory) -> Iterator[dict[str, Any]]:
    for index, turn in enumerate(t.turns):
        yield {
            **_key(t),
            "turn": index,
            "segment": turn.segment,
            "start": turn.start,
            "sample_start": turn.sample_start,
            "end": turn.end,
            "flags": [str(f) for f in turn.flags],
            "calls": [
                {
                    "name": c.name,
                    "arguments": None if c.arguments is None else json.dumps(dict(c.arguments)),
                    "error": c.error,
                    "message": c.message,
                    "start": c.span[0],
                    "end": c.span[1],
                }
                for c in turn.calls
            ],
            "results": [
                {"status": str(r.status), "content": r.content, "seconds": r.seconds}
                for r in turn.results
            ],
        }


def _token_columns(t: Trajectory, credits: Credits) -> Iterator[dict[str, Any]]:
    """Columns of each segment; a masked array is null where its mask is set."""
    names = np.array([p.name.lower() for p in sorted(Provenance)])
    for index, segment in enumerate(t.segments):
        n, sampled = len(segment), segment.sampled
        trained, advantage = np.zeros(n, bool), np.zeros(n, np.float32)
        if (t.sample, index) in credits:
            credit = credits[t.sample, index].credit
            trained, advantage = sampled & credit.keep, np.asarray(credit.advantage, np.float32)
        yield {
            **{key: np.full(n, value) for key, value in _key(t).items()},
            "segment": np.full(n, index),
            "position": np.arange(n, dtype=np.int32),
            "token": np.asarray(segment.ids, np.int32),
            "provenance": names[segment.provenance],
            "shared": np.arange(n) < segment.shared_prefix_len,
            "logprob": np.ma.array(segment.logprob, mask=~sampled),
            "version": np.ma.array(segment.version, mask=~sampled),
            "trained": trained,
            "advantage": np.ma.array(advantage, mask=~trained),
        }


def _credits(run: Run, issue: Issue) -> dict[tuple[int, int], _Shipped]:
    query = sa.select(db.shipped).where(db.shipped.c.issue_id == issue.issue_id)
    with run.tables.connect() as conn:
        rows = conn.execute(query.order_by(db.shipped.c.ordinal)).all()
    return {
        (r.sample, r.segment): _Shipped(r.step, r.ordinal, decode_credit(r.credit)) for r in rows
    }


def _shipped_rows(
    issue: Issue, attempts: Sequence[Trajectory], credits: Credits
) -> Iterator[dict[str, Any]]:
    last = {t.sample: t for t in attempts}  # attempts are in ascending order
    for (sample, index), (batch, ordinal, credit) in credits.items():
        segment = last[sample].segments[index]
        oldest = oldest_trained(segment, credit.keep)
        yield {
            "stage": issue.stage,
            "step": batch + 1,
            "ordinal": ordinal,
            "issue_id": issue.issue_id,
            "sample": sample,
            "segment": index,
            "trained_tokens": int((segment.sampled & credit.keep).sum()),
            "age": None if oldest is None else batch - oldest,
        }


def _decision_rows(run: Run) -> Iterator[dict[str, Any]]:
    c = db.decision.c
    query = sa.select(c.decision_id, c.issue_id, c.sample, c.filter, c.reason)
    with run.tables.connect() as conn:
        for row in conn.execute(query.order_by(c.decision_id)):
            yield row._asdict() | {"sample": row.sample if row.sample >= 0 else None}


def _metric_rows(run: Run) -> Iterator[dict[str, Any]]:
    for stage in run.cfg.stages:
        directory = run.workdir / stage.name
        for path in [directory / "metrics.jsonl", *sorted(directory.glob("*/metrics.jsonl"))]:
            name = path.parent.relative_to(run.workdir).as_posix()
            for row in read_metrics(path):
                for key, value in row.items():
                    if key != "step":
                        yield {"stage": name, "step": row["step"], "name": key, "value": value}


def _key(t: Trajectory) -> dict[str, int]:
    return {"issue_id": t.issue_id, "sample": t.sample, "attempt": t.attempt}
