"""The operations that merge methods are made of, on JAX arrays: whole, sharded or traced.

Results do not depend on how an array is laid out over devices. Elementwise arithmetic never does.
Sums do not because they are sums of integers: values are scaled by a power of two so that the
largest has as many bits as int64 admits for so many addends, at most 50, rounded to int64, and
added exactly; what the rounding left is added in the same way. The result is as good as float64.
The k largest are found by bisection on the bits of the magnitude, four a round, and then, among
equal magnitudes, on the index: this counts elements and sorts none.

Deviations from `chunked`:
1. NaN and infinite inputs are not reported: that would wait for the device.
2. `compat` reproduces mergekit's formulas, not its rounding of bfloat16 after every operation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from agentcpm_jax.merge.kernels.ops import Array, Kernel, Ops, Scalar
from agentcpm_jax.merge.kernels.random_bits import Key, bits_at, stream_key


def compiled(fn: Callable[..., Array], leaves: Sequence[Array]) -> Array:
    """`fn(*leaves)` as one program, whose result is sharded as the first leaf is."""
    first = leaves[0]
    sharded = isinstance(first, jax.Array) and not isinstance(first, Tracer)
    return jax.jit(fn, out_shardings=first.sharding if sharded else None)(*leaves)


def on_device(
    fn: Callable[..., Array],
    tensors: Sequence[Array],
    arguments: Mapping[str, Any],
    name: str,
    dtype: np.dtype,
    compute: np.dtype,
    seed: int,
    compat: bool,
) -> Array:
    """`fn` on JAX arrays or tracers of one shape; see `methods.merge_tensors`."""
    tensors = [jnp.asarray(x) for x in tensors]
    if arguments.get("base") is not None:
        arguments = {**arguments, "base": jnp.asarray(arguments["base"])}
    # Scalars are float64 and counts int64; the tensors stay what they are.
    with jax.enable_x64(True):
        ops: Ops = Sharded(name, tensors[0].shape, dtype, compute, seed, compat)
        return fn(ops, tensors, **arguments)


@dataclass
class Sharded:
    """The operations `ops.Ops` on JAX arrays; the fields are explained there."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    compute: np.dtype
    seed: int
    compat: bool

    def __post_init__(self) -> None:
        self.xp: ModuleType = jnp
        self.traced, self.native = True, False
        self.size = math.prod(self.shape)
        self.row = self.shape[-1] if self.shape else 1

    def number(self, x: Scalar | Array) -> Array:
        return jnp.asarray(x).astype(self.compute)

    def sum(self, parts: Sequence[Array]) -> Array:
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def repeat(self, count: int, step: Callable[..., Any], state: Any) -> Any:
        return lax.fori_loop(0, count, lambda _, s: step(*s), state)

    def turned(self) -> Sharded:
        return replace(self, shape=(self.shape[-1], *self.shape[1:-1], self.shape[0]))

    def map(self, kernel: Kernel, arrays: Sequence[Array], propagates: bool = False) -> Array:
        return self._values(kernel, arrays).astype(self.dtype)

    def pick(self, kernel: Kernel, arrays: Sequence[Array], index: Array | None) -> Array:
        flat = self._values(kernel, arrays).reshape(-1)
        return flat if index is None else flat[index]

    def totals(self, kernel: Kernel, arrays: Sequence[Array]) -> list[Scalar]:
        return [exact_sum(x, None) for x in self._values(kernel, arrays)]

    def row_total(self, x: Array) -> Array:
        return exact_sum(x, -1)

    def largest(self, kernel: Kernel, arrays: Sequence[Array], k: Scalar) -> Kernel:
        if not isinstance(k, jax.Array) and k >= self.size:
            return lambda at, m: m >= 0
        bits, index = _pattern(self._values(kernel, arrays)), _index(self.shape)
        value = _largest_that(lambda v: _count(bits >= v) >= k, 31, bits.dtype)
        quota = k - _count(bits > value)
        equal = bits == value
        # The largest index below which fewer than `quota` lie is that of the last one kept.
        width = max(1, (self.size - 1).bit_length())
        last = _largest_that(lambda i: _count(equal & (index < i)) < quota, width, index.dtype)

        def cut(at: int, magnitude: Array) -> Array:
            pattern = _pattern(magnitude)
            return (pattern > value) | ((pattern == value) & (index <= last))

        return cut

    def key(self, model: int) -> Key:
        return stream_key(self.seed, self.name, model)

    def draws(self, at: int, like: Array, key: Key) -> Array:
        index = _index(like.shape)
        block = (index >> np.uint64(32)).astype(np.uint32)
        second = jnp.asarray(key[1], jnp.uint32) + block
        return bits_at(index.astype(np.uint32), (key[0], second))

    def kept_by_rank(
        self, at: int, magnitude: Array, key: Key, limits: np.ndarray, values: np.ndarray
    ) -> Array:
        order = jnp.argsort(_pattern(magnitude), axis=-1, stable=True)
        rank = jnp.argsort(order, axis=-1)
        kept = self.draws(at, magnitude, key) < jnp.asarray(limits)[rank]
        return jnp.asarray(values)[rank] * kept

    def _values(self, kernel: Kernel, arrays: Sequence[Array]) -> Any:
        return kernel(0, *(x.astype(self.compute) for x in arrays))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def exact_sum(x: Array, axis: int | None) -> Array:
    """float64 sum over everything (axis None) or over the last axis, which stays with size 1.

    The result has the same bits for every sharding of `x`. Call it under `jax.enable_x64`.
    """
    keep = axis is not None
    count = x.size if axis is None else x.shape[axis]
    bits = min(50, 61 - max(count - 1, 1).bit_length())
    largest = jnp.max(jnp.abs(x), axis=axis, keepdims=keep, initial=0.0).astype(np.float32)
    exponent = jnp.clip(lax.bitcast_convert_type(largest, np.int32) >> 23, 1, 253)
    power = lax.bitcast_convert_type(exponent << 23, np.float32).astype(np.float64)
    scaled = x.astype(np.float64) * ((1.0 / power) * 2.0**bits)  # exact: powers of two
    whole = jnp.round(scaled)
    rest = jnp.round((scaled - whole) * 2.0**bits)
    high = jnp.sum(whole.astype(np.int64), axis=axis, keepdims=keep)
    low = jnp.sum(rest.astype(np.int64), axis=axis, keepdims=keep)
    total = high.astype(np.float64) + low.astype(np.float64) * 2.0**-bits
    return total * (power * 2.0**-bits)


@exact_sum.defjvp
def _exact_sum_jvp(axis: int | None, primals: Any, tangents: Any) -> tuple[Array, Array]:
    (t,) = tangents
    slope = jnp.sum(t.astype(np.float64), axis=axis, keepdims=axis is not None)
    return exact_sum(*primals, axis), slope


def _pattern(x: Array) -> Array:
    """The bits of non-negative numbers, which order as the numbers do."""
    return lax.bitcast_convert_type(x.astype(np.float32), np.uint32)


def _index(shape: tuple[int, ...]) -> Array:
    """Each element's flat index; every device makes its own part."""
    word = np.uint32 if math.prod(shape) <= 2**32 else np.uint64
    index = jnp.zeros(shape, word)
    stride = 1
    for axis in range(len(shape) - 1, -1, -1):
        index = index + lax.broadcasted_iota(word, shape, axis) * word(stride)
        stride *= shape[axis]
    return index


def _largest_that(holds: Callable[[Any], Any], bits: int, dtype: Any) -> Array:
    """The largest number of `bits` bits for which `holds`, as it does for 0 and all below it.

    Four bits a round: fewer passes over the array, and fewer times that devices wait for each
    other, than one bit a round.
    """
    rounds = -(-bits // 4)

    def step(i: Any, value: Any) -> Array:
        shift = (4 * (rounds - 1 - i)).astype(dtype)
        candidates = value | (jnp.arange(1, 16, dtype=dtype) << shift)
        return value | (jnp.sum(jax.vmap(holds)(candidates), dtype=dtype) << shift)

    return lax.fori_loop(0, rounds, step, jnp.asarray(0, dtype))


def _count(mask: Any) -> Array:
    return jnp.sum(mask, dtype=np.int64)
