"""Evaluation is durable: finished tasks stay finished, unknown samples are asked again."""

from __future__ import annotations

import asyncio

import numpy as np

from agentcpm_jax.evaluate.runner import evaluate, task_scores
from agentcpm_jax.evaluate.skills import skill_documents, skill_scores
from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.rollout.policy import Scripted
from agentcpm_jax.types import StopReason, Task, Trajectory, Verdict

TASKS = [Task(f"q{i}", ("a",), kind=f"hop{1 + i % 2}") for i in range(6)]


class Player:
    """Right on even samples; the first attempt of sample 1 has no verdict; counts its calls."""

    def __init__(self, hopeless: str = "") -> None:
        self.calls: list[tuple[str, int, int]] = []
        self.hopeless = hopeless

    async def __call__(self, task: Task, issue_id: int, sample: int, attempt: int) -> Trajectory:
        self.calls.append((task.question, sample, attempt))
        await asyncio.sleep(0)
        if task.question == self.hopeless or (sample == 1 and attempt == 0):
            verdict, stop = Verdict.UNKNOWN, StopReason.INFRA_ERROR
        else:
            verdict = Verdict.RIGHT if sample % 2 == 0 else Verdict.WRONG
            stop = StopReason.ANSWERED
        reward = {Verdict.RIGHT: 1.0, Verdict.WRONG: 0.0}.get(verdict)
        return Trajectory((), (), stop, issue_id, sample, attempt, verdict=verdict, reward=reward)


def play(log: ExperienceLog, player: Player, tasks=TASKS):
    return asyncio.run(evaluate(tasks, player, log, "eval/m", samples=4, concurrency=3))


def test_scores_and_retries(tmp_path) -> None:
    with ExperienceLog.open(tmp_path / "log.db") as log:
        player = Player(hopeless="q5")
        scores = play(log, player)
        assert [(s.n, s.c, s.unknown) for s in scores] == [(4, 2, 0)] * 5 + [(0, 0, 4)]
        assert [s.kind for s in scores] == ["hop1", "hop2"] * 3
        assert [s.uid for s in scores] == [t.uid for t in TASKS]
        retries = [c for c in player.calls if c[2] > 0 and c[0] != "q5"]
        assert sorted(retries) == [(f"q{i}", 1, 1) for i in range(5)]


def test_a_finished_task_is_not_run_again(tmp_path) -> None:
    path = tmp_path / "log.db"
    with ExperienceLog.open(path) as log:
        before = play(log, Player(), TASKS[:4])
    with ExperienceLog.open(path) as log:
        again = Player()
        after = play(log, again)
        assert after[:4] == before and len(after) == 6
        assert {c[0] for c in again.calls} == {"q4", "q5"}
        assert task_scores(log, "eval/m") == after


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
