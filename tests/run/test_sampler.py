"""What the trainer's side of sampling keeps for a resume."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from agentcpm_jax.config import RLStage
from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.log.schema import ShipEntry
from agentcpm_jax.model.config import TINY
from agentcpm_jax.model.params import init
from agentcpm_jax.rollout.config import StreamConfig
from agentcpm_jax.rollout.producer import GroupOutcome
from agentcpm_jax.run.sampler import UNTRAINABLE, Sampler, set_aside, without_untrainable
from agentcpm_jax.types import (
    Credit,
    Provenance,
    Segment,
    StopReason,
    Task,
    Trajectory,
    TrajectoryGroup,
    Verdict,
)
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


def sampled(length: int, sample: int = 0, issue_id: int = 1) -> Trajectory:
    """A prompt of two tokens and `length` - 2 sampled ones."""
    provenance = np.full(length, Provenance.SAMPLED, np.uint8)
    provenance[:2] = Provenance.TEMPLATE
    mine = provenance == Provenance.SAMPLED
    logprob = np.where(mine, -1.0, np.nan).astype(np.float32)
    version = np.where(mine, 0, -1).astype(np.int32)
    segment = Segment(np.arange(length, dtype=np.int32), provenance, logprob, version)
    return Trajectory((segment,), (), StopReason.ANSWERED, issue_id, sample, verdict=Verdict.RIGHT)


def credit(length: int, advantage: float = 1.0) -> Credit:
    return Credit(np.full(length, advantage, np.float32), np.ones(length, bool))


@pytest.mark.parametrize(
    ("length", "advantage", "why"),
    [
        (9, 1.0, "a row of 9 tokens, shape.row_length is 8"),
        (6, np.nan, "non-finite advantage"),
        (6, np.inf, "non-finite advantage"),
    ],
)
def test_what_cannot_be_a_row_leaves_before_it_is_recorded(length, advantage, why) -> None:
    good, bad = sampled(8), sampled(length, sample=1)
    credits = {(0, 0): credit(8), (1, 0): credit(length, advantage)}

    def outcome(*trajectories: Trajectory) -> GroupOutcome:
        group = TrajectoryGroup(1, Task("q", ("a",)), trajectories)
        mine = {place: credits[place] for place in ((t.sample, 0) for t in trajectories)}
        return without_untrainable(lambda _: GroupOutcome(True, credits=mine), 8, group)

    both = outcome(good, bad)
    assert both.keep and set(both.credits) == {(0, 0)}
    assert [(d.sample, d.filter) for d in both.decisions] == [(1, UNTRAINABLE)]
    assert why in both.decisions[0].reason
    alone = outcome(bad)
    assert (alone.keep, alone.reason) == (False, UNTRAINABLE)
    assert outcome(good).decisions == ()


def test_a_recorded_batch_that_cannot_be_trained_is_set_aside_aloud(tmp_path: Path) -> None:
    said: list[str] = []
    with ExperienceLog.open(tmp_path / "experience.db") as log:
        for step, length in enumerate((8, 9, 9)):
            issue = log.issue("rl", "train", Task(f"{step}?", ("a",)), 0, step)
            log.record_trajectory(sampled(length, issue_id=issue))
            log.finish_group(issue, "ready")
            log.ship("rl", step, [ShipEntry(issue, 0, 0, credit(length))])
        ctx: Any = SimpleNamespace(log=log, announce=said.append)
        stage: Any = SimpleNamespace(name="rl")
        set_aside(ctx, stage, version=2, row_length=9)
        assert said == [] and log.last_shipped_step("rl") == 2, "it can be trained"
        set_aside(ctx, stage, version=1, row_length=8)
        assert log.last_shipped_step("rl") == 0
        assert log.counts("rl")["state"] == {"shipped": 1, "dropped": 2}
    assert ["step 3" in said[0], "step 2" in said[1], len(said)] == [True, True, 2]
    assert "a row of 9 tokens" in said[0] and "1 groups are dropped as set_aside" in said[0]
