"""Each denoising filter's exact condition, and the original's defects it must not have."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from agentcpm_jax.rewards.advantages import AdvantageConfig, credit_group, leave_one_out
from agentcpm_jax.rewards.denoise import FILTERS, DenoiseConfig, denoise
from agentcpm_jax.types import (
    UNKNOWN_STOPS,
    Provenance,
    Segment,
    StopReason,
    Task,
    ToolCall,
    ToolResult,
    ToolStatus,
    Trajectory,
    TrajectoryGroup,
    Turn,
    TurnFlag,
    UserError,
    Verdict,
)

CALL = ToolCall("search", {"q": "x"}, span=(1, 2))
BAD = ToolCall("", None, "bad_json", span=(2, 3))
TASK = Task("?", ("!",))
ORIGINAL = AdvantageConfig(estimator="leave_one_out")


def sample(index, reward, stop=StopReason.ANSWERED, calls=(CALL,), flags=(), turns=None):
    """Four tokens, three of them sampled in one turn."""
    if turns is None:
        turns = (Turn(0, 0, 1, 4, calls=calls, flags=flags),)
    provenance = np.array([Provenance.TEMPLATE] + [Provenance.SAMPLED] * 3, np.uint8)
    only = Segment(
        np.arange(4, dtype=np.int32),
        provenance,
        np.array([np.nan, -1, -1, -1], np.float32),
        np.array([-1, 0, 0, 0], np.int32),
    )
    verdict = {1.0: Verdict.RIGHT, 0.0: Verdict.WRONG}.get(reward, Verdict.UNKNOWN)
    return Trajectory(
        (only,), turns, stop, issue_id=7, sample=index, verdict=verdict, reward=reward
    )


def group(*trajectories):
    return TrajectoryGroup(7, TASK, trajectories)


def run(*trajectories, **cfg):
    return denoise(group(*trajectories), DenoiseConfig(**cfg))


def samples(denoised):
    return [t.sample for t in denoised.group.trajectories]


def test_a_clean_group_passes_unchanged():
    clean = group(sample(0, 1.0), sample(1, 0.0), sample(2, 0.0))
    done = denoise(clean, DenoiseConfig())
    assert done.keep and done.group == clean and done.decisions == () and done.counts == {}
    assert done.scores == (1.0, 0.0, 0.0)


# ------------------------------------------------------------------------- environment noise


@pytest.mark.parametrize("stop", sorted(UNKNOWN_STOPS))
def test_failures_leave_before_the_baseline(stop):
    """The original counts them as 0 and so gives the right samples credit they did not earn."""
    done = run(sample(0, 1.0), sample(1, 1.0), sample(2, 0.0), sample(3, None, stop))
    assert samples(done) == [0, 1, 2] and done.counts == {f"environment/{stop}": 1}
    credits = credit_group(
        done.group, AdvantageConfig("leave_one_out", scale=1.0), scores=done.scores
    )
    assert credits[0][0].advantage[1] == 0.5 == leave_one_out([1.0, 1.0, 0.0])[0]
    assert leave_one_out([1.0, 1.0, 0.0, 0.0])[0] != 0.5  # the original's baseline


@pytest.mark.parametrize(
    ("estimator", "advantages"),
    [("grpo_no_std", [2 / 3, -1 / 3, -1 / 3]), ("leave_one_out", [1.0, -0.5, -0.5])],
)
def test_the_baseline_is_that_of_the_samples_that_count(estimator, advantages):
    """The second of 1, 1, 0, 0 met a dead tool server after it had been graded."""
    lost = sample(1, 1.0, StopReason.INFRA_ERROR)
    done = run(sample(0, 1.0), lost, sample(2, 0.0), sample(3, 0.0))
    credits = credit_group(done.group, AdvantageConfig(estimator, scale=1.0), scores=done.scores)
    assert [c[0].advantage[1] for c in credits] == pytest.approx(advantages)


def test_a_failure_does_not_give_an_all_right_group_variance():
    done = run(sample(0, 1.0), sample(1, 1.0), sample(2, None, StopReason.INFRA_ERROR))
    assert not done.keep
    assert done.counts == {"environment/infra_error": 1, "zero_variance/all_right": 1}


def test_unknown_verdicts_and_non_finite_rewards_are_noise():
    odd = dataclasses.replace(sample(2, 0.0), reward=float("nan"))
    stale = dataclasses.replace(sample(4, 0.0), stop=StopReason.ENGINE_ERROR)  # 0 by a mistake
    done = run(sample(0, 1.0), sample(1, None), odd, sample(3, 0.0), stale)
    assert samples(done) == [0, 3] and done.scores == (1.0, 0.0)
    assert done.counts == {
        "environment/unknown_verdict": 1,
        "environment/non_finite_reward": 1,
        "environment/engine_error": 1,
    }


def test_why_a_verdict_is_unknown_is_counted():
    def unknown(index, error):
        return dataclasses.replace(sample(index, None), error=error)

    done = run(
        sample(0, 1.0),
        sample(1, 0.0),
        unknown(2, "judge_disagreement: 1 right, 1 wrong, 0 unknown"),
        unknown(3, "judge_abstained: 0 right, 0 wrong, 1 unknown"),
        unknown(4, "non_finite_reward: nan"),
        unknown(5, "something else"),
    )
    assert samples(done) == [0, 1] and done.counts == {
        "environment/judge_disagreement": 1,
        "environment/judge_abstained": 1,
        "environment/non_finite_reward": 1,
        "environment/unknown_verdict": 1,
    }


# ------------------------------------------------------------------------- checks of the reward


def answering(index, answer, reward):
    return dataclasses.replace(sample(index, reward), answer=answer)


def test_of_equal_answers_the_rarer_verdict_is_dropped():
    done = run(
        answering(0, "Tor Min", 1.0),
        answering(1, "tor min.", 1.0),
        answering(2, "Tor Min", 0.0),
        answering(3, "Bal Gun", 0.0),
    )
    assert samples(done) == [0, 1, 3] and done.scores == (1.0, 1.0, 0.0)
    assert done.counts == {"disagreement/same_answer_other_verdict": 1}


def test_equal_answers_without_a_majority_all_leave():
    pair = (answering(0, "Tor Min", 1.0), answering(1, "Tor Min", 0.0))
    rest = (answering(2, "Bal Gun", 0.0), answering(3, "Dar Hem", 1.0))
    assert samples(run(*pair, *rest)) == [2, 3]
    three = (*pair, answering(4, "Tor Min", 1.0))
    assert samples(run(*three, *rest)) == [0, 4, 2, 3]


def test_no_answer_is_not_an_equal_answer():
    silent = (sample(0, 1.0), sample(1, 0.0), sample(2, 0.0))
    assert samples(run(*silent)) == [0, 1, 2]


def visiting(index, reward, content="", arguments=None):
    turn = Turn(
        0,
        0,
        1,
        4,
        calls=(dataclasses.replace(CALL, arguments=arguments or {"q": "x"}),),
        results=(ToolResult(ToolStatus.OK, content),),
    )
    return sample(index, reward, turns=(turn,))


def test_samples_that_met_a_leak_leave_with_their_score():
    done = run(
        visiting(0, 1.0, "see https://HF.co/datasets/gaia/answers"),
        visiting(1, 1.0, arguments={"url": "https://hf.co/datasets/gaia"}),
        visiting(2, 1.0, "a page"),
        visiting(3, 0.0),
        contaminated=("hf.co/datasets",),
    )
    assert samples(done) == [2, 3] and done.scores == (1.0, 0.0)
    assert done.counts == {"contamination/contaminated_source": 2}


def test_a_held_out_task_is_not_trained():
    done = run(sample(0, 1.0), sample(1, 0.0), contaminated=(TASK.uid,))
    assert not done.keep and done.counts == {"contamination/held_out_task": 1}


# ----------------------------------------------------------------------------- format errors


def test_a_call_that_its_tool_refuses_is_a_format_error_of_that_call():
    turn = Turn(
        0,
        0,
        1,
        4,
        calls=(CALL, dataclasses.replace(CALL, span=(2, 3))),
        results=(ToolResult(ToolStatus.OK, ""), ToolResult(ToolStatus.BAD_ARGUMENTS, "no code")),
    )
    done = run(sample(0, 1.0, turns=(turn,)), sample(1, 0.0))
    assert done.counts == {"format/bad_arguments": 1}
    (credit,), _ = credit_group(done.group, ORIGINAL, scores=done.scores)
    assert credit.keep.tolist() == [False, True, False, True]


def test_one_bad_call_is_counted_and_does_not_mute_its_turn():
    mixed = sample(0, 1.0, calls=(CALL, BAD), flags=(TurnFlag.FORMAT_ERROR,))
    done = run(mixed, sample(1, 0.0))
    assert done.keep and samples(done) == [0, 1] and not done.muted_turns
    assert done.counts == {"format/bad_json": 1}
    (credit,), _ = credit_group(done.group, ORIGINAL, scores=done.scores)
    assert credit.keep.tolist() == [False, True, False, True]


def test_labels_do_not_overwrite_each_other():
    both = sample(0, 0.0, calls=(CALL, BAD), flags=(TurnFlag.FORMAT_ERROR, TurnFlag.REPEATED))
    done = run(both, sample(1, 1.0))
    assert done.counts == {"format/bad_json": 1, "repeated/repeated_turn": 1}


# ---------------------------------------------------------------------- extreme trajectories

EXTREME = ("max_turns", "max_context", "repetition", "truncated")


@pytest.mark.parametrize("stop", EXTREME)
def test_extreme_stops_are_muted_and_their_score_stays_in_the_baseline(stop):
    done = run(sample(0, 1.0), sample(1, 0.0, StopReason(stop)), sample(2, 1.0), sample(3, 0.0))
    assert samples(done) == [0, 2, 3] and done.scores == (1.0, 0.0, 1.0, 0.0)
    assert done.counts == {f"extreme/{stop}": 1}


def test_the_originals_list_of_extreme_stops_trains_repetition_as_wrong():
    looping = sample(1, 0.0, StopReason.REPETITION)
    done = run(sample(0, 1.0), looping, extreme_stops=("max_turns", "max_context"))
    assert samples(done) == [0, 1]


def test_right_without_searching_is_muted():
    lucky = sample(0, 1.0, calls=())
    only_malformed = sample(1, 1.0, calls=(BAD,))
    done = run(lucky, only_malformed, sample(2, 1.0), sample(3, 0.0, calls=()))
    assert samples(done) == [2, 3]
    assert done.counts["no_search/answered_without_searching"] == 2


def test_over_long_turns_are_muted_alone():
    turns = (Turn(0, 0, 1, 2, calls=(CALL,)), Turn(0, 2, 3, 4))
    done = run(sample(0, 1.0, turns=turns), sample(1, 0.0), max_turn_tokens=3)
    assert done.muted_turns == {(0, 1), (1, 0)} and samples(done) == [0, 1]
    credits = credit_group(done.group, ORIGINAL, scores=done.scores, muted_turns=done.muted_turns)
    assert credits[0][0].keep.tolist() == [False, True, True, False]
    assert not credits[1][0].keep.any()


# --------------------------------------------------------------------------------- the group


@pytest.mark.parametrize(("reward", "reason"), [(1.0, "all_right"), (0.0, "all_wrong")])
def test_groups_without_variance_are_dropped(reward, reason):
    done = run(sample(0, reward), sample(1, reward))
    assert not done.keep and done.counts == {f"zero_variance/{reason}": 1}


def test_the_spread_is_compared_with_the_threshold():
    near = dataclasses.replace(sample(0, 0.0), reward=0.0625)
    assert not run(near, sample(1, 0.0)).keep
    assert run(near, sample(1, 0.0), min_spread=0.0625).keep


def test_groups_with_less_than_two_valid_samples_are_dropped():
    done = run(sample(0, 1.0), sample(1, None, StopReason.INFRA_ERROR))
    assert not done.keep and done.counts["too_few/too_few_valid"] == 1
    assert not run().keep


def test_groups_with_nothing_left_to_train_are_dropped():
    done = run(sample(0, 1.0, calls=()), sample(1, 0.0, StopReason.MAX_TURNS))
    assert not done.keep and done.counts["too_few/nothing_to_train"] == 1


def test_balancing_skips_no_other_filter():
    """The original returns from the balanced path before its other filters run."""
    cfg = DenoiseConfig()
    filters = (*cfg.filters[:-2], "balance", *cfg.filters[-2:])
    right = [sample(i, 1.0) for i in range(5)]
    wrong = [sample(5, 0.0), sample(6, 0.0, StopReason.MAX_TURNS)]
    lucky = sample(7, 1.0, calls=())
    done = run(*right, *wrong, lucky, filters=filters)
    assert samples(done) == [0, 1, 2, 5]  # one wrong: three right ones stay
    assert done.counts == {
        "extreme/max_turns": 1,
        "no_search/answered_without_searching": 1,
        "balance/surplus": 2,
    }


# ------------------------------------------------------------------------------ the pipeline


def test_decisions_are_the_same_in_any_order_of_the_samples():
    noisy = [
        sample(0, 1.0),
        sample(1, 0.0, StopReason.MAX_TURNS),
        sample(2, None, StopReason.CANCELLED),
        sample(3, 1.0, calls=()),
        sample(4, 0.0, calls=(BAD,)),
        sample(5, 0.0, StopReason.MAX_CONTEXT),
    ]
    everything = (*DenoiseConfig().filters, "balance")
    assert set(everything) == set(FILTERS)
    one = run(*noisy, filters=everything)
    other = run(*noisy[::-1], filters=everything)
    assert set(one.decisions) == set(other.decisions)
    assert sorted(samples(one)) == sorted(samples(other)) == [0, 4]


def test_denoising_twice_changes_nothing_more():
    done = run(sample(0, 1.0), sample(1, 0.0), sample(2, None, StopReason.INFRA_ERROR))
    again = denoise(done.group, DenoiseConfig())
    assert again.group == done.group and again.keep and again.decisions == ()


def test_decisions_are_json():
    done = run(sample(0, 1.0), sample(1, None, StopReason.INFRA_ERROR), sample(2, 0.0))
    assert json.loads(json.dumps([dataclasses.asdict(d) for d in done.decisions])) == [
        {
            "action": "drop",
            "filter": "environment",
            "reason": "infra_error",
            "sample": 1,
            "turn": -1,
        }
    ]


def test_bad_configurations_name_value_and_fix():
    with pytest.raises(UserError, match=r"'length'.*zero_variance"):
        DenoiseConfig(filters=("environment", "length"))
    with pytest.raises(UserError, match="begin with 'environment'"):
        DenoiseConfig(filters=("format", "environment"))
    with pytest.raises(UserError, match=r"'late'.*max_turns"):
        DenoiseConfig(extreme_stops=("late",))
    with pytest.raises(UserError, match="empty text, which is in every page"):
        DenoiseConfig(contaminated=("hf.co", " "))


def test_sample_indices_are_unique():
    with pytest.raises(ValueError, match="not unique"):
        run(sample(0, 1.0), sample(0, 0.0))
