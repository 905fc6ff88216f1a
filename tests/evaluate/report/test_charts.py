from __future__ import annotations

import math
import re

import pytest

from agentcpm_jax.evaluate.passk import Estimate
from agentcpm_jax.evaluate.report.charts import bar_chart, line_chart, scatter_chart
from agentcpm_jax.evaluate.report.formats import format_estimate, format_number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0, "0"), (12, "12"), (1234, "1234"), (3.14159, "3.14"), (123.456, "123")),
        *((0.00012, "1.2e-4"), (2e6, "2M"), (1.5e5, "150k"), (3.41e9, "3.41B"), (-0.02, "-0.02")),
        *((math.nan, "n/a"), (math.inf, "∞"), (-1e-6, "-1e-6"), (0.5, "0.5")),
    ],
)
def test_numbers(value, text):
    assert format_number(value) == text


def test_estimates():
    assert format_estimate(Estimate(0.6213, 0.58, 0.66), percent=True) == "62.1% [58.0, 66.0]"
    assert format_estimate(Estimate(0.5), percent=True) == "50.0%"
    assert format_estimate(Estimate(math.nan)) == "n/a"


def texts(svg: str, anchor: str) -> list[str]:
    return re.findall(rf'text-anchor="{anchor}"[^>]*>([^<]*)</text>', svg)


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.0, 1.0, ["0", "0.25", "0.50", "0.75", "1.00"]),
        (2.1, 2.9, ["2.0", "2.2", "2.4", "2.6", "2.8", "3.0"]),
        (0.0, 3e-4, ["0", "1e-4", "2e-4", "3e-4"]),
        (-1.0, 1.0, ["-1.0", "-0.5", "0", "0.5", "1.0"]),
        (0.0, 4e6, ["0", "1M", "2M", "3M", "4M"]),
        (5.0, 5.0, ["4.50", "4.75", "5.00", "5.25", "5.50"]),
    ],
)
def test_axis_encloses_the_data_with_round_exact_labels(low, high, labels):
    svg = line_chart({"a": [(0, low), (10, high)]}, "t")
    assert texts(svg, "end")[:-1] == labels  # the last one names the other axis


def path_points(svg: str) -> list[list[tuple[float, float]]]:
    lines = re.findall(r'<path d="M([\d. L-]+)" fill="none"', svg)
    return [[tuple(map(float, p.split())) for p in line.split("L")] for line in lines]


def test_lines_lie_where_the_numbers_say():
    svg = line_chart({"a": [(0, 0), (5, 1), (10, 0.5)]}, "t", width=340, height=210)
    [points] = path_points(svg)
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(2 * (y2 - y1), abs=0.2)
    assert y0 == pytest.approx(176, abs=0.1)


def test_values_that_are_no_numbers_are_left_out():
    points = [(0, 1.0), (1, math.nan), (2, None), (3, math.inf), (4, 2.0)]
    assert path_points(line_chart({"a": points}, "t")) == path_points(
        line_chart({"a": [(0, 1.0), (4, 2.0)]}, "t")
    )
    assert "no data yet" in line_chart({"a": [(0, math.nan)]}, "t")


def test_smoothing_keeps_constants_and_hides_nothing():
    flat = [(i, 3.0) for i in range(200)]
    raw, smooth = path_points(line_chart({"a": flat}, "t"))
    assert {y for _, y in raw} == {y for _, y in smooth}
    spike = [(i, 100.0 if i == 1234 else 1.0) for i in range(5000)]
    raw, smooth = path_points(line_chart({"a": spike}, "t"))
    assert len(raw) < 500 and min(y for _, y in raw) < min(y for _, y in smooth) - 50


def test_bars_and_whiskers_have_the_right_heights():
    svg = bar_chart(["x"], {"a": [Estimate(0.5, 0.4, 0.6)], "b": [Estimate(1.0, 1.0, 1.0)]}, "t")
    a, b = (float(h) for h in re.findall(r'<rect[^>]* height="([\d.]+)"', svg))
    assert b == pytest.approx(2 * a, abs=0.2)
    whiskers = re.findall(
        r'y1="([\d.]+)" x2="[\d.]+" y2="([\d.]+)" stroke="var\(--ink,#1f2933\)"', svg
    )
    spans = [abs(float(p) - float(q)) for p, q in whiskers]
    assert spans[0] == pytest.approx(0.2 * b, abs=0.2)
    assert "x, a: 50.0% [40.0, 60.0]" in svg
    with pytest.raises(ValueError, match="a: 1 values for 2 categories"):
        bar_chart(["x", "y"], {"a": [Estimate(0.5)]}, "t")


def test_labels_of_points_end_within_the_chart():
    points = [(x / 10, x % 3, f"alpha {x / 10:g}, density 0.25") for x in range(11)]
    svg = scatter_chart(points, [10], "t", "general", "agent", chosen=10)
    label = re.compile(r'<text x="([\d.]+)"[^>]*text-anchor="(\w+)"[^>]*>(alpha[^<]*)</text>')
    found = label.findall(svg)
    assert len(found) == len(points) and {anchor for _, anchor, _ in found} == {"start", "end"}
    for x, anchor, text in found:
        end = float(x) + (6.2 * len(text) if anchor == "start" else 0)
        assert end <= 460 and end - 6.2 * len(text) >= 0


def test_names_are_escaped():
    evil = '<script>&"'
    for svg in (
        line_chart({evil: [(0, 1), (1, 2)], "b": [(0, 1)]}, evil),
        bar_chart([evil], {evil: [Estimate(0.5)]}, evil),
    ):
        assert "<script" not in svg and 'aria-label="&lt;script&gt;&amp;&quot;"' in svg
