"""One self-contained HTML page about a run: what was learned, how surely, and what it looks like.

The page loads nothing (a content security policy forbids it), needs no script, and prints. Texts
of trajectories come from web pages and models: every one is escaped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentcpm_jax.evaluate.passk import Estimate
from agentcpm_jax.evaluate.report.charts import Points, bar_chart, line_chart, scatter_chart
from agentcpm_jax.evaluate.report.formats import format_estimate, format_number
from agentcpm_jax.evaluate.report.transcript import STYLE as TRANSCRIPT_STYLE
from agentcpm_jax.evaluate.report.transcript import escape, transcript
from agentcpm_jax.files import duration_text, write_atomically

Cell = str | int | float | bool | Estimate | None


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
    facts: Mapping[str, Cell] = field(default_factory=dict)
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


@dataclass(frozen=True)
class BarChart:
    """Shares (or, without `percent`, values) with intervals: one bar per category and series."""

    title: str
    categories: tuple[str, ...]
    series: Mapping[str, Sequence[Estimate]]
    note: str = ""
    percent: bool = True


@dataclass(frozen=True)
class ScatterChart:
    """Candidates between two scores, as `plots.scatter_chart` draws them."""

    title: str
    points: tuple[tuple[float, float, str], ...]
    frontier: tuple[int, ...]
    x_label: str
    y_label: str
    chosen: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Headline:
    """A claim in one number: shown large, with a line about what it is."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class TrajectoryReport:
    """One readable trajectory; a turn is (role, text) with role system, user, assistant or tool."""

    title: str
    verdict: str
    reward: float | None
    turns: tuple[tuple[str, str], ...]
    note: str = ""


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
    sections: list[tuple[str, str, str]] = []  # id, heading, body
    if data.charts or data.tables:
        body = "".join([*map(_chart, data.charts), *map(table, data.tables)])
        sections.append(("results", "Results", body))
    if data.stages:
        sections.append(("stages", "Stages", _timeline(data.stages)))
    for i, stage in enumerate(data.stages):
        kind = "" if stage.kind == stage.name else f" ({stage.kind})"
        sections.append((f"stage-{i}", stage.name + kind, _stage(stage)))
    if data.trajectories:
        body = "".join(
            transcript(t.title, t.verdict, t.reward, t.turns, t.note, opened=i == 0)
            for i, t in enumerate(data.trajectories)
        )
        sections.append(("trajectories", "Trajectories", body))
    if data.notes:
        body = "<ul>" + "".join(f"<li>{escape(n)}</li>" for n in data.notes) + "</ul>"
        sections.append(("notes", "Notes", body))
    if data.config:
        sections.append(("config", "Configuration", _config(data.config)))
    contents = "".join(f'<li><a href="#{i}">{escape(h)}</a></li>' for i, h, _ in sections)
    main = "".join(f'<section id="{i}"><h2>{escape(h)}</h2>{b}</section>' for i, h, b in sections)
    cards = "".join(map(_headline, data.headlines))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(data.title)}</title><style>{STYLE}{TRANSCRIPT_STYLE}</style></head><body>"
        f'<nav aria-label="Contents"><p>Contents</p><ol>{contents}</ol></nav>'
        f"<main><header><h1>{escape(data.title)}</h1>"
        f'<p class="subtitle">{escape(data.subtitle)}</p></header>'
        f"{f'<div class=cards>{cards}</div>' if cards else ''}{main}</main></body></html>\n"
    )


def _headline(h: Headline) -> str:
    return (
        f'<div class="card"><p class="label">{escape(h.label)}</p>'
        f'<p class="value">{escape(h.value)}</p><p class="detail">{escape(h.detail)}</p></div>'
    )


def _chart(chart: BarChart | ScatterChart) -> str:
    if isinstance(chart, ScatterChart):
        svg = scatter_chart(
            chart.points, chart.frontier, chart.title, chart.x_label, chart.y_label, chart.chosen
        )
    else:
        svg = bar_chart(chart.categories, chart.series, chart.title, chart.percent)
    return f'<figure class="wide">{svg}{_note(chart.note, "figcaption")}</figure>'


def table(table: Table) -> str:
    """One table as HTML. Raises ValueError when a row has not as many cells as columns."""
    for row in table.rows:
        if len(row) != len(table.columns):
            raise ValueError(f"table {table.title}: {len(row)} cells, {len(table.columns)} columns")
    numeric = [
        bool(table.rows) and all(not isinstance(row[i], str | bool) for row in table.rows)
        for i in range(len(table.columns))
    ]
    kinds = [' class="number"' if n else "" for n in numeric]
    head = "".join(
        f'<th scope="col"{k}>{escape(c)}</th>' for k, c in zip(kinds, table.columns, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(f"<td{k}>{_cell(c, table.percent)}</td>" for k, c in zip(kinds, row, strict=True))
        + "</tr>"
        for row in table.rows
    )
    return (
        f'<div class="scroll"><table><caption>{escape(table.title)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{_note(table.note)}"
    )


def _cell(value: Cell, percent: bool = False) -> str:
    if value is None:
        return "-"
    if isinstance(value, Estimate):
        return escape(format_estimate(value, percent))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and percent:
        return escape(format_estimate(Estimate(value), percent))
    if isinstance(value, int):
        return f"{value:,}"
    return escape(format_number(value) if isinstance(value, float) else value)


def _timeline(stages: Sequence[StageReport]) -> str:
    """A table of the stages with bars for the share of time that each took."""
    known = [s.wall_seconds for s in stages if math.isfinite(s.wall_seconds)]
    total = sum(known) or 1.0
    rows = "".join(
        f'<tr><td><a href="#stage-{i}">{escape(s.name)}</a></td><td>{escape(s.kind)}</td>'
        f'<td class="number">{duration_text(s.wall_seconds)}</td>'
        f'<td class="share">{_share(s.wall_seconds / total)}</td></tr>'
        for i, s in enumerate(stages)
    )
    return (
        '<div class="scroll"><table><caption>Where the time went</caption><thead><tr>'
        '<th scope="col">stage</th><th scope="col">kind</th>'
        '<th scope="col" class="number">wall time</th><th scope="col">share</th></tr></thead>'
        f'<tbody>{rows}</tbody><tfoot><tr><td>total</td><td></td><td class="number">'
        f"{duration_text(sum(known))}</td><td></td></tr></tfoot></table></div>"
    )


def _share(share: float) -> str:
    share = share if math.isfinite(share) else 0.0
    return f'<span class="bar" style="width:{160 * share:.0f}px"></span> {100 * share:.0f}%'


def _stage(stage: StageReport) -> str:
    facts = {"wall time": duration_text(stage.wall_seconds), **stage.facts}
    listed = "".join(
        f"<div><dt>{escape(k)}</dt><dd>{_cell(v)}</dd></div>" for k, v in facts.items()
    )
    named = {m for p in stage.panels for m in p.metrics}
    rest = [Panel(m, (m,)) for m in stage.series if m not in named]
    charts = [_panel(p, stage) for p in (*stage.panels, *rest)]
    shown = max(12, len(stage.panels))
    more = charts[shown:]
    grid = f'<div class="grid">{"".join(charts[:shown])}</div>' if charts else ""
    if more:
        grid += (
            f"<details><summary>{len(more)} more metrics</summary>"
            f'<div class="grid">{"".join(more)}</div></details>'
        )
    return f'{_note(stage.note)}<dl class="facts">{listed}</dl>{grid}'


def _panel(panel: Panel, stage: StageReport) -> str:
    lines = {m: stage.series[m] for m in panel.metrics if m in stage.series}
    prefixes = {m.rpartition("/")[0] for m in lines}
    if len(lines) > 1 and len(prefixes) == 1:  # `filters/` once is enough: the title says it
        lines = {m.rpartition("/")[2]: p for m, p in lines.items()}
    return f"<figure>{line_chart(lines, panel.title, smooth=panel.smooth)}</figure>"


def _config(config: Mapping[str, Any]) -> str:
    text = json.dumps(config, indent=2, ensure_ascii=False, default=str)
    return (
        "<details><summary>The whole configuration, as it ran</summary>"
        f"<pre>{escape(text)}</pre></details>"
    )


def _note(text: str, tag: str = "p") -> str:
    return f'<{tag} class="note">{escape(text)}</{tag}>' if text else ""


STYLE = """
:root{--ink:#1f2933;--muted:#5f6b7a;--line:#dfe4ea;--soft:#f6f8fa;--accent:#0072b2}
*{box-sizing:border-box}
html{scroll-behavior:smooth}
body{margin:0;color:var(--ink);background:#fff;font:15px/1.55 system-ui,-apple-system,"Segoe UI",
Roboto,"Helvetica Neue",Arial,sans-serif;display:grid;grid-template-columns:13.5rem minmax(0,66rem);
gap:2.5rem;padding:0 1.5rem}
nav{position:sticky;top:0;align-self:start;max-height:100vh;overflow:auto;padding:2.2rem 0;
font-size:13.5px}
nav p{margin:0 0 .5rem;color:var(--muted);font-weight:600}
nav ol{list-style:none;margin:0;padding:0;border-left:2px solid var(--line)}
nav li a{display:block;padding:.18rem .8rem;color:var(--ink);text-decoration:none}
nav li a:hover,nav li a:focus{color:var(--accent);text-decoration:underline}
main{padding:1.8rem 0 5rem;min-width:0}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .3rem;letter-spacing:-.01em}
h2{font-size:1.25rem;margin:2.6rem 0 .9rem;padding-bottom:.3rem;border-bottom:1px solid var(--line)}
a{color:var(--accent)}
.subtitle,.note,figcaption{color:var(--muted);margin:.2rem 0 .8rem;max-width:46rem}
.note,figcaption{font-size:13.5px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(13rem,1fr));gap:.9rem;
margin:1.4rem 0 0}
.card{border:1px solid var(--line);border-top:3px solid var(--accent);border-radius:6px;
padding:.75rem .95rem}
.card p{margin:0}
.card .label{font-size:13px;color:var(--muted)}
.card .value{font-size:1.55rem;font-weight:650;line-height:1.35;letter-spacing:-.01em}
.card .detail{font-size:12.5px;color:var(--muted)}
figure{margin:0}
figure svg{display:block;max-width:100%;height:auto}
figure.wide{border:1px solid var(--line);border-radius:6px;padding:.6rem .5rem .3rem;
margin:0 0 1.2rem;max-width:46rem}
figcaption{margin-left:.75rem}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(19.5rem,1fr));gap:.9rem 1rem}
.grid figure{border:1px solid var(--line);border-radius:6px;padding:.45rem .3rem .2rem}
.grid svg{width:100%}
.scroll{overflow-x:auto;margin:0 0 .5rem}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;font-size:13.5px;padding:.5rem 0}
th,td{padding:.34rem 1.1rem .34rem 0;border-bottom:1px solid var(--line);text-align:left;
vertical-align:baseline}
th{color:var(--muted);font-weight:600;font-size:13px;border-bottom:1.5px solid #aeb8c4}
tfoot td{border-bottom:0;font-weight:600}
.number{text-align:right;white-space:nowrap}
.share{white-space:nowrap;color:var(--muted)}
.bar{display:inline-block;height:.7em;min-width:1px;background:var(--accent);border-radius:2px}
.facts{display:flex;flex-wrap:wrap;gap:.3rem 2rem;margin:0 0 1rem;font-size:13.5px}
.facts dt,.facts dd{display:inline;margin:0}
.facts dt{color:var(--muted);margin-right:.4rem}
.facts dd{font-variant-numeric:tabular-nums;font-weight:600}
summary{cursor:pointer}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--soft);border:1px solid var(--line);
border-radius:6px;padding:.8rem 1rem;font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,
"DejaVu Sans Mono",monospace}
@media(max-width:70rem){body{display:block;padding:0 1rem}nav{position:static;padding:1rem 0 0;
max-height:none}nav ol{display:flex;flex-wrap:wrap;border:0}nav li a{padding:.1rem .9rem .1rem 0}}
@media print{body{display:block;font-size:11pt}nav{display:none}h2{break-after:avoid}
figure,tr,.card{break-inside:avoid}a{color:inherit;text-decoration:none}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
