"""An eval stage goes on after outages and edits of its tasks, and asks only what is missing."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from agentcpm_jax.config import EvalStage, ExperimentConfig, from_config_dict, stage_dict
from agentcpm_jax.evaluate import outage
from agentcpm_jax.files import SHIPPED
from agentcpm_jax.run.evaluation import _is_whole
from agentcpm_jax.run.stages import run_experiment
from agentcpm_jax.types import Task, UserError
from configs.tiny import TEST_ENGINE, recipe

#: A judge whose verdict depends on the task alone, and which can be away.
JUDGE = """
import time
asked, away, broken = [], [], ""
async def verdict(task, trajectory):
    asked.append((task.question, trajectory.sample))
    if len(asked) == 6:
        away.append(time.monotonic() + 5.0)
    if (away and time.monotonic() < away[0]) or task.question == broken:
        raise ConnectionError("connection refused")
    return task.answers == ("yes",)
def lookup(title: str) -> str:
    "Look something up."
    return "nothing"
"""


def rows(*tasks: str) -> str:
    answers = {name: "yes" if int(name[1:]) % 2 else "no" for name in tasks}
    return "".join(
        json.dumps({"question": f"question {name} ?", "answers": [answer]}) + "\n"
        for name, answer in answers.items()
    )


@pytest.mark.runs
def test_a_stage_with_outages_and_edited_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "judge_away.py").write_text(JUDGE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    judge = importlib.import_module("judge_away")
    cfg, workdir, lines = config(tmp_path), tmp_path / "run", list[str]()
    start = partial(run_experiment, cfg, workdir, announce=lines.append)
    shutil.copytree(SHIPPED["shipped:sft"], workdir / "sft" / "hf")
    done = {"stage": "sft", "kind": "sft", "seconds": 1.0}
    (workdir / "sft" / "DONE").write_text(json.dumps(done))

    (tmp_path / "tasks.jsonl").write_text(rows("t0", "t1", "t2", "t3"))
    began = time.monotonic()
    start()
    assert judge.away and judge.away[0] < time.monotonic() and began < judge.away[0]
    assert scores(workdir) == {"t0": (2, 0, 0), "t1": (2, 2, 0), "t2": (2, 0, 0), "t3": (2, 2, 0)}
    assert (workdir / "eval" / "DONE").exists()

    # Another order, one task less and one more, which the judge cannot judge.
    monkeypatch.setattr(outage, "GRACE", 0.5)
    monkeypatch.setattr(outage, "FIRST_PAUSE", 0.1)
    (workdir / "eval" / "DONE").unlink()
    (tmp_path / "tasks.jsonl").write_text(rows("t5", "t3", "t2", "t1"))
    judge.asked.clear()
    judge.broken = "question t5 ?"
    with pytest.raises(UserError, match=r"tasks\.jsonl is not what it was"):
        start()
    start(accept_data=True)
    known = {question for question, _ in judge.asked} - {judge.broken}
    assert len(known) <= 1, "one that had a verdict bears witness; nothing else is asked again"
    assert list(scores(workdir)) == ["t5", "t3", "t2", "t1"]
    assert scores(workdir)["t5"] == (0, 0, 2)
    summary = json.loads((workdir / "summary.json").read_text())["eval"]["sft"]
    assert [summary["sampled"][key] for key in ("tasks", "asked")] == [3, 4]
    assert "sft, greedy: 3 of 4 tasks, 3 of 4 samples have a verdict; " in "\n".join(lines)
    assert "Over fewer tasks than were asked: sft 3 of 4." in (workdir / "report.html").read_text()
    assert not (workdir / "eval" / "DONE").exists()

    judge.broken = ""
    judge.asked.clear()
    start()
    assert {question for question, _ in judge.asked} == {"question t5 ?"}
    assert scores(workdir)["t5"] == (2, 2, 0) and (workdir / "eval" / "DONE").exists()
    sys.modules.pop("judge_away")


def config(tmp_path: Path) -> ExperimentConfig:
    c = recipe()
    c.stages = ("sft", "eval")
    c.tools = ("judge_away:lookup",)
    c.episode.max_turns = 2
    c.stage.sft = stage_dict("sft", "shipped:base")
    c.stage.eval = stage_dict(
        "eval",
        **vars(
            EvalStage(
                models=("sft",),
                tasks_path=str(tmp_path / "tasks.jsonl"),
                tasks=4,
                samples=2,
                k=(1, 2),
                skill_tasks=1,
                grader="judge_away:verdict",
                engine=TEST_ENGINE,
            )
        ),
    )
    return from_config_dict(c, tmp_path / "run")


def scores(workdir: Path) -> dict[str, tuple[int, int, int]]:
    """Name of the task -> (graded, right, lost) of the sampled attempts."""
    names = {Task(f"question t{i} ?", (a,)).uid: f"t{i}" for i in range(9) for a in ("yes", "no")}
    found = json.loads((workdir / "eval" / "sft.json").read_text())["sampled"]
    return {names[row["uid"]]: (row["n"], row["c"], row["lost"]) for row in found}


TASKS = [Task("a", ("1",)), Task("b", ("1",))]
SPEC = EvalStage(samples=2)


def results(**changes: Any) -> dict[str, Any]:
    def some(n: int) -> list[dict[str, Any]]:
        row = {"n": n, "c": 0, "unknown": 0, "lost": 0}
        return [row | {"uid": task.uid} for task in TASKS]

    found = {"sampled": some(2), "greedy": some(1)}
    found["greedy"][0] |= changes
    return found


@pytest.mark.parametrize(
    ("found", "tasks", "brief", "whole"),
    [
        ({}, [], False, False),
        (results(), TASKS, False, True),
        (results(), TASKS[::-1], False, True),
        (results(), TASKS[:1], False, False),
        (results(), [*TASKS, Task("c", ("1",))], False, False),
        ({"greedy": results()["greedy"]}, TASKS, False, False),
        ({"greedy": results()["greedy"]}, TASKS, True, True),
        (results(n=0, unknown=1, lost=1), TASKS, False, False),
        (results(n=0, unknown=1), TASKS, False, True),  # the judge abstained
        (results(n=0), TASKS, False, False),
    ],
)
def test_what_is_on_disk_is_used_where_it_is_whole(
    found: dict[str, Any], tasks: list[Task], brief: bool, whole: bool
) -> None:
    assert _is_whole(found, tasks, SPEC, brief=brief) == whole


def test_results_of_an_earlier_release_without_a_verdict_are_asked_again() -> None:
    old = results(n=0, unknown=1)
    for row in [*old["sampled"], *old["greedy"]]:
        del row["lost"]
    assert not _is_whole(old, TASKS, SPEC, brief=False)
