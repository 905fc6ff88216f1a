"""Charts as inline SVG text: line charts, bars with intervals, and points between two scores.

Drawn for paper and for screens, in the eight colours of Okabe and Ito that stay apart for the
colour-blind; dashes and direct labels carry the same distinction without colour. No scripts, no
fonts, no links: a chart is a string to paste into a page. Values show as tooltips.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agentcpm_jax.evaluate.passk import Estimate
from agentcpm_jax.evaluate.report.formats import format_estimate, format_number

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#A07000", "#56B4E9", "#444444", "#8A5BB5")
DASHES = ("", "6 3", "2 2.5", "8 3 2 3", "", "6 3", "2 2.5", "8 3 2 3")
INK, MUTED, GRID = "#1f2933", "#5f6b7a", "#e4e8ee"
MAX_POINTS = 400  # per drawn line; more is invisible and only makes the page heavy
SMOOTH_FROM = 24  # points below which a line is left as it is

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class _Frame:
    """The plotting rectangle in SVG units and the data range that it shows."""

    left: float
    top: float
    right: float
    bottom: float
    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        return self.left + (value - self.x0) / (self.x1 - self.x0) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - (value - self.y0) / (self.y1 - self.y0) * (self.bottom - self.top)


def line_chart(
    series: Mapping[str, Points],
    title: str,
    x_label: str = "step",
    smooth: bool = True,
    width: int = 340,
    height: int = 210,
) -> str:
    """Lines over steps; long noisy ones are drawn faint with their moving average on top.

    Args:
      series: name -> (step, value) pairs in any order; values that are not finite are left out.
      title: heading of the chart, also read out by screen readers.
      x_label: caption of the horizontal axis.
      smooth: draw moving averages.
      width, height: in CSS pixels.
    """
    kept = {name: _finite(points) for name, points in series.items()}
    kept = {name: points for name, points in kept.items() if points}
    legend = list(kept) if len(kept) > 1 else []
    rows = _legend_rows(legend, width)
    if not kept:
        return _svg(title, width, height, [_text(width / 2, height / 2, "no data yet", "middle")])
    xs = [x for points in kept.values() for x, _ in points]
    ticks_y = _nice_ticks(*_padded(_range([y for p in kept.values() for _, y in p])), 4)
    labels = [format_number(t, _step(ticks_y)) for t in ticks_y]
    f = _Frame(
        left=14 + 6.2 * max(map(len, labels)),
        top=32 + 15 * len(rows),
        right=width - 14,
        bottom=height - 34,
        x0=min(xs),
        x1=max(xs) if max(xs) > min(xs) else min(xs) + 1,
        y0=ticks_y[0],
        y1=ticks_y[-1],
    )
    out = [*_y_axis(f, ticks_y, labels), *_x_axis(f, x_label), *_legend(rows, dashed=True)]
    for i, (name, points) in enumerate(kept.items()):
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)] if legend else ""
        smoothed = _moving_average(points) if smooth and len(points) >= SMOOTH_FROM else None
        if smoothed:
            out.append(_path(f, points, colour, "", 1, 0.28))
        out.append(_path(f, smoothed or points, colour, dash, 1.8, 1))
        if len(points) <= 30:
            out += [_dot(f, x, y, colour, name if legend else title) for x, y in points]
        else:
            out.append(_dot(f, *(smoothed or points)[-1], colour, f"{name}, last"))
    return _svg(title, width, height, out)


def bar_chart(
    categories: Sequence[str],
    series: Mapping[str, Sequence[Estimate]],
    title: str,
    percent: bool = True,
    width: int = 700,
    height: int = 270,
) -> str:
    """Grouped bars with their intervals as whiskers; a NaN value shows as n/a.

    Args:
      categories: the groups along the horizontal axis.
      series: name -> one value per category; each name has one colour.
      title: heading of the chart.
      percent: values are shares of 1, shown in percent from 0 to 100.
      width, height: in CSS pixels.
    """
    for name, values in series.items():
        if len(values) != len(categories):
            raise ValueError(f"{name}: {len(values)} values for {len(categories)} categories")
    scale = 100.0 if percent else 1.0
    drawn = [v for values in series.values() for v in values]
    ends = [e * scale for v in drawn for e in (v.value, v.low, v.high) if math.isfinite(e)]
    low, high = min([0.0, *ends]), max([0.0, *ends]) or 1.0
    ticks = _nice_ticks(low, high, 5)
    labels = [format_number(t, _step(ticks)) + ("%" if percent else "") for t in ticks]
    rows = _legend_rows(list(series) if len(series) > 1 else [], width)
    f = _Frame(
        left=14 + 6.2 * max(map(len, labels)),
        top=44 + 15 * len(rows),
        right=width - 14,
        bottom=height - 28,
        x0=0,
        x1=max(1, len(categories)),
        y0=ticks[0],
        y1=ticks[-1],
    )
    out = [*_y_axis(f, ticks, labels), *_legend(rows, dashed=False)]
    bar = 0.78 / max(1, len(series))
    thick = min(46.0, (f.x(1) - f.x(0)) * bar * 0.86)
    for c, category in enumerate(categories):
        out.append(_text(f.x(c + 0.5), f.bottom + 18, category, "middle", INK))
        for i, (name, values) in enumerate(series.items()):
            centre = f.x(c + 0.5 + (i - (len(series) - 1) / 2) * bar)
            colour = COLOURS[i % len(COLOURS)]
            out += _bar(f, centre, thick, values[c], scale, colour, f"{category}, {name}", percent)
    out.append(_line(f.left, f.y(0), f.right, f.y(0), MUTED))
    return _svg(title, width, height, out)


def scatter_chart(
    points: Sequence[tuple[float, float, str]],
    frontier: Sequence[int],
    title: str,
    x_label: str,
    y_label: str,
    chosen: int | None = None,
    width: int = 460,
    height: int = 320,
) -> str:
    """Labelled points; a line joins the frontier's, a ring marks the chosen one.

    Args:
      points: (x, y, label), finite.
      frontier: indices of the points that no other beats on both axes.
      title, x_label, y_label: captions.
      chosen: index of the point that was taken.
      width, height: in CSS pixels.
    """
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    ticks = [_nice_ticks(*_padded(_range(values)), 4) for values in (xs, ys)]
    labels = [format_number(t, _step(ticks[1])) for t in ticks[1]]
    f = _Frame(
        left=14 + 6.2 * max(map(len, labels)),
        top=50,
        right=width - 14,
        bottom=height - 34,
        x0=ticks[0][0],
        x1=ticks[0][-1],
        y0=ticks[1][0],
        y1=ticks[1][-1],
    )
    out = [*_y_axis(f, ticks[1], labels), *_x_axis(f, x_label), _text(12, 36, y_label, "start")]
    best = sorted((points[i][0], points[i][1]) for i in frontier)
    if len(best) > 1:
        out.append(_path(f, best, COLOURS[0], "", 1.2, 0.5))
    for i, (x, y, label) in enumerate(points):
        out.append(_dot(f, x, y, COLOURS[0] if i in frontier else MUTED, label))
        out.append(_text(f.x(x) + 6, f.y(y) - 5, label, "start", INK if i in frontier else MUTED))
    if chosen is not None:
        x, y = f.x(points[chosen][0]), f.y(points[chosen][1])
        out.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="none" stroke="{COLOURS[1]}" '
            'stroke-width="1.8"><title>chosen</title></circle>'
        )
    return _svg(title, width, height, out)


def _finite(points: Points) -> list[tuple[float, float]]:
    kept = [(float(x), float(y)) for x, y in points if y is not None]
    return sorted((x, y) for x, y in kept if math.isfinite(x) and math.isfinite(y))


def _range(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _padded(bounds: tuple[float, float]) -> tuple[float, float]:
    """Room for the line; a constant gets a range of its own; near 0 the axis starts at 0."""
    low, high = bounds
    if high == low:
        pad = abs(low) * 0.1 or 1.0
        return (low - pad, high + pad) if low else (0.0, 1.0)
    if 0 <= low < 0.35 * high:
        low = 0.0
    return low, high


def _nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` + 1 round numbers that enclose [low, high]."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _step(ticks: Sequence[float]) -> float:
    """The spacing, halved in precision terms when it is 2.5, so that labels stay exact."""
    step = ticks[1] - ticks[0]
    power = 10.0 ** math.floor(math.log10(step) + 1e-9)
    return power / 10 if abs(step / power - 2.5) < 1e-6 else power


def _moving_average(points: Points) -> list[tuple[float, float]]:
    """Centred mean over about a twelfth of the line; half as wide where the line ends."""
    half = max(2, len(points) // 24)
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    out = []
    for i, (x, _) in enumerate(points):
        reach = max(min(half, i, len(points) - 1 - i), half // 2)
        a, b = max(0, i - reach), min(len(points), i + reach + 1)
        out.append((x, (sums[b] - sums[a]) / (b - a)))
    return out


def _thinned(points: Points) -> Points:
    """At most `MAX_POINTS`, keeping the lowest and the highest of each bucket."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(2 * len(points) / MAX_POINTS)
    out: list[tuple[float, float]] = []
    for i in range(0, len(points), size):
        bucket = points[i : i + size]
        out += sorted({min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])})
    return out


def _path(f: _Frame, points: Points, colour: str, dash: str, width: float, alpha: float) -> str:
    d = "L".join(f"{f.x(x):.1f} {f.y(y):.1f}" for x, y in _thinned(points))
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<path d="M{d}" fill="none" stroke="{colour}" stroke-width="{width}" opacity="{alpha}" '
        f'stroke-linejoin="round"{dashes}/>'
    )


def _dot(f: _Frame, x: float, y: float, colour: str, name: str) -> str:
    tip = html.escape(f"{name}: {format_number(y)} at {format_number(x)}")
    return (
        f'<circle cx="{f.x(x):.1f}" cy="{f.y(y):.1f}" r="2.3" fill="{colour}">'
        f"<title>{tip}</title></circle>"
    )


def _bar(
    f: _Frame,
    centre: float,
    thick: float,
    v: Estimate,
    scale: float,
    colour: str,
    name: str,
    percent: bool,
) -> list[str]:
    if not math.isfinite(v.value):
        return [_text(centre, f.y(0) - 4, "n/a", "middle")]
    top = f.y(v.value * scale)
    tip = html.escape(f"{name}: {format_estimate(v, percent)}")
    y, tall = min(top, f.y(0)), max(abs(top - f.y(0)), 0.8)
    out = [
        f'<rect x="{centre - thick / 2:.1f}" y="{y:.1f}" width="{thick:.1f}" height="{tall:.1f}" '
        f'fill="{colour}" fill-opacity="0.85" rx="1.5"><title>{tip}</title></rect>'
    ]
    label = top
    if math.isfinite(v.low) and math.isfinite(v.high):
        low, high, cap = f.y(v.low * scale), f.y(v.high * scale), min(5.0, thick / 3)
        out += [
            _line(centre, low, centre, high, INK, 1.3),
            _line(centre - cap, low, centre + cap, low, INK, 1.3),
            _line(centre - cap, high, centre + cap, high, INK, 1.3),
        ]
        label = min(top, high)
    if thick >= 15:
        shown = f"{v.value * scale:.0f}" if percent else format_number(v.value)
        out.append(_text(centre, label - 5, shown, "middle", INK))
    return out


def _y_axis(f: _Frame, ticks: Sequence[float], labels: Sequence[str]) -> list[str]:
    out = []
    for tick, label in zip(ticks, labels, strict=True):
        out.append(_line(f.left, f.y(tick), f.right, f.y(tick), GRID))
        out.append(_text(f.left - 6, f.y(tick) + 3.5, label, "end"))
    return out


def _x_axis(f: _Frame, label: str) -> list[str]:
    ticks = [t for t in _nice_ticks(f.x0, f.x1, 4) if f.x0 - 1e-9 <= t <= f.x1 + 1e-9]
    if f.x1 - f.x0 <= 4:  # few steps: no halves
        ticks = [t for t in ticks if float(t).is_integer()]
    step = _step(ticks) if len(ticks) > 1 else None
    out = [_line(f.left, f.bottom, f.right, f.bottom, MUTED)]
    for tick in ticks:
        out.append(_line(f.x(tick), f.bottom, f.x(tick), f.bottom + 4, MUTED))
        out.append(_text(f.x(tick), f.bottom + 16, format_number(tick, step), "middle"))
    out.append(_text(f.right, f.bottom + 29, label, "end"))
    return out


def _legend_rows(names: Sequence[str], width: int) -> list[list[tuple[float, int, str]]]:
    """(x, colour index, name) of each entry, wrapped to the width."""
    rows: list[list[tuple[float, int, str]]] = []
    x = math.inf
    for i, name in enumerate(names):
        need = 34 + 6.3 * len(name)
        if x + need > width:
            rows.append([])
            x = 12.0
        rows[-1].append((x, i, name))
        x += need
    return rows


def _legend(rows: Sequence[Sequence[tuple[float, int, str]]], dashed: bool) -> list[str]:
    out = []
    for r, row in enumerate(rows):
        y = 33 + 15 * r
        for x, i, name in row:
            dash = DASHES[i % len(DASHES)] if dashed else ""
            dashes = f' stroke-dasharray="{dash}"' if dash else ""
            out.append(
                f'<path d="M{x:.1f} {y - 3.5}h16" stroke="{COLOURS[i % len(COLOURS)]}" '
                f'stroke-width="{3 if dashed else 9}"{dashes}/>'
            )
            out.append(_text(x + 20, y, name, "start", INK))
    return out


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        f'stroke-width="{width}"/>'
    )


def _text(x: float, y: float, text: str, anchor: str, colour: str = MUTED) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">'
        f"{html.escape(text)}</text>"
    )


def _svg(title: str, width: int, height: int, content: Sequence[str]) -> str:
    name = html.escape(title)
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{name}" font-family="system-ui, sans-serif" font-size="11">'
        f'<text x="12" y="16" font-size="12.5" font-weight="600" fill="{INK}">{name}</text>'
        f"{''.join(content)}</svg>"
    )
