"""Verdicts and rewards: what is right, what is wrong, and what is neither."""

from __future__ import annotations

import math

import pytest

from agentcpm_jax.rewards.grade import grade_exact, normalize, reward_metrics, score
from agentcpm_jax.types import UNKNOWN_STOPS, StopReason, Task, Trajectory, Verdict

TASK = Task("Where?", ("New York", "NYC"))


def ended(stop=StopReason.ANSWERED, answer=None, reward=None):
    return Trajectory((), (), stop=stop, answer=answer, reward=reward)


@pytest.mark.parametrize(
    "answer",
    [
        "New York",
        "  new   york\n",
        '"NEW YORK."',
        "**new york**",
        "(New York)",
        "nyc!",
        "\uff2e\uff39\uff23",  # full width
        "\u201cNYC\u201d\uff01",
    ],
)
def test_case_space_and_surrounding_punctuation_do_not_matter(answer):
    assert grade_exact(answer, TASK.answers) is Verdict.RIGHT


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [
        ("New York City", "New York"),
        ("NewYork", "New York"),
        ("-5", "5"),
        ("5%", "5"),
        ("C#", "C"),
        (".5", "5"),
        ("?", "!"),
        ("", "New York"),
        (None, "New York"),
    ],
)
def test_what_carries_meaning_matters(answer, accepted):
    assert grade_exact(answer, (accepted,)) is Verdict.WRONG


def test_nothing_to_compare_with_is_unknown():
    assert grade_exact("New York", ()) is Verdict.UNKNOWN


def test_normalize_is_idempotent():
    for text in ('"A.B."', "..5", "?!", "'(x)'", " \u00bfQu\u00e9? ", "*_a_*"):
        assert normalize(normalize(text)) == normalize(text)


@pytest.mark.parametrize("stop", sorted(UNKNOWN_STOPS))
def test_failures_of_the_environment_are_unknown_never_zero(stop):
    graded = score(ended(stop, answer="wrong"), TASK)
    assert (graded.verdict, graded.reward, graded.stop) == (Verdict.UNKNOWN, None, stop)


@pytest.mark.parametrize("stop", sorted(set(StopReason) - UNKNOWN_STOPS))
def test_every_other_stop_without_answer_is_wrong_and_not_judged(stop):
    def never(answer, answers):
        raise AssertionError("a missing answer reached the grader")

    graded = score(ended(stop), TASK, never)
    assert (graded.verdict, graded.reward, graded.stop) == (Verdict.WRONG, 0.0, stop)


def test_right_and_wrong_answers():
    assert score(ended(answer="new york"), TASK).reward == 1.0
    assert score(ended(answer="Paris"), TASK).reward == 0.0


def test_a_failing_judge_is_unknown_where_the_original_says_zero():
    def judge(answer, answers):
        raise TimeoutError("judge did not answer")

    graded = score(ended(answer="Paris"), TASK, judge)
    assert graded.stop is StopReason.JUDGE_ERROR
    assert (graded.verdict, graded.reward) == (Verdict.UNKNOWN, None)
    assert graded.error == "TimeoutError: judge did not answer"


def test_an_abstaining_judge_gives_no_reward():
    graded = score(ended(answer="Paris"), TASK, lambda answer, answers: Verdict.UNKNOWN)
    assert (graded.verdict, graded.reward) == (Verdict.UNKNOWN, None)


def test_reward_std_is_a_standard_deviation_over_known_rewards():
    rewards = [1.0, 0.0, 0.0, 1.0, None]
    got = reward_metrics([ended(reward=r) for r in rewards])
    assert got["reward/mean"] == 0.5
    assert got["reward/std"] == 0.5  # the original logs sqrt(sum of squares) / n: 0.25
    assert got["reward/unknown"] == pytest.approx(0.2)
    assert math.isnan(reward_metrics([ended()])["reward/mean"])
