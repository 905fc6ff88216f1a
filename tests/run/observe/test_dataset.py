"""Data that were edited since a stage began are noticed; going on with them is on record."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agentcpm_jax.config import EvalStage, RLStage, Stage
from agentcpm_jax.data.examine import Examined
from agentcpm_jax.evaluate.report.page import Marked, ReportData, render
from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.run.observe.dataset import announce_data, announce_tasks, data_tables
from agentcpm_jax.types import Task, UserError


def data(*digests: str) -> Examined:
    dropped = (("bad", "line 3: not JSON"),)
    pieces = (("q", False), ("a", True))
    return Examined("d.jsonl", len(digests), dropped, (4, 6), 5, (), digests, pieces)


def begun(folder: Path) -> None:
    announce_data(folder, data("x", "y"), lambda line: None)
    (folder / "checkpoints" / "1").mkdir(parents=True)


@pytest.mark.parametrize(
    ("now", "says"),
    [
        (("x", "z"), "row 2 of d.jsonl is not what it was"),
        (("y", "x"), "row 1 of d.jsonl is not what it was"),
        (("x", "y", "z"), "1 rows were appended to d.jsonl"),
        (("x",), "1 of 2 rows are gone from d.jsonl"),
    ],
)
def test_edited_data_are_refused_or_noted(tmp_path: Path, now: tuple[str, ...], says: str) -> None:
    begun(tmp_path)
    with pytest.raises(UserError, match=f"{says}.*--accept_data"):
        announce_data(tmp_path, data(*now), lambda line: None)
    announce_data(tmp_path, data(*now), lambda line: None, accept=True)
    announce_data(tmp_path, data(*now), lambda line: None)  # these are the stage's data now
    assert says in data_tables(tmp_path)[0].note


def test_the_same_data_go_on_and_a_stage_without_a_checkpoint_begins_anew(tmp_path: Path) -> None:
    announce_data(tmp_path, data("x"), lambda line: None)
    announce_data(tmp_path, data("y"), lambda line: None)
    begun(tmp_path)
    said: list[str] = []
    announce_data(tmp_path, data("x", "y"), said.append)
    assert said[0] == "2 of 3 records of d.jsonl are used; dropped: 1 bad"


@pytest.mark.parametrize(
    ("spec", "logged"),
    [(EvalStage(("model",)), "held_out/model/sampled"), (RLStage(), "held_out")],
)
def test_tasks_that_were_edited_are_noticed_once_the_log_has_an_episode(
    tmp_path: Path, spec: EvalStage | RLStage, logged: str
) -> None:
    """An evaluation has no checkpoints: its results would be of two sets of tasks."""
    file = tmp_path / "tasks.jsonl"
    spec = replace(spec, tasks_path=str(file))
    stage = Stage("held_out", spec)

    def start(question: str, accept: bool = False) -> None:
        file.write_text(json.dumps({"question": question, "answer": "a"}) + "\n")
        with ExperienceLog.open(tmp_path / "log.db") as log:
            ctx: Any = SimpleNamespace(
                directory=lambda stage: tmp_path, log=log, announce=print, accept_data=accept
            )
            announce_tasks(ctx, stage, spec)

    start("q")
    start("another")  # nothing was done with the first
    with ExperienceLog.open(tmp_path / "log.db") as log:
        log.issue(logged, "eval", Task("another", ("a",)), 0, 0)
    with pytest.raises(UserError, match=r"row 1 of .* --accept_data"):
        start("q")
    start("q", accept=True)
    assert "Resumed with other data: row 1" in data_tables(tmp_path)[0].note


def test_the_report_has_the_same(tmp_path: Path) -> None:
    assert data_tables(tmp_path) == []
    begun(tmp_path)
    records, dropped, example = data_tables(tmp_path)
    assert records.rows == (("kept", 2), ("bad", 1))
    assert dropped.rows == (("bad", "line 3: not JSON"),)
    assert "50% of them trained; a row has 4 to 6" in records.note
    assert example.rows == ((Marked((("q", False), ("a", True))),),)
    page = render(ReportData("t", tables=(example,)))
    assert '<pre class="marked">q<mark>a</mark></pre>' in page


def test_of_many_dropped_records_the_report_shows_some_and_counts_the_rest(tmp_path: Path) -> None:
    dropped = tuple(("bad", f"line {i}: not JSON") for i in range(3000))
    announce_data(tmp_path, Examined("d.jsonl", 1, dropped, digests=("x",)), lambda line: None)
    records, shown = data_tables(tmp_path)
    assert records.rows == (("kept", 1), ("bad", 3000))
    assert len(shown.rows) == 21 and "2,980 more" in str(shown.rows[-1])
