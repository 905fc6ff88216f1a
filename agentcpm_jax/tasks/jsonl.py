"""Tasks as JSONL: one object per line with `question`, `answers` and optionally `kind`, `split`,
`meta`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentcpm_jax.types import Task, UserError


@dataclass(frozen=True)
class LoadReport:
    """What happened to the lines of a file. `bad` names each skipped line and its reason."""

    lines: int
    loaded: int
    bad: tuple[str, ...] = ()
    duplicates: tuple[str, ...] = ()  # "line 7: same task as line 3 (uid ...)"; dropped


def load_tasks(path: str | Path, *, skip_bad: bool = False) -> tuple[list[Task], LoadReport]:
    """The tasks of a file in order, each uid once; blank lines are ignored.

    Raises `UserError` naming file and line for corrupt lines and questions without answers
    (`skip_bad=True` leaves those out and reports them), and for a missing or empty file.
    """
    tasks: list[Task] = []
    bad: list[str] = []
    duplicates: list[str] = []
    first_line: dict[str, int] = {}
    lines = 0
    for number, line in enumerate(_read_lines(Path(path)), start=1):
        if not line.strip():
            continue
        lines += 1
        try:
            task = _parse(line)
        except ValueError as error:
            if not skip_bad:
                raise UserError(
                    f"{path}, line {number}: {error}; correct the line or load with skip_bad=True"
                ) from None
            bad.append(f"line {number}: {error}")
            continue
        if task.uid in first_line:
            known = first_line[task.uid]
            duplicates.append(f"line {number}: same task as line {known} (uid {task.uid})")
            continue
        first_line[task.uid] = number
        tasks.append(task)
    if not tasks:
        raise UserError(f"{path} holds no usable task ({lines} lines, {len(bad)} bad)")
    return tasks, LoadReport(lines, len(tasks), tuple(bad), tuple(duplicates))


def _read_lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(
            f"cannot read tasks from {path}: {error.strerror}; check the path"
        ) from None


def _parse(line: bytes) -> Task:
    """One line as a task; ValueError says what is wrong with it."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON ({type(error).__name__})") from None
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object but {_kind(row)}")
    unknown = sorted(row.keys() - {"question", "answers", "kind", "split", "meta"})
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}")
    _require_text(row.get("question"), "question")
    answers = row.get("answers")
    if not isinstance(answers, list):
        raise ValueError(f"answers must be a list of strings, not {_kind(answers)}")
    if not answers:
        raise ValueError(f"the question {row['question']!r:.80} has no answers")
    for answer in answers:
        _require_text(answer, "every answer")
    for name in ("kind", "split"):
        if name in row:
            _require_text(row[name], name)
    if not isinstance(row.get("meta", {}), dict):
        raise ValueError(f"meta must be an object, not {_kind(row['meta'])}")
    return Task.from_json(row)


def _require_text(value: Any, name: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, not {_kind(value)}")
    if not value.strip():
        raise ValueError(f"{name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds a lone surrogate") from None


def _kind(value: Any) -> str:
    return "missing" if value is None else type(value).__name__
