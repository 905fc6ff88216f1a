"""What the trainer's side of sampling keeps for a resume."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

from agentcpm_jax.config import RLStage
from agentcpm_jax.model.config import TINY
from agentcpm_jax.model.params import init
from agentcpm_jax.rollout.config import StreamConfig
from agentcpm_jax.run.sampler import Sampler
from agentcpm_jax.weights.store import versions
from agentcpm_jax.weights.versions import VersionStore

MODEL = dataclasses.replace(
    TINY, vocab_size=16, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, ffw=16
)


def test_the_weights_that_a_resume_samples_with_stay(tmp_path: Path) -> None:
    """From the checkpoint of step 5, batch 5 is sampled with version 3 when eta is 2."""
    store = VersionStore(tmp_path, MODEL, enabled=True)
    params = init(jax.random.key(0), MODEL)
    for version in range(7):
        store.put(version, params)
    rl = RLStage(stream=StreamConfig(max_staleness=2, deterministic=True))
    rest: Any = None  # the engine, the log and the stream have no part in it
    sampler = Sampler(rl, log=rest, engine=rest, stream=rest, store=store, meter=rest)
    sampler.forget(None)  # before the first checkpoint
    assert versions(tmp_path) == list(range(7))
    sampler.forget(5)
    assert versions(tmp_path) == [3, 4, 5, 6]
