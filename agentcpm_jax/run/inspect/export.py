"""Everything a run recorded as Parquet: seven tables with documented columns.

Rows are streamed issue by issue, so a long run needs no more memory than a short one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agentcpm_jax.disk import refusals
from agentcpm_jax.log.schema import ShippedCredit
from agentcpm_jax.rollout.staleness import oldest_trained
from agentcpm_jax.run.inspect.columns import EXPORT_SCHEMA, TABLES, readme
from agentcpm_jax.run.inspect.opened import Run, open_run
from agentcpm_jax.run.inspect.parquet import TableWriter, require_pyarrow
from agentcpm_jax.run.observe.metrics import read_metrics
from agentcpm_jax.types import Provenance, Task, Trajectory, UserError

Credits = Mapping[tuple[int, int], ShippedCredit]  # by (sample, segment)
PROGRESS_EVERY = 500  # issues


def export_run(
    workdir: str | Path, out: str | Path, announce: Callable[[str], None] = lambda line: None
) -> dict[str, int]:
    """Writes `<table>.parquet` and README.md into a new directory; returns rows by table.

    The directory appears only when it is complete. While a run is going on, each issue is exported
    in its state at the time of reading.

    Raises:
      UserError: no such run, `out` exists, or pyarrow is not installed.
    """
    require_pyarrow()
    target = Path(out)
    if target.exists():
        raise UserError(f"{target} exists; name a directory that does not")
    work = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with refusals(target, "then export again"), open_run(workdir) as run:
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
        for n, issue in enumerate(run.log.rows("issue")):
            if n and n % PROGRESS_EVERY == 0:
                announce(f"{n:,} issues")
            writers["issues"].row(_issue_row(issue))
            attempts = run.log.attempts(issue["issue_id"])
            credits = run.log.credits(issue["issue_id"])
            for t in attempts:
                last = t.attempt == max(a.attempt for a in attempts if a.sample == t.sample)
                writers["trajectories"].row(_trajectory_row(t, last))
                for row in _turn_rows(t):
                    writers["turns"].row(row)
                for columns in _token_columns(t, credits if last else {}):
                    writers["tokens"].columns(columns)
            for row in _shipped_rows(issue["stage"], attempts, credits):
                writers["shipped"].row(row)
        for row in run.log.rows("decision"):
            sample = row["sample"] if row["sample"] >= 0 else None
            writers["decisions"].row(row | {"sample": sample})
        for row in _metric_rows(run):
            writers["metrics"].row(row)
        return {name: writer.close() for name, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.close()


def _issue_row(stored: Mapping[str, Any]) -> dict[str, Any]:
    task = Task.from_json(json.loads(stored["task"]))
    return {
        **stored,
        "task_uid": task.uid,
        "question": task.question,
        "answers": list(task.answers),
        "task_kind": task.kind,
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


def _shipped_rows(
    stage: str, attempts: Sequence[Trajectory], credits: Credits
) -> Iterator[dict[str, Any]]:
    last = {t.sample: t for t in attempts}  # attempts are in ascending order
    for (sample, index), found in credits.items():
        segment, keep = last[sample].segments[index], found.credit.keep
        oldest = oldest_trained(segment, keep)
        yield {
            "stage": stage,
            "step": found.step + 1,
            "ordinal": found.ordinal,
            "issue_id": last[sample].issue_id,
            "sample": sample,
            "segment": index,
            "trained_tokens": int((segment.sampled & keep).sum()),
            "age": None if oldest is None else found.step - oldest,
        }


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
