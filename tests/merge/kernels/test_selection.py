"""The k largest without sorting, and the random bits of an element."""

from __future__ import annotations

import numpy as np
import pytest

from agentcpm_jax.merge.kernels.random_bits import bits_at, probability_bits, stream_key
from agentcpm_jax.merge.kernels.selection import find_cut, keep_counts

SHAPES = {
    "smooth": lambda rng, n: np.abs(rng.normal(size=n)),
    "mostly zero": lambda rng, n: np.abs(rng.normal(size=n)) * (rng.random(n) < 0.2),
    "few values": lambda rng, n: rng.integers(0, 5, n).astype(float),
    "one value": lambda rng, n: np.ones(n),
    "sorted": lambda rng, n: np.arange(n) / n,
    "heavy tail": lambda rng, n: np.abs(rng.standard_cauchy(n)),
}


@pytest.mark.parametrize("sampled", ["well", "badly"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_k_largest_are_kept_and_among_equals_the_first(shape, sampled):
    rng = np.random.default_rng(0)
    n = 5000
    x = SHAPES[shape](rng, n).astype(np.float32)
    sample = x[::7] if sampled == "well" else np.linspace(100, 101, 700, dtype=np.float32)

    def pieces():
        for at in range(0, n, 640):
            yield at, x[at : at + 640]

    order = np.lexsort((np.arange(n), -x))
    for k in (1, 2, 250, 2500, 4999, 5000):
        cut = find_cut(pieces, sample, n, k)
        kept = np.concatenate([cut(at, piece) for at, piece in pieces()])
        want = np.zeros(n, bool)
        want[order[:k]] = True
        np.testing.assert_array_equal(kept, want)


def test_trimming_the_whole_model_keeps_its_largest():
    rng = np.random.default_rng(1)
    tensors = {"a": np.abs(rng.normal(size=300)), "b": 3 * np.abs(rng.normal(size=100))}
    tensors["c"] = np.full(50, 0.5)
    tensors = {k: v.astype(np.float32) for k, v in tensors.items()}
    whole = np.concatenate(list(tensors.values()))
    for k in (1, 100, 260, 449, 450):
        counts = keep_counts(lambda: iter(tensors.items()), whole.size, k)
        assert sum(counts.values()) == k
        threshold = np.sort(whole)[whole.size - k]
        for name, x in tensors.items():
            assert np.sum(x > threshold) <= counts[name] <= np.sum(x >= threshold)


def test_bits_are_uniform_independent_and_fixed_for_ever():
    key = stream_key(7, "model.norm.weight", 2)
    bits = bits_at(np.arange(1 << 18, dtype=np.uint32), key)
    assert bits[:3].tolist() == [1545455612, 888497774, 1308402386]
    u = bits / 2.0**32
    assert abs(u.mean() - 0.5) < 5 * np.sqrt(1 / 12 / u.size)
    counts = np.bincount(bits >> 24, minlength=256)
    assert abs(np.sum((counts - 1024) ** 2 / 1024) - 255) < 5 * np.sqrt(2 * 255)
    for lag in (1, 2, 64, 1024):  # neighbours, and rows above each other
        assert abs(np.corrcoef(u[:-lag], u[lag:])[0, 1]) < 5 / np.sqrt(u.size)
    for bit in range(32):
        assert abs(np.mean(bits >> bit & 1) - 0.5) < 5 * 0.5 / np.sqrt(u.size)
    other = bits_at(np.arange(1 << 18, dtype=np.uint32), stream_key(7, "model.norm.weight", 3))
    assert abs(np.corrcoef(u, other)[0, 1]) < 5 / np.sqrt(u.size)


def test_probabilities_never_reach_never_or_always():
    assert probability_bits(0.5) == 2**31
    assert probability_bits(1e-30) == 1 and probability_bits(1 - 1e-16) == 2**32 - 1
