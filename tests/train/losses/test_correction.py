"""Off-policy corrections: packing, bounds, NaN; the rules by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentcpm_jax.train.losses.config import RULES, Correction
from agentcpm_jax.train.losses.correction import correct, log_linear
from agentcpm_jax.types import UserError

#: Three sequences in one row, and the same three in rows of their own.
LENGTHS = (3, 2, 4)
PACKED = np.repeat([1, 2, 3, 0], [*LENGTHS, 1])[None]


def packed_and_apart() -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    rng = np.random.default_rng(0)
    d = np.where(PACKED > 0, rng.normal(0, 0.6, PACKED.shape), np.nan).astype(np.float32)
    mask = (rng.random(PACKED.shape) < 0.8).astype(np.float32) * (PACKED > 0)
    d_apart, mask_apart = (np.zeros((3, 10), np.float32) for _ in range(2))
    for k in range(3):
        n = LENGTHS[k]
        d_apart[k, :n] = d[k + 1 == PACKED]
        mask_apart[k, :n] = mask[k + 1 == PACKED]
    return (d, mask), (d_apart, mask_apart)


@pytest.mark.parametrize("name", RULES)
def test_packing_changes_no_weight(name: str) -> None:
    (d, mask), (d_apart, mask_apart) = packed_and_apart()
    rule = Correction(name, 0.1, 1.5).rule
    got = correct(jnp.asarray(d), jnp.asarray(mask), jnp.asarray(PACKED), rule)
    want = correct(jnp.asarray(d_apart), jnp.asarray(mask_apart), None, rule)
    for k in range(3):
        np.testing.assert_allclose(
            got.weight[k + 1 == PACKED], want.weight[k, : LENGTHS[k]], rtol=1e-6
        )
    assert (np.asarray(got.weight)[mask == 0] == 0).all()


def weights(
    name: str, ratios: list[float], low: float | None = None, high: float | None = None
) -> list[float]:
    d = jnp.log(jnp.asarray([ratios]))
    rule = Correction(name, low, high).rule
    return np.asarray(correct(d, jnp.ones_like(d), None, rule).weight)[0].tolist()


def test_rules_by_hand() -> None:
    ratios = [0.25, 1.0, 6.0]  # product 1.5, geometric mean 1.145
    root = 1.5 ** (1 / 3)
    for name, expected in {
        "token_tis": [0.25, 1.0, 2.0],
        "sequence_tis": [1.5] * 3,
        "geometric_tis": [root] * 3,
        "icepop": [0.0, 1.0, 0.0],
        "sequence_icepop": [1.5] * 3,
        "geometric_icepop": [root] * 3,
        "token_mask": [0.0, 1.0, 0.0],
        "mis": [1.0] * 3,
        "geometric": [0.0] * 3,
        "veto": [1.0] * 3,
        "mean_k2": [0.0] * 3,
        "token_k3": [0.0, 1.0, 0.0],
    }.items():
        assert weights(name, ratios) == pytest.approx(expected, rel=1e-6), name
    assert weights("token_tis", ratios, low=0.5, high=0.0) == pytest.approx([0.5, 1.0, 6.0])
    assert weights("veto", ratios, low=0.3) == [0.0] * 3
    assert weights("geometric", [1.0, 1.0, 1.02]) == [1.0] * 3  # the mean, not the largest


def test_the_two_k3_are_mirror_images() -> None:
    for ratio in (0.4, 3.0):
        k3, back = ratio - 1 - np.log(ratio), 1 / ratio - 1 + np.log(ratio)
        for name, value in (("token_k3", k3), ("token_k3_back", back)):
            assert weights(name, [ratio], high=value * 1.01) == [1.0]
            assert weights(name, [ratio], high=value * 0.99) == [0.0]


def test_nothing_is_differentiated_and_extremes_stay_finite() -> None:
    d = jnp.asarray([[-2000.0, 2000.0, 0.0]])
    for name in RULES:
        rule = Correction(name).rule
        assert np.isfinite(correct(d, jnp.ones_like(d), None, rule).weight).all()
        grad = jax.grad(lambda x, r=rule: correct(x, jnp.ones_like(x), None, r).weight.sum())(d)
        assert not grad.any()


def test_the_ratio_of_a_long_sequence_is_bounded_under_any_rule() -> None:
    """Five tokens of ratio e^18: e^90 is no float32, and the weight of each is e^20."""
    got = weights("sequence_tis", [np.exp(18.0)] * 5, high=0.0)
    assert got == pytest.approx([np.exp(20.0)] * 5, rel=1e-6)


def test_log_linear_by_age() -> None:
    age = jnp.asarray([[0.0, 1.0, 2.0, 5.0]])
    current, behavior = jnp.full_like(age, -1.0), jnp.full_like(age, -2.0)
    got = log_linear(current, behavior, age)
    np.testing.assert_allclose(got, [[-2.0, -2.0, -1.5, -1.2]], rtol=1e-6)
    assert not jax.grad(lambda c: log_linear(c, behavior, age).sum())(current).any()


def test_unknown_rules_name_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'tis'.*token_tis"):
        Correction("tis")
