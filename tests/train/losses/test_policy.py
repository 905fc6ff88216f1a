"""Properties that every loss must have, whatever its method."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentcpm_jax.train.losses.aggregate import aggregate, sequence_sum
from agentcpm_jax.train.losses.config import METHODS, MODES, Correction, LossConfig
from agentcpm_jax.train.losses.policy import (
    cross_entropy,
    finish_metrics,
    normalize_advantages,
)
from agentcpm_jax.types import UserError
from tests.train.losses.loss_rows import APART, lay_out, one_row, per_sequence, run, sequences


@pytest.fixture(autouse=True, scope="module")
def _compile_quickly():
    """Each loss runs a few times: compiling it is what takes time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# Every method (one of those that differ in their advantages alone), and what options add to them.
SAME_LOSS = ("rloo", "reinforce_pp_baseline")
CONFIGS = {name: LossConfig(name) for name in METHODS if name not in SAME_LOSS}
CONFIGS |= {
    "minirl-decay": LossConfig(widen=4.0, decay=0.3, aggregation="token-sum"),
    "minirl-kept": LossConfig(denominator="kept", aggregation="seq-mean-token-mean"),
    "minirl-masks": LossConfig(
        corrections=(Correction("geometric", 0.8, 1.2), Correction("token_mask"))
    ),
    "ppo-loglinear": LossConfig(
        "ppo", proximal="loglinear", corrections=(Correction("sequence_tis"),)
    ),
    "gspo-decoupled": LossConfig(
        "gspo",
        eps_low=0.1,
        eps_high=0.1,
        proximal="recompute",
        corrections=(Correction("icepop"), Correction("mis")),
    ),
    "grpo-k3+": LossConfig("grpo", kl="k3+", kl_ratio=True),
    "importance": LossConfig("cispo", objective="importance"),
}
WHOLE = [k for k, c in CONFIGS.items() if c.denominator == "all"]


@pytest.mark.parametrize("name", CONFIGS)
def test_packing_order_and_padding_do_not_matter(name):
    seqs = sequences(np.random.default_rng(0))
    packed = [[3, 0], [], [4, 2, 1]]
    loss, grad, metrics = run(lay_out(seqs, APART), CONFIGS[name])
    loss_p, grad_p, metrics_p = run(lay_out(seqs, packed, fill=np.nan), CONFIGS[name])
    assert loss_p == pytest.approx(loss, rel=1e-10)
    assert metrics_p == pytest.approx(metrics, rel=1e-10)
    for g, g_p in zip(
        per_sequence(grad, APART, seqs), per_sequence(grad_p, packed, seqs), strict=True
    ):
        np.testing.assert_allclose(g_p, g, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", WHOLE)
def test_micro_batches_add_up(name):
    seqs = sequences(np.random.default_rng(1))
    counts = {
        "num_tokens": float(sum(s["mask"].sum() for s in seqs)),
        "num_sequences": float(len(seqs)),
    }
    loss, grad, metrics = run(lay_out(seqs, [[0, 1], [2], [3, 4]]), CONFIGS[name])
    halves = ([[0, 1], [], []], [[], [2], [3, 4]])
    parts = [run(lay_out(seqs, bins), CONFIGS[name], **counts) for bins in halves]
    assert sum(p[0] for p in parts) == pytest.approx(loss, rel=1e-10)
    np.testing.assert_allclose(sum(p[1] for p in parts), grad, rtol=1e-10, atol=1e-12)
    for key, value in metrics.items():
        fold = max if key == "loss/ratio_max" else sum
        assert fold(p[2][key] for p in parts) == pytest.approx(value, rel=1e-10, abs=1e-12), key


@pytest.mark.parametrize("name", CONFIGS)
def test_masked_nan_reaches_neither_value_nor_gradient(name):
    rows = lay_out(sequences(np.random.default_rng(2)), [[0, 1], [2, 3], [4]])
    clean_loss, clean_grad, _ = run(rows, CONFIGS[name])
    for key in ("logprobs", "behavior", "old", "reference", "advantages", "age"):
        rows[key] = np.where(rows["mask"] > 0, rows[key], np.nan)
    loss, grad, metrics = run(rows, CONFIGS[name])
    assert loss == clean_loss and np.isfinite(list(metrics.values())).all()
    np.testing.assert_array_equal(grad, clean_grad)
    assert (grad[rows["mask"] == 0] == 0).all()


def test_padding_is_no_segment_even_if_the_mask_says_so():
    rows = lay_out(sequences(np.random.default_rng(3)), APART)
    expected = run(rows, LossConfig())
    wrong = rows | {"mask": np.where(rows["segment_ids"] == 0, 1.0, rows["mask"])}
    assert run(wrong, LossConfig())[0] == expected[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_no_token_is_pushed_against_its_advantage(name):
    rows = lay_out(sequences(np.random.default_rng(4)), APART)
    rows["reference"] = rows["logprobs"]
    _, grad, _ = run(rows, CONFIGS[name])
    assert (grad * rows["advantages"] <= 0).all() and (grad != 0).any()


@pytest.mark.parametrize("name", CONFIGS)
def test_at_ratio_one_the_gradient_is_that_of_reinforce(name):
    rows = lay_out(sequences(np.random.default_rng(5)), APART)
    rows |= dict.fromkeys(("behavior", "old", "reference"), rows["logprobs"])
    cfg = dataclasses.replace(CONFIGS[name], aggregation="seq-mean-token-sum")
    _, grad, metrics = run(rows, cfg)
    np.testing.assert_allclose(grad, -rows["advantages"] * rows["mask"] / 5, rtol=1e-12)
    assert metrics["loss/ratio_max"] == 1.0 and metrics["loss/kl_behavior_k3"] == 0.0
    assert finish_metrics(jax.tree.map(jnp.asarray, metrics))["loss/ess"] == pytest.approx(1.0)


@pytest.mark.parametrize("name", CONFIGS)
def test_absurd_log_ratios_stay_finite(name):
    rows = one_row([1.0, 1.0], [-1.0, 1.0])
    rows["behavior"][0, :2] = [-2000.0, 2000.0]
    loss, grad, metrics = run(
        rows | {"old": rows["behavior"][::-1], "reference": rows["behavior"]}, CONFIGS[name]
    )
    assert np.isfinite([loss, *grad[0], *metrics.values()]).all()


def test_five_aggregation_modes_by_hand():
    values = jnp.asarray([[1.0, 2.0, 4.0, 8.0], [16.0, 32.0, 64.0, 128.0]])
    mask = jnp.asarray([[1.0, 1.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    segments = jnp.asarray([[1, 1, 2, 2], [1, 1, 2, 2]])  # the last has no trained token
    expected = {
        "token-sum": 39.0,
        "token-mean": 39.0 / 4,
        "seq-mean-token-sum": (3 + 4 + 32) / 3,
        "seq-mean-token-mean": (1.5 + 4 + 32) / 3,
        "seq-mean-token-sum-norm": 39.0 / 3 / 10,
    }
    got = {m: float(aggregate(values, mask, segments, m, norm=10.0)) for m in MODES}
    assert got == pytest.approx(expected, rel=1e-6)


def pulled(x: list[float], ratios: list[float], **options: Any) -> np.ndarray:
    """Gradients of the KL alone, at tokens with log pi - log ref = x and these pi/pi_old."""
    rows = one_row(ratios, [0.0] * len(x))
    rows["reference"] = rows["logprobs"].copy()
    rows["reference"][0, : len(x)] -= x
    cfg = LossConfig("grpo", kl_coef=0.5, aggregation="token-sum", **options)
    return run(rows, cfg)[1][0, : len(x)]


def test_beyond_the_clamp_of_its_value_the_kl_pulls_no_more():
    """k3 = exp(-x) - 1 + x has the slope 1 - exp(-x); at x = -3 it is 16, at -1 it is 0.7."""
    got = pulled([-1.0, -3.0], [1.0, 1.0], kl="k3", kl_clamp=10.0)
    np.testing.assert_allclose(got, [0.5 * (1 - np.e), 0.0], rtol=1e-12)
    got = pulled([-1.0, -3.0], [1.0, 1.0], kl="k2", kl_clamp=0.1)  # k3 alone can explode
    np.testing.assert_allclose(got, [-0.5, -1.5], rtol=1e-12)


def test_the_ratio_that_weights_the_kl_is_a_constant():
    got = pulled([1.0, 1.0], [1.0, 1.5], kl="k2", kl_ratio=True)
    np.testing.assert_allclose(got, [0.5, 0.75], rtol=1e-12)


def test_a_row_may_hold_as_many_sequences_as_tokens():
    values, segments = jnp.asarray([[1.0, 2.0, 4.0]]), jnp.asarray([[1, 2, 3]])
    assert sequence_sum(values, segments).tolist() == values.tolist()


def test_cross_entropy_is_a_weighted_mean_and_ignores_nan():
    logprobs = jnp.asarray([[jnp.nan, -1.0, -3.0], [-5.0, jnp.nan, jnp.nan]])
    mask = jnp.asarray([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    weights = jnp.asarray([[jnp.nan, 2.0, 1.0], [0.5, jnp.nan, jnp.nan]])
    assert float(cross_entropy(logprobs, mask)) == 3.0
    assert float(cross_entropy(logprobs, mask, weights, num_tokens=15.0)) == 0.5
    grad = jax.grad(cross_entropy)(logprobs, mask, weights)
    np.testing.assert_allclose(grad, -np.array([[0, 2, 1], [0.5, 0, 0]]) / 3, rtol=1e-6)


def test_metrics_see_the_mismatch():
    rows = one_row([2.0, 0.5, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0])
    _, _, metrics = run(rows, LossConfig("reinforce"))
    metrics = finish_metrics(jax.tree.map(jnp.asarray, metrics))
    log2 = np.log(2.0)
    assert metrics["loss/kl_behavior_k1"] == pytest.approx(0.0)
    assert metrics["loss/kl_behavior_k3"] == pytest.approx((2 - 1 - log2 + 0.5 - 1 + log2) / 4)
    assert metrics["loss/ess"] == pytest.approx(4.5**2 / (4 * 6.25))
    assert metrics["loss/ratio_max"] == 2.0 and "loss/importance_square" not in metrics


def test_normalised_advantages_have_the_batchs_mean_and_variance():
    rows = lay_out(sequences(np.random.default_rng(6)), APART, fill=np.nan)
    with jax.enable_x64(True):
        arrays = [jnp.asarray(rows[k]) for k in ("advantages", "mask", "segment_ids")]
        got = np.asarray(normalize_advantages(*arrays))
    trained = got[rows["mask"] > 0]
    assert trained.mean() == pytest.approx(0.0, abs=1e-12)
    assert trained.var(ddof=1) == pytest.approx(1.0)
    assert (got[rows["mask"] == 0] == 0).all()


def test_missing_arrays_are_errors_never_ratio_one():
    rows = one_row([1.0], [1.0])
    with pytest.raises(UserError, match="reference"):
        run(rows, LossConfig(kl_coef=0.1))
    with pytest.raises(UserError, match="old"):
        run(rows, LossConfig("decoupled_ppo"))
