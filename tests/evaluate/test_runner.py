"""Evaluation is durable: what has a verdict is never asked again, what has none always is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agentcpm_jax.chat.format import ChatFormat
from agentcpm_jax.dock.functions import NoTools, with_functions
from agentcpm_jax.evaluate import outage
from agentcpm_jax.evaluate.passk import TaskScore
from agentcpm_jax.evaluate.runner import evaluate, task_scores
from agentcpm_jax.evaluate.skills import skill_documents, skill_scores
from agentcpm_jax.files import SHIPPED
from agentcpm_jax.hf.tokenizer import load_chat
from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.rewards.grade import Reward
from agentcpm_jax.rollout.config import EpisodeConfig
from agentcpm_jax.rollout.groups import BreakerOpen
from agentcpm_jax.rollout.policy import Completion, Finish, SampleRequest, Scripted
from agentcpm_jax.run.sampling import make_run_sample
from agentcpm_jax.types import StopReason, Task, Trajectory, UserError, Verdict
from tests.doubles.virtual_time import run_virtual

TASKS = [Task(f"q{i}", ("a",), kind=f"hop{1 + i % 2}") for i in range(6)]


class Player:
    """Right on even samples; the first attempt of sample 1 has no verdict; counts its calls.

    Args:
      hopeless: the question of a task that never has a verdict.
      away: [from, to) in seconds during which every call fails, by an exception.
    """

    def __init__(self, hopeless: str = "", away: tuple[float, float] = (0.0, 0.0)) -> None:
        self.calls: list[tuple[str, int, int]] = []
        self.hopeless, self.away = hopeless, away

    async def __call__(self, task: Task, issue_id: int, sample: int, attempt: int) -> Trajectory:
        self.calls.append((task.question, sample, attempt))
        await asyncio.sleep(1.0)
        if self.away[0] <= asyncio.get_running_loop().time() < self.away[1]:
            raise ConnectionError("connection refused")
        if task.question == self.hopeless or (sample == 1 and attempt == 0):
            verdict, stop = Verdict.UNKNOWN, StopReason.INFRA_ERROR
        else:
            verdict = Verdict.RIGHT if sample % 2 == 0 else Verdict.WRONG
            stop = StopReason.ANSWERED
        reward = {Verdict.RIGHT: 1.0, Verdict.WRONG: 0.0}.get(verdict)
        return Trajectory((), (), stop, issue_id, sample, attempt, verdict=verdict, reward=reward)


def play(
    log: ExperienceLog,
    player: Callable,
    tasks: Sequence[Task] = TASKS,
    announce: Callable[[str], None] = lambda line: None,
) -> list[TaskScore]:
    how = {"samples": 4, "concurrency": 3, "announce": announce}
    return run_virtual(evaluate(tasks, player, log, "eval/m", **how))


def test_scores_and_retries(tmp_path) -> None:
    with ExperienceLog.open(tmp_path / "log.db") as log:
        player = Player(hopeless="q5")
        scores = play(log, player)
        assert [(s.n, s.c, s.unknown) for s in scores] == [(4, 2, 0)] * 5 + [(0, 0, 4)]
        assert [s.lost for s in scores] == [0] * 5 + [4]
        assert [s.kind for s in scores] == ["hop1", "hop2"] * 3
        assert [s.uid for s in scores] == [t.uid for t in TASKS]
        retries = [c for c in player.calls if c[2] > 0 and c[0] != "q5"]
        assert set(retries) == {(f"q{i}", 1, 1) for i in range(5)}


def test_a_finished_task_is_not_run_again(tmp_path) -> None:
    path = tmp_path / "log.db"
    with ExperienceLog.open(path) as log:
        before = play(log, Player(), TASKS[:4])
    with ExperienceLog.open(path) as log:
        again = Player()
        after = play(log, again)
        assert after[:4] == before and len(after) == 6
        assert {c[0] for c in again.calls} == {"q4", "q5"}
        assert task_scores(TASKS, log, "eval/m", 4) == after


@pytest.mark.parametrize("seconds", [5.0, 250.0])
@pytest.mark.parametrize("begin", [0.0, 3.5])
def test_an_outage_changes_no_result(tmp_path, begin: float, seconds: float) -> None:
    lines: list[str] = []
    quiet_log, log = (ExperienceLog.open(tmp_path / f"{n}.db") for n in range(2))
    with quiet_log as quiet, log:
        undisturbed = play(quiet, Player())
        assert play(log, Player(away=(begin, begin + seconds)), TASKS, lines.append) == undisturbed
    told = "no answers (infra_error: ConnectionError: connection refused); asking again, 300 s long"
    assert lines == [f"eval/m: {told}", "eval/m: answers again"]


def test_an_outage_that_lasts_stops_the_evaluation_which_goes_on_later(tmp_path) -> None:
    with ExperienceLog.open(tmp_path / "log.db") as log:
        first = Player(away=(10.0, 1e9))
        with pytest.raises(BreakerOpen, match=r"no answer for 3\d\d s; .* connection refused"):
            play(log, first)
        lines: list[str] = []
        second = Player()
        scores = play(log, second, TASKS, lines.append)
        assert [(s.n, s.c, s.unknown) for s in scores] == [(4, 2, 0)] * 6
        assert len(second.calls) < 24 + 6, "what had a verdict was not asked again"
        assert lines[0].startswith("eval/m: ") and "of 6 tasks have their results" in lines[0]


def test_what_fails_alone_is_given_up_and_asked_again_by_the_next_call(tmp_path) -> None:
    """Also where nothing else is left to ask: one that had a verdict is asked once more."""
    with ExperienceLog.open(tmp_path / "log.db") as log:
        play(log, Player(hopeless="q0"))
        again = Player(hopeless="q0")
        scores = play(log, again)
        assert [s.lost for s in scores] == [4, 0, 0, 0, 0, 0]
        others = [question for question, _, _ in again.calls if question != "q0"]
        assert 0 < len(others) <= 4 and len(set(others)) == 1, "the witness alone"
        assert [s.lost for s in play(log, Player())] == [0] * 6
        assert log.issues("eval/m", "eval", ["issued"]) == []


def test_one_failure_among_long_episodes_is_no_outage(tmp_path) -> None:
    async def long(task: Task, issue_id: int, sample: int, attempt: int) -> Trajectory:
        if task.question == "q0":
            raise ConnectionError("refused")
        await asyncio.sleep(1000.0)
        return Trajectory((), (), StopReason.ANSWERED, verdict=Verdict.RIGHT, reward=1.0)

    with ExperienceLog.open(tmp_path / "log.db") as log:
        assert [s.lost for s in play(log, long)] == [4, 0, 0, 0, 0, 0]


def test_results_belong_to_tasks_and_not_to_places(tmp_path) -> None:
    with ExperienceLog.open(tmp_path / "log.db") as log:
        four = play(log, Player(), TASKS[:4])
        again = Player()
        assert play(log, again, TASKS[3::-1]) == four[::-1]
        assert play(log, again, TASKS[1:3]) == four[1:3]
        lines: list[str] = []
        longer = play(log, again, [TASKS[5], *TASKS[:3], TASKS[0]], lines.append)
        assert [s.uid for s in longer] == [t.uid for t in (TASKS[5], *TASKS[:3])]
        assert longer[1:] == four[:3] and {q for q, _, _ in again.calls} == {"q5"}
        assert lines == ["eval/m: 3 of 4 tasks have their results, 1 of other tasks are left out"]


def test_what_an_earlier_release_recorded_is_used_or_asked_again(tmp_path) -> None:
    """It found tasks by their place, and called a task without a verdict done."""
    with ExperienceLog.open(tmp_path / "log.db") as log:
        for place, task in enumerate(TASKS[:3]):
            issue_id = log.issue("eval/m", "eval", task, 0, place)
            for sample in range(4):
                answered = Trajectory((), (), StopReason.ANSWERED, issue_id, sample)
                if place == 1:
                    answered = replace(answered, stop=StopReason.INFRA_ERROR, attempt=3)
                else:
                    answered = replace(answered, verdict=Verdict.RIGHT, reward=1.0)
                log.record_trajectory(answered)
            log.finish_group(issue_id, "done")
        player, lines = Player(), list[str]()
        scores = play(log, player, TASKS[2::-1], lines.append)
        assert [(s.n, s.c, s.lost) for s in scores] == [(4, 4, 0), (4, 2, 0), (4, 4, 0)]
        assert {q for q, _, _ in player.calls} == {"q1"}
        assert lines == [
            "eval/m: 2 of 3 tasks have their results, 1 that ended without are asked again"
        ]


def test_further_samples_are_asked_of_tasks_that_were_done(tmp_path) -> None:
    with ExperienceLog.open(tmp_path / "log.db") as log:
        how = {"concurrency": 3, "samples": 2}
        run_virtual(evaluate(TASKS[:2], Player(), log, "eval/m", **how))
        more = Player()
        assert [s.n for s in play(log, more, TASKS[:2])] == [4, 4]
        assert {sample for _, sample, _ in more.calls} == {2, 3}
        assert [s.n for s in task_scores(TASKS[:2], log, "eval/m", 2)] == [2, 2]


def test_a_judge_that_abstains_is_asked_a_few_times_and_has_said_so(tmp_path) -> None:
    calls: list[int] = []

    async def abstains(task: Task, issue_id: int, sample: int, attempt: int) -> Trajectory:
        calls.append(sample)
        return Trajectory((), (), StopReason.ANSWERED, issue_id, sample, attempt)

    with ExperienceLog.open(tmp_path / "log.db") as log:
        (score,) = play(log, abstains, TASKS[:1])
        assert (score.n, score.unknown, score.lost) == (0, 4, 0)
        assert len(calls) == 4 * outage.ATTEMPTS
        assert play(log, abstains, TASKS[:1]) == [score]
        assert len(calls) == 4 * outage.ATTEMPTS


def test_a_users_mistake_ends_it_and_a_hanging_tool_costs_an_attempt(tmp_path) -> None:
    async def mistaken(*_: object) -> Trajectory:
        raise UserError("task meta has no world")

    async def hangs_once(task: Task, issue_id: int, sample: int, attempt: int) -> Trajectory:
        await asyncio.sleep(0.0 if attempt else 1e9)
        return Trajectory((), (), StopReason.ANSWERED, verdict=Verdict.RIGHT, reward=1.0)

    with ExperienceLog.open(tmp_path / "log.db") as log:
        with pytest.raises(UserError, match="no world"):
            play(log, mistaken)
        assert [s.c for s in play(log, hangs_once, TASKS[:1])] == [4]


# --- whole episodes: engine, tools and judge are away for five seconds ---------------------------


def episodes(chat: ChatFormat, down: Callable[[str], bool], seeds: list) -> Callable:
    """Run samples that look something up and answer it; `down` says which part is away."""

    async def lookup(title: str) -> str:
        """Look something up."""
        await asyncio.sleep(0.5)
        if down("tool"):
            raise ConnectionError("connection refused")
        return "Fin Sil"

    async def none(meta, key) -> NoTools:
        return NoTools()

    called = {"name": "lookup", "arguments": {"title": "x"}}
    call, right, wrong = (
        chat.assistant_ids({"role": "assistant", "content": content, "tool_calls": calls})
        for content, calls in (
            ("", [{"function": called}]),
            ("<answer>Fin Sil</answer>", []),
            ("<answer>no idea</answer>", []),
        )
    )

    class Policy(Scripted):
        async def sample(self, request: SampleRequest) -> Completion:
            await asyncio.sleep(0.1)
            seeds.append(request.params.seed)
            if down("server"):
                raise OSError("server disconnected")
            if down("engine"):
                empty = np.zeros(0, np.int32)
                return Completion(empty, np.zeros(0, np.float32), empty, Finish.ERROR, "gone")
            return await super().sample(request)

    def script(request: SampleRequest) -> np.ndarray:
        text = chat.decode(request.prompt_ids)
        if "<tool_response>\n" not in text:
            return call
        return right if "number 0" in text or "number 1 " in text else wrong

    async def judged(task: Task, trajectory: Trajectory) -> Verdict:
        await asyncio.sleep(0.1)
        if down("judge"):
            raise TimeoutError("no reply")
        return Verdict.RIGHT if trajectory.answer in task.answers else Verdict.WRONG

    reward: Reward = judged
    cfg = EpisodeConfig(max_context=3000, max_new_tokens=64, reserve=8)
    how = {"seed": 0, "reward": reward, "deadline": 30.0, "redraw": False}
    return make_run_sample(Policy(script), chat, cfg, with_functions(none, [lookup]), **how)


@pytest.mark.parametrize("part", ["tool", "server", "engine", "judge"])
def test_five_seconds_without_a_part_change_no_result(part: str, tmp_path: Path) -> None:
    chat = load_chat(SHIPPED["shipped:sft"])
    tasks = [Task(f"question number {i} ?", ("Fin Sil",)) for i in range(40)]
    found, drawn = [], []
    for away in (False, True):
        log, seeds = ExperienceLog.open(tmp_path / f"{away}.db"), []

        def down(asked: str, away: bool = away) -> bool:
            return away and asked == part and 5.0 <= asyncio.get_running_loop().time() < 10.0

        run_sample = episodes(chat, down, seeds)
        how = {"samples": 1, "concurrency": 4}
        with log:
            found.append(run_virtual(evaluate(tasks, run_sample, log, "eval/m/greedy", **how)))
        drawn.append(set(seeds))
    assert found[0] == found[1] and sum(s.c for s in found[0]) == 2
    assert drawn[0] == drawn[1], "further attempts draw the same tokens"


def test_skills_compare_greedy_completions_exactly() -> None:
    documents = skill_documents(5)

    def encode(text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    answers = {encode(d.page + d.prompt).tobytes(): encode(d.answer) for d in documents}

    def script(request):
        assert request.params.temperature == 0.0
        answer = answers[request.prompt_ids.tobytes()]
        return answer[::-1] if b"sort" in bytes(request.prompt_ids.astype(np.uint8)) else answer

    scores = asyncio.run(skill_scores(Scripted(script), encode, documents))
    assert {k: sum(v) for k, v in scores.items()} == {"recall": 5, "sort": 0, "add": 5}


@pytest.mark.parametrize("until", [5.0, 1e9])
def test_an_engine_that_is_away_makes_no_skill_wrong(until: float) -> None:
    documents = skill_documents(2)
    raised = iter([True, False] * 10_000)

    def encode(text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    answers = {encode(d.page + d.prompt).tobytes(): encode(d.answer) for d in documents}

    class Away(Scripted):
        async def sample(self, request: SampleRequest) -> Completion:
            if asyncio.get_running_loop().time() >= until:
                return await super().sample(request)
            if next(raised):
                raise OSError("connection refused")
            empty = np.zeros(0, np.int32)
            return Completion(empty, np.zeros(0, np.float32), empty, Finish.ERROR, "gone")

    policy = Away(lambda request: answers[request.prompt_ids.tobytes()])
    if until > 1e6:
        with pytest.raises(BreakerOpen, match=r"skills: no answer for 3\d\d s"):
            run_virtual(skill_scores(policy, encode, documents))
    else:
        scores = run_virtual(skill_scores(policy, encode, documents))
        assert scores == {"recall": [True] * 2, "sort": [True] * 2, "add": [True] * 2}
