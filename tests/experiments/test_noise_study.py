"""The noise of the denoising study, and what the filters are supposed to undo of it."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "experiments"))

import noise

from agentcpm_jax.rewards.denoise import DenoiseConfig, denoise
from agentcpm_jax.rewards.grade import settle
from agentcpm_jax.types import (
    StopReason,
    Task,
    ToolCall,
    Trajectory,
    TrajectoryGroup,
    Turn,
    Verdict,
)

BARE = ("environment", "too_few", "zero_variance")


def episode(sample: int, right: bool, calls: int = 2, issue: int = 1) -> Trajectory:
    turns = tuple(Turn(0, 0, 0, 0, calls=(ToolCall("search", {}),)) for _ in range(calls))
    answer = "Tor Min" if right else f"Bal {sample % 3}"
    t = Trajectory((), turns, StopReason.ANSWERED, issue_id=issue, sample=sample, answer=answer)
    return settle(t, Verdict.RIGHT if right else Verdict.WRONG)


MANY = [episode(s, s % 2 == 0, issue=i) for i in range(250) for s in range(8)]


def share(of: noise.Noise, seed: int = 0) -> Counter:
    return Counter((t.verdict, of(t, seed).verdict) for t in MANY)


@pytest.mark.parametrize(("votes", "rate"), [(1, 0.1), (3, 0.028)])
def test_flips_have_their_rate_and_votes_lower_it(votes, rate):
    counts = share(noise.flip(0.1, votes))
    flipped = counts[Verdict.RIGHT, Verdict.WRONG] + counts[Verdict.WRONG, Verdict.RIGHT]
    assert flipped / len(MANY) == pytest.approx(rate, abs=0.02)


def test_noise_depends_on_seed_and_sample_alone():
    of = noise.flip(0.3)
    one, again, other = ([of(t, seed).reward for t in MANY] for seed in (0, 0, 1))
    assert one == again != other


def test_lost_tools_hit_long_episodes_most_and_repair_brings_samples_back():
    short, long = (
        [episode(s, True, calls, issue=i) for i in range(250) for s in range(8)] for calls in (1, 8)
    )
    lost = noise.lose_tools(0.1, False)
    rates = [np.mean([lost(t, 0).reward is None for t in ts]) for ts in (short, long)]
    assert rates == pytest.approx([0.1, 1 - 0.9**8], abs=0.03)
    repaired = noise.lose_tools(0.1, False, [episode(8 + s, True, 1) for s in range(4)])
    back = [repaired(t, 0) for t in long if t.issue_id == 1]
    assert all(t.reward is not None for t in back) and [t.sample for t in back] == list(range(8))


def test_filters_catch_the_noise_that_they_are_for():
    clean = [episode(s, s < 4) for s in range(8)]

    def left(of: noise.Noise, seed: int, **cfg):
        noisy = TrajectoryGroup(1, Task("?", ("Tor Min",)), tuple(of(t, seed) for t in clean))
        done = denoise(noisy, DenoiseConfig(**cfg))
        truth = {t.sample: t.verdict for t in clean}
        wrong = sum(t.verdict != truth[t.sample] for t in done.baseline)
        return wrong, len(done.baseline)

    flips, checked = noise.flip(0.15), ("environment", "disagreement", "too_few")
    bare = sum(left(flips, s, filters=("environment",))[0] for s in range(60))
    filtered = sum(left(flips, s, filters=checked)[0] for s in range(60))
    assert filtered < bare / 3
    for of in (noise.lose_judge(0.3, False), noise.lose_tools(0.2, False)):
        assert all(left(of, s, filters=BARE)[0] == 0 for s in range(20))
    leaked = replace(DenoiseConfig(), contaminated=(noise.LEAK,))
    listed = {"filters": ("environment", "contamination"), "contaminated": leaked.contaminated}
    assert all(left(noise.leak(0.5), s, **listed)[0] == 0 for s in range(20))
    assert any(left(noise.leak(0.5), s, filters=BARE)[0] > 0 for s in range(20))
