"""Log-probabilities and entropies, each at the index of its token; temperature 1, float32.

The logits of all positions never exist at once. With z = W h the logits of a position, y its
token and p = softmax z:
    l = z_y - logsumexp z              dl/dz_i = [i = y] - p_i
    H = logsumexp z - sum_i p_i z_i    dH/dz_i = -p_i (log p_i + H)
Positions are processed in chunks; the backward pass recomputes a chunk's logits from the hidden
states. Only the logits and their gradient have size [chunk, V]; a one-hot label exists only inside
a fused comparison.

On a mesh every device processes its own tokens with the whole output matrix (the tensor axis still
splits the vocabulary), so that no chunk waits for another device, and the gradient of the matrix is
reduced once.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from agentcpm_jax.model import qwen3
from agentcpm_jax.model.attention.context import reorder
from agentcpm_jax.model.attention.reference import Attention
from agentcpm_jax.model.config import ModelConfig
from agentcpm_jax.sharding import RULES, TOKEN_AXES, WIDTH_AXES, splits_tokens

F32 = jnp.float32
#: Logits in an automatic chunk, and its least number of tokens (matrix units need many rows).
CHUNK_LOGITS, CHUNK_TOKENS = 1 << 22, 512


def token_logprobs(
    params: Mapping[str, Any],
    cfg: ModelConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    *,
    attention: Attention | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "B T"]:
    """log p(token t | the tokens of its segment before t), at index t.

    0 at the first token of a segment and at padding. Arguments as in `qwen3.forward`.
    """
    where = (tokens, positions, segment_ids)
    return _of_labels(params, cfg, *where, attention, mesh, entropy=False)[0]


def token_logprobs_and_entropy(
    params: Mapping[str, Any],
    cfg: ModelConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    *,
    attention: Attention | None = None,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """`token_logprobs`, and at t the entropy (nats) of the distribution that predicts token t."""
    where = (tokens, positions, segment_ids)
    return _of_labels(params, cfg, *where, attention, mesh, entropy=True)


def predicted(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """True where a token has a predecessor in its own segment (never at padding)."""
    follows = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)
    return jnp.pad(follows, ((0, 0), (1, 0)))


def logprobs_from_logits(
    logits: Float[Array, "*B V"], targets: Int[Array, "*B"]
) -> Float[Array, "*B"]:
    """log softmax(logits)[target], float32."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def _of_labels(
    params: Mapping[str, Any],
    cfg: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    attention: Attention | None,
    mesh: Mesh | None,
    *,
    entropy: bool,
) -> tuple[jax.Array, jax.Array]:
    labels = jnp.roll(tokens, -1, axis=1)  # before any reordering; the last one is never read
    inputs = [reorder(x, mesh) for x in (tokens, positions, segment_ids)]
    hidden = qwen3.hidden_states(params, cfg, *inputs, attention=attention, mesh=mesh)
    found = label_logprobs(
        hidden,
        qwen3.output_matrix(params, cfg, mesh),
        reorder(labels, mesh),
        chunk=cfg.logits_chunk,
        entropy=entropy,
        mesh=mesh,
    )
    valid = predicted(segment_ids)
    logprobs, entropies = (_align(reorder(x, mesh, back=True), valid) for x in found)
    return logprobs, entropies


def _align(values: Float[Array, "B T"], valid: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    # The value at t belongs to token t + 1.
    return jnp.where(valid, jnp.roll(values, 1, axis=1), 0.0)


def label_logprobs(
    hidden: Float[Array, "B T D"],
    matrix: Float[Array, "V D"],
    labels: Int[Array, "B T"],
    *,
    chunk: int = 0,
    entropy: bool = False,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """(log softmax(hidden matrix^T)[labels], its entropy in nats or zeros), float32.

    Args:
      hidden: the residual stream after the final norm; each chunk is cast to matrix.dtype.
      matrix: one row per id; float32 products are computed at full precision.
      labels: ids; any valid id where the result is not used.
      chunk: tokens per device at a time; 0: `chunk_tokens`.
      entropy: whether to compute the entropy (it is differentiable too).
      mesh: of the arrays; None: one device.
    """
    with jax.named_scope("label_logprobs"):
        return _head(entropy, chunk, mesh, hidden, matrix, labels)


def chunk_tokens(vocab_size: int) -> int:
    """Number of tokens in an automatic chunk."""
    return max(CHUNK_TOKENS, CHUNK_LOGITS // vocab_size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _head(
    entropy: bool, chunk: int, mesh: Mesh | None, hidden: Any, matrix: Any, labels: Any
) -> tuple[Any, Any]:
    return _head_forward(entropy, chunk, mesh, hidden, matrix, labels)[0]


def _head_forward(
    entropy: bool, chunk: int, mesh: Mesh | None, hidden: Any, matrix: Any, labels: Any
) -> tuple[Any, Any]:
    def local(hidden: Any, matrix: Any, labels: Any) -> Any:
        def one(part: tuple[Any, Any]) -> tuple[Any, Any, Any]:
            h, y = part
            z = _logits(h, matrix)
            top = z.max(-1, keepdims=True)
            e = jnp.exp(z - top)
            total = e.sum(-1)
            logsum = top[:, 0] + jnp.log(total)
            chosen = jnp.take_along_axis(z, y[:, None], axis=1)[:, 0]
            spread = logsum - jnp.sum(e * z, -1) / total if entropy else jnp.zeros_like(logsum)
            return chosen - logsum, spread, logsum

        cut = _cutter(labels.shape, chunk or chunk_tokens(matrix.shape[0]))
        found = jax.lax.map(one, (cut(hidden), cut(labels)))
        return tuple(_joined(x, labels.shape) for x in found)

    logp, spread, logsum = _on_devices(local, mesh, "TMT", "TTT")(hidden, matrix, labels)
    return (logp, spread), (hidden, matrix, labels, logsum, spread)


def _head_backward(
    entropy: bool, chunk: int, mesh: Mesh | None, kept: Any, grads: Any
) -> tuple[Any, Any, None]:
    def local(hidden: Any, matrix: Any, *per_token: Any) -> tuple[Any, Any]:
        def one(total: Any, part: Any) -> tuple[Any, Any]:
            h, y, log_total, h_entropy, g, g_entropy = part
            logp = _logits(h, matrix) - log_total[:, None]
            p = jnp.exp(logp)
            is_label = jnp.arange(matrix.shape[0]) == y[:, None]
            dz = g[:, None] * (is_label - p)
            if entropy:
                dz = dz - g_entropy[:, None] * p * (logp + h_entropy[:, None])
            dz = dz.astype(matrix.dtype)
            dh = _product("CV,VD->CD", dz, matrix).astype(h.dtype)
            return total + _product("CV,CD->VD", dz, h.astype(matrix.dtype)), dh

        cut = _cutter(hidden.shape[:2], chunk or chunk_tokens(matrix.shape[0]))
        start = jnp.zeros(matrix.shape, F32)
        total, dh = jax.lax.scan(one, start, tuple(cut(x) for x in (hidden, *per_token)))
        if splits_tokens(mesh):
            total = jax.lax.psum_scatter(total, WIDTH_AXES, scatter_dimension=1, tiled=True)
            total = jax.lax.psum(total, "data")
        return _joined(dh, hidden.shape), total

    hidden, matrix, labels, logsum, spread = kept
    run = _on_devices(local, mesh, "TMTTTTT", "TS")
    d_hidden, d_matrix = run(hidden, matrix, labels, logsum, spread, *grads)
    return d_hidden, d_matrix.astype(matrix.dtype), None


_head.defvjp(_head_forward, _head_backward)


def _on_devices(local: Any, mesh: Mesh | None, inputs: str, outputs: str) -> Any:
    """`local` on each device's part. T: split like tokens; M: not split; S: split along the width.

    The tensor axis is left to the partitioner: it splits the vocabulary.
    """
    if not splits_tokens(mesh):
        return local
    specs = {
        "T": PartitionSpec(RULES["batch"], RULES["time"]),
        "M": PartitionSpec(),
        "S": PartitionSpec(None, WIDTH_AXES),
    }
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=tuple(specs[x] for x in inputs),
        out_specs=tuple(specs[x] for x in outputs),
        axis_names=set(TOKEN_AXES),
        check_vma=False,  # sums over devices are written out here, not left to autodiff
    )


def _cutter(shape: tuple[int, ...], chunk: int) -> Any:
    """[B,T,...] -> [n,C,...] with as little padding as equal chunks of at most `chunk` allow."""
    count = shape[0] * shape[1]
    pieces = -(-count // chunk)
    size = -(-count // pieces)

    def cut(x: Any) -> Any:
        flat = x.reshape(count, *x.shape[2:])
        widths = [(0, pieces * size - count)] + [(0, 0)] * (flat.ndim - 1)
        return jnp.pad(flat, widths).reshape(pieces, size, *x.shape[2:])

    return cut


def _joined(x: Any, shape: tuple[int, ...]) -> Any:
    """The inverse of a cut: `shape` from [n,C,...]."""
    flat = x.reshape(-1, *x.shape[2:])
    return flat[: shape[0] * shape[1]].reshape(shape)


def _logits(h: Any, matrix: Any) -> Any:
    return _product("CD,VD->CV", h.astype(matrix.dtype), matrix)


def _product(legend: str, a: Any, b: Any) -> Any:
    exact = jax.lax.Precision.HIGHEST if b.dtype == F32 else None
    return jnp.einsum(legend, a, b, precision=exact, preferred_element_type=F32)
