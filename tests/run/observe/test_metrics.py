"""Metric files of resumed runs equal those of uninterrupted ones."""

from __future__ import annotations

import json

import numpy as np

from agentcpm_jax.run.observe.metrics import MetricsWriter, read_metrics, series


def test_later_steps_and_torn_lines_are_removed_on_reopening(tmp_path) -> None:
    path = tmp_path / "stage" / "metrics.jsonl"
    writer = MetricsWriter(path)
    for step in range(1, 6):
        writer.write(step, {"train/loss": float(step)})
    with path.open("a") as file:
        file.write('{"step": 6, "train/lo')  # killed while writing
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5]
    again = MetricsWriter(path, start_step=3)
    again.write(4, {"train/loss": 40.0})
    assert series(path) == {"train/loss": [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]}


def test_what_is_no_row_is_left_out_and_the_curve_goes_on(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write(1, {"train/loss": 1.0})
    whole = path.read_bytes()
    torn = b'garbage\n[1]\n5\n{"nostep": 1}\n{"step": "x"}\n{"step": 2, "a": []}\n\xff\xfe\0'
    path.write_bytes(whole + torn)
    writer.write(2, {"train/loss": 2.0})  # on a line of its own
    assert series(path) == {"train/loss": [(1, 1.0), (2, 2.0)]}
    assert [row["step"] for row in MetricsWriter(path, start_step=1).kept] == [1]
    assert path.read_bytes() == whole


def test_values_are_json_numbers_or_null(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsWriter(path).write(1, {"b": np.float32(0.5), "a": float("nan"), "c": np.int64(3)})
    assert json.loads(path.read_text()) == {"step": 1, "a": None, "b": 0.5, "c": 3}
    assert series(path) == {"b": [(1, 0.5)], "c": [(1, 3)]}
