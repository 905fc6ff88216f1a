"""Metric writers and progress: JSON lines on disk, a bar for people. Nothing is printed here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from agentcpm_jax.files import append_line, write_atomically

NUMBER = int | float | None


class Bar(Protocol):
    """A progress bar (tqdm fits)."""

    def update(self, n: int = 1) -> Any: ...

    def set_postfix_str(self, s: str) -> Any: ...

    def close(self) -> Any: ...


class Progress(Protocol):
    """Opens a bar of `total` steps, of which `initial` are done."""

    def __call__(self, description: str, total: int, initial: int = 0) -> Bar: ...


class _Silent:
    def update(self, n: int = 1) -> None: ...

    def set_postfix_str(self, s: str) -> None: ...

    def close(self) -> None: ...


def silent(description: str, total: int, initial: int = 0) -> Bar:
    """A `Progress` that shows nothing."""
    return _Silent()


#: Groups of figures that measure the clock, or count since the process began.
CLOCK = ("time", "loop", "memory", "pool", "engine", "stream")


class MetricsWriter:
    """Appends one JSON line per step to `metrics.jsonl`.

    Opened at `start_step`, it first removes lines of later steps (they are about to be recomputed)
    and a torn last line. So the file of a resumed lockstep run, and that of another equal one, is
    that of an uninterrupted one, the figures of the groups in `CLOCK` aside.
    """

    def __init__(self, path: Path, start_step: int = 0) -> None:
        self._path = path
        kept = [row for row in read_metrics(path) if row["step"] <= start_step]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.kept = kept  # the rows of the steps before

    def write(self, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """`values` are scalars named `group/name`; NaN and infinities become null.

        Returns the row as written.
        """
        row = {"step": step} | {k: scalar(v) for k, v in sorted(values.items())}
        append_line(self._path, json.dumps(row))
        return row


class NoMetrics:
    """The writer of all processes but the first: it writes nothing."""

    def __init__(self, path: Path, start_step: int = 0) -> None:
        self.kept: list[dict[str, Any]] = []

    def write(self, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        return {}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; none when it does not exist; torn lines are left out."""
    rows = read_lines(path, "step")
    return [row for row in rows if all(isinstance(v, NUMBER) for v in row.values())]


def read_lines(path: Path, key: str) -> list[dict[str, Any]]:
    """The JSON objects, one a line, that have a whole number as `key`; other lines are torn."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n"):
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and type(row.get(key)) is int:
                rows.append(row)
    return rows


def series(path: Path) -> dict[str, list[tuple[int, float]]]:
    """metric name -> [(step, value)], for charts."""
    out: dict[str, list[tuple[int, float]]] = {}
    for row in read_metrics(path):
        for key, value in row.items():
            if key != "step" and value is not None:
                out.setdefault(key, []).append((row["step"], value))
    return out


def scalar(value: Any) -> float | int | None:
    """As `metrics.jsonl` holds it: every bit of a float32, NaN and infinities as null."""
    number = value.item() if hasattr(value, "item") else value
    return number if math.isfinite(number) else None
