"""Every operation of `Ops` does the same on numpy arrays, chunk by chunk, and on JAX arrays."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentcpm_jax.hf.files import FLOATS
from agentcpm_jax.merge.kernels import chunked
from agentcpm_jax.merge.kernels.chunked import Chunked
from agentcpm_jax.merge.kernels.device import Sharded
from agentcpm_jax.merge.kernels.ops import Ops
from agentcpm_jax.merge.kernels.random_bits import Key

SHAPE = (6, 40)
F4 = np.dtype(np.float32)
#: Draws below 1/4 in the first rank to 3/4 in the last, and what is kept is multiplied with.
LIMITS = np.linspace(2**30, 3 * 2**30, SHAPE[1]).astype(np.uint32)
FACTORS = np.linspace(1, 2, SHAPE[1]).astype(F4)


def both(dtype: str = "float32") -> tuple[Ops, Ops]:
    out = FLOATS[dtype]
    return (
        Chunked("layer", SHAPE, out, F4, seed=7, compat=False),
        Sharded("layer", SHAPE, out, F4, seed=7, compat=False),
    )


def arrays(count: int = 2) -> list[np.ndarray]:
    """Rounded, so that some magnitudes are equal; other signs, so that they cancel."""
    rng = np.random.default_rng(0)
    return [np.round(rng.normal(size=SHAPE) * 20).astype(F4) / 16 for _ in range(count)]


def distance(at: int, x: Any, y: Any) -> Any:
    return abs(x - y)


def by_key(key: Key) -> list[int]:
    return [int(word) for word in key]


#: By name: what to do with the operations and two arrays, and how exactly results agree.
OPERATIONS: dict[str, Callable[[Ops, list[Any]], Any]] = {
    "number": lambda ops, x: (ops.number(0.7) * x[0], ops.number(ops.row_total(x[0]))),
    "sum": lambda ops, x: ops.sum([x[0], x[1], x[0]]),
    "repeat": lambda ops, x: ops.repeat(3, lambda a, b: (b, a + b), (ops.number(1), ops.number(2))),
    "turned": lambda ops, x: ops.turned().map(distance, [ops.xp.swapaxes(a, 0, -1) for a in x]),
    "map": lambda ops, x: ops.map(lambda at, a, b: a * b, x, propagates=True),
    "pick": lambda ops, x: [
        ops.pick(distance, x, index) for index in (None, ops.xp.asarray([0, 39, 40, 100, 239]))
    ],
    "totals": lambda ops, x: ops.totals(lambda at, a, b: (a * b, a * a), x),
    "row_total": lambda ops, x: ops.row_total(x[0]),
    "largest": lambda ops, x: [
        ops.map(lambda at, a, b, cut=cut: a * cut(at, distance(at, a, b)), x)
        for cut in (ops.largest(distance, x, k) for k in (0, 1, 50, 239, 240))
    ],
    "key": lambda ops, x: by_key(ops.key(1)),
    "draws": lambda ops, x: ops.map(
        lambda at, a: a * (ops.draws(at, a, ops.key(1)) < np.uint32(2**31)), x[:1]
    ),
    "kept_by_rank": lambda ops, x: ops.map(
        lambda at, a: a * ops.kept_by_rank(at, abs(a), ops.key(0), LIMITS, FACTORS), x[:1]
    ),
}


def test_every_operation_is_compared() -> None:
    public = {n for n, f in inspect.getmembers(Ops, inspect.isfunction) if not n.startswith("_")}
    assert OPERATIONS.keys() == public


@pytest.mark.parametrize("name", OPERATIONS)
def test_both_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK", 80)  # two rows of the six
    on_host, on_device = both()
    want = OPERATIONS[name](on_host, arrays())
    with jax.enable_x64(True):
        got = OPERATIONS[name](on_device, [jnp.asarray(x) for x in arrays()])
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(b, a, rtol=0 if name != "totals" else 1e-12)
        if name != "totals":  # a list of plain numbers
            assert np.asarray(b).dtype == np.asarray(a).dtype


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_results_have_the_dtype_that_was_asked_for(dtype: str) -> None:
    on_host, on_device = both(dtype)
    with jax.enable_x64(True):
        for ops, x in ((on_host, arrays()), (on_device, [jnp.asarray(a) for a in arrays()])):
            assert ops.map(distance, x).dtype.name == dtype
            assert ops.pick(distance, x, None).dtype == F4
