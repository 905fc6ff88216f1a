"""The update does not depend on packing, padding or micro-batches, and only trained tokens act."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agentcpm_jax import tree
from agentcpm_jax.data.batch import Batch
from agentcpm_jax.data.pack import fill, pack
from agentcpm_jax.data.rows import Row, text_row
from agentcpm_jax.model import params as model_params
from agentcpm_jax.model.config import TINY
from agentcpm_jax.model.logprobs import token_logprobs
from agentcpm_jax.model.qwen3 import forward
from agentcpm_jax.train.config import OptimizerConfig
from agentcpm_jax.train.losses.config import Correction, LossConfig
from agentcpm_jax.train.optimizer import make_optimizer
from agentcpm_jax.train.step import Frozen, TrainState, make_rl_step, make_sft_step, needs_reference

MODEL = dataclasses.replace(
    TINY, vocab_size=16, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, ffw=16
)
VERSION = 5
# Keeps the gradient as its state and changes nothing.
RECORD = optax.chain(optax.trace(decay=0.0), optax.set_to_zero())
# Sequence ratios, sequence masks and batch-wide advantages: what packing and splitting could break.
LOSS = LossConfig(
    "reinforce_pp",
    objective="gspo",
    eps_low=0.5,
    eps_high=1.0,
    aggregation="seq-mean-token-mean",
    corrections=(Correction("mis", 1e-4, 1e4), Correction("geometric", 0.2, 5.0)),
)


@pytest.fixture(autouse=True, scope="module")
def _compile_quickly() -> Iterator[None]:
    """These steps run a few times each: compiling them is what takes time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def rows() -> list[Row]:
    rng = np.random.default_rng(0)
    out = []
    for n in (5, 9, 3, 7, 8, 12):
        row = text_row(rng.integers(0, 16, n))
        mask = row.loss_mask & (rng.random(n) < 0.7)
        out.append(
            dataclasses.replace(
                row,
                loss_mask=mask,
                weights=rng.random(n, np.float32),
                advantages=rng.standard_normal(n).astype(np.float32),
                logprobs=-3 * rng.random(n, np.float32),
                versions=rng.integers(0, VERSION + 1, n, np.int32),
            )
        )
    return out


@functools.cache
def initial() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    return tree.map_with_path(
        lambda path, p: np.asarray(
            np.ones(p.shape) if "norm" in path else 0.2 * rng.standard_normal(p.shape), np.float32
        ),
        model_params.abstract_params(MODEL),
    )


def fresh(tx: optax.GradientTransformation) -> TrainState:
    return TrainState.create(jax.tree.map(jnp.array, initial()), tx)


@functools.cache
def recorder(kind: str, micro_rows: int = 0):
    if kind == "sft":
        step = make_sft_step(MODEL, RECORD, micro_rows=micro_rows)
        return lambda state, batch: step(state, batch, Frozen())
    step = make_rl_step(MODEL, LOSS, RECORD, micro_rows=micro_rows)
    return lambda state, batch: step(state, batch, VERSION, Frozen())


def gradient(kind: str, batch: Batch, micro_rows: int = 0) -> tuple[np.ndarray, dict]:
    state, metrics = recorder(kind, micro_rows)(fresh(RECORD), batch)
    flat = [np.asarray(g).ravel() for g in jax.tree.leaves(state.opt_state[0].trace)]
    return np.concatenate(flat), metrics


@pytest.mark.parametrize("kind", ["sft", "rl"])
def test_packing_padding_and_micro_batches_change_nothing(kind: str) -> None:
    alone = fill([[row] for row in reversed(rows())], 16, 8)
    packed = pack(rows(), row_length=16, num_rows=8).batch
    without_padding = pack(rows(), row_length=16).batch
    assert packed.segment_ids.max() > 1
    assert without_padding.shape == (3, 16)
    reference, seen = gradient(kind, alone)
    assert np.abs(reference).max() > 1e-3
    for batch, micro_rows in ((packed, 0), (without_padding, 0), (alone, 2)):
        grads, metrics = gradient(kind, batch, micro_rows)
        assert np.linalg.norm(grads - reference) <= 1e-5 * np.linalg.norm(reference)
        assert metrics.keys() == seen.keys()
        for name in metrics:
            np.testing.assert_allclose(
                metrics[name], seen[name], rtol=1e-5, atol=1e-6, err_msg=name
            )
        np.testing.assert_allclose(metrics["train/loss"], seen["train/loss"], rtol=1e-6)


def test_the_gradient_is_that_of_the_formula() -> None:
    """SFT: -sum w log p / number of trained tokens, from plain softmax over the forward pass."""
    batch = jax.tree.map(jnp.asarray, fill([[row] for row in rows()], 16, 8))

    def formula(params: Any) -> jax.Array:
        logits = forward(params, MODEL, batch.tokens, batch.positions, batch.segment_ids)
        logp = jax.nn.log_softmax(logits)[:, :-1]
        of_next = jnp.take_along_axis(logp, batch.tokens[:, 1:, None], axis=2)[..., 0]
        return -jnp.sum((batch.weights * batch.loss_mask)[:, 1:] * of_next) / batch.loss_mask.sum()

    loss, grads = jax.jit(jax.value_and_grad(formula))(initial())
    expected = np.concatenate([np.asarray(g).ravel() for g in jax.tree.leaves(grads)])
    got, metrics = gradient("sft", batch)
    np.testing.assert_allclose(metrics["train/loss"], loss, rtol=1e-6)
    assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)
    assert metrics["train/grad_norm"] == pytest.approx(np.linalg.norm(expected), rel=1e-5)
    assert metrics["train/tokens"] == batch.loss_mask.sum()


@pytest.mark.parametrize("kind", ["sft", "rl"])
def test_masked_tokens_give_no_gradient(kind: str) -> None:
    """What is not trained may hold anything in its weights, advantages and log-probabilities."""
    batch = fill([[row] for row in rows()], 16, 8)
    off = batch.loss_mask == 0
    absurd = batch.replace(
        weights=np.where(off, 1e6, batch.weights).astype(np.float32),
        advantages=np.where(off, np.nan, batch.advantages).astype(np.float32),
        behavior_logprobs=np.where(off, np.nan, batch.behavior_logprobs).astype(np.float32),
    )
    np.testing.assert_array_equal(gradient(kind, absurd)[0], gradient(kind, batch)[0])
    nothing, _ = gradient(kind, batch.replace(loss_mask=np.zeros_like(batch.loss_mask)))
    assert not nothing.any()


def updated(cfg: LossConfig, batch: Batch, micro_rows: int = 0) -> tuple[np.ndarray, dict]:
    """Parameters after one step of plain descent, large enough to move the ratios."""
    step = make_rl_step(MODEL, cfg, optax.sgd(0.5), micro_rows=micro_rows)
    state, metrics = step(fresh(optax.sgd(0.5)), batch, VERSION, Frozen())
    return np.concatenate([np.asarray(p).ravel() for p in jax.tree.leaves(state.params)]), metrics


def share(batch: Batch, j: int, updates: int) -> Batch:
    part = jax.tree.map(lambda x: x[j::updates] if np.ndim(x) else x, batch)
    trained = part.loss_mask > 0
    sequences = {(b, s) for b, s in zip(*np.nonzero(trained), strict=True)}
    ids = {(b, int(part.segment_ids[b, t])) for b, t in sequences}
    return part.replace(num_tokens=np.float32(trained.sum()), num_sequences=np.float32(len(ids)))


def test_several_updates_are_steps_on_shares_with_the_first_policy_as_proximal() -> None:
    cfg = LossConfig("decoupled_ppo", eps_low=0.05, eps_high=0.05, dual_clip=3.0)
    batch = pack(rows(), row_length=16, num_rows=4).batch
    together, metrics = updated(dataclasses.replace(cfg, updates=2), batch, micro_rows=1)

    first = jax.tree.map(jnp.asarray, initial())
    where = (batch.tokens, batch.positions, batch.segment_ids)
    old = token_logprobs(first, MODEL, *map(jnp.asarray, where))
    batch = batch.replace(proximal_logprobs=np.asarray(old))
    step = make_rl_step(MODEL, cfg, optax.sgd(0.5))
    state = fresh(optax.sgd(0.5))
    seen = []
    for j in range(2):
        state, each = step(state, share(batch, j, 2), VERSION, Frozen())
        seen.append(each)
    alone = np.concatenate([np.asarray(p).ravel() for p in jax.tree.leaves(state.params)])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)
    assert seen[0]["loss/ratio_max"] == pytest.approx(1.0) and seen[1]["loss/ratio_max"] > 1.01
    assert metrics["train/tokens"] == sum(m["train/tokens"] for m in seen)
    largest = float(seen[1]["loss/ratio_max"])
    assert metrics["loss/ratio_max"] == pytest.approx(largest, rel=1e-4)
    losses = [float(m["train/loss"]) for m in seen]
    assert metrics["train/loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_one_update_takes_the_proximal_policy_for_free() -> None:
    """pi_old of a batch's only update are the current parameters: ratio 1, weights pi/mu."""
    batch = pack(rows(), row_length=16, num_rows=4).batch
    _, metrics = updated(LossConfig("decoupled_ppo"), batch)
    assert metrics["loss/ratio_max"] == metrics["loss/ratio_mean"] == 1.0
    assert 0 < metrics["loss/weight_mean"] < 1 and 0 < metrics["loss/ess"] < 1


@pytest.mark.parametrize("age", [0, 1])
def test_the_age_of_a_token_is_counted_from_the_version_that_is_trained(age: int) -> None:
    """The band of ratios is 1 + 0.3 * 4 exp(-0.1 age): 2.2, then 2.09. At 2.15 it holds age 0."""
    batch = pack(rows(), row_length=16, num_rows=4).batch
    where = (batch.tokens, batch.positions, batch.segment_ids)
    first = jax.tree.map(jnp.asarray, initial())
    logprobs = token_logprobs(first, MODEL, *map(jnp.asarray, where))
    batch = batch.replace(
        advantages=np.ones_like(batch.advantages),
        behavior_logprobs=np.asarray(logprobs) - np.float32(np.log(2.15)),
        versions=np.where(batch.loss_mask > 0, VERSION - age, -1).astype(np.int32),
    )
    params, metrics = updated(LossConfig(eps_high=0.3, widen=4.0, decay=0.1), batch)
    assert metrics["loss/age_mean"] == age
    assert metrics["loss/bound_fraction"] == (age > 0)
    before = np.concatenate([np.asarray(p).ravel() for p in jax.tree.leaves(initial())])
    assert np.array_equal(params, before) == (age > 0)


def test_the_reference_policy_pulls_back() -> None:
    cfg = LossConfig("grpo", kl_coef=1e3, eps_low=0.0, eps_high=0.0)
    assert needs_reference(cfg) and not needs_reference(LossConfig())
    step = make_rl_step(MODEL, cfg, RECORD)
    batch = pack(rows(), row_length=16, num_rows=4).batch
    at_reference, metrics = step(fresh(RECORD), batch, VERSION, Frozen(reference=initial()))
    assert metrics["loss/kl_reference"] == pytest.approx(0.0, abs=1e-6)
    elsewhere = jax.tree.map(lambda p: 1.1 * p, initial())
    away, metrics = step(fresh(RECORD), batch, VERSION, Frozen(reference=elsewhere))
    assert metrics["loss/kl_reference"] > 1e-4
    assert optax.tree.norm(away.opt_state[0].trace) > optax.tree.norm(
        at_reference.opt_state[0].trace
    )


MESH_SCRIPT = """
import dataclasses, jax, numpy as np
from tests.train.test_step import LOSS, MODEL, RECORD, VERSION, fresh, initial, rows
from agentcpm_jax.data.pack import pack
from agentcpm_jax.train.placement import place, step_shardings
from agentcpm_jax.mesh import MeshConfig
from agentcpm_jax.sharding import make_mesh
from agentcpm_jax.train.step import Frozen, make_rl_step

batch = pack(rows(), row_length=16, num_rows=4).batch
found = []
for sizes in ((1, 1, 1, 1), (2, 2, 1, 1), (1, 2, 1, 2)):
    count = int(np.prod(sizes))
    shardings = step_shardings(
        make_mesh(MeshConfig(*sizes), jax.devices()[:count]), MODEL, RECORD, 4
    )
    cfg = dataclasses.replace(LOSS, kl_coef=0.1, kl="k3+")
    step = make_rl_step(MODEL, cfg, RECORD, shardings=shardings)
    reference = jax.tree.map(lambda p: 1.1 * p, initial())
    if shardings is not None:
        reference = jax.device_put(reference, shardings.state.params)
    frozen = Frozen(reference=reference)
    state, metrics = step(place(fresh(RECORD), shardings), batch, VERSION, frozen)
    flat = [np.asarray(g).ravel() for g in jax.tree.leaves(state.opt_state[0].trace)]
    found.append((np.concatenate(flat), float(metrics["train/loss"])))
(grad, loss), *others = found
for other, value in others:
    assert np.linalg.norm(other - grad) <= 1e-5 * np.linalg.norm(grad)
    assert abs(value - loss) <= 1e-6 * abs(loss), (value, loss)
"""


@pytest.mark.mesh
def test_a_mesh_changes_neither_loss_nor_gradient() -> None:
    """Four virtual devices against one, sequence masks and batch-wide advantages included."""
    flag = "--xla_force_host_platform_device_count=4 --xla_cpu_multi_thread_eigen=false"
    here = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", MESH_SCRIPT],
        capture_output=True,
        text=True,
        cwd=here,
        env=os.environ
        | {"XLA_FLAGS": flag, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        | {"PYTHONPATH": f"{here.parent}{os.pathsep}{here}"},
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("weight", [np.inf, 1e30], ids=["the loss", "the gradient alone"])
def test_a_non_finite_update_is_skipped_and_counted(weight: float) -> None:
    tx, schedule = make_optimizer(OptimizerConfig(lr=0.1, schedule="linear"), 4)
    step = make_sft_step(MODEL, tx, schedule)
    good = fill([[row] for row in rows()], 16, 6)
    bad = good.replace(weights=np.where(good.loss_mask > 0, weight, 0).astype(np.float32))
    _, overflowing = step(fresh(tx), bad, Frozen())
    assert np.isfinite(overflowing["train/loss"]) == np.isfinite(weight)
    assert not np.isfinite(overflowing["train/grad_norm"])
    skipping, straight = fresh(tx), fresh(tx)
    for batch in (good, bad, good):
        skipping, metrics = step(skipping, batch, Frozen())
    assert (skipping.step, skipping.skipped, metrics["train/nonfinite"]) == (3, 1, 1)
    for _ in range(2):
        straight, straight_metrics = step(straight, good, Frozen())
    assert metrics["train/lr"] == straight_metrics["train/lr"] == pytest.approx(0.075)
    for left, right in (
        (skipping.params, straight.params),
        (skipping.opt_state, straight.opt_state),
    ):
        jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_few_rows_are_learned_by_heart(name: str) -> None:
    cfg = OptimizerConfig(name=name, lr=0.02, adam_lr=0.02, schedule="constant", weight_decay=0.0)
    tx, schedule = make_optimizer(cfg)
    step = make_sft_step(MODEL, tx, schedule)
    batch = pack([text_row([3, 1, 4, 1, 5, 9, 2, 6]), text_row([2, 7, 1, 8, 2, 8])], 16).batch
    state, losses = fresh(tx), []
    for _ in range(80):
        state, metrics = step(state, batch, Frozen())
        losses.append(float(metrics["train/loss"]))
    assert losses[0] > 2.0
    assert losses[-1] < 0.1


def test_rl_raises_what_was_good_and_lowers_what_was_bad() -> None:
    """Two continuations of one prompt, advantages +1 and -1: the odds move to the first."""
    cfg = OptimizerConfig(lr=0.01, schedule="constant", weight_decay=0.0)
    tx, _ = make_optimizer(cfg)
    step = make_rl_step(MODEL, LossConfig(region="none"), tx)
    base = text_row([1, 2, 3])
    last = np.array([False, False, True])
    good, bad = (
        dataclasses.replace(
            base,
            ids=np.array([1, 2, token], np.int32),
            loss_mask=last,
            advantages=np.where(last, advantage, 0).astype(np.float32),
            logprobs=np.where(last, np.log(1 / 16), 0).astype(np.float32),
            versions=np.where(last, 0, -1).astype(np.int32),
        )
        for token, advantage in ((3, 1.0), (4, -1.0))
    )
    batch = pack([good, bad], 8).batch
    state, first = step(fresh(tx), batch, 0, Frozen())
    for _ in range(10):
        state, metrics = step(state, batch, 0, Frozen())
    assert 0 < metrics["train/entropy"] < first["train/entropy"] <= np.log(16)
    tokens, positions = jnp.array([[1, 2]]), jnp.array([[0, 1]])
    read = jax.jit(lambda params: forward(params, MODEL, tokens, positions, tokens * 0 + 1)[0, -1])
    before, logits = read(initial()), read(state.params)
    assert logits[3] - logits[4] > before[3] - before[4] + 0.5


def test_rows_must_split_evenly() -> None:
    batch = fill([[row] for row in rows()], 16, 6)
    with pytest.raises(ValueError, match="6 rows are not a multiple of updates=4"):
        updated(LossConfig(updates=4), batch)
    with pytest.raises(ValueError, match="6 rows are not a multiple of micro_rows=4"):
        make_sft_step(MODEL, RECORD, micro_rows=4)(fresh(RECORD), batch, Frozen())
