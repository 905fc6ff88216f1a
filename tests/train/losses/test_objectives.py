"""What tells the methods apart, by hand; and their configuration."""

from __future__ import annotations

import numpy as np
import pytest

from agentcpm_jax.train.losses.config import Correction, LossConfig, resolve
from agentcpm_jax.types import UserError
from tests.train.losses.loss_rows import lay_out, one_row, run


def test_minirl_bounds_cut_only_on_the_side_the_gradient_pushes():
    rows = one_row([1.29, 1.31, 0.81, 0.79, 1.31, 0.79], [1.0, 1.0, -1.0, -1.0, -1.0, 1.0])
    _, grad, metrics = run(rows, LossConfig())
    ratio = np.exp(rows["logprobs"] - rows["behavior"])[0, :6]
    within = np.array([1, 0, 1, 0, 1, 1])
    expected = -ratio * rows["advantages"][0, :6] * within
    np.testing.assert_allclose(grad[0, :6], expected, rtol=1e-12)
    assert metrics["loss/bound_fraction"] == pytest.approx(2 / 6)
    assert metrics["loss/clip_fraction"] == pytest.approx(2 / 6)


def test_the_band_tightens_with_age():
    rows = one_row([1.5, 1.5, 1.5], [1.0, 1.0, 1.0], age=[0.0, 5.0, 50.0])
    _, grad, _ = run(rows, LossConfig(widen=4.0, decay=0.1))
    # U = 1 + 0.3 * 4 * exp(-0.1 age): 2.2, 1.73, 1.01
    assert (grad[0, :3] != 0).tolist() == [True, True, False]


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_bounds_never_inflate_the_tokens_they_leave(mode):
    within = one_row([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0])
    beyond = one_row([1.0, 9.0, 9.0, 9.0], [1.0, 1.0, 1.0, 1.0])
    _, before, _ = run(within, LossConfig(aggregation=mode))
    _, after, _ = run(beyond, LossConfig(aggregation=mode))
    assert after[0, :4].tolist() == [before[0, 0], 0.0, 0.0, 0.0]
    _, inflated, _ = run(beyond, LossConfig(aggregation=mode, denominator="kept"))
    assert inflated[0, 0] == 4 * before[0, 0]


def test_clip_stops_the_gradient_where_it_should():
    """Beyond the band on the pushed side nothing; on the other side the ratio; dual clip below."""
    rows = one_row([1.3, 1.3, 0.7, 0.7, 5.0, 1.0], [1.0, -1.0, 1.0, -1.0, -1.0, -1.0])
    _, grad, metrics = run(rows, LossConfig("ppo", aggregation="token-sum"))
    np.testing.assert_allclose(grad[0, :6], [0, 1.3, -0.7, 0, 0, 1.0], rtol=1e-12)
    assert metrics["loss/clip_fraction"] == pytest.approx(2 / 6)
    _, grad, _ = run(rows, LossConfig("ppo", aggregation="token-sum", dual_clip=0.0))
    assert grad[0, 4] == pytest.approx(5.0)


def test_gspo_moves_a_sequence_as_one():
    """The same gradient for every token of a sequence: -A s / length, and none when clipped."""
    rows = one_row([1.1, 0.9, 1.0], [1.0, 1.0, 1.0])
    s = (1.1 * 0.9) ** (1 / 3)
    _, grad, _ = run(rows, LossConfig("gspo", eps_low=0.1, eps_high=0.1))
    np.testing.assert_allclose(grad[0, :3], -s / 3, rtol=1e-12)
    high = one_row([1.5, 1.0, 1.0], [1.0, 1.0, 1.0])
    assert not run(high, LossConfig("gspo", eps_low=0.1, eps_high=0.1))[1].any()


def test_gspo_stops_at_the_clamp_of_its_ratio():
    """Where A < 0 no clip bounds the ratio: e^9 pulls with its size, e^12 counts as e^10."""
    cfg = LossConfig("gspo", aggregation="token-sum")
    _, grad, _ = run(one_row([np.exp(9.0)] * 2, [-1.0, -1.0]), cfg)
    np.testing.assert_allclose(grad[0, :2], np.exp(9.0), rtol=1e-12)
    loss, grad, _ = run(one_row([np.exp(12.0)] * 2, [-1.0, -1.0]), cfg)
    assert loss == pytest.approx(2 * np.exp(10.0), rel=1e-12) and not grad.any()


def test_cispo_keeps_every_gradient():
    rows = one_row([9.0, 0.01, 1.0], [1.0, -1.0, 1.0])
    _, grad, _ = run(rows, LossConfig("cispo", aggregation="token-sum"))
    np.testing.assert_allclose(grad[0, :3], [-1.28, 0.01, -1.0], rtol=1e-12)


def test_dppo_bounds_probabilities_not_ratios():
    """A rare token may grow sixfold; a likely one may not gain 0.3."""
    rows = one_row([1.0, 1.0], [1.0, 1.0])
    rows["logprobs"][0, :2] = np.log([0.06, 0.9])
    rows["behavior"][0, :2] = np.log([0.01, 0.6])
    _, grad, _ = run(rows, LossConfig("dppo_tv", aggregation="token-sum"))
    np.testing.assert_allclose(grad[0, :2], [-6.0, 0.0], rtol=1e-12)


def test_the_papers_minirl_bounds_staleness_and_weights_by_the_whole_ratio():
    rows = one_row([2.0, 2.0, 9.0], [1.0, 1.0, 1.0])
    rows["old"] = rows["logprobs"].copy()
    rows["old"][0, 1] -= np.log(1.4)  # pi/pi_old out of bounds, pi/mu the same as its neighbour's
    _, grad, _ = run(rows, LossConfig("minirl_paper", aggregation="token-sum"))
    np.testing.assert_allclose(grad[0, :3], [-2.0, 0.0, -5.0], rtol=1e-12)


def test_decoupled_ppo_weights_by_the_proximal_policy():
    """w = pi_old/mu multiplies the clipped loss; the clip sees pi/pi_old alone."""
    rows = one_row([4.0, 4.0, 40.0], [1.0, 1.0, 1.0])
    rows["old"] = rows["logprobs"] - np.where(np.arange(30) == 1, np.log(1.25), 0.0)
    _, grad, metrics = run(rows, LossConfig("decoupled_ppo", aggregation="token-sum"))
    np.testing.assert_allclose(grad[0, :3], [-4.0, 0.0, -5.0], rtol=1e-12)
    assert metrics["loss/weight_mean"] == pytest.approx((4.0 + 3.2 + 5.0) / 3)
    assert metrics["loss/token_tis_fraction"] == pytest.approx(1 / 3)


def test_the_log_linear_policy_lies_between_sampler_and_current():
    """Age 4: a quarter of the way from pi to mu remains in pi/pi_old."""
    rows = one_row([2.0, 2.0, 2.0], [1.0, 1.0, 1.0], age=[0.0, 1.0, 4.0])
    cfg = LossConfig("ppo", objective="importance", proximal="loglinear", aggregation="token-sum")
    _, grad, _ = run(rows, cfg)
    np.testing.assert_allclose(grad[0, :3], [-2.0, -2.0, -(2.0**0.25)], rtol=1e-12)


@pytest.mark.parametrize("name", ["geometric", "mis", "veto", "sum_k3", "sequence_icepop"])
def test_a_dropped_sequence_neither_trains_nor_lifts_its_neighbours(name):
    """Two sequences packed in one row, the second far off: only it is dropped."""
    good, bad = (
        {
            "logprobs": np.full(3, -1.0),
            "behavior": np.full(3, -1.0 - d),
            "old": np.full(3, -1.0),
            "advantages": np.ones(3),
            "mask": np.ones(3),
            "age": np.zeros(3),
        }
        for d in (0.001, 12.0)
    )
    cfg = LossConfig(
        "ppo",
        proximal="recompute",
        corrections=(Correction(name),),
        aggregation="seq-mean-token-mean",
    )
    _, alone, _ = run(lay_out([good], [[0]]), cfg)
    _, grad, metrics = run(lay_out([good, bad], [[0, 1]]), cfg)
    np.testing.assert_allclose(grad[0, :3], alone[0, :3] / 2, rtol=1e-12)
    assert not grad[0, 3:].any() and metrics["loss/mask_fraction"] == 0.5


def test_a_name_brings_the_papers_constants_and_each_can_be_changed():
    dapo = resolve(LossConfig("dapo"))
    assert (dapo.eps_low, dapo.eps_high, dapo.aggregation, dapo.kl_coef) == (
        0.2,
        0.28,
        "token-mean",
        0.0,
    )
    assert resolve(LossConfig("grpo")).kl_coef == 0.04
    assert resolve(LossConfig("grpo", kl_coef=0.0)).kl_coef == 0.0
    assert resolve(LossConfig("ppo")).dual_clip == 3.0
    changed = LossConfig("decoupled_ppo", corrections=(), proximal="loglinear")
    assert resolve(resolve(changed)) == resolve(changed)
    assert resolve(changed).proximal == "loglinear"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "ppo2"}, "ppo2.*use one of"),
        ({"aggregation": "mean"}, "mean.*use one of"),
        ({"denominator": "some"}, "some.*use one of"),
        ({"kl": "k9"}, "k9.*use one of"),
        ({"proximal": "ref"}, "ref.*use one of"),
        ({"eps_low": -0.2}, "eps_low=-0.2"),
        ({"kl_coef": float("nan")}, "kl_coef=nan"),
        ({"updates": 0}, "updates=0"),
        ({"name": "ppo", "aggregation": "seq-mean-token-sum-norm"}, "set norm"),
        ({"corrections": (Correction("token_tis"),)}, "count twice"),
        ({"name": "dapo", "corrections": (Correction("icepop"),)}, "count twice"),
    ],
)
def test_bad_options_name_value_and_fix(change, said):
    with pytest.raises(UserError, match=said):
        LossConfig(**change)
