"""From an answer to a verdict, from a verdict to a reward.

A reward exists only where the policy can be judged: right 1.0, wrong 0.0, unknown None. A failure
of the environment, the engine or the judge is unknown: never a reward of 0.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, TypeAlias

import numpy as np

from agentcpm_jax.types import UNKNOWN_STOPS, StopReason, Task, Trajectory, Verdict

#: (answer, accepted answers) -> verdict.
Grader = Callable[[str, Sequence[str]], Verdict]


@dataclasses.dataclass(frozen=True)
class Judgement:
    """A verdict and, where it is unknown, why: `note` begins with one of `UNKNOWN_NOTES`."""

    verdict: Verdict
    note: str = ""


DISAGREEMENT, ABSTENTION, NON_FINITE = "judge_disagreement", "judge_abstained", "non_finite_reward"
UNKNOWN_NOTES = (DISAGREEMENT, ABSTENTION, NON_FINITE)

#: A bool or verdict; a float (above `RIGHT_ABOVE` = right); None: unknown.
Outcome: TypeAlias = Judgement | Verdict | bool | float | None
#: What judges a whole trajectory, plain or async. May raise: the sample then counts as unknown.
Reward: TypeAlias = Callable[[Task, Trajectory], Outcome | Awaitable[Outcome]]

RIGHT_ABOVE = 0.5

# Signs that carry meaning (+ - # % $ /) are not in the sets: "C#" is not "C", "-5" is not "5".
_QUOTES = " \"'`*_\u2018\u2019\u201c\u201d\u00ab\u00bb"
_OPENING = _QUOTES + "([{<\u00bf\u00a1"
_CLOSING = _QUOTES + ")]}>.,;:!?\u3002"
_LEADING_STOPS = re.compile(r"^[.,;:]+(?!\d)")


async def score(
    trajectory: Trajectory, task: Task, reward: Reward | None = None, deadline: float = 0.0
) -> Trajectory:
    """The trajectory with verdict and reward filled in.

    An unknown stop (engine, tools, judge, cancelled) is unknown and costs no judge. Everything
    else `reward` decides (None: `grade_exact` of the answer). When it raises, or an async one takes
    longer than `deadline` seconds (0: no limit), the stop becomes `judge_error` and `error` says
    why.
    """
    if trajectory.stop in UNKNOWN_STOPS:
        return settle(trajectory, Verdict.UNKNOWN)
    try:
        outcome = (reward or answer_reward(grade_exact))(task, trajectory)
        if inspect.isawaitable(outcome):
            outcome = await _within(deadline, outcome)
        return _settled(trajectory, outcome)
    except Exception as error:  # a judge may fail in any way; the sample is then unknown
        reason = f"{type(error).__name__}: {error}"
        failed = dataclasses.replace(trajectory, stop=StopReason.JUDGE_ERROR, error=reason)
        return settle(failed, Verdict.UNKNOWN)


def settle(trajectory: Trajectory, verdict: Verdict) -> Trajectory:
    """The trajectory with this verdict and its reward: 1.0, 0.0 or None."""
    reward = {Verdict.RIGHT: 1.0, Verdict.WRONG: 0.0, Verdict.UNKNOWN: None}[verdict]
    return dataclasses.replace(trajectory, verdict=verdict, reward=reward)


def answer_reward(grader: Grader) -> Reward:
    """Judges the answer alone; an episode that gave none is wrong, and `grader` is not asked."""

    def reward(task: Task, trajectory: Trajectory) -> Verdict:
        if trajectory.answer is None:
            return Verdict.WRONG
        return Verdict(grader(trajectory.answer, task.answers))

    return reward


def grade_exact(answer: str, answers: Sequence[str]) -> Verdict:
    """Right when `normalize` makes the answer equal to an accepted one.

    Without any accepted answer nothing can be said: unknown (so in every grader here).
    """
    return _any_of(answers, lambda accepted: normalize(answer) == normalize(accepted))


def grade_numeric(answer: str, answers: Sequence[str]) -> Verdict:
    """Right when the answer is the same number as an accepted one, digit for digit.

    `$1,234.50` = `1234.5`, `-5` = `\N{MINUS SIGN}5`, `1.5e3` = `1500`; a unit or percent sign of
    the answer must be that of the accepted answer, if it has one. Where either is not a number as
    a whole, `grade_exact` decides.
    """

    def same(accepted: str) -> bool:
        ours, theirs = number(answer), number(accepted)
        if ours is None or theirs is None:
            return normalize(answer) == normalize(accepted)
        if theirs[1] and ours[1] != theirs[1]:
            return False
        return ours[0] == theirs[0]

    return _any_of(answers, same)


def grade_list(answer: str, answers: Sequence[str]) -> Verdict:
    """Right when the answer lists the same elements as an accepted one, in the same order.

    Elements are separated by `;` where the accepted answer has one, else by `,`; each is compared
    by `grade_numeric`.
    """
    return _any_of(answers, lambda accepted: _same_lists(answer, accepted))


def grade_set(answer: str, answers: Sequence[str]) -> Verdict:
    """`grade_list` in any order; how often an element stands there counts."""

    def same(accepted: str) -> bool:
        separator = _separator(accepted)
        ours, theirs = _keys(answer, separator), _keys(accepted, separator)
        return Counter(ours) == Counter(theirs)

    return _any_of(answers, same)


GRADERS: dict[str, Grader] = {
    "exact": grade_exact,
    "numeric": grade_numeric,
    "list": grade_list,
    "set": grade_set,
}


def normalize(text: str) -> str:
    """Case, white space, Unicode form and surrounding punctuation removed.

    Text of nothing but punctuation keeps it.
    """
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    bare = _LEADING_STOPS.sub("", plain.lstrip(_OPENING).rstrip(_CLOSING)).lstrip(_OPENING)
    return bare or plain


_NUMBER = re.compile(
    r"(?P<currency>[$\u20ac\u00a3\u00a5]\s?)?"
    r"(?P<sign>[+-]?)\s?(?P<currency2>[$\u20ac\u00a3\u00a5]\s?)?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)(?:\.\d*)?|\.\d+)"
    r"(?P<exponent>e[+-]?\d{1,3})?"
    r"\s?(?P<unit>%|\u00b0?[^\W\d_]+(?:[/^]?[\w]+)?)?"
)
_MAX_DIGITS = 200


def number(text: str) -> tuple[Decimal, str] | None:
    """(value, unit or "") of a text that is one number as a whole, else None.

    Thousands may be grouped by commas or spaces. A currency sign is a unit.
    """
    plain = normalize(text).replace("\u2212", "-")
    match = _NUMBER.fullmatch(plain) if len(plain) <= _MAX_DIGITS else None
    if match is None or not plain.isprintable():
        return None
    digits = re.sub(r"[, ]", "", match["digits"])
    try:
        value = Decimal(f"{match['sign']}{digits}{match['exponent'] or ''}")
    except InvalidOperation:
        return None
    currency = (match["currency"] or match["currency2"] or "").strip()
    return value, currency or match["unit"] or ""


def unknown_reason(trajectory: Trajectory) -> str:
    """Why a sample says nothing about the policy; empty when it has a verdict and a reward."""
    if trajectory.stop in UNKNOWN_STOPS:
        return str(trajectory.stop)
    if trajectory.reward is not None and not math.isfinite(trajectory.reward):
        return NON_FINITE
    if trajectory.verdict == Verdict.UNKNOWN or trajectory.reward is None:
        note = trajectory.error.partition(":")[0]
        return note if note in UNKNOWN_NOTES else "unknown_verdict"
    return ""


def reward_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """`reward/mean`, `std` (population), `min`, `max` of known rewards; `unknown`: a share.

    All but the share are NaN when no reward is known.
    """
    rewards = [t.reward for t in trajectories if t.reward is not None]
    known = np.array([r for r in rewards if math.isfinite(r)], np.float64)
    share = 1.0 - len(known) / len(trajectories) if trajectories else math.nan
    figures = {"mean": np.mean, "std": np.std, "min": np.min, "max": np.max}
    return {
        f"reward/{name}": float(of(known)) if len(known) else math.nan
        for name, of in figures.items()
    } | {"reward/unknown": share}


async def _within(deadline: float, outcome: Awaitable[Any]) -> Any:
    limit = asyncio.timeout(deadline or None)
    try:
        async with limit:
            return await outcome
    except TimeoutError:
        if limit.expired():
            raise TimeoutError(f"no verdict within {deadline:g} s") from None
        raise


def _settled(trajectory: Trajectory, outcome: Outcome) -> Trajectory:
    if outcome is None:
        return settle(trajectory, Verdict.UNKNOWN)
    if isinstance(outcome, Judgement):
        error = outcome.note or trajectory.error
        return settle(dataclasses.replace(trajectory, error=error), outcome.verdict)
    if isinstance(outcome, str):
        return settle(trajectory, Verdict(outcome))
    value = float(outcome)
    if not math.isfinite(value):
        note = f"{NON_FINITE}: {value}"
        return dataclasses.replace(settle(trajectory, Verdict.UNKNOWN), reward=value, error=note)
    verdict = Verdict.RIGHT if value > RIGHT_ABOVE else Verdict.WRONG
    return dataclasses.replace(trajectory, verdict=verdict, reward=value)


def _any_of(answers: Sequence[str], same: Callable[[str], bool]) -> Verdict:
    if not answers:
        return Verdict.UNKNOWN
    return Verdict.RIGHT if any(map(same, answers)) else Verdict.WRONG


def _separator(accepted: str) -> str:
    return ";" if ";" in accepted else ","


def _same_lists(answer: str, accepted: str) -> bool:
    separator = _separator(accepted)
    ours, theirs = answer.split(separator), accepted.split(separator)
    return len(ours) == len(theirs) and all(
        grade_numeric(one, (other,)) is Verdict.RIGHT
        for one, other in zip(ours, theirs, strict=True)
    )


def _keys(text: str, separator: str) -> list[Any]:
    return [number(part) or normalize(part) for part in text.split(separator)]
