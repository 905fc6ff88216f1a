"""Attention that never holds T x T scores, forward or backward: for CPUs and small devices.

Per query t, over blocks of keys s, with m a running maximum (arXiv 2205.14135, 2307.08691):
    o_t = sum_s exp(q_t k_s - m) v_s / l_t,   l_t = sum_s exp(q_t k_s - m),   L_t = m + log l_t
Backward, with the weights recomputed as p_ts = exp(q_t k_s - L_t) and D_t = do_t . o_t:
    dv_s = sum_t p_ts do_t;  ds_ts = p_ts (do_t . v_s - D_t);  dq_t = sum_s ds_ts k_s;  dk likewise

Deviations:
1. A block of keys after the last query of a block of queries is never visited; inside a visited
   block hidden scores are computed and masked.
2. Queries may be at any positions (`q_index`), as context parallelism distributes them.
Einsum letters as in `reference.py`; Q, J the queries and keys of a block.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from agentcpm_jax.model.attention.reference import MASKED, group_queries
from agentcpm_jax.model.remat import ATTENTION_OUT, named

F32 = jnp.float32


def blockwise(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    q_segments: Int[Array, "B T"],
    kv_segments: Int[Array, "B S"],
    q_index: Int[Array, " T"],
    *,
    block: int = 0,
) -> Float[Array, "B T N H"]:
    """Equal to `reference.reference_kernel`; computes `block` queries times `block` keys at a time.

    Args:
      block: 0 means 64 for up to 4096 keys (on a CPU the scores of a block then stay in its cache,
        and little is computed beyond the diagonal), else 256.
    """
    length, keys = q.shape[1], k.shape[1]
    block = block or (64 if keys <= 4096 else 256)
    bq, bk = _block(length, block), _block(keys, block)
    grouped = jnp.einsum("BTKGH->BKGTH", group_queries(q, k.shape[2]))
    blocks = (
        _pad(grouped, 3, bq),
        _pad(jnp.einsum("BSKH->BKSH", k), 2, bk),
        _pad(jnp.einsum("BSKH->BKSH", v), 2, bk),
        _pad(q_segments, 1, bq),
        _pad(kv_segments, 1, bk, fill=-1),  # a segment that no query has
        _pad(q_index, 0, bq),
    )
    out: Any = _attend(bq, bk, *blocks)
    return jnp.einsum("BKGTH->BTKGH", out[:, :, :, :length]).reshape(q.shape)


def _block(length: int, wanted: int) -> int:
    """Equal blocks of at most `wanted`, with as little padding as that allows."""
    count = -(-length // wanted)
    return -(-length // count)


def _pad(x: jax.Array, axis: int, block: int, fill: int = 0) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, widths, constant_values=fill) if widths[axis][1] else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(bq: int, bk: int, q: Any, k: Any, v: Any, q_seg: Any, kv_seg: Any, index: Any) -> Any:
    """q [B,K,G,T,H] scaled; k, v [B,K,S,H] -> [B,K,G,T,H] in v's dtype."""
    return _forward(bq, bk, q, k, v, q_seg, kv_seg, index)[0]


def _forward(
    bq: int, bk: int, q: Any, k: Any, v: Any, q_seg: Any, kv_seg: Any, index: Any
) -> tuple[Any, Any]:
    def rows(i: Any) -> tuple[Any, Any]:
        qi, seg, at = _slice(q, i, bq, 3), _slice(q_seg, i, bq, 1), _slice(index, i, bq, 0)
        shape = qi.shape[:-1]

        def one(j: Any, carry: Any) -> Any:
            top, total, out = carry
            s = _scores(qi, _slice(k, j, bk, 2), seg, _slice(kv_seg, j, bk, 1), at, j * bk)
            new = jnp.maximum(top, s.max(-1))
            p = jnp.exp(s - new[..., None])
            scale = jnp.exp(top - new)
            vj = _slice(v, j, bk, 2)
            out = out * scale[..., None] + jnp.einsum(
                "BKGQJ,BKJH->BKGQH", p.astype(v.dtype), vj, preferred_element_type=F32
            )
            return new, total * scale + p.sum(-1), out

        start = (jnp.full(shape, MASKED, F32), jnp.zeros(shape, F32), jnp.zeros(qi.shape, F32))
        top, total, out = jax.lax.fori_loop(0, jnp.max(at) // bk + 1, one, start)
        return (out / total[..., None]).astype(v.dtype), top + jnp.log(total)

    out, logsum = jax.lax.map(rows, jnp.arange(q.shape[3] // bq))
    return _join(out), _join(logsum)


def _attend_forward(bq: int, bk: int, *args: Any) -> tuple[Any, Any]:
    out, logsum = (named(x, ATTENTION_OUT) for x in _forward(bq, bk, *args))
    return out, (*args, out, logsum)


def _attend_backward(bq: int, bk: int, kept: Any, grad: Any) -> tuple[Any, ...]:
    q, k, v, q_seg, kv_seg, index, out, logsum = kept
    inner = jnp.sum(out.astype(F32) * grad.astype(F32), axis=-1)

    def rows(carry: Any, i: Any) -> tuple[Any, Any]:
        qi, gi = _slice(q, i, bq, 3), _slice(grad, i, bq, 3)
        seg, at = _slice(q_seg, i, bq, 1), _slice(index, i, bq, 0)
        log_i, inner_i = _slice(logsum, i, bq, 3), _slice(inner, i, bq, 3)

        def one(j: Any, carry: Any) -> Any:
            dq, dk, dv = carry
            kj, vj = _slice(k, j, bk, 2), _slice(v, j, bk, 2)
            s = _scores(qi, kj, seg, _slice(kv_seg, j, bk, 1), at, j * bk)
            p = jnp.exp(s - log_i[..., None])
            dp = jnp.einsum("BKGQH,BKJH->BKGQJ", gi, vj, preferred_element_type=F32)
            ds = (p * (dp - inner_i[..., None])).astype(q.dtype)
            p = p.astype(v.dtype)
            dv = _add(dv, j, jnp.einsum("BKGQJ,BKGQH->BKJH", p, gi, preferred_element_type=F32))
            dk = _add(dk, j, jnp.einsum("BKGQJ,BKGQH->BKJH", ds, qi, preferred_element_type=F32))
            dq = dq + jnp.einsum("BKGQJ,BKJH->BKGQH", ds, kj, preferred_element_type=F32)
            return dq, dk, dv

        start = (jnp.zeros(qi.shape, F32), *carry)
        dq, *carry = jax.lax.fori_loop(0, jnp.max(at) // bk + 1, one, start)
        return tuple(carry), dq

    def _add(total: Any, j: Any, part: Any) -> Any:
        return jax.lax.dynamic_update_slice_in_dim(
            total, _slice(total, j, bk, 2) + part, j * bk, axis=2
        )

    zeros = (jnp.zeros(k.shape, F32), jnp.zeros(v.shape, F32))
    (dk, dv), dq = jax.lax.scan(rows, zeros, jnp.arange(q.shape[3] // bq))
    return _join(dq).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _scores(q: Any, k: Any, q_seg: Any, kv_seg: Any, index: Any, start: Any) -> Any:
    """Masked scores f32[B,K,G,Q,J] of one block, its first key at index `start`."""
    s = jnp.einsum("BKGQH,BKJH->BKGQJ", q, k, preferred_element_type=F32)
    seen = q_seg[:, :, None] == kv_seg[:, None, :]
    seen &= index[:, None] >= start + jnp.arange(k.shape[2])
    return jnp.where(seen[:, None, None], s, MASKED)


def _slice(x: Any, i: Any, size: int, axis: int) -> Any:
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)


def _join(blocks: Any) -> Any:
    """[n,B,K,G,Q,...] -> [B,K,G,nQ,...]."""
    x = jnp.moveaxis(blocks, 0, 3)
    return x.reshape(*x.shape[:3], x.shape[3] * x.shape[4], *x.shape[5:])
