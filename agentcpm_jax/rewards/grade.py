"""From an answer to a verdict, from a verdict to a reward.

A reward exists only where the policy can be judged: right 1.0, wrong 0.0, unknown None. A failure
of the environment, the engine or the judge is unknown: never a reward of 0.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np

from agentcpm_jax.types import UNKNOWN_STOPS, StopReason, Task, Trajectory, Verdict

#: (answer, accepted answers) -> verdict. May raise: the sample then counts as unknown.
Grader = Callable[[str | None, Sequence[str]], Verdict]

# Signs that carry meaning (+ - # % $ /) are not in the sets: "C#" is not "C", "-5" is not "5".
_QUOTES = " \"'`*_\u2018\u2019\u201c\u201d\u00ab\u00bb"
_OPENING = _QUOTES + "([{<\u00bf\u00a1"
_CLOSING = _QUOTES + ")]}>.,;:!?\u3002"
_LEADING_STOPS = re.compile(r"^[.,;:]+(?!\d)")


def score(trajectory: Trajectory, task: Task, grader: Grader | None = None) -> Trajectory:
    """The trajectory with verdict and reward filled in.

    An unknown stop (engine, tools, judge, cancelled) is unknown whatever was answered; without an
    answer every other stop is wrong; else the grader decides (None: `grade_exact`). A grader that
    raises turns the stop into `judge_error`, with the exception in `error`.
    """
    if trajectory.stop in UNKNOWN_STOPS:
        return settle(trajectory, Verdict.UNKNOWN)
    if trajectory.answer is None:
        return settle(trajectory, Verdict.WRONG)
    try:
        verdict = Verdict((grader or grade_exact)(trajectory.answer, task.answers))
    except Exception as error:  # a judge may fail in any way; the sample is then unknown
        reason = f"{type(error).__name__}: {error}"
        failed = dataclasses.replace(trajectory, stop=StopReason.JUDGE_ERROR, error=reason)
        return settle(failed, Verdict.UNKNOWN)
    return settle(trajectory, verdict)


def settle(trajectory: Trajectory, verdict: Verdict) -> Trajectory:
    """The trajectory with this verdict and its reward: 1.0, 0.0 or None."""
    reward = {Verdict.RIGHT: 1.0, Verdict.WRONG: 0.0, Verdict.UNKNOWN: None}[verdict]
    return dataclasses.replace(trajectory, verdict=verdict, reward=reward)


def grade_exact(answer: str | None, answers: Sequence[str]) -> Verdict:
    """Right when `normalize` makes the answer equal to an accepted one; None is wrong.

    Without any accepted answer nothing can be said: unknown.
    """
    if not answers:
        return Verdict.UNKNOWN
    if answer is None:
        return Verdict.WRONG
    accepted = {normalize(a) for a in answers}
    return Verdict.RIGHT if normalize(answer) in accepted else Verdict.WRONG


def normalize(text: str) -> str:
    """Case, white space, Unicode form and surrounding punctuation removed.

    Text of nothing but punctuation keeps it.
    """
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    bare = _LEADING_STOPS.sub("", plain.lstrip(_OPENING).rstrip(_CLOSING)).lstrip(_OPENING)
    return bare or plain


def reward_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """`reward/mean`, `reward/std` (population) over known rewards, `reward/unknown` (a share).

    Mean and standard deviation are NaN when no reward is known.
    """
    known = np.array([t.reward for t in trajectories if t.reward is not None], np.float64)
    share = 1.0 - len(known) / len(trajectories) if trajectories else float("nan")
    return {
        "reward/mean": float(known.mean()) if len(known) else float("nan"),
        "reward/std": float(known.std()) if len(known) else float("nan"),
        "reward/unknown": share,
    }
