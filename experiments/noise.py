"""Noise for the denoising study: pure functions of a group (and a seed), of the kinds that training
on the live web meets. Every draw depends on (seed, issue, sample) alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from agentcpm_jax.rewards.grade import settle
from agentcpm_jax.types import StopReason, ToolResult, ToolStatus, Trajectory, Verdict

LEAK = "leaked-answers.example"

Noise = Callable[[Trajectory, int], Trajectory]


def flip(rate: float, votes: int = 1, split: str = "majority") -> Noise:
    """A judge whose every vote is the other verdict with chance `rate`; votes decide by majority,
    or ('unknown') only when they agree."""

    def noisy(t: Trajectory, seed: int) -> Trajectory:
        rng = _rng("flip", seed, t)
        flipped = sum(rng.random() < rate for _ in range(votes))
        if split == "unknown" and 0 < flipped < votes:
            return settle(t, Verdict.UNKNOWN)
        return settle(t, other(t.verdict)) if 2 * flipped > votes else t

    return noisy


def lose_judge(rate: float, counted_wrong: bool) -> Noise:
    """A judge that cannot be reached: wrong (the original's rule), or an error."""

    def noisy(t: Trajectory, seed: int) -> Trajectory:
        if _rng("judge", seed, t).random() >= rate:
            return t
        if counted_wrong:
            return settle(t, Verdict.WRONG)
        return settle(replace(t, stop=StopReason.JUDGE_ERROR), Verdict.UNKNOWN)

    return noisy


def lose_tools(rate: float, counted_wrong: bool, spares: Sequence[Trajectory] = ()) -> Noise:
    """A tool server that is gone at a call with chance `rate`, so that long episodes suffer most.

    The episode ends as wrong, or as an infrastructure error; with `spares` it is tried again (at
    most 3 times) with other samples of the same task, which may fail as well.
    """

    def noisy(t: Trajectory, seed: int) -> Trajectory:
        rng = _rng("tools", seed, t)
        mine = [s for s in spares if s.issue_id == t.issue_id]
        for again in (t, *rng.sample(mine, min(3, len(mine)))):
            if all(rng.random() >= rate for _ in range(again.num_calls)):
                return replace(again, sample=t.sample)
        if counted_wrong:
            return settle(t, Verdict.WRONG)
        return settle(replace(t, stop=StopReason.INFRA_ERROR), Verdict.UNKNOWN)

    return noisy


def leak(rate: float) -> Noise:
    """A page that holds the answer of the task, in a share of the episodes: right, unearned."""

    def noisy(t: Trajectory, seed: int) -> Trajectory:
        if not t.turns or _rng("leak", seed, t).random() >= rate:
            return t
        seen = ToolResult(ToolStatus.OK, f"https://{LEAK}/dataset")
        first = replace(t.turns[0], results=(*t.turns[0].results, seen))
        return settle(replace(t, turns=(first, *t.turns[1:])), Verdict.RIGHT)

    return noisy


def other(verdict: Verdict) -> Verdict:
    """The other one of right and wrong."""
    return Verdict.WRONG if verdict == Verdict.RIGHT else Verdict.RIGHT


def _rng(kind: str, seed: int, t: Trajectory) -> random.Random:
    return random.Random(f"{kind}/{seed}/{t.issue_id}/{t.sample}/{t.attempt}")
