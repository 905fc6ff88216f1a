"""The operations that merge methods are written in: the seam between numpy and JAX.

A method is one function over these, its formulas written once. `chunked.Chunked` runs it on numpy
arrays, a few rows in cache at a time; `device.Sharded` on JAX arrays, whole, sharded or traced.
What a method does to elements is a function `(at, *chunks)`: `at` is the flat index of the chunks'
first element, and there is one chunk per array, in the compute dtype.

Coefficients are plain numbers or traced scalars; the helpers at the end tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from types import ModuleType
from typing import Any, Concatenate, Protocol, TypeAlias, runtime_checkable

import numpy as np

from agentcpm_jax.merge.kernels.random_bits import Key
from agentcpm_jax.types import UserError

SMALLEST_SUM = 1e-8

#: A numpy array, a JAX array or a tracer: they share operators, but no type.
Array: TypeAlias = Any
#: A plain number, or a scalar Array.
Scalar: TypeAlias = Any
#: (at, *chunks) -> a chunk, or a tuple of chunks.
Kernel: TypeAlias = Callable[Concatenate[int, ...], Any]


@runtime_checkable  # for the tests, in which annotations are checked
class Ops(Protocol):
    """The operations on one tensor of every model, all of one shape.

    Attributes:
      xp: numpy or jax.numpy.
      traced: whether values may be unknown while the method runs.
      native: whether arithmetic is in 16 bits, as mergekit's is.
      name: of the tensor, for messages and randomness.
      shape, size, row: of the tensor, its number of elements, the length of its last axis.
      dtype, compute: of results and of arithmetic.
      seed: of the randomness.
      compat: reproduce mergekit where a method differs.
    """

    xp: ModuleType
    traced: bool
    native: bool
    name: str
    shape: tuple[int, ...]
    size: int
    row: int
    dtype: np.dtype
    compute: np.dtype
    seed: int
    compat: bool

    def number(self, x: Scalar | Array) -> Array:
        """Coefficients in the compute dtype, which do not widen what they multiply."""
        ...

    def sum(self, parts: Sequence[Array]) -> Array:
        """Sum of arrays of one shape."""
        ...

    def repeat(self, count: int, step: Callable[..., Any], state: Any) -> Any:
        """`step` applied `count` times to a tuple."""
        ...

    def turned(self) -> Ops:
        """The same operations for arrays with the first and the last axis exchanged."""
        ...

    def map(self, kernel: Kernel, arrays: Sequence[Array], propagates: bool = False) -> Array:
        """`kernel(at, *chunks)` everywhere, rounded to the result's dtype.

        `propagates`: a NaN or infinity in an input makes the kernel's result NaN or infinite there,
        so that checking the result is enough.
        """
        ...

    def pick(self, kernel: Kernel, arrays: Sequence[Array], index: Array | None) -> Array:
        """The elements of `kernel(at, *chunks)` at sorted flat indices; None: all, flat."""
        ...

    def totals(self, kernel: Kernel, arrays: Sequence[Array]) -> Sequence[Scalar]:
        """float64 sums over the tensor of every array of the tuple `kernel(at, *chunks)`."""
        ...

    def row_total(self, x: Array) -> Array:
        """float64 sums over the last axis, which stays with size 1."""
        ...

    def largest(self, kernel: Kernel, arrays: Sequence[Array], k: Scalar) -> Kernel:
        """A function (at, chunk) -> mask of the `k` largest of `kernel(at, *chunks)`, all >= 0.

        Among equal ones those of the lowest index count.
        """
        ...

    def key(self, model: int) -> Key:
        """The key of one input's random bits."""
        ...

    def draws(self, at: int, like: Array, key: Key) -> Array:
        """uint32 random bits in the shape of `like`; functions of the key and the flat index."""
        ...

    def kept_by_rank(
        self, at: int, magnitude: Array, key: Key, limits: np.ndarray, values: np.ndarray
    ) -> Array:
        """values[r] where the element's draw is below limits[r], else 0.

        r is the element's rank in its row, ascending, ties by index.
        """
        ...


def nonzero_sum(ops: Ops, weights: Sequence[Scalar]) -> Scalar:
    """The sum of the weights; UserError if it is zero (not noticed when traced)."""
    total = sum(weights[1:], start=weights[0])
    if isinstance(total, Real) and not abs(total) > SMALLEST_SUM:
        raise UserError(
            f"weights {[float(w) for w in weights]} of tensor {ops.name} sum to {total:g}, which "
            "cannot be normalised; change them or set normalize to false"
        )
    return total


def is_zero(x: Scalar) -> bool:
    """Whether a coefficient is the plain number 0, not a traced scalar."""
    return isinstance(x, Real) and bool(x == 0)


def is_one(x: Scalar) -> bool:
    """Whether a coefficient is the plain number 1."""
    return isinstance(x, Real) and bool(x == 1)
