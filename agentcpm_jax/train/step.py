"""Optimizer updates, jitted: gradients over micro-batches, clip, update, metrics.

Losses divide by the counts of the whole batch, so the gradients of micro-batches add up to the
gradient of the batch: the result does not depend on how it is split, packed or padded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh

from agentcpm_jax.data.batch import Batch
from agentcpm_jax.model.attention.reference import Attention
from agentcpm_jax.model.config import ModelConfig
from agentcpm_jax.model.logprobs import token_logprobs, token_logprobs_and_entropy
from agentcpm_jax.train.losses.aggregate import count_sequences, trained_mask
from agentcpm_jax.train.losses.config import LossConfig, Method, resolve
from agentcpm_jax.train.losses.objectives import Tokens
from agentcpm_jax.train.losses.policy import (
    Counts,
    cross_entropy,
    finish_metrics,
    normalize_advantages,
    policy_loss,
)
from agentcpm_jax.train.optimizer import Schedule

Metrics = dict[str, jax.Array]
BatchLoss = Callable[[Any, Batch], tuple[jax.Array, Metrics]]


@flax.struct.dataclass
class TrainState:
    """Parameters and optimiser state after `step` updates, of which `skipped` changed nothing.

    step i32[], skipped i32[] (updates with a non-finite loss or gradient), params and opt_state
    pytrees. Donated to the step that consumes it.
    """

    step: Any  # arrays; or, when the tree is mapped over, shardings and shapes in their place
    skipped: Any
    params: Any
    opt_state: Any

    @classmethod
    def create(cls, params: Any, tx: optax.GradientTransformation) -> TrainState:
        """Step 0. The state holds `params` itself: copy them first to use them elsewhere."""
        return cls(
            step=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=tx.init(params),
        )


@flax.struct.dataclass
class Frozen:
    """Parameters that a step reads and never changes; None where it does not need them.

    base: what trained adapters are added to (`model.lora_rank`). reference: the policy that
    `kl_coef` pulls to (`needs_reference`), laid out like the parameters of a model.
    """

    base: Any = None
    reference: Any = None


class StepShardings(NamedTuple):
    """Shardings on a mesh (trees of `jax.sharding.Sharding` or prefixes of them)."""

    state: Any
    batch: Any
    mesh: Mesh | AbstractMesh | None = None  # of the shardings; constrains activations
    base: Any = None  # with adapters: of the frozen parameters


class Backbone(NamedTuple):
    """The model of a step and how its forward pass runs: constants of the compiled program."""

    model: ModelConfig
    attention: Attention | None  # the kernel; None: that of `model.attention` on the mesh
    mesh: Any  # Mesh, AbstractMesh (to compile ahead of time) or None


class Descent(NamedTuple):
    """How gradients become an update: constants of the compiled program."""

    tx: optax.GradientTransformation
    schedule: Schedule | None  # its learning rate, for the metric `train/lr` only
    micro_rows: int  # rows of a forward pass; 0: all at once


def make_sft_step(
    model: ModelConfig,
    tx: optax.GradientTransformation,
    schedule: Schedule | None = None,
    *,
    micro_rows: int = 0,
    shardings: StepShardings | None = None,
    attention: Attention | None = None,
) -> Callable[[TrainState, Batch, Frozen], tuple[TrainState, Metrics]]:
    """The step of pretraining and SFT: weighted cross entropy of the trained tokens.

    Args:
      model: the backbone.
      tx: the optimiser; `schedule` (its learning rate) is for the metric `train/lr` only.
      micro_rows: rows per forward pass; the batch's rows must be a multiple. 0: all at once.
      shardings: of the state and the batch on a mesh; None: one device.
      attention: the kernel; None: that of `model.attention` on the mesh.
    Returns:
      A jitted (state, batch, frozen) -> (state, metrics), metrics f32[] by name. The state is
      donated. A non-finite loss or gradient changes nothing but `step` and `skipped`.
    Raises (when it is traced):
      ValueError: the rows are not a multiple of `micro_rows`.
    """
    backbone = Backbone(model, attention, shardings and shardings.mesh)
    descent = Descent(tx, schedule, micro_rows)
    step = partial(sft_step, backbone=backbone, descent=descent)
    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings.state, shardings.batch, Frozen(base=shardings.base)),
        out_shardings=(shardings.state, None),
    )


def make_rl_step(
    model: ModelConfig,
    loss_cfg: LossConfig,
    tx: optax.GradientTransformation,
    schedule: Schedule | None = None,
    *,
    micro_rows: int = 0,
    shardings: StepShardings | None = None,
    attention: Attention | None = None,
) -> Callable[[TrainState, Batch, Any, Frozen], tuple[TrainState, Metrics]]:
    """The step of reinforcement learning; arguments as in `make_sft_step`.

    With `loss_cfg.updates` = K, a batch makes K optimizer updates, each on every K-th row and with
    the denominators of its own rows. Advantages are normalised over the whole batch, and with
    `proximal="recompute"` pi_old has the parameters before the first update: with K = 1 they are
    the current ones, at no cost; a larger K costs one more forward pass.

    Returns:
      A jitted (state, batch, version, frozen) -> (state, metrics). `version` i32[] is that of the
      current parameters: the age of a token is `version - batch.versions`.
    """
    cfg = resolve(loss_cfg)
    backbone = Backbone(model, attention, shardings and shardings.mesh)
    descent = Descent(tx, schedule, micro_rows)
    step = partial(rl_step, cfg=cfg, backbone=backbone, descent=descent)
    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    frozen = Frozen(base=shardings.base)
    if needs_reference(cfg):  # laid out like the model's parameters
        whole = shardings.base if model.lora_rank else shardings.state.params
        frozen = replace(frozen, reference=whole)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings.state, shardings.batch, None, frozen),
        out_shardings=(shardings.state, None),
    )


def sft_step(
    state: TrainState, batch: Batch, frozen: Frozen, *, backbone: Backbone, descent: Descent
) -> tuple[TrainState, Metrics]:
    """One update on one batch, not jitted: see `make_sft_step`."""
    loss_fn = partial(sft_loss, frozen=frozen, backbone=backbone)
    return _update(state, batch, loss_fn, descent)


def rl_step(
    state: TrainState,
    batch: Batch,
    version: jax.Array,
    frozen: Frozen,
    *,
    cfg: Method,
    backbone: Backbone,
    descent: Descent,
) -> tuple[TrainState, Metrics]:
    """The `cfg.updates` updates on one batch, not jitted: see `make_rl_step`."""
    if cfg.normalize:
        normalized = normalize_advantages(batch.advantages, batch.loss_mask, batch.segment_ids)
        batch = replace(batch, advantages=normalized)
    loss_fn = partial(rl_loss, version=version, frozen=frozen, cfg=cfg, backbone=backbone)
    if cfg.updates == 1:
        return _update(state, batch, loss_fn, descent)
    if cfg.proximal == "recompute":
        params = _with_adapters(frozen.base, state.params)
        old = _constant_logprobs(params, batch, backbone, descent.micro_rows)
        batch = replace(batch, proximal_logprobs=old)

    def one_update(state: TrainState, share: Batch) -> tuple[TrainState, Metrics]:
        return _update(state, share, loss_fn, descent)

    state, metrics = jax.lax.scan(one_update, state, _shares(batch, cfg.updates))
    return state, _over_updates(metrics)


def sft_loss(
    params: Any, batch: Batch, *, frozen: Frozen, backbone: Backbone
) -> tuple[jax.Array, Metrics]:
    """Weighted cross entropy f32[] of a (micro-)batch, without metrics."""
    logprobs = _logprobs(_with_adapters(frozen.base, params), batch, backbone)
    loss = cross_entropy(logprobs, batch.loss_mask, batch.weights, batch.num_tokens)
    return loss, {}


def rl_loss(
    params: Any,
    batch: Batch,
    *,
    version: jax.Array,
    frozen: Frozen,
    cfg: Method,
    backbone: Backbone,
) -> tuple[jax.Array, Metrics]:
    """`policy_loss` f32[] of a (micro-)batch at `params`, its metrics and `train/entropy`."""
    logprobs, entropy = token_logprobs_and_entropy(
        _with_adapters(frozen.base, params),
        backbone.model,
        batch.tokens,
        batch.positions,
        batch.segment_ids,
        attention=backbone.attention,
        mesh=backbone.mesh,
    )
    proximal = batch.proximal_logprobs
    if cfg.proximal == "recompute" and proximal is None:  # before the only update
        proximal = jax.lax.stop_gradient(logprobs)
    reference = None
    if frozen.reference is not None:
        reference = _logprobs(frozen.reference, batch, backbone)
    age = jnp.where(batch.versions >= 0, version - batch.versions, 0)
    tokens = Tokens(
        logprobs=logprobs,
        behavior=batch.behavior_logprobs,
        advantages=batch.advantages,
        mask=batch.loss_mask,
        segment_ids=batch.segment_ids,
        age=age.astype(jnp.float32),
        proximal=proximal,
        reference=reference,
    )
    loss, metrics = policy_loss(tokens, cfg, Counts(batch.num_tokens, batch.num_sequences))
    entropy = jax.lax.stop_gradient(entropy) * batch.loss_mask
    metrics["train/entropy"] = jnp.sum(entropy) / jnp.maximum(batch.num_tokens, 1.0)
    return loss, metrics


def needs_reference(loss_cfg: LossConfig | Method) -> bool:
    """Whether the step takes the parameters of a reference policy."""
    return resolve(loss_cfg).kl_coef > 0


def accumulate(
    loss_fn: BatchLoss, params: Any, batch: Batch, micro_rows: int
) -> tuple[jax.Array, Metrics, Any]:
    """(loss, metrics, gradients) of a batch, summed over micro-batches of `micro_rows` rows.

    Gradients are summed in float32 and returned in the parameters' dtype. Metrics are summed too;
    of those named `...max` the largest counts.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    rows = batch.tokens.shape[0]
    if micro_rows <= 0 or micro_rows >= rows:
        (loss, metrics), grads = value_and_grad(params, batch)
        return loss, metrics, grads

    def one(total: Any, micro: Batch) -> tuple[Any, tuple[jax.Array, Metrics]]:
        value, grads = value_and_grad(params, micro)
        return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads), value

    def one_or_none(total: Any, micro: Batch) -> tuple[Any, tuple[jax.Array, Metrics]]:
        def skipped(total: Any, micro: Batch) -> tuple[Any, tuple[jax.Array, Metrics]]:
            _, value = jax.eval_shape(one, total, micro)
            return total, jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), value)

        # A micro-batch of padding is skipped: one compiled shape serves any number of rows.
        return jax.lax.cond(jnp.any(micro.segment_ids > 0), one, skipped, total, micro)

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    total, (loss, metrics) = jax.lax.scan(one_or_none, zeros, _split(batch, micro_rows))
    grads = jax.tree.map(lambda t, p: t.astype(p.dtype), total, params)
    metrics = {k: v.max() if k.endswith("max") else v.sum() for k, v in metrics.items()}
    return loss.sum(), metrics, grads


def _split(batch: Batch, micro_rows: int) -> Batch:
    rows = batch.tokens.shape[0]
    if rows % micro_rows:
        raise ValueError(f"{rows} rows are not a multiple of micro_rows={micro_rows}")
    count = rows // micro_rows

    def one(x: jax.Array) -> jax.Array:
        if jnp.ndim(x) == 0:  # the denominators stay those of the whole batch
            return jnp.broadcast_to(x, (count,))
        # Strided, so that on a mesh every device keeps a part of each micro-batch.
        return x.reshape(micro_rows, count, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(one, batch)


def _shares(batch: Batch, updates: int) -> Batch:
    """The rows of each update on a new first axis, with denominators of their own."""
    rows = batch.tokens.shape[0]
    if rows % updates:
        raise ValueError(f"{rows} rows are not a multiple of updates={updates}")
    parts = _split(batch, rows // updates)

    def counts(mask: jax.Array, segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        trained = trained_mask(mask, segment_ids)
        return jnp.sum(trained), count_sequences(trained, segment_ids)

    tokens, sequences = jax.vmap(counts)(parts.loss_mask, parts.segment_ids)
    return replace(parts, num_tokens=tokens, num_sequences=sequences)


def _logprobs(params: Any, batch: Batch, backbone: Backbone) -> jax.Array:
    """log pi of every token of a batch: f32[B,T]."""
    return token_logprobs(
        params,
        backbone.model,
        batch.tokens,
        batch.positions,
        batch.segment_ids,
        attention=backbone.attention,
        mesh=backbone.mesh,
    )


def _constant_logprobs(params: Any, batch: Batch, backbone: Backbone, micro_rows: int) -> jax.Array:
    """`_logprobs` of a batch, `micro_rows` rows at a time, without a gradient."""
    rows, length = batch.shape
    if micro_rows <= 0 or micro_rows >= rows:
        return jax.lax.stop_gradient(_logprobs(params, batch, backbone))
    parts = jax.lax.map(lambda part: _logprobs(params, part, backbone), _split(batch, micro_rows))
    return jax.lax.stop_gradient(parts.swapaxes(0, 1).reshape(rows, length))


def _over_updates(metrics: Metrics) -> Metrics:
    """Metrics of a batch from those of its updates (first axis).

    They are means, except for maxima, sums of counts, and the last values of `train/nonfinite` and
    `train/lr`.
    """

    def fold(name: str, values: jax.Array) -> jax.Array:
        if name.endswith("max"):
            return values.max()
        if name in ("train/tokens", "train/sequences"):
            return values.sum()
        return values[-1] if name in ("train/nonfinite", "train/lr") else values.mean()

    return {name: fold(name, values) for name, values in metrics.items()}


def _update(
    state: TrainState, batch: Batch, loss_fn: BatchLoss, descent: Descent
) -> tuple[TrainState, Metrics]:
    loss, metrics, grads = accumulate(loss_fn, state.params, batch, descent.micro_rows)
    metrics = finish_metrics(metrics)
    with jax.named_scope("optimizer"):
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = descent.tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
    skipped = state.skipped + jnp.where(finite, 0, 1)
    metrics = metrics | {
        "train/loss": loss,
        "train/grad_norm": grad_norm,
        "train/tokens": batch.num_tokens,
        "train/sequences": batch.num_sequences,
        "train/nonfinite": skipped,
    }
    if descent.schedule is not None:  # it counts the updates that were not skipped
        metrics["train/lr"] = descent.schedule(state.step - state.skipped)
    return TrainState(state.step + 1, skipped, params, opt_state), metrics


def _with_adapters(base: Any, trained: Any) -> Any:
    """The backbone's parameters: the trained ones, or the frozen ones with trained adapters."""
    return trained if base is None else {**base, "adapters": trained}
