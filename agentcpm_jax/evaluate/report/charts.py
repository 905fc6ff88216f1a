"""Charts as inline SVG text: line charts, bars with intervals, and points between two scores.

Drawn for paper and for screens, in the eight colours of Okabe and Ito that stay apart for the
colour-blind; dashes and direct labels carry the same distinction without colour. A page may set
the colours by name, for a dark screen; alone, a chart has those of paper. No scripts, no fonts, no
links: a chart is a string to paste into a page. Values show as tooltips.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from xml.etree import ElementTree

from agentcpm_jax.evaluate.passk import Estimate
from agentcpm_jax.evaluate.report.formats import format_estimate, format_number
from agentcpm_jax.evaluate.report.render import without_controls

PALETTE = {
    "blue": "#0072b2",
    "vermilion": "#d55e00",
    "green": "#009e73",
    "pink": "#cc79a7",
    "ochre": "#a07000",
    "sky": "#56b4e9",
    "grey": "#444444",
    "purple": "#8a5bb5",
}
COLOURS = [f"var(--{name},{value})" for name, value in PALETTE.items()]
DASHES = ("", "6 3", "2 2.5", "8 3 2 3", "", "6 3", "2 2.5", "8 3 2 3")
INK, MUTED, GRID = "var(--ink,#1f2933)", "var(--muted,#5f6b7a)", "var(--grid,#e4e8ee)"
LETTER = 6.2  # width of a letter, on the generous side
MAX_POINTS = 400  # per drawn line; more is invisible and only makes the page heavy
SMOOTH_FROM = 24  # points below which a line is left as it is

Points = Sequence[tuple[float, float]]


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
    kept = {name: found for name, points in series.items() if (found := _finite(points))}
    chart = _Chart(title, width, height)
    if not kept:
        chart.text(width / 2, height / 2, "no data yet", "middle")
        return chart.svg()
    several = len(kept) > 1
    rows = chart.legend(kept, dashed=True) if several else 0
    steps = [x for points in kept.values() for x, _ in points]
    ticks = _nice_ticks(*_padded([y for points in kept.values() for _, y in points]), 4)
    chart.frame(32 + 15 * rows, 34, min(steps), max(steps), ticks)
    chart.x_axis(x_label)
    for i, (name, points) in enumerate(kept.items()):
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)] if several else ""
        shown = points
        if smooth and len(points) >= SMOOTH_FROM:
            chart.path(points, colour, width="1", opacity="0.28")
            shown = _moving_average(points)
        chart.path(shown, colour, dash)
        if len(points) <= 30:
            for x, y in points:
                chart.dot(x, y, colour, name if several else title)
        else:
            chart.dot(*shown[-1], colour, f"{name}, last")
    return chart.svg()


def bar_chart(
    categories: Sequence[str],
    series: Mapping[str, Sequence[Estimate]],
    title: str,
    percent: bool = True,
) -> str:
    """Grouped bars with their intervals as whiskers; a NaN value shows as n/a.

    Args:
      categories: the groups along the horizontal axis.
      series: name -> one value per category; each name has one colour.
      title: heading of the chart.
      percent: values are shares of 1, shown in percent from 0 to 100.
    """
    for name, values in series.items():
        if len(values) != len(categories):
            raise ValueError(f"{name}: {len(values)} values for {len(categories)} categories")
    drawn = [v for values in series.values() for v in values]
    ends = [e for v in drawn for e in (v.value, v.low, v.high) if math.isfinite(e)]
    scale = 100.0 if percent else 1.0
    high = max([0.0, *ends]) * scale or 1.0
    ticks = _nice_ticks(min([0.0, *ends]) * scale, high, 5)
    chart = _Chart(title, 700, 270)
    rows = chart.legend(series, dashed=False) if len(series) > 1 else 0
    chart.frame(44 + 15 * rows, 28, 0, len(categories), ticks, "%" if percent else "")
    share = 0.78 / max(1, len(series))
    thick = min(46.0, (chart.x(1) - chart.x(0)) * share * 0.86)
    for c, category in enumerate(categories):
        chart.text(chart.x(c + 0.5), chart.bottom + 18, category, "middle", INK)
        for i, (name, values) in enumerate(series.items()):
            centre = chart.x(c + 0.5 + (i - (len(series) - 1) / 2) * share)
            tip = f"{category}, {name}: {format_estimate(values[c], percent)}"
            _bar(chart, centre, thick, values[c], percent, COLOURS[i % len(COLOURS)], tip)
    chart.line(chart.left, chart.y(0), chart.right, chart.y(0), MUTED)
    return chart.svg()


def scatter_chart(
    points: Sequence[tuple[float, float, str]],
    frontier: Sequence[int],
    title: str,
    x_label: str,
    y_label: str,
    chosen: int | None = None,
) -> str:
    """Labelled points; a line joins the frontier's, a ring marks the chosen one.

    Args:
      points: (x, y, label), finite.
      frontier: indices of the points that no other beats on both axes.
      title, x_label, y_label: captions.
      chosen: index of the point that was taken.
    """
    ticks_x = _nice_ticks(*_padded([x for x, _, _ in points]), 4)
    ticks_y = _nice_ticks(*_padded([y for _, y, _ in points]), 4)
    chart = _Chart(title, 460, 320)
    chart.frame(50, 34, ticks_x[0], ticks_x[-1], ticks_y)
    chart.x_axis(x_label)
    chart.text(12, 36, y_label, "start")
    best = sorted((points[i][0], points[i][1]) for i in frontier)
    if len(best) > 1:
        chart.path(best, COLOURS[0], width="1.2", opacity="0.5")
    for i, (x, y, label) in enumerate(points):
        chart.dot(x, y, COLOURS[0] if i in frontier else MUTED, label)
        fits = chart.x(x) + 6 + LETTER * len(label) <= chart.width
        where, anchor = (chart.x(x) + 6, "start") if fits else (chart.x(x) - 6, "end")
        chart.text(where, chart.y(y) - 5, label, anchor, INK if i in frontier else MUTED)
    if chosen is not None:
        x, y = chart.x(points[chosen][0]), chart.y(points[chosen][1])
        ring = {"fill": "none", "stroke": COLOURS[1], "stroke_width": "1.8"}
        chart.add("circle", cx=x, cy=y, r="6", **ring, tip="chosen")
    return chart.svg()


class _Chart:
    """An SVG in the making: what is drawn, the plotting rectangle, and the data that it shows."""

    def __init__(self, title: str, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._svg = ElementTree.Element("svg")
        self._svg.attrib = {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {width} {height}",
            "width": str(width),
            "height": str(height),
            "role": "img",
            "aria-label": title,
            "font-family": "system-ui, sans-serif",
            "font-size": "11",
        }
        bold = {"font_size": "12.5", "font_weight": "600"}
        self.add("text", title, x="12", y="16", **bold, fill=INK)

    def svg(self) -> str:
        """The text of the SVG."""
        return without_controls(ElementTree.tostring(self._svg, encoding="unicode"))

    def frame(
        self, top: float, below: float, x0: float, x1: float, ticks: Sequence[float], unit: str = ""
    ) -> None:
        """Fixes the rectangle and the ranges, and draws the vertical axis with its ticks."""
        labels = [format_number(t, _step(ticks)) + unit for t in ticks]
        self.left, self.right = 14 + LETTER * max(map(len, labels)), self.width - 14
        self.top, self.bottom = top, self.height - below
        self._x0, self._x1 = x0, x1 if x1 > x0 else x0 + 1
        self._y0, self._y1 = ticks[0], ticks[-1]
        for tick, label in zip(ticks, labels, strict=True):
            self.line(self.left, self.y(tick), self.right, self.y(tick), GRID)
            self.text(self.left - 6, self.y(tick) + 3.5, label, "end")

    def x(self, value: float) -> float:
        """Where a value of the data stands, in SVG units."""
        return self.left + (value - self._x0) / (self._x1 - self._x0) * (self.right - self.left)

    def y(self, value: float) -> float:
        """Where a value of the data stands, in SVG units."""
        return self.bottom - (value - self._y0) / (self._y1 - self._y0) * (self.bottom - self.top)

    def x_axis(self, label: str) -> None:
        """The horizontal axis with its ticks and caption."""
        low, high = self._x0, self._x1
        ticks = [t for t in _nice_ticks(low, high, 4) if low - 1e-9 <= t <= high + 1e-9]
        if high - low <= 4:  # few steps: no halves
            ticks = [t for t in ticks if float(t).is_integer()]
        step = _step(ticks) if len(ticks) > 1 else None
        self.line(self.left, self.bottom, self.right, self.bottom, MUTED)
        for tick in ticks:
            self.line(self.x(tick), self.bottom, self.x(tick), self.bottom + 4, MUTED)
            self.text(self.x(tick), self.bottom + 16, format_number(tick, step), "middle")
        self.text(self.right, self.bottom + 29, label, "end")

    def legend(self, names: Iterable[str], dashed: bool) -> int:
        """One entry per name, wrapped to the width; returns the number of rows."""
        x, row = math.inf, 0
        for i, name in enumerate(names):
            need = 34 + 6.3 * len(name)
            if x + need > self.width:
                x, row = 12.0, row + 1
            y = 18 + 15 * row
            mark = {"stroke": COLOURS[i % len(COLOURS)], "stroke_width": "3" if dashed else "9"}
            if dashed and DASHES[i % len(DASHES)]:
                mark["stroke_dasharray"] = DASHES[i % len(DASHES)]
            self.add("path", d=f"M{x:.1f} {y - 3.5}h16", **mark)
            self.text(x + 20, y, name, "start", INK)
            x += need
        return row

    def path(
        self, points: Points, colour: str, dash: str = "", width: str = "1.8", opacity: str = "1"
    ) -> None:
        """A line through points of the data."""
        d = "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in _thinned(points))
        look = {"stroke": colour, "stroke_width": width, "opacity": opacity}
        look |= {"stroke_linejoin": "round"} | ({"stroke_dasharray": dash} if dash else {})
        self.add("path", d=f"M{d}", fill="none", **look)

    def dot(self, x: float, y: float, colour: str, name: str) -> None:
        """A point of the data, its values as a tooltip."""
        tip = f"{name}: {format_number(y)} at {format_number(x)}"
        self.add("circle", cx=self.x(x), cy=self.y(y), r="2.3", fill=colour, tip=tip)

    def line(
        self, x1: float, y1: float, x2: float, y2: float, colour: str, width: str = "1"
    ) -> None:
        """A straight line, in SVG units."""
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=colour, stroke_width=width)

    def text(self, x: float, y: float, text: str, anchor: str, colour: str = MUTED) -> None:
        """A word, in SVG units."""
        self.add("text", text, x=x, y=y, text_anchor=anchor, fill=colour)

    def add(self, tag: str, text: str = "", *, tip: str = "", **attributes: str | float) -> None:
        """An element; numbers are written to a tenth, `tip` becomes its tooltip."""
        written = {
            name.replace("_", "-"): value if isinstance(value, str) else f"{value:.1f}"
            for name, value in attributes.items()
        }
        element = ElementTree.SubElement(self._svg, tag, written)
        element.text = text
        if tip:
            ElementTree.SubElement(element, "title").text = tip


def _bar(
    chart: _Chart, centre: float, thick: float, v: Estimate, percent: bool, colour: str, tip: str
) -> None:
    if not math.isfinite(v.value):
        chart.text(centre, chart.y(0) - 4, "n/a", "middle")
        return
    scale = 100 if percent else 1
    zero, top = chart.y(0), chart.y(v.value * scale)
    place = {"x": centre - thick / 2, "y": min(top, zero), "width": thick}
    look = {"fill": colour, "fill_opacity": "0.85", "rx": "1.5"}
    chart.add("rect", **place, height=max(abs(top - zero), 0.8), **look, tip=tip)
    if math.isfinite(v.low) and math.isfinite(v.high):
        low, high, cap = chart.y(v.low * scale), chart.y(v.high * scale), min(5.0, thick / 3)
        chart.line(centre, low, centre, high, INK, "1.3")
        chart.line(centre - cap, low, centre + cap, low, INK, "1.3")
        chart.line(centre - cap, high, centre + cap, high, INK, "1.3")
        top = min(top, high)
    if thick >= 15:
        shown = f"{v.value * scale:.0f}" if percent else format_number(v.value)
        chart.text(centre, top - 5, shown, "middle", INK)


def _finite(points: Points) -> list[tuple[float, float]]:
    kept = [(float(x), float(y)) for x, y in points if y is not None]
    return sorted((x, y) for x, y in kept if math.isfinite(x) and math.isfinite(y))


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """Room for the line; a constant gets a range of its own; near 0 the axis starts at 0."""
    low, high = min(values), max(values)
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
