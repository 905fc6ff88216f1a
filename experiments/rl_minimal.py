"""Group-relative RL of an agent on one screen: sample, reward, advantage, rows, step, and again.

    python experiments/rl_minimal.py            # 6 steps of the tiny agent, a minute on a CPU

`run/loop.py` is this algorithm with everything a long run needs: sampling while training, a log
that survives kill -9, checkpoints, servers, several processes. Here one thing follows the other and
nothing is stored. With `max_staleness=0` the two compute the same losses, bit for bit
(`tests/experiments/test_rl_minimal.py`): what this file says is what the loop does.

Suffixes: `_P` one per problem (task) of a batch, `_G` one per sample of a group, `_S` one per
segment, an unbroken sequence of tokens of a trajectory, whose arrays run over its tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parent.parent))

from agentcpm_jax.chat.format import ChatFormat, template_text
from agentcpm_jax.config import ExperimentConfig, RLStage, from_config_dict
from agentcpm_jax.data.pack import pack
from agentcpm_jax.data.rows import shipped_rows
from agentcpm_jax.engine.local import LocalEngine
from agentcpm_jax.files import SHIPPED
from agentcpm_jax.hf.load import load_hf
from agentcpm_jax.hf.tokenizer import load_chat
from agentcpm_jax.rewards.advantages import credit_group
from agentcpm_jax.rewards.grade import answer_reward, grade_exact, score
from agentcpm_jax.rollout.episode import run_episode
from agentcpm_jax.run.sampling import task_sequence
from agentcpm_jax.train.optimizer import make_optimizer
from agentcpm_jax.train.step import Frozen, TrainState, make_rl_step
from agentcpm_jax.types import ShippedSegment, Task, Trajectory, TrajectoryGroup
from agentcpm_jax.world.tools import open_toolbox
from agentcpm_jax.world.vocabulary import write_tokenizer
from configs import tiny


def train(cfg: ExperimentConfig, rl: RLStage, init_from: str) -> Iterator[float]:
    """Yields the loss of each step; GRPO, MiniRL, RLOO ...: `rl.loss` and `rl.advantages` say."""
    with tempfile.TemporaryDirectory() as directory:
        write_tokenizer(directory, template_text(cfg.template))
        chat = load_chat(directory)
    params, _ = load_hf(SHIPPED[init_from], param_dtype=cfg.model.param_dtype)
    tx, schedule = make_optimizer(rl.optimizer, rl.shape.steps)
    step = make_rl_step(cfg.model, rl.loss, tx, schedule, micro_rows=rl.shape.micro_rows or 0)
    state = TrainState.create(params, tx)
    # It samples with a copy of the parameters; `deterministic`: the same bits in any company.
    engine = LocalEngine(params, cfg.model, rl.engine, deterministic=True)
    task_at = task_sequence(rl, cfg.train_tasks, cfg.seed)
    count = rl.stream.batch_groups

    for version in range(rl.shape.steps):
        tasks_P = {n + 1: task_at(n) for n in range(version * count, (version + 1) * count)}
        groups_P = asyncio.run(sample(engine, chat, cfg, rl, tasks_P))
        segments_S = [s for group in groups_P for s in credited(group, rl)]
        packed = pack(shipped_rows(segments_S), rl.shape.row_length, row_multiple=rl.shape.rows)
        state, metrics = step(state, packed.batch, jnp.int32(version), Frozen())
        engine.set_params(state.params, version + 1)
        yield float(metrics["train/loss"])
    engine.close()


async def sample(
    engine: LocalEngine,
    chat: ChatFormat,
    cfg: ExperimentConfig,
    rl: RLStage,
    tasks_P: Mapping[int, Task],
) -> list[TrajectoryGroup]:
    """Sample and reward: `group_size` episodes of each task, all at once.

    A task comes with the number of its group, which is part of the random key of every token.
    """
    reward = answer_reward(grade_exact)

    async def one(number: int, task: Task, sample: int) -> Trajectory:
        key = (number, sample, 0)
        toolbox = await open_toolbox(task.meta, key)
        trajectory = await run_episode(
            task,
            engine,
            toolbox,
            chat,
            cfg.episode,
            issue_id=number,
            sample=sample,
            attempt=0,
            seed=cfg.seed,
        )
        return await score(trajectory, task, reward)

    async def group(number: int, task: Task) -> TrajectoryGroup:
        episodes = (one(number, task, sample) for sample in range(rl.stream.group_size))
        trajectories_G = await asyncio.gather(*episodes)
        return TrajectoryGroup(number, task, tuple(trajectories_G))

    return await asyncio.gather(*(group(number, task) for number, task in tasks_P.items()))


def credited(group: TrajectoryGroup, rl: RLStage) -> list[ShippedSegment]:
    """Advantage: a sampled token gets its trajectory's reward less that of the group's others.

    `rl.advantages` says which others, and how it is scaled.
    """
    scores_G = [t.reward for t in group.trajectories]
    credits_G = credit_group(group, rl.credit, scores_G)
    return [
        ShippedSegment(group.issue_id, t.sample, i, segment, credit)
        for t, credits_S in zip(group.trajectories, credits_G, strict=True)
        for i, (segment, credit) in enumerate(zip(t.segments, credits_S, strict=True))
        if credit.keep.any()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6)
    steps = parser.parse_args().steps
    config = tiny.get_config()
    config.stage.rl.shape.steps = steps
    cfg = from_config_dict(config)
    for step, loss in enumerate(train(cfg, cfg.stages[0].rl, "shipped:sft"), 1):
        print(f"step {step}: loss {loss:+.6f}")


if __name__ == "__main__":
    main()
