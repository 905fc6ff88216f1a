"""Files of tasks: `question`, `answers` and optionally `kind`, `split`, `meta`, or the columns of
others (`schemas.py`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from agentcpm_jax.records import Flaw, read_records
from agentcpm_jax.tasks.schemas import TaskFields, task_fields
from agentcpm_jax.types import Task, UserError


@dataclass(frozen=True)
class LoadReport:
    """What happened to the lines of a file. `bad` names each skipped line and its reason."""

    lines: int
    loaded: int
    bad: tuple[str, ...] = ()
    duplicates: tuple[str, ...] = ()  # "line 7: same task as line 3 (uid ...)"; dropped
    digests: tuple[str, ...] = ()  # a short hash of each task that was loaded


def load_tasks(path: str | Path, *, skip_bad: bool = False) -> tuple[list[Task], LoadReport]:
    """The tasks of a file in order, each uid once; blank lines are ignored.

    Raises `UserError` naming file and line for corrupt lines and questions without answers
    (`skip_bad=True` leaves those out and reports them), and for a missing or empty file.
    """
    tasks, report = scan_tasks(path, skip_bad)
    if not tasks:
        bad = report.bad
        raise UserError(f"{path} holds no usable task ({report.lines} lines, first: {bad[0]})")
    return tasks, report


def scan_tasks(path: str | Path, skip_bad: bool) -> tuple[list[Task], LoadReport]:
    """`load_tasks`, which may find no task."""
    tasks: list[Task] = []
    bad: list[str] = []
    duplicates: list[str] = []
    first_line: dict[str, int] = {}
    lines = 0
    for line, found in each_task(path):
        lines += 1
        if isinstance(found, Flaw):
            if not skip_bad:
                raise UserError(
                    f"{path}, line {line}: {found}; correct the line or load with skip_bad=True"
                )
            bad.append(f"line {line}: {found}")
            continue
        task = found.task()
        if task.uid in first_line:
            known = first_line[task.uid]
            duplicates.append(f"line {line}: same task as line {known} (uid {task.uid})")
            continue
        first_line[task.uid] = line
        tasks.append(task)
    return tasks, LoadReport(lines, len(tasks), tuple(bad), tuple(duplicates), _digests(tasks))


def _digests(tasks: list[Task]) -> tuple[str, ...]:
    texts = (json.dumps(task.to_json(), sort_keys=True, default=str) for task in tasks)
    return tuple(hashlib.blake2b(text.encode(), digest_size=6).hexdigest() for text in texts)


def each_task(path: str | Path) -> Iterator[tuple[int, TaskFields | Flaw]]:
    """(line, the task or what is wrong with it) for each record of a file."""
    for record in read_records(path):
        try:
            yield record.line, record.flaw or task_fields(record.value)
        except Flaw as flaw:
            yield record.line, flaw
