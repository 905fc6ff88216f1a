"""Verdicts and rewards: what is right, what is wrong, and what is neither."""

from __future__ import annotations

import asyncio
import math
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentcpm_jax.rewards.grade import (
    Judgement,
    answer_reward,
    grade_exact,
    grade_list,
    grade_numeric,
    grade_set,
    normalize,
    number,
    reward_metrics,
)
from agentcpm_jax.rewards.grade import score as score_async
from agentcpm_jax.types import UNKNOWN_STOPS, StopReason, Task, Trajectory, Verdict

TASK = Task("Where?", ("New York", "NYC"))


def score(trajectory, task, grader=None):
    reward = None if grader is None else answer_reward(grader)
    return asyncio.run(score_async(trajectory, task, reward))


def rewarded(reward, stop=StopReason.ANSWERED, answer="x", deadline=0.0):
    return asyncio.run(score_async(ended(stop, answer), TASK, reward, deadline))


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


# ---------------------------------------------------------------------- numbers and lists

RIGHT, WRONG = Verdict.RIGHT, Verdict.WRONG


@pytest.mark.parametrize(
    ("answer", "accepted", "verdict"),
    [
        ("1234.50", "$1,234.5", WRONG),  # an amount without its currency
        ("$1,234.50", "1234.5", RIGHT),
        ("1 234 567", "1,234,567", RIGHT),
        ("\u22125", "-5", RIGHT),
        ("5", "-5", WRONG),
        ("+5", "5", RIGHT),
        ("5.", "5", RIGHT),
        ("\uff15", "5", RIGHT),  # full width
        ("1.5e3", "1500", RIGHT),
        ("0.10", ".1", RIGHT),
        ("50%", "50", RIGHT),
        ("50", "50%", WRONG),
        ("0.5", "50%", WRONG),
        ("12 km", "12", RIGHT),
        ("12 km", "12 km", RIGHT),
        ("12 miles", "12 km", WRONG),
        ("1234567", "1234568", WRONG),
        ("0.30000000000000004", "0.3", WRONG),
        ("12 or 13", "12", WRONG),
        ("about 12", "12", WRONG),
        ("12, 13", "12", WRONG),
        ("1,23", "123", WRONG),  # no grouping of thousands
        ("twelve", "twelve", RIGHT),
        ("nan", "nan", RIGHT),  # words are compared as words
        ("inf", "1e999", WRONG),
        ("9" * 500, "9" * 500, RIGHT),
    ],
)
def test_numbers(answer, accepted, verdict):
    assert grade_numeric(answer, (accepted,)) is verdict


@given(st.integers(-(10**12), 10**12), st.integers(0, 6))
@settings(derandomize=True, deadline=None, max_examples=100)
def test_every_way_to_write_a_number_is_that_number(value, places):
    exact = Decimal(value).scaleb(-places)
    for text in (f"{exact:f}", f"{exact:,f}", f" {exact:f} ", f"{exact:f}0" if places else "0"):
        parsed = number(text)
        assert parsed is not None and (parsed[0] == exact or text == "0")


@pytest.mark.parametrize(
    ("answer", "accepted", "as_list", "as_set"),
    [
        ("a, b,c", "A, B, C", RIGHT, RIGHT),
        ("b, a", "a, b", WRONG, RIGHT),
        ("a, b", "a, b, c", WRONG, WRONG),
        ("a, a", "a, b", WRONG, WRONG),
        ("a, a, b", "a, b, b", WRONG, WRONG),
        ("1.0; 2", "1; 2.00", RIGHT, RIGHT),
        ("Smith, John; Doe, Jane", "Smith, John; Doe, Jane", RIGHT, RIGHT),
        ("Doe, Jane; Smith, John", "Smith, John; Doe, Jane", WRONG, RIGHT),
        ("a", "a", RIGHT, RIGHT),
    ],
)
def test_lists(answer, accepted, as_list, as_set):
    assert grade_list(answer, (accepted,)) is as_list
    assert grade_set(answer, (accepted,)) is as_set


@pytest.mark.parametrize("grader", [grade_numeric, grade_list, grade_set])
def test_any_accepted_answer_will_do_and_none_is_unknown(grader):
    assert grader("2", ("1", "2")) is RIGHT
    assert grader("2", ()) is Verdict.UNKNOWN


# --------------------------------------------------------------------------- what a reward says


@pytest.mark.parametrize(
    ("outcome", "verdict", "reward"),
    [
        (True, RIGHT, 1.0),
        (False, WRONG, 0.0),
        (0.75, RIGHT, 0.75),
        (0.5, WRONG, 0.5),
        (-1, WRONG, -1.0),
        (Verdict.RIGHT, RIGHT, 1.0),
        ("wrong", WRONG, 0.0),
        (None, Verdict.UNKNOWN, None),
        (Judgement(Verdict.WRONG), WRONG, 0.0),
    ],
)
def test_outcomes(outcome, verdict, reward):
    async def later(task, trajectory):
        return outcome

    for function in (lambda task, trajectory: outcome, later):
        got = rewarded(function)
        assert (got.verdict, got.reward) == (verdict, reward)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_is_unknown_and_says_so(value):
    got = rewarded(lambda task, trajectory: value)
    assert got.verdict is Verdict.UNKNOWN and got.error == f"non_finite_reward: {value}"


def test_an_unknown_verdict_keeps_its_reason():
    got = rewarded(lambda *_: Judgement(Verdict.UNKNOWN, "judge_abstained: 1 unknown"))
    assert (got.stop, got.error) == (StopReason.ANSWERED, "judge_abstained: 1 unknown")


def test_a_word_that_is_no_verdict_is_a_failure():
    got = rewarded(lambda *_: "correct")
    assert got.stop is StopReason.JUDGE_ERROR and "'correct' is not a valid Verdict" in got.error


def test_a_reward_sees_the_whole_trajectory_even_without_an_answer():
    got = rewarded(lambda task, t: -0.5 if t.answer is None else 1.0, StopReason.MAX_TURNS, None)
    assert (got.verdict, got.reward, got.stop) == (WRONG, -0.5, StopReason.MAX_TURNS)


def test_an_unknown_stop_costs_no_judge():
    def never(task, trajectory):
        raise AssertionError("a failed episode reached the judge")

    assert rewarded(never, StopReason.ENGINE_ERROR).stop is StopReason.ENGINE_ERROR


def test_a_deadline_ends_what_takes_too_long_and_only_that():
    async def forever(task, trajectory):
        await asyncio.Event().wait()

    async def own_timeout(task, trajectory):
        raise TimeoutError("the database")

    assert rewarded(forever, deadline=0.01).error == "TimeoutError: no verdict within 0.01 s"
    assert rewarded(own_timeout, deadline=5.0).error == "TimeoutError: the database"
