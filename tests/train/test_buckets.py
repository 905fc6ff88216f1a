"""Cutting padding off changes nothing but the shape, and every shape is compiled once."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import optax
import pytest

from agentcpm_jax.config import TrainShape
from agentcpm_jax.data.pack import fill
from agentcpm_jax.data.rows import text_row
from agentcpm_jax.mesh import MeshConfig
from agentcpm_jax.model.config import TINY
from agentcpm_jax.model.params import init
from agentcpm_jax.run.learner import make_cut
from agentcpm_jax.sharding import make_mesh
from agentcpm_jax.train.buckets import check_lengths, trim
from agentcpm_jax.train.step import Frozen, TrainState, make_sft_step
from agentcpm_jax.types import UserError

MODEL = dataclasses.replace(
    TINY, vocab_size=16, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, ffw=16
)


def test_the_loss_is_that_of_the_whole_rows_and_buckets_compile_once() -> None:
    step = make_sft_step(MODEL, optax.sgd(0.0))
    params = init(jax.random.key(0), MODEL)
    shapes, rng = [], np.random.default_rng(0)
    for longest in (3, 7, 5, 8, 12, 2, 16):
        rows = [text_row(rng.integers(0, 16, n)) for n in (longest, 2)]
        batch = fill([[row] for row in rows], 16, 2)
        short = trim(batch, (4, 8))
        shapes.append(short.shape[1])
        losses = []
        for b in (batch, short):
            state = TrainState.create(jax.tree.map(jax.numpy.array, params), optax.sgd(0.0))
            losses.append(float(step(state, b, Frozen())[1]["train/loss"]))
        assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert shapes == [4, 8, 8, 8, 16, 4, 16]
    assert step._cache_size() == 3


def test_a_stage_cuts_its_batches_as_its_config_says() -> None:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    cut = make_cut(TrainShape(16, 2, buckets=(4, 8)), mesh)
    for longest, length in ((3, 4), (5, 8), (9, 16)):
        rows = [text_row(np.arange(n)) for n in (longest, 2)]
        assert cut(fill([[row] for row in rows], 16, 2)).shape == (2, length)
    with pytest.raises(UserError, match=r"bucket of 16 tokens: .* below row_length=16"):
        make_cut(TrainShape(16, 2, buckets=(16,)), mesh)


def test_buckets_that_cannot_be_compiled_are_refused() -> None:
    check_lengths((256, 512), 1024, 128)
    with pytest.raises(UserError, match=r"bucket of 300 tokens: .* multiples of 128; .* is 256"):
        check_lengths((300,), 1024, 128)
    with pytest.raises(UserError, match=r"below row_length=1024 .* nearest is 896"):
        check_lengths((2048,), 1024, 128)
