"""One self-contained HTML page about a run: what was learned, how surely, and what it looks like.

The page loads nothing (a content security policy forbids it), needs no script, and prints.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from agentcpm_jax.evaluate.passk import Estimate
from agentcpm_jax.evaluate.report.charts import Points, bar_chart, line_chart, scatter_chart
from agentcpm_jax.evaluate.report.formats import format_estimate, format_number
from agentcpm_jax.evaluate.report.render import render_template
from agentcpm_jax.evaluate.report.transcript import TrajectoryReport
from agentcpm_jax.files import duration_text, write_atomically

SHOWN_CHARTS = 12  # of a stage; what no panel names is folded beyond that


@dataclass(frozen=True)
class Marked:
    """Text in pieces, some of which are marked."""

    pieces: tuple[tuple[str, bool], ...]


Plain = str | int | float | bool | Estimate | None
Cell = Plain | Marked


@dataclass(frozen=True)
class Panel:
    """One chart of a stage: metrics that are read together, as lines with a legend."""

    title: str
    metrics: tuple[str, ...]
    smooth: bool = True


@dataclass(frozen=True)
class StageReport:
    """What one stage measured.

    `series` maps a metric's name to its (step, value) pairs. Metrics that no panel names get a
    chart each. `facts` are shown beside the wall time, e.g. steps, tokens, parameters.
    """

    name: str
    kind: str
    wall_seconds: float
    series: Mapping[str, Points] = field(default_factory=dict)
    panels: tuple[Panel, ...] = ()
    facts: Mapping[str, Plain] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells: numbers are formatted, an `Estimate` shows its interval.

    With `percent`, estimates and floats are shares of 1, shown in percent.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    percent: bool = False

    def is_number(self, column: int) -> bool:
        """Whether a column holds numbers only, which are aligned to the right."""
        cells = [row[column] for row in self.rows]
        return bool(cells) and not any(isinstance(cell, str | bool | Marked) for cell in cells)

    def texts(self) -> list[list[str | Marked]]:
        """The cells as they are shown. Raises ValueError: a row has not one cell per column."""
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table {self.title}: {len(row)} cells, {len(self.columns)} columns"
                )
        return [
            [v if isinstance(v, Marked) else _cell(v, self.percent) for v in row]
            for row in self.rows
        ]


@dataclass(frozen=True)
class BarChart:
    """Shares (or, without `percent`, values) with intervals: one bar per category and series."""

    title: str
    categories: tuple[str, ...]
    series: Mapping[str, Sequence[Estimate]]
    note: str = ""
    percent: bool = True

    def svg(self) -> str:
        """The chart."""
        return bar_chart(self.categories, self.series, self.title, self.percent)


@dataclass(frozen=True)
class ScatterChart:
    """Candidates between two scores, as `charts.scatter_chart` draws them."""

    title: str
    points: tuple[tuple[float, float, str], ...]
    frontier: tuple[int, ...]
    x_label: str
    y_label: str
    chosen: int | None = None
    note: str = ""

    def svg(self) -> str:
        """The chart."""
        return scatter_chart(
            self.points, self.frontier, self.title, self.x_label, self.y_label, self.chosen
        )


@dataclass(frozen=True)
class Headline:
    """A claim in one number: shown large, with a line about what it is."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class ReportData:
    """Everything on the page, in the order in which it is shown."""

    title: str
    subtitle: str = ""
    headlines: tuple[Headline, ...] = ()
    charts: tuple[BarChart | ScatterChart, ...] = ()
    tables: tuple[Table, ...] = ()
    stages: tuple[StageReport, ...] = ()
    trajectories: tuple[TrajectoryReport, ...] = ()
    notes: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)


def write_report(path: Path, data: ReportData) -> None:
    """Writes the page, UTF-8, atomically: an older report stays until the new one is whole."""
    write_atomically(path, render(data))


def render(data: ReportData) -> str:
    """The page as text."""
    known = [s.wall_seconds for s in data.stages if math.isfinite(s.wall_seconds)]
    total = sum(known)
    return render_template(
        "report.html.j2",
        title=data.title,
        report=data,
        contents=_contents(data),
        stages=[_stage(i, stage, total) for i, stage in enumerate(data.stages)],
        total_seconds=total,
        config=json.dumps(data.config, indent=2, ensure_ascii=False, default=str),
    )


def _contents(data: ReportData) -> dict[str, str]:
    """Id -> heading of the sections that have something to show."""
    names = [s.name if s.kind == s.name else f"{s.name} ({s.kind})" for s in data.stages]
    sections = [
        ("results", "Results", data.charts or data.tables),
        ("stages", "Stages", data.stages),
        *((f"stage-{i}", name, True) for i, name in enumerate(names)),
        ("trajectories", "Trajectories", data.trajectories),
        ("notes", "Notes", data.notes),
        ("config", "Configuration", data.config),
    ]
    return {id_: heading for id_, heading, content in sections if content}


class _Stage(NamedTuple):
    """A stage as the template shows it; `share` is its part of the time of all stages."""

    id: str
    name: str
    kind: str
    seconds: float
    share: float
    note: str
    facts: Mapping[str, str]
    charts: Sequence[str]
    more_charts: Sequence[str]


def _stage(index: int, stage: StageReport, total: float) -> _Stage:
    named = {m for p in stage.panels for m in p.metrics}
    rest = [Panel(m, (m,)) for m in stage.series if m not in named]
    charts = [_line_chart(panel, stage) for panel in (*stage.panels, *rest)]
    shown = max(SHOWN_CHARTS, len(stage.panels))
    seconds = stage.wall_seconds
    return _Stage(
        id=f"stage-{index}",
        name=stage.name,
        kind=stage.kind,
        seconds=seconds,
        share=seconds / (total or 1.0) if math.isfinite(seconds) else 0.0,
        note=stage.note,
        facts={"wall time": duration_text(seconds)} | {k: _cell(v) for k, v in stage.facts.items()},
        charts=charts[:shown],
        more_charts=charts[shown:],
    )


def _line_chart(panel: Panel, stage: StageReport) -> str:
    lines = {m: stage.series[m] for m in panel.metrics if m in stage.series}
    prefixes = {m.rpartition("/")[0] for m in lines}
    if len(lines) > 1 and len(prefixes) == 1:  # `filters/` once is enough: the title says it
        lines = {m.rpartition("/")[2]: p for m, p in lines.items()}
    return line_chart(lines, panel.title, smooth=panel.smooth)


def _cell(value: Plain, percent: bool = False) -> str:
    if value is None:
        return "-"
    if isinstance(value, Estimate):
        return format_estimate(value, percent)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return format_estimate(Estimate(value), percent) if percent else format_number(value)
    return f"{value:,}" if isinstance(value, int) else value
