"""One optimizer update, jitted: gradients over micro-batches, clip, update, metrics.

Losses divide by the counts of the whole batch, so the gradients of micro-batches add up to the
gradient of the batch: the result does not depend on how it is split, packed or padded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agentcpm_jax.data.batch import Batch
from agentcpm_jax.model.attention import Attention
from agentcpm_jax.model.config import ModelConfig
from agentcpm_jax.model.logprobs import token_logprobs, token_logprobs_and_entropy
from agentcpm_jax.train.loss import LossConfig, cross_entropy, policy_loss
from agentcpm_jax.train.optimizer import Schedule
from agentcpm_jax.train.state import TrainState

Metrics = dict[str, jax.Array]
BatchLoss = Callable[[Any, Batch], tuple[jax.Array, Metrics]]


class StepShardings(NamedTuple):
    """Shardings on a mesh (trees of `jax.sharding.Sharding` or prefixes of them)."""

    state: Any
    batch: Any


def make_sft_step(
    model: ModelConfig,
    tx: optax.GradientTransformation,
    schedule: Schedule | None = None,
    *,
    micro_rows: int = 0,
    shardings: StepShardings | None = None,
    attention: Attention | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The step of pretraining and SFT: weighted cross entropy of the trained tokens.

    Args:
      model: the backbone.
      tx: the optimiser; `schedule` (its learning rate) is for the metric `train/lr` only.
      micro_rows: rows per forward pass; the batch's rows must be a multiple. 0: all at once.
      shardings: of the state and the batch on a mesh; None: one device.
      attention: the kernel; None: the reference.
    Returns:
      A jitted (state, batch) -> (state, metrics). The state is donated. A non-finite loss or
      gradient changes nothing but `step` and `skipped`.
    """

    def loss_fn(params: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        logprobs = token_logprobs(
            params, model, batch.tokens, batch.positions, batch.segment_ids, attention=attention
        )
        loss = cross_entropy(logprobs, batch.loss_mask, batch.weights, batch.num_tokens)
        return loss, {}

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return _update(state, batch, loss_fn, tx, schedule, micro_rows)

    return _jit(step, shardings)


def make_rl_step(
    model: ModelConfig,
    loss_cfg: LossConfig,
    tx: optax.GradientTransformation,
    schedule: Schedule | None = None,
    *,
    micro_rows: int = 0,
    shardings: StepShardings | None = None,
    attention: Attention | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The step of reinforcement learning; arguments as in `make_sft_step`.

    Returns:
      A jitted (state, batch, version, reference=None) -> (state, metrics). `version` i32[] is that
      of the current parameters: the age of a token is `version - batch.versions`. `reference` are
      the parameters that `loss_cfg.kl_coef` pulls to.
    """

    def step(
        state: TrainState, batch: Batch, version: jax.Array, reference: Any = None
    ) -> tuple[TrainState, Metrics]:
        def loss_fn(params: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
            where = (batch.tokens, batch.positions, batch.segment_ids)
            logprobs, entropy = token_logprobs_and_entropy(
                params, model, *where, attention=attention
            )
            pulled_to = None
            if reference is not None:
                pulled_to = token_logprobs(reference, model, *where, attention=attention)
            age = jnp.where(batch.versions >= 0, version - batch.versions, 0)
            loss, metrics = policy_loss(
                logprobs,
                batch.behavior_logprobs,
                batch.advantages,
                batch.loss_mask,
                batch.segment_ids,
                age.astype(jnp.float32),
                batch.num_tokens,
                batch.num_sequences,
                loss_cfg,
                reference=pulled_to,
            )
            tokens = jnp.maximum(batch.num_tokens, 1.0)
            entropy = jax.lax.stop_gradient(entropy) * batch.loss_mask
            metrics["train/entropy"] = jnp.sum(entropy) / tokens
            return loss, metrics

        return _update(state, batch, loss_fn, tx, schedule, micro_rows)

    return _jit(step, shardings, extra=2)


def accumulate(
    loss_fn: BatchLoss, params: Any, batch: Batch, micro_rows: int
) -> tuple[jax.Array, Metrics, Any]:
    """(loss, metrics, gradients) of a batch, summed over micro-batches of `micro_rows` rows.

    Gradients add up in float32 and come back in the dtype of the parameters. Metrics add up too,
    but for those named `...max`.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    rows = batch.tokens.shape[0]
    if micro_rows <= 0 or micro_rows >= rows:
        (loss, metrics), grads = value_and_grad(params, batch)
        return loss, metrics, grads

    def one(total: Any, micro: Batch) -> tuple[Any, tuple[jax.Array, Metrics]]:
        value, grads = value_and_grad(params, micro)
        return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads), value

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    total, (loss, metrics) = jax.lax.scan(one, zeros, _split(batch, micro_rows))
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


def _update(
    state: TrainState,
    batch: Batch,
    loss_fn: BatchLoss,
    tx: optax.GradientTransformation,
    schedule: Schedule | None,
    micro_rows: int,
) -> tuple[TrainState, Metrics]:
    loss, metrics, grads = accumulate(loss_fn, state.params, batch, micro_rows)
    with jax.named_scope("optimizer"):
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
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
    if schedule is not None:  # the optimiser counts the updates it made, not the batches it saw
        metrics["train/lr"] = schedule(state.step - state.skipped)
    return TrainState(state.step + 1, skipped, params, opt_state), metrics


def _jit(step: Callable, shardings: StepShardings | None, extra: int = 0) -> Callable:
    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    state, batch = shardings
    # The parameters of a reference policy are laid out like those of the state.
    rest = (None, getattr(state, "params", state))[:extra]
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(state, batch, *rest),
        out_shardings=(state, None),
    )
