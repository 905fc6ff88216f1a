"""Short RL runs under noise, for `ablate_denoise.py`."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import noise
import numpy as np

from agentcpm_jax.config import default_config, from_config_dict
from agentcpm_jax.data.loader import StepBatches
from agentcpm_jax.data.rows import shipped_rows
from agentcpm_jax.engine.config import EngineConfig
from agentcpm_jax.engine.local import LocalEngine
from agentcpm_jax.files import SHIPPED
from agentcpm_jax.hf.load import load_hf
from agentcpm_jax.hf.tokenizer import load_chat
from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.rewards.advantages import AdvantageConfig
from agentcpm_jax.rewards.denoise import DenoiseConfig
from agentcpm_jax.rewards.grade import settle
from agentcpm_jax.rollout.config import StreamConfig
from agentcpm_jax.rollout.stream import Stream
from agentcpm_jax.run.sampling import make_finish, make_run_sample
from agentcpm_jax.train.config import OptimizerConfig
from agentcpm_jax.train.losses.config import LossConfig
from agentcpm_jax.train.optimizer import make_optimizer
from agentcpm_jax.train.step import Frozen, TrainState, make_rl_step
from agentcpm_jax.types import StopReason, Task, Trajectory, Verdict
from agentcpm_jax.world.tools import open_toolbox
from configs.tiny import CONTEXT, use_tiny_world

ROWS = 8
BARE = ("environment", "too_few", "zero_variance")


class Setting(NamedTuple):
    """What a run suffers from, and what is done about it."""

    noise: str
    filters: str
    pipeline: tuple[str, ...] = DenoiseConfig().filters
    flips: float = 0.0
    fault_rate: float = 0.0
    faults: tuple[str, ...] = ("infra_error",)
    counted_wrong: bool = False


HELD_OUT = 1_000_000  # issue ids no training run reaches
TESTED = 96  # held-out questions, four episodes each, without noise

LEARNING = {
    "untrained": Setting("none", "none"),
    "clean": Setting("none", "all"),
    "clean-bare": Setting("none", "none", BARE),
    "flips-off": Setting("judge flips 20 %", "none", BARE, flips=0.2),
    "flips-on": Setting("judge flips 20 %", "all", flips=0.2),
    "tools-off": Setting("lost tools 10 %", "lost = wrong", BARE, 0.0, 0.1, counted_wrong=True),
    "tools-on": Setting("lost tools 10 %", "all, repair", fault_rate=0.1),
    "truncated-off": Setting("truncated pages 20 %", "none", BARE, 0.0, 0.2, ("truncated",)),
    "truncated-on": Setting("truncated pages 20 %", "all", fault_rate=0.2, faults=("truncated",)),
}


def learn(name: str, steps: int, seed: int) -> dict:
    """Train; the true accuracy by the version that sampled, and of the result without noise.

    The first leaves out episodes that were lost, and so is no fair measure between runs.
    """
    setting = LEARNING[name]
    steps = 0 if name == "untrained" else steps
    c = default_config()
    use_tiny_world(c)
    c.train_tasks.tool_fault_rate = setting.fault_rate
    c.train_tasks.tool_faults = setting.faults
    cfg = from_config_dict(c)
    params, model = load_hf(SHIPPED["shipped:sft"])
    chat = load_chat(SHIPPED["shipped:sft"])
    engine = LocalEngine(params, model, EngineConfig(slots=64, capacity=CONTEXT, row_buckets=(16,)))
    play = make_run_sample(engine, chat, cfg.episode, open_toolbox, seed=seed)
    truth: list[tuple[int, int, float]] = []  # (issue, version, 1.0 = right)

    async def run_sample(task: Task, issue_id: int, sample: int, attempt: int) -> Trajectory:
        t = await play(task, issue_id, sample, attempt)
        if t.reward is not None:
            truth.append((issue_id, t.versions[1], t.reward))
        elif setting.counted_wrong and t.segments:
            t = settle(replace(t, stop=StopReason.NO_PROGRESS), Verdict.WRONG)
        return noise.flip(setting.flips)(t, seed) if t.reward is not None else t

    order = np.random.default_rng(seed).permutation(len(cfg.train_tasks))
    optimizer = OptimizerConfig(
        lr=6e-4, b2=0.95, eps=1e-5, weight_decay=0.0, schedule="constant", warmup=3.0
    )
    tx, _ = make_optimizer(optimizer)
    state = TrainState.create(params, tx)
    step = make_rl_step(model, LossConfig(name="minirl"), tx, micro_rows=ROWS)
    with (
        tempfile.TemporaryDirectory() as scratch,
        ExperienceLog.open(Path(scratch) / "log.db") as log,
    ):
        stream = Stream(
            log,
            "rl",
            lambda n: cfg.train_tasks.task_at(int(order[n % len(order)])),
            run_sample,
            make_finish(
                DenoiseConfig(setting.pipeline), AdvantageConfig(estimator="leave_one_out")
            ),
            StreamConfig(batch_groups=8, max_staleness=1, max_concurrent_groups=10),
        )
        batches = iter(
            StepBatches(
                lambda n: shipped_rows(stream.next_step_segments(n)), CONTEXT, row_multiple=ROWS
            )
        )
        with stream:
            stream.start(0)
            for version in range(steps):
                state, _ = step(state, next(batches), jnp.int32(version), Frozen())
                engine.set_params(state.params, version + 1)
                stream.set_version(version + 1)
                print(f"{name}: step {version + 1} of {steps}", flush=True)
            figures = stream.snapshot()
            dropped = [n for k, n in figures.items() if k.startswith("stream/dropped/")]
    tested = asyncio.run(test(play, list(cfg.test_tasks.take(TESTED))))
    engine.close()
    return {
        "noise": setting.noise,
        "filters": setting.filters,
        "steps": steps,
        "tested": accuracy(tested, 0, 0),
        "first": accuracy(truth, 0, 1) if steps else None,
        "last": accuracy(truth, steps - 4, steps) if steps else None,
        "curve": [[v, accuracy(truth, v, v)[0]] for v in range(steps + 1) if _at(truth, v, v)],
        "dropped": int(sum(dropped)),
    }


async def test(
    play: Callable[..., Awaitable[Trajectory]], tasks: list[Task]
) -> list[tuple[int, int, float]]:
    """(question, 0, 1.0 = right) of episodes in worlds without faults."""
    numbers = [n for n in range(len(tasks)) for _ in range(4)]
    episodes = (play(tasks[n], HELD_OUT + n, i % 4, 0) for i, n in enumerate(numbers))
    done = await asyncio.gather(*episodes)
    return [(n, 0, t.reward or 0.0) for n, t in zip(numbers, done, strict=True)]


def accuracy(truth: list[tuple[int, int, float]], first: int, last: int) -> list[float]:
    """(mean, low, high) over samples of these versions; bootstrap over groups."""
    groups: dict[int, list[float]] = {}
    for issue, _, right in _at(truth, first, last):
        groups.setdefault(issue, []).append(right)
    sums = np.array([[sum(g), len(g)] for g in groups.values()], float).reshape(-1, 2)
    if not len(sums):
        return [float("nan")] * 3
    drawn = np.random.default_rng(0).integers(len(sums), size=(1000, len(sums)))
    means = sums[drawn].sum(axis=1)
    low, high = np.quantile(means[:, 0] / means[:, 1], [0.025, 0.975])
    return [float(sums[:, 0].sum() / sums[:, 1].sum()), float(low), float(high)]


def _at(truth: list[tuple[int, int, float]], first: int, last: int) -> list:
    return [entry for entry in truth if first <= entry[1] <= last]
