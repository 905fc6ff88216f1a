"""Rewards, judges and tools that a config names: found at the start, or named in one line."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agentcpm_jax.config import EvalStage, ExperimentConfig, MergeStage, RLStage, Stage
from agentcpm_jax.dock.functions import NoTools, schema_of, with_functions
from agentcpm_jax.rewards.grade import score
from agentcpm_jax.rewards.judge import JudgeConfig
from agentcpm_jax.run.custom import check_custom, load_function, make_reward, make_tools
from agentcpm_jax.run.sampling import check_held_out, make_run_sample
from agentcpm_jax.types import (
    StopReason,
    Task,
    ToolCall,
    ToolStatus,
    Trajectory,
    Turn,
    UserError,
    Verdict,
)
from tests.rollout.scripted_episode import CFG, CHAT, Says

ROOT = Path(__file__).resolve().parents[2]
TASK = Task("What is 6 times 7?", ("42",), meta={"relations": ["r"]})
GRADER = "experiments.custom_reward:short_and_right"
TOOL = "experiments.custom_reward:multiply"


def answered(answer: str | None, calls: int = 0) -> Trajectory:
    turns = tuple(Turn(0, 0, 0, 0, calls=(ToolCall("search", {}),)) for _ in range(calls))
    return Trajectory((), turns, StopReason.ANSWERED, answer=answer)


def graded(grader: str, trajectory: Trajectory, deadline: float = 5.0) -> Trajectory:
    reward = make_reward(grader, JudgeConfig(), None)
    return asyncio.run(score(trajectory, TASK, reward, deadline))


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's, in the working directory."""
    source = """
import threading, time
from agentcpm_jax.types import Verdict
waiting = threading.Event()
threads = []
def plain(task, trajectory):
    threads.append(threading.current_thread().name)
    return trajectory.answer in task.answers
async def later(task, trajectory): return Verdict.RIGHT
def failing(task, trajectory): return 1 / 0
def hanging(task, trajectory): waiting.wait()
def alone(trajectory): return 1.0
def greedy(task, trajectory, more): return 1.0
constant = 3
def untyped(x):
    "A tool."
def undocumented(x: int): return x
def search(query: str):
    "Poses as the world's tool."
def lookup(word: str, times: int = 1):
    "Look a word up."
    if word == "crash": raise ValueError("no such word")
    if word == "lost": raise ConnectionResetError("gone")
    if word == "hang": waiting.wait()
    return [word] * times
"""
    (tmp_path / "user_code.py").write_text(source)
    (tmp_path / "broken_code.py").write_text("import no_such_library_at_all\n")
    (tmp_path / "raising_code.py").write_text("raise RuntimeError('at import')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "user_code"
    if "user_code" in sys.modules:
        sys.modules["user_code"].waiting.set()
    for name in ("user_code", "broken_code", "raising_code"):
        sys.modules.pop(name, None)


# ---------------------------------------------------------------------------------- the example


@pytest.fixture
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.usefixtures("in_the_checkout")
@pytest.mark.parametrize(
    ("answer", "calls", "reward"),
    [("42", 0, 1.0), ("42.", 2, 1.0), ("42", 4, 0.9), ("42", 99, 0.6), ("41", 1, 0), (None, 1, 0)],
)
def test_the_example_reward(answer, calls, reward):
    got = graded(GRADER, answered(answer, calls))
    assert got.reward == pytest.approx(reward)
    assert got.verdict is (Verdict.RIGHT if reward else Verdict.WRONG)
    assert len((ROOT / "experiments" / "custom_reward.py").read_text().splitlines()) <= 25


@pytest.mark.usefixtures("in_the_checkout")
def test_the_example_tool_is_called_by_an_episode_and_rewarded():
    open_tools, schemas = make_tools((TOOL,))
    assert [s["function"]["name"] for s in schemas] == ["search", "visit", "multiply"]
    call = '<tool_call>\n{"name": "multiply", "arguments": {"a": 6, "b": 7}}\n</tool_call>'
    says = Says(call, "<answer>42</answer>")
    reward = make_reward(GRADER, JudgeConfig(), None)
    run = make_run_sample(says.policy, CHAT, CFG, open_tools, seed=0, reward=reward)
    done = asyncio.run(run(TASK, 1, 0, 0))
    (result,) = done.turns[0].results
    assert (result.status, result.content) == (ToolStatus.OK, "42")
    assert done.reward == 1.0
    shown = CHAT.decode(done.segments[0].ids[: done.turns[0].sample_start])
    assert '"description": "Multiply two numbers."' in shown


# -------------------------------------------------------------------------------------- rewards


def test_words_of_the_config():
    assert graded("exact", answered("42")).verdict is Verdict.RIGHT
    assert graded("numeric", answered("42.0")).verdict is Verdict.RIGHT
    assert graded("exact", answered("42.0")).verdict is Verdict.WRONG
    assert graded("list", answered("4, 2")).verdict is Verdict.WRONG


def test_plain_functions_run_outside_the_event_loop(user_module):
    assert graded("user_code:plain", answered("42")).reward == 1.0
    assert sys.modules["user_code"].threads == ["plain"]
    assert graded("user_code:later", answered("")).verdict is Verdict.RIGHT


def test_what_a_users_reward_raises_is_no_verdict(user_module):
    got = graded("user_code:failing", answered("42"))
    assert (got.stop, got.reward) == (StopReason.JUDGE_ERROR, None)
    assert got.error == "ZeroDivisionError: division by zero"


def test_a_reward_that_hangs_holds_neither_the_loop_nor_the_process(user_module):
    got = graded("user_code:hanging", answered("42"), deadline=0.05)  # the loop ends although...
    assert got.stop is StopReason.JUDGE_ERROR and "no verdict within 0.05 s" in got.error
    (left,) = [t for t in threading.enumerate() if t.name == "hanging"]  # ...this still waits
    assert left.daemon
    sys.modules["user_code"].waiting.set()
    left.join(5)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("exat", r"grader='exat': did you mean 'exact'\? use exact, .*package\.module:function"),
        ("user_code.plain", "use exact, numeric, list, set, judge, package.module:function"),
        (":plain", "use exact"),
        ("no_such_module:plain", "no module 'no_such_module'; start in its folder or .*PYTHONPATH"),
        ("user_code.inner:plain", "no module 'user_code.inner'"),
        ("broken_code:plain", "imports 'no_such_library_at_all', which is missing; install it"),
        ("raising_code:plain", "fails when imported: RuntimeError: at import"),
        ("user_code:plane", r"no function 'plane'; did you mean 'plain'\?"),
        ("user_code:constant", "no function 'constant'; it has"),
        ("user_code:alone", r"takes \(trajectory\), it is called with \(task, trajectory\)"),
        ("user_code:greedy", r"missing a required argument: 'more'.*change its parameters"),
    ],
)
def test_a_wrong_name_is_told_in_one_line(user_module, path, message):
    with pytest.raises(UserError, match=message) as caught:
        make_reward(path, JudgeConfig(), None)
    assert "\n" not in str(caught.value) and f"grader={path!r}" in str(caught.value)


def test_everything_named_is_checked_before_the_first_stage(user_module):
    sound = ExperimentConfig(stages=(Stage("rl", RLStage()),))
    check_custom(sound)
    late = Stage("eval", EvalStage(grader="user_code:gone"))
    with pytest.raises(UserError, match="no function 'gone'"):
        check_custom(replace(sound, stages=(*sound.stages, late)))
    measured = replace(EvalStage(), grader="exakt")
    chosen = Stage("merge", MergeStage(alpha=(0.5, 0.8), validation=measured))
    with pytest.raises(UserError, match="did you mean 'exact'"):
        check_custom(replace(sound, stages=(*sound.stages, chosen)))
    check_custom(replace(sound, stages=(Stage("merge", MergeStage(validation=measured)),)))
    with pytest.raises(UserError, match="tools='user_code:gone'"):
        check_custom(replace(sound, tools=("user_code:gone",)))


def test_questions_that_are_evaluated_are_not_trained(tmp_path: Path):
    """The original's training example points at its evaluation set."""

    def tasks(name: str, *questions: str) -> str:
        rows = [json.dumps({"question": q, "answers": ["x"]}) for q in questions]
        (tmp_path / name).write_text("\n".join(rows))
        return str(tmp_path / name)

    ours, theirs = tasks("train.jsonl", "What is it?", "Who?"), tasks("gaia.jsonl", "who ?", "WHO?")
    rl = Stage("rl", RLStage(tasks_path=ours))
    evaluated = Stage("eval", EvalStage(tasks_path=theirs))
    with pytest.raises(UserError, match=r"1 questions of .*train\.jsonl.*'Who\?'; take them out"):
        check_held_out(ExperimentConfig(stages=(rl, evaluated)))
    check_held_out(ExperimentConfig(stages=(rl,)))


# ---------------------------------------------------------------------------------------- tools


def called(function: Any, name: str, arguments: dict[str, Any], deadline: float = 5.0):
    async def run():
        async def nothing(meta, key):
            return NoTools()

        box = await with_functions(nothing, [function], deadline)({}, (0, 0, 0))
        try:
            return await box.call(name, arguments)
        finally:
            await box.close()

    return asyncio.run(run())


def test_the_schema_is_the_signature():
    def weigh(names: list[str], scale: float, exact: bool = False, limit: int = 3) -> str:
        """Weigh things.

        Only the first line is shown.
        """
        return ""

    assert schema_of(weigh)["function"] == {
        "name": "weigh",
        "description": "Weigh things.",
        "parameters": {
            "type": "object",
            "properties": {
                "names": {"type": "array", "items": {"type": "string"}},
                "scale": {"type": "number"},
                "exact": {"type": "boolean"},
                "limit": {"type": "integer"},
            },
            "required": ["names", "scale"],
        },
    }


@pytest.mark.parametrize(
    ("arguments", "status", "content"),
    [
        ({"word": "é", "times": 2}, ToolStatus.OK, '["é", "é"]'),
        ({"word": "a"}, ToolStatus.OK, '["a"]'),
        ({}, ToolStatus.BAD_ARGUMENTS, "lookup needs the argument word"),
        ({"word": 3}, ToolStatus.BAD_ARGUMENTS, "lookup: word must be string, not int"),
        ({"word": "a", "times": True}, ToolStatus.BAD_ARGUMENTS, "times must be integer, not bool"),
        ({"word": "a", "time": 1}, ToolStatus.BAD_ARGUMENTS, "no argument time, it takes word"),
        ({"word": "crash"}, ToolStatus.TOOL_ERROR, "lookup: ValueError: no such word"),
        ({"word": "lost"}, ToolStatus.INFRA_ERROR, "lookup: ConnectionResetError: gone"),
        ({"word": "hang"}, ToolStatus.INFRA_ERROR, "no result within 0.5 s"),
    ],
)
def test_what_a_function_says_as_a_tool(user_module, arguments, status, content):
    lookup = load_function("user_code:lookup", "tools")
    result = called(lookup, "lookup", arguments, deadline=0.5)
    assert result.status is status and content in result.content


def test_other_tools_are_the_inner_toolboxs(user_module):
    lookup = load_function("user_code:lookup", "tools")
    assert called(lookup, "search", {}).content == "no tool named search"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("user_code:untyped",), "tool untyped: parameter x needs an annotation of str, int"),
        (("user_code:undocumented",), "tool undocumented has no docstring"),
        (("user_code:search",), "of search, visit, search two have the same name"),
        (("user_code",), "tools='user_code': use package.module:function"),
    ],
)
def test_what_cannot_be_a_tool_is_told_in_one_line(user_module, names, message):
    with pytest.raises(UserError, match=message):
        make_tools(names)
