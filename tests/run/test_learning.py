"""The whole circle learns: engine, stream, log, credit, MiniRL and weight updates, asynchronously.

The task is a bandit that a tiny random model can solve: say a token of the lower quarter of the
vocabulary. Rewards rise from chance to near certainty, or a sign is wrong somewhere.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentcpm_jax.data.loader import StepBatches
from agentcpm_jax.data.rows import shipped_rows
from agentcpm_jax.engine.config import EngineConfig
from agentcpm_jax.engine.local import LocalEngine
from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.model import params as model_params
from agentcpm_jax.model.config import TINY
from agentcpm_jax.rewards.advantages import AdvantageConfig
from agentcpm_jax.rewards.denoise import DenoiseConfig
from agentcpm_jax.rewards.grade import settle
from agentcpm_jax.rollout.config import StreamConfig
from agentcpm_jax.rollout.policy import SampleRequest, SamplingParams
from agentcpm_jax.rollout.stream import Stream
from agentcpm_jax.run.sampling import make_finish
from agentcpm_jax.train.config import OptimizerConfig
from agentcpm_jax.train.losses.config import LossConfig
from agentcpm_jax.train.optimizer import make_optimizer
from agentcpm_jax.train.step import Frozen, TrainState, make_rl_step
from agentcpm_jax.types import (
    Provenance,
    Segment,
    StopReason,
    Task,
    Trajectory,
    Turn,
    Verdict,
)

CFG = replace(TINY, width=32, num_layers=1, ffw=64, head_dim=16, vocab_size=32)
STEPS = 18
FILTERS = ("environment", "too_few", "zero_variance")  # an answer needs no search here


def bandit(engine: LocalEngine):
    async def run_sample(task: Task, issue_id: int, sample: int, attempt: int) -> Trajectory:
        prompt = np.array([1, 2, 3 + issue_id % 3], np.int32)
        seed = (issue_id, sample, attempt)
        done = await engine.sample(
            SampleRequest(f"{issue_id}-{sample}/", prompt, 1, SamplingParams(1.0, (), seed))
        )
        n = len(prompt)
        segment = Segment(
            ids=np.concatenate([prompt, done.ids]),
            provenance=np.array([Provenance.TEMPLATE] * n + [Provenance.SAMPLED], np.uint8),
            logprob=np.concatenate([np.full(n, np.nan, np.float32), done.logprobs]),
            version=np.concatenate([np.full(n, -1, np.int32), done.versions]),
        )
        trajectory = Trajectory(
            (segment,), (Turn(0, 0, n, n + 1),), StopReason.ANSWERED, issue_id, sample, attempt
        )
        right = int(done.ids[0]) < CFG.vocab_size // 4
        return settle(trajectory, Verdict.RIGHT if right else Verdict.WRONG)

    return run_sample


@pytest.mark.parametrize("loss", ["minirl", "grpo"])
def test_reward_rises(tmp_path: Path, loss: str) -> None:
    tx, _ = make_optimizer(OptimizerConfig(lr=0.004, schedule="constant", weight_decay=0.0))
    state = TrainState.create(model_params.init(jax.random.key(0), CFG), tx)
    engine = LocalEngine(state.params, CFG, EngineConfig(16, 16, 1, (), (4,)))
    step = make_rl_step(CFG, LossConfig(name=loss, kl_coef=0.0), tx)
    estimator = "leave_one_out" if loss == "minirl" else "grpo"
    with ExperienceLog.open(tmp_path / "log.db") as log:
        stream = Stream(
            log,
            "rl",
            lambda n: Task(f"q{n}", ("a",)),
            bandit(engine),
            make_finish(DenoiseConfig(FILTERS), AdvantageConfig(estimator=estimator)),
            StreamConfig(batch_groups=4, group_size=8, max_staleness=1, max_concurrent_groups=8),
        )
        batches = iter(
            StepBatches(lambda n: shipped_rows(stream.next_step_segments(n)), 16, num_rows=8)
        )
        with stream:
            stream.start(0)
            for version in range(STEPS):
                state, _ = step(state, next(batches), jnp.int32(version), Frozen())
                engine.set_params(state.params, version + 1)
                stream.set_version(version + 1)
            ages = stream.snapshot()["stream/age_max"]
        engine.close()
        rewards = [
            t.reward
            for issue in log.issues("rl")
            if issue.state in ("shipped", "dropped")
            for t in log.load_group(issue.issue_id).trajectories
        ]
    first, last = np.mean(rewards[:64]), np.mean(rewards[-64:])
    assert first < 0.5, f"chance is a quarter, the first 64 samples had {first:.2f}"
    assert last > 0.7, f"after {STEPS} steps only {last:.2f}"
    assert ages <= 1
