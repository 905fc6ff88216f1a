from __future__ import annotations

import json
from pathlib import Path

import pytest

from agentcpm_jax.tasks.jsonl import load_tasks
from agentcpm_jax.tasks.schemas import ANSWERS, OTHER_ANSWERS, OTHER_QUESTIONS, QUESTIONS
from agentcpm_jax.tasks.world import WorldTasks
from agentcpm_jax.types import UserError

ASKED = [{"role": "user", "content": "Who?"}]
GOOD = {"question": "Who?", "answers": ["Kar Vel"]}


def test_world_tasks_survive_the_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    tasks = WorldTasks(worlds=3, hops=(1, 2, 3)).take(9)
    path.write_text("".join(json.dumps(task.to_json()) + "\n" for task in tasks))
    loaded, report = load_tasks(path)
    assert loaded == tasks
    assert (report.lines, report.loaded, report.bad, report.duplicates) == (9, 9, (), ())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"question": "Who?", "answ', "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "not a JSON object but list"),
        (b'{"answers": ["x"]}', "question must be a string, not missing"),
        (b'{"question": " ", "answers": ["x"]}', "question is empty"),
        (b'{"question": "Who?", "answers": []}', "'Who\\?' has no answers"),
        (b'{"question": "Who?"}', "'Who\\?' has no answers"),
        (b'{"question": "Who?", "answers": [true]}', r"answers\[0\]: .*text or a number, not bool"),
        (b'{"question": "Who?", "answers": {"a": 1}}', "text or a number, not dict"),
        (b'{"question": "Who?", "answers": ["a", " "]}', r"answers\[1\]: an answer is empty"),
        (b'{"question": "Who?", "answer": NaN}', "answer is nan"),
        (b'{"question": "Who?", "problem": "What?", "answer": "x"}', "ask different things"),
        (b'{"question": "Who?", "answers": ["x"], "answer": "y"}', "different answers"),
        (b'{"question": "a\\u0000", "answers": ["x"]}', "NUL"),
        (b'{"question": "Who?", "answers": ["x"], "meta": 1}', "meta must be an object"),
        (b'{"question": "\\ud800", "answers": ["x"]}', "lone surrogate"),
        (b'{"question": "Who?", "answers": ["x"], "kind": 1}', "kind must be a string, not int"),
    ],
)
def test_a_bad_line_is_named_or_left_out(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(UserError, match=f"{path}, line 3: .*{message}"):
        load_tasks(path)
    tasks, report = load_tasks(path, skip_bad=True)
    assert [t.question for t in tasks] == ["Who?"]
    assert len(report.bad) == 1 and report.bad[0].startswith("line 3: ")
    assert (report.lines, report.loaded) == (2, 1)


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        *(({"question": "Who?", name: "x"}, ("x",)) for name in ANSWERS[:4] + OTHER_ANSWERS),
        *(({name: "Who?", "answer": "x"}, ("x",)) for name in QUESTIONS + OTHER_QUESTIONS),
        ({"question": "Who?", "answer": "x", "label": "hard"}, ("x",)),
        ({"question": "Who?", "answers": ["x", 2.0], "ground_truth": "x"}, ("x", "2")),
        ({"prompt": ASKED, "reward_model": {"ground_truth": {"target": ["x"]}}}, ("x",)),
        ({"prompt": json.dumps(ASKED), "reward_model": '{"ground_truth": "x"}'}, ("x",)),
        (
            {"question": "Who?", "prompt": [{"role": "user", "content": "Say: Who?"}], "gt": 3},
            ("3",),
        ),
    ],
)
def test_columns_have_usual_names(tmp_path: Path, row: dict, answers: tuple[str, ...]) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps({**row, "level": 2}))
    (task,) = load_tasks(path)[0]
    assert (task.question, task.answers, task.meta["level"]) == ("Who?", answers, 2)
    assert task.meta.get("label") == (row.get("label") if "answer" in row else None)


@pytest.mark.parametrize("label", [{"answer": None}, {"answers": []}])
def test_a_column_beside_an_empty_answer_is_not_taken_for_one(tmp_path: Path, label: dict) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps({"question": "Who?", "label": "hard", **label}))
    with pytest.raises(UserError, match="has no answers"):
        load_tasks(path)


def test_duplicates_are_kept_once_and_reported(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    rows = [GOOD, {**GOOD, "kind": "hop1"}, {**GOOD, "meta": {"note": "differs"}}]
    path.write_text("\n".join(json.dumps(r) for r in rows))
    tasks, report = load_tasks(path)
    assert [t.kind for t in tasks] == ["qa", "hop1"]
    assert report.duplicates == (f"line 3: same task as line 1 (uid {tasks[0].uid})",)


def test_a_missing_or_empty_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file: .*absent\.jsonl"):
        load_tasks(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"empty\.jsonl is empty: it holds no usable record"):
        load_tasks(tmp_path / "empty.jsonl")
