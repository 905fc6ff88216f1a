"""Advantages against the peers' own functions, and who gets credit within a trajectory."""

from __future__ import annotations

import numpy as np
import pytest

from agentcpm_jax.rewards.advantages import (
    ESTIMATORS,
    AdvantageConfig,
    credit_group,
    estimate,
    for_loss,
    is_trained,
    leave_one_out,
    punish_overlong,
    shape,
    soft_overlong,
)
from agentcpm_jax.train.losses.config import METHODS
from agentcpm_jax.types import (
    Provenance,
    Segment,
    StopReason,
    Task,
    ToolCall,
    Trajectory,
    TrajectoryGroup,
    Turn,
    TurnFlag,
    UserError,
)
from tests.golden.rl import compare


def test_reference_turn_rule():
    def ours(
        scores,
        own_score,
        preset_turn_advantages,
        adv_scaling,
        drop_zero_advantage,
        minimal_advantage,
    ):
        cfg = AdvantageConfig(
            scale=adv_scaling, drop_zero=drop_zero_advantage, minimal=minimal_advantage
        )
        raw = float(estimate(scores, cfg)[list(scores).index(own_score)])
        bounded = [raw if p is None else min(p, raw) for p in preset_turn_advantages]
        shaped = [shape(advantage, own_score, cfg) for advantage in bounded]
        return [advantage if is_trained(advantage, cfg) else None for advantage in shaped]

    assert compare.check_agentcpm(ours) == []


# --------------------------------------------------------------------------------- estimators


@pytest.mark.parametrize("estimator", ["leave_one_out", "grpo", "grpo_no_std"])
def test_estimators_sum_to_zero_and_ignore_order(estimator):
    cfg = AdvantageConfig(estimator=estimator)
    scores = np.random.default_rng(0).normal(size=9)
    order = np.random.default_rng(1).permutation(9)
    assert estimate(scores, cfg).sum() == pytest.approx(0.0, abs=1e-12)
    np.testing.assert_allclose(estimate(scores[order], cfg), estimate(scores, cfg)[order])


@pytest.mark.parametrize("estimator", ["leave_one_out", "grpo", "grpo_no_std"])
def test_equal_scores_and_lone_samples_have_no_advantage(estimator):
    cfg = AdvantageConfig(estimator=estimator)
    assert (estimate([0.1] * 7, cfg) == 0).all()
    assert (estimate([0.7], cfg) == 0).all()
    assert estimate([], cfg).shape == (0,)


def test_leave_one_out_is_the_mean_of_the_others():
    scores = [1.0, 0.0, 0.5, 0.25]
    expected = [s - np.mean(scores[:i] + scores[i + 1 :]) for i, s in enumerate(scores)]
    np.testing.assert_allclose(leave_one_out(scores), expected)


def test_raw_scores_have_no_baseline():
    assert estimate([0.3, 0.3], AdvantageConfig(estimator="raw")).tolist() == [0.3, 0.3]


@pytest.mark.parametrize("estimator", ["leave_one_out", "grpo_no_std"])
def test_a_lone_score_passes_only_when_asked_to(estimator):
    assert estimate([0.7], AdvantageConfig(estimator=estimator)).tolist() == [0.0]
    assert estimate([0.7], AdvantageConfig(estimator=estimator, singleton="raw")).tolist() == [0.7]


def test_the_estimator_follows_the_loss_unless_it_is_named():
    assert {method.estimator for method in METHODS.values()} == set(ESTIMATORS)
    minirl = for_loss(AdvantageConfig(), "minirl", "leave_one_out")
    assert (minirl.estimator, minirl.scale, minirl.sign_clamp) == ("leave_one_out", 2.0, True)
    dapo = for_loss(AdvantageConfig(drop_zero=False), "dapo", "grpo")
    assert (dapo.estimator, dapo.scale, dapo.sign_clamp) == ("grpo", 1.0, False)
    named = AdvantageConfig(estimator="grpo")
    assert for_loss(named, "rloo", "leave_one_out") is named
    with pytest.raises(UserError, match=r"scale=3.0 would be ignored.*estimator"):
        for_loss(AdvantageConfig(scale=3.0), "rloo", "leave_one_out")


def test_soft_overlong_punishment_falls_over_the_buffer():
    got = soft_overlong([0, 80, 90, 100, 120], max_length=100, buffer=20, factor=2.0)
    assert got.tolist() == [0.0, 0.0, -1.0, -2.0, -4.0]


def test_overlong_trajectories_are_punished_for_what_they_wrote():
    """8 sampled tokens each; the template's two do not count."""
    cfg = AdvantageConfig(overlong_max=8, overlong_buffer=4)
    long, unknown = punish_overlong([trajectory(1.0), trajectory(None, 1)], cfg)
    assert long.reward == 0.0 and unknown.reward is None
    kept = trajectory(1.0)
    assert punish_overlong([kept], AdvantageConfig()) == (kept,)
    with pytest.raises(UserError, match="overlong_buffer=9"):
        AdvantageConfig(overlong_max=8, overlong_buffer=9)


def test_unknown_options_are_user_errors():
    with pytest.raises(UserError, match=r"'rloo'.*leave_one_out"):
        AdvantageConfig(estimator="rloo")


# ------------------------------------------------------------------------------------- credit

# One turn: 2 template tokens, then 8 sampled ones [2, 10); two calls at [3, 5) and [6, 9).
GOOD, BAD = ToolCall("search", {"q": "x"}, span=(3, 5)), ToolCall("", None, "bad_json", "", (6, 9))


DEFAULT = AdvantageConfig()


def trajectory(reward, sample=0, calls=(), flags=(), segments=None, turns=None, **more):
    if segments is None:
        segments = (segment([Provenance.TEMPLATE] * 2 + [Provenance.SAMPLED] * 8),)
    if turns is None:
        turns = (Turn(0, 0, 2, 10, calls=calls, flags=flags),)
    return Trajectory(segments, turns, StopReason.ANSWERED, sample=sample, reward=reward, **more)


def segment(provenance, **more):
    n = len(provenance)
    sampled = np.asarray(provenance) == Provenance.SAMPLED
    return Segment(
        np.arange(n, dtype=np.int32),
        np.asarray(provenance, np.uint8),
        np.where(sampled, -1.0, np.nan).astype(np.float32),
        np.where(sampled, 0, -1).astype(np.int32),
        **more,
    )


def credit(*trajectories, cfg=DEFAULT, **more):
    group = TrajectoryGroup(0, Task("?", ("!",)), trajectories)
    return credit_group(group, cfg, **more)


def test_sampled_tokens_of_a_turn_share_the_trajectory_advantage():
    (right,), (wrong,) = credit(trajectory(1.0), trajectory(0.0, 1))
    assert right.advantage.tolist() == [0.0] * 2 + [2.0] * 8  # leave-one-out, scaled by 2
    assert wrong.advantage.tolist() == [0.0] * 2 + [-2.0] * 8
    assert right.keep.tolist() == [False] * 2 + [True] * 8


@pytest.mark.parametrize(("reward", "trained"), [(0.5, False), (0.51, True)])
def test_a_score_at_the_threshold_is_not_right(reward, trained):
    """Better than the other, but only what lies above `right_above` is ever encouraged."""
    ((mine,), _) = credit(trajectory(reward), trajectory(0.0, 1))
    assert mine.keep[2:].tolist() == [trained] * 8
    assert mine.advantage[2:].tolist() == pytest.approx([2 * reward if trained else 0.0] * 8)


@pytest.mark.parametrize("reward", [1.0, 0.0])
def test_a_bad_call_loses_its_own_credit_and_nothing_else(reward):
    """The original mutes the whole turn, the good call included."""
    both = trajectory(reward, calls=(GOOD, BAD), flags=(TurnFlag.FORMAT_ERROR,))
    ((mine,), _) = credit(both, trajectory(1.0 - reward, 1))
    if reward:
        assert mine.keep.tolist() == [False] * 2 + [True] * 4 + [False] * 3 + [True]
        assert mine.advantage.tolist() == [0, 0, 2, 2, 2, 2, 0, 0, 0, 2]
    else:  # blame stays
        assert mine.keep[2:].all() and (mine.advantage[2:] == -2.0).all()


def test_without_drop_zero_a_bad_call_is_kept_at_zero():
    bad = trajectory(1.0, calls=(BAD,))
    ((mine,), _) = credit(bad, trajectory(0.0, 1), cfg=AdvantageConfig(drop_zero=False))
    assert mine.keep[2:].all() and mine.advantage.tolist() == [0, 0, 2, 2, 2, 2, 0, 0, 0, 2]


@pytest.mark.parametrize(
    "turn",
    [
        {"calls": (GOOD, ToolCall("", None, "bad_json"))},  # not located
        {"flags": (TurnFlag.FORMAT_ERROR,)},  # no call left to locate
        {"flags": (TurnFlag.REPEATED,)},
        {"calls": (BAD,), "flags": (TurnFlag.FORMAT_ERROR, TurnFlag.REPEATED)},  # both labels count
    ],
)
def test_repeated_turns_and_calls_that_cannot_be_located_lose_the_turn(turn):
    ((right,), (wrong,)) = credit(trajectory(1.0, **turn), trajectory(0.0, 1, **turn))
    assert not right.keep.any() and (right.advantage == 0).all()
    assert wrong.keep[2:].all() and (wrong.advantage[2:] == -2.0).all()


def test_truncated_and_muted_turns_are_not_trained():
    cut = trajectory(0.0, 0, flags=(TurnFlag.TRUNCATED,))
    ((a,), (b,), (c,)) = credit(
        cut, trajectory(0.0, 1), trajectory(1.0, 2), muted_turns=frozenset({(1, 0)})
    )
    assert not a.keep.any() and not b.keep.any() and c.keep[2:].all()


def test_every_segment_gets_credit_but_a_shared_prefix_only_once():
    first = segment([Provenance.TEMPLATE, Provenance.SAMPLED, Provenance.SAMPLED])
    fork = segment(
        [Provenance.TEMPLATE] + [Provenance.SAMPLED] * 3, parent_segment=0, shared_prefix_len=2
    )
    forked = trajectory(1.0, segments=(first, fork), turns=(Turn(0, 0, 1, 3), Turn(1, 2, 2, 4)))
    ((a, b), _) = credit(forked, trajectory(0.0, 1))
    assert a.keep.tolist() == [False, True, True]
    assert b.keep.tolist() == [False, False, True, True]


def test_baseline_scores_may_hold_samples_that_are_not_trained():
    ((mine,),) = credit(trajectory(1.0), scores=(1.0, 0.0, 0.0, 0.0))
    assert (mine.advantage[2:] == 2.0).all()
    with pytest.raises(ValueError, match="not in"):
        credit(trajectory(1.0), scores=(0.0, 0.0))


def test_text_of_a_chat_endpoint_is_never_trained():
    ((mine,), _) = credit(trajectory(1.0, trainable=False), trajectory(0.0, 1))
    assert not mine.keep.any()


@pytest.mark.parametrize("reward", [None, float("nan")])
def test_unknown_rewards_must_have_left(reward):
    with pytest.raises(ValueError, match="unknown verdict"):
        credit(trajectory(reward), trajectory(0.0, 1))
