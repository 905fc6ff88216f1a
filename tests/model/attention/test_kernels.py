"""Every attention equals the reference, gradients included, and none holds T x T scores."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentcpm_jax.model.attention import choice as attention_choice
from agentcpm_jax.model.attention import cudnn as attention_cudnn
from agentcpm_jax.model.attention import reference as attention
from agentcpm_jax.model.attention.blockwise import blockwise
from agentcpm_jax.model.attention.context import on_mesh, time_order
from agentcpm_jax.model.attention.reference import reference, reference_kernel
from agentcpm_jax.model.attention.splash import CausalOrder, block_size, splash_kernel
from agentcpm_jax.model.config import ATTENTIONS, QWEN3_4B, TINY
from agentcpm_jax.types import UserError


@pytest.fixture(autouse=True, scope="module")
def _compile_quickly() -> Iterator[None]:
    """Each program runs once: compiling it is what takes time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def arrays(length: int, heads: int = 4, kv_heads: int = 2, size: int = 8) -> tuple[Any, ...]:
    """q, k, v and the cotangent of the output, of two rows."""
    keys = jax.random.split(jax.random.key(0), 4)
    counts = (heads, kv_heads, kv_heads, heads)
    return tuple(
        jax.random.normal(x, (2, length, n, size)) for x, n in zip(keys, counts, strict=True)
    )


def packed_segments(length: int) -> np.ndarray:
    """Two rows: three segments and padding; one segment alone."""
    ids = np.ones((2, length), np.int32)
    cuts = (length // 5, length // 2, length - 3)
    for number, cut in enumerate(cuts, 2):
        ids[0, cut:] = number
    ids[0, length - 3 :] = 0
    return ids


def results(attend: Callable[..., Any], q: Any, k: Any, v: Any, grad: Any) -> list[np.ndarray]:
    """Output and the gradients of its product with `grad`."""

    def both(q: Any, k: Any, v: Any, grad: Any) -> Any:
        out, back = jax.vjp(attend, q, k, v)
        return out, *back(grad)

    return [np.asarray(x) for x in jax.jit(both)(q, k, v, grad)]


def assert_equal(found: list[np.ndarray], expected: list[np.ndarray], rtol: float = 1e-5) -> None:
    for x, y in zip(found, expected, strict=True):
        assert np.linalg.norm(x - y) <= rtol * np.linalg.norm(y)


@pytest.mark.parametrize(("length", "block"), [(50, 16), (33, 0)])
def test_blockwise_equals_the_reference(length: int, block: int) -> None:
    """A padded last block, and one block; grouped heads, packed rows."""
    q, k, v, grad = arrays(length)
    segments, index = jnp.asarray(packed_segments(length)), jnp.arange(length)
    expected = results(lambda *x: reference(*x, segments), q, k, v, grad)
    attend = functools.partial(blockwise, block=block)
    found = results(lambda *x: attend(*x, segments, segments, index), q, k, v, grad)
    assert_equal(found, expected)


def test_queries_of_a_context_device_are_rows_of_the_whole() -> None:
    length, shards = 32, 2
    q, k, v, grad = arrays(length)
    segments = packed_segments(length)
    expected = results(lambda *x: reference(*x, jnp.asarray(segments)), q, k, v, grad)
    for kernel in (reference_kernel, functools.partial(blockwise, block=4)):
        total = [np.zeros_like(x) for x in expected]
        for mine in time_order(length, shards).reshape(shards, -1):

            def part(q: Any, k: Any, v: Any, mine: Any = mine, kernel: Any = kernel) -> Any:
                own, whole = jnp.asarray(segments[:, mine]), jnp.asarray(segments)
                return kernel(q, k, v, own, whole, jnp.asarray(mine))

            out, dq, dk, dv = results(part, q[:, mine], k, v, grad[:, mine])
            total[0][:, mine], total[1][:, mine] = out, dq
            total[2] += dk
            total[3] += dv
        assert_equal(total, expected)


def test_zig_zag_gives_every_device_the_same_work() -> None:
    order = time_order(64, 4)
    assert sorted(order) == list(range(64))
    work = (order + 1).reshape(4, -1).sum(axis=1)
    assert (work == work[0]).all()
    assert time_order(6, 1).tolist() == list(range(6))
    with pytest.raises(UserError, match=r"rows of 60 tokens .* context of 4 devices.* fits is 64"):
        time_order(60, 4)


def sizes(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """Shapes of every intermediate array, loop bodies included."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape"))
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from sizes(getattr(value, "jaxpr", value))


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def largest(attend: Callable[..., Any], *inputs: Any) -> int:
    """Elements of the largest array of a forward and backward pass, per row and head."""

    def loss(q: Any, k: Any, v: Any) -> Any:
        return jnp.sum(attend(q, k, v) ** 2)

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*inputs)
    return max(int(np.prod(s[-2:], dtype=np.int64)) for s in sizes(jaxpr.jaxpr) if len(s) >= 4)


def test_blockwise_never_holds_all_scores() -> None:
    length = 512
    q, k, v, _ = arrays(length)
    segments, index = jnp.ones((2, length), jnp.int32), jnp.arange(length)
    block = functools.partial(blockwise, block=64)
    assert largest(lambda *x: reference(*x, segments), q, k, v) == length * length
    assert largest(lambda *x: block(*x, segments, segments, index), q, k, v) <= length * 64


def test_splash_equals_the_reference() -> None:
    """The kernel's own program, interpreted: grouped heads, packed rows, several blocks."""
    length = 256
    q, k, v, grad = arrays(length, size=128)
    segments = jnp.asarray(packed_segments(length))
    splash = on_mesh(splash_kernel(block=128, interpret=True))
    expected = results(lambda *x: reference(*x, segments), q, k, v, grad)
    found = results(lambda *x: splash(*x, segments), q, k, v, grad)
    assert_equal(found, expected)


def test_splash_on_context_devices_equals_the_reference() -> None:
    """Each device's part of the kernel, in zig-zag order, with its queries and all keys."""
    length, shards = 512, 2
    q, k, v, grad = arrays(length, heads=2, kv_heads=1, size=128)
    segments, order = packed_segments(length), time_order(length, shards)
    kernel = splash_kernel(block=128, interpret=True)
    operands, specs = kernel.prepare(order, shards, q.shape[2])
    expected = results(lambda *x: reference(*x, jnp.asarray(segments)), q, k, v, grad)
    total = [np.zeros_like(x) for x in expected]
    for device, mine in enumerate(order.reshape(shards, -1)):

        def own(x: Any, spec: Any, device: int = device) -> Any:
            cut = [axis for axis, name in enumerate(spec) if name == "context"]
            return np.split(x, shards, cut[0])[device] if cut else x

        part = jax.tree.map(own, operands, specs)

        def attend(q: Any, k: Any, v: Any, part: Any = part, mine: Any = mine) -> Any:
            return kernel.attend(part, q, k, v, segments[:, mine], segments)

        out, dq, dk, dv = results(attend, q[:, mine], k, v, grad[:, mine])
        total[0][:, mine], total[1][:, mine] = out, dq
        total[2] += dk
        total[3] += dv
    assert_equal(total, expected)


def test_the_mask_of_splash_is_causal_in_any_order_and_cheap() -> None:
    looked_at = 0

    class Counted(CausalOrder):
        def __getitem__(self, idx: Any) -> np.ndarray:
            nonlocal looked_at
            found = super().__getitem__(idx)
            looked_at += found.size
            return found

        __hash__ = CausalOrder.__hash__

    for length, shards in ((512, 1), (512, 2), (4096, 4)):
        order, looked_at = time_order(length, shards), 0
        size = block_size(length, shards, 128)
        mask = Counted(order)
        blocks = [slice(i, i + size) for i in range(0, length, size)]
        for rows in blocks:
            for columns in blocks:
                seen = order[rows, None] >= np.arange(length)[None, columns]
                assert (np.broadcast_to(mask[rows, columns], seen.shape) == seen).all()
        assert looked_at <= length * size + (length // size) ** 2
    with pytest.raises(UserError, match="nearest length that fits is 512"):
        block_size(400, 2, 1024)


@pytest.mark.parametrize("packed", [False, True])
def test_cudnn_takes_rows_of_one_segment_and_only_those(packed: bool, monkeypatch: Any) -> None:
    """Here XLA stands in for the library; what is checked is who gets which rows."""
    stock = jax.nn.dot_product_attention

    def stand_in(*args: Any, implementation: str, **kwargs: Any) -> Any:
        assert implementation == "cudnn"
        return stock(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    length = 24
    q, k, v, grad = arrays(length)
    segments = packed_segments(length) if packed else np.ones((2, length), np.int32)
    segments[1, 20:] = 0
    assert bool(attention_cudnn.one_segment(jnp.asarray(segments))) is not packed
    kernel = on_mesh(attention_cudnn.cudnn_kernel())
    grad = grad * (segments > 0)[:, :, None, None]  # nothing is read at padding
    expected = results(lambda *x: reference(*x, jnp.asarray(segments)), q, k, v, grad)
    found = results(lambda *x: kernel(*x, jnp.asarray(segments)), q, k, v, grad)
    found[0], expected[0] = (x * (segments > 0)[:, :, None, None] for x in (found[0], expected[0]))
    assert_equal(found, expected)


def test_the_configuration_chooses_and_says_why() -> None:
    def choose(platform: str, **changes: Any) -> attention_choice.AttentionChoice:
        return attention_choice.choose(dataclasses.replace(QWEN3_4B, **changes), platform)

    assert choose("tpu") == ("splash", "")
    assert choose("gpu") == ("cudnn", "")
    assert choose("cpu") == ("blockwise", "")
    assert choose("tpu", attention="reference") == ("reference", "")
    small = choose("tpu", head_dim=64)
    assert small.name == "blockwise" and "head_dim" in small.why
    exact = choose("gpu", dtype="float32")
    assert exact.name == "blockwise" and "float32" in exact.why
    with pytest.raises(UserError, match="'splash', which runs on tpu only, and this is cpu"):
        choose("cpu", attention="splash")
    assert attention_choice.fit_to(QWEN3_4B, "gpu", 8.0) == (QWEN3_4B, [])
    fitted, lines = attention_choice.fit_to(QWEN3_4B, "gpu", 7.5)
    assert fitted == dataclasses.replace(QWEN3_4B, dtype="float32")
    assert [line.split(":")[0] for line in lines] == ["model.dtype", "model.attention"]
    assert attention_choice.fit_to_device(QWEN3_4B, jax.devices()[0]) == (QWEN3_4B, [])
    with pytest.raises(UserError, match=f"'flash'; use one of {', '.join(ATTENTIONS)}"):
        dataclasses.replace(TINY, attention="flash")


def test_grouping_keeps_neighbours_together() -> None:
    q = jnp.arange(4.0).reshape(1, 1, 4, 1)
    grouped = attention.group_queries(q, 2)
    assert grouped.shape == (1, 1, 2, 2, 1) and grouped.ravel().tolist() == [0, 1, 2, 3]
