"""Sampling against its definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentcpm_jax.engine.sampling import Draw, sample

ROWS, WIDTH = 512, 24
LOGITS = np.random.default_rng(0).normal(0, 2.0, WIDTH).astype(np.float32)
LOGITS[5] = LOGITS[9]  # a tie

_sample = jax.jit(sample)


def draw(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Draw:
    keys = np.random.default_rng(1).integers(0, 2**32, (ROWS, 2), np.uint32)
    return Draw(
        temperature=np.full(ROWS, temperature, np.float32),
        top_k=np.full(ROWS, top_k, np.int32),
        top_p=np.full(ROWS, top_p, np.float32),
        min_p=np.full(ROWS, min_p, np.float32),
        key=keys,
    )


def draws(how: Draw, index: int = 0) -> np.ndarray:
    return np.asarray(_sample(jnp.tile(LOGITS, (ROWS, 1)), how, jnp.full(ROWS, index, jnp.int32)))


def by_definition(temperature, top_k, top_p, min_p) -> tuple[set[int], np.ndarray]:
    """Allowed ids, and the probabilities of all at that temperature, in float64."""
    scaled = LOGITS.astype(np.float64) / temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    allowed = set()
    for i in range(WIDTH):
        likelier = LOGITS[i] < LOGITS
        few = not top_k or likelier.sum() < top_k
        light = top_p == 1 or p[likelier].sum() < top_p
        if few and light and p[i] >= min_p * p.max():
            allowed.add(i)
    return allowed, p


@pytest.mark.parametrize(
    "how",
    [
        (1.0, 0, 1.0, 0.0),
        (1.0, 4, 1.0, 0.0),
        (1.0, 0, 0.7, 0.0),
        (1.0, 0, 1.0, 0.1),
        (1.7, 6, 0.8, 0.05),
        (0.5, 100, 0.95, 0.0),
    ],
)
def test_allowed_ids_are_drawn_in_proportion_and_no_others(how):
    allowed, p = by_definition(*how)
    counts = np.zeros(WIDTH)
    for index in range(8):
        counts += np.bincount(draws(draw(*how), index), minlength=WIDTH)
    assert set(np.flatnonzero(counts)) <= allowed
    expected = np.where([i in allowed for i in range(WIDTH)], p, 0)
    expected *= counts.sum() / expected.sum()
    likely = expected > 5
    chi2 = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    assert chi2 < likely.sum() + 5 * np.sqrt(2 * likely.sum())


def test_the_tightest_restrictions_are_greedy():
    best = {int(LOGITS.argmax())}
    for how in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert set(draws(draw(**how))) == best


def test_a_row_does_not_see_its_neighbours():
    """Among free rows, and among restricted and greedy ones."""
    free, kind = draws(draw()), np.arange(ROWS) % 4
    mixed = draw().replace(
        temperature=np.where(kind == 1, 0.0, 1.0).astype(np.float32),
        top_k=np.where(kind == 2, 3, 0).astype(np.int32),
        top_p=np.where(kind == 3, 0.5, 1.0).astype(np.float32),
    )
    assert (draws(mixed)[kind == 0] == free[kind == 0]).all()
    assert (draws(mixed) != free).any()


def test_a_key_and_an_index_decide():
    assert (draws(draw(), 3) == draws(draw(), 3)).all()
    assert (draws(draw(), 3) != draws(draw(), 4)).any()
