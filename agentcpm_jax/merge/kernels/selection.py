"""The k-th largest magnitude of a tensor, exactly and without sorting it.

A regular sample says between which two values the threshold must lie; one pass counts what is
above them and copies out the few values between; those are partitioned. If the sample misled, or
too many values are equal, two counting passes over the bits of the magnitudes (which order as the
numbers do) find the threshold for certain. Values that equal the threshold are kept in the order
of their index.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

SAMPLE = 1 << 16
Pieces = Callable[[], Iterator[tuple[int, np.ndarray]]]


@dataclass(frozen=True)
class Cut:
    """Keeps magnitudes above `value`, and those equal to it up to flat index `last`."""

    value: float
    last: int

    def __call__(self, at: int, magnitude: np.ndarray) -> np.ndarray:
        """Mask of the kept among `magnitude`, whose first element has flat index `at`."""
        if at + magnitude.size - 1 <= self.last:
            return magnitude >= self.value
        keep = magnitude > self.value
        if at <= self.last:
            head = magnitude.reshape(-1)[: self.last + 1 - at]
            keep.reshape(-1)[: head.size] |= head == self.value
        return keep


def find_cut(pieces: Pieces, sample: np.ndarray, size: int, k: int) -> Cut:
    """The cut that keeps the `k` largest.

    Args:
      pieces: starts an iteration over (index of the first element, magnitudes, any shape) that
        covers the tensor once, in order. Magnitudes are float32 or float64 and not negative.
      sample: some of the magnitudes, from all over the tensor.
      size: number of elements.
      k: how many to keep, 1 <= k <= size.
    """
    low, high = _bracket(np.sort(sample, axis=None), k / size)
    found = _within(pieces, low, high, size, k)
    if found is not None:
        return found
    value, quota = _by_bits(pieces, sample.dtype, k)
    return Cut(float(value), _index_of_equal(pieces, value, quota, size))


def keep_counts(
    pieces: Callable[[], Iterator[tuple[str, np.ndarray]]], size: int, k: int
) -> dict[str, int]:
    """How many each tensor keeps when the `k` largest of the whole model are kept.

    Keeping so many of each tensor's own largest is trimming the model as one vector, as the TIES
    paper does; equal magnitudes go to the tensor that comes first.

    Args:
      pieces: starts an iteration over (tensor name, magnitudes), each tensor's pieces together.
      size: elements of the whole model.
      k: 1 <= k <= size.
    """
    dtype = np.result_type(*(m.dtype for _, m in pieces()))
    value, quota = _by_bits(
        lambda: ((0, m.astype(dtype)) for _, m in pieces()), dtype, min(k, size)
    )
    counts: dict[str, int] = {}
    for name, magnitude in pieces():
        equal = min(int(np.count_nonzero(magnitude == value)), quota)
        quota -= equal
        above = int(np.count_nonzero(magnitude > value))
        counts[name] = counts.get(name, 0) + above + equal
    return counts


def _bracket(ordered: np.ndarray, share: float) -> tuple[Any, Any]:
    """Two values with the threshold between them, but for one sample in some 10^5."""
    n = ordered.size
    slack = 4.5 * math.sqrt(n * share * (1 - share)) + 2
    place = n * (1 - share)
    low, high = math.floor(place - slack), math.ceil(place + slack)
    return (
        ordered[low] if low >= 0 else ordered.dtype.type(-1),
        ordered[high] if high < n else ordered.dtype.type(np.inf),
    )


def _within(pieces: Pieces, low: Any, high: Any, size: int, k: int) -> Cut | None:
    """The cut; None if it is not in [low, high], or too many other values are."""
    above = count = 0
    values, places = [], []
    for at, magnitude in pieces():
        m = magnitude.reshape(-1)
        up_to = m <= high
        above += m.size - np.count_nonzero(up_to)
        up_to &= m >= low
        place = np.flatnonzero(up_to)
        values.append(m[place])
        places.append(place + at)
        count += place.size
        if count > max(SAMPLE, size // 8):
            return None  # many equal values: to keep them all would take too much memory
    rest = k - above
    if not 0 < rest <= count:
        return None
    near = np.concatenate(values)
    value = np.partition(near, count - rest)[count - rest]
    quota = rest - int(np.count_nonzero(near > value))
    equal = np.concatenate(places)[near == value]
    return Cut(float(value), int(equal[quota - 1]) if quota < equal.size else size)


def _by_bits(pieces: Pieces, dtype: np.dtype, k: int) -> tuple[Any, int]:
    """(threshold, how many equal to it are kept), by counting 16 bits of the pattern at a time."""
    width = dtype.itemsize * 8
    word = np.dtype(f"u{dtype.itemsize}")
    prefix, rest = 0, k
    for shift in range(width - 16, -1, -16):
        counts = np.zeros(1 << 16, np.int64)
        for _, magnitude in pieces():
            bits = np.ascontiguousarray(magnitude).reshape(-1).view(word)
            if shift < width - 16:
                bits = bits[bits >> word.type(shift + 16) == prefix]
            digits = (bits >> word.type(shift)) & word.type(0xFFFF)
            counts += np.bincount(digits.astype(np.int64), minlength=1 << 16)
        from_top = np.cumsum(counts[::-1])
        digit = 0xFFFF - int(np.searchsorted(from_top, rest))
        rest -= int(from_top[0xFFFF - digit] - counts[digit])
        prefix = prefix << 16 | digit
    return np.array(prefix, word).view(dtype)[()], rest


def _index_of_equal(pieces: Pieces, value: Any, count: int, size: int) -> int:
    """Flat index of the `count`-th element that equals `value`; the end if there are no more."""
    seen = 0
    for at, magnitude in pieces():
        equal = np.flatnonzero(magnitude == value)
        if seen + equal.size >= count:
            return at + int(equal[count - seen - 1])
        seen += equal.size
    return size
