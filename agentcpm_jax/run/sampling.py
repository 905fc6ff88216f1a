"""One sample of one task, graded; and what becomes of a finished group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from agentcpm_jax.config import EvalStage, RLStage
from agentcpm_jax.dock.protocol import OpenToolbox
from agentcpm_jax.evaluate.runner import RunSample
from agentcpm_jax.rewards.advantages import AdvantageConfig, credit_group
from agentcpm_jax.rewards.denoise import DenoiseConfig, denoise
from agentcpm_jax.rewards.grade import Grader, grade_exact, score
from agentcpm_jax.rollout.chat import ChatFormat
from agentcpm_jax.rollout.episode import EpisodeConfig, run_episode
from agentcpm_jax.rollout.policy import TokenPolicy
from agentcpm_jax.rollout.stream import GroupOutcome
from agentcpm_jax.tasks.jsonl import load_tasks
from agentcpm_jax.tasks.world import WorldTasks
from agentcpm_jax.types import Task, Trajectory, TrajectoryGroup, UserError


def make_run_sample(
    policy: TokenPolicy,
    chat: ChatFormat,
    episode: EpisodeConfig,
    open_toolbox: OpenToolbox,
    *,
    seed: int,
    grader: Grader = grade_exact,
) -> RunSample:
    """An episode in a fresh environment, then the grader."""

    async def run_sample(task: Task, issue_id: int, sample: int, attempt: int) -> Trajectory:
        toolbox = await open_toolbox(task.meta, (issue_id, sample, attempt))
        try:
            trajectory = await run_episode(
                task,
                policy,
                toolbox,
                chat,
                episode,
                issue_id=issue_id,
                sample=sample,
                attempt=attempt,
                seed=seed,
            )
        finally:
            await toolbox.close()
        return score(trajectory, task, grader)

    return run_sample


def make_finish(
    denoise_cfg: DenoiseConfig, advantages: AdvantageConfig
) -> Callable[[TrajectoryGroup], GroupOutcome]:
    """Filters first, then the baseline over what is left, then the credit of every token."""
    return partial(_finish, denoise_cfg=denoise_cfg, advantages=advantages)


def _finish(
    group: TrajectoryGroup, *, denoise_cfg: DenoiseConfig, advantages: AdvantageConfig
) -> GroupOutcome:
    clean = denoise(group, denoise_cfg)
    if not clean.keep:
        reason = clean.decisions[-1].filter  # the one that ended the group
        return GroupOutcome(keep=False, reason=reason, decisions=clean.decisions)
    credits = credit_group(clean.group, advantages, clean.scores, clean.muted_turns)
    return GroupOutcome(
        keep=True,
        credits={
            (trajectory.sample, index): credit
            for trajectory, per_segment in zip(clean.group.trajectories, credits, strict=True)
            for index, credit in enumerate(per_segment)
        },
        decisions=clean.decisions,
    )


def task_sequence(rl: RLStage, world: WorldTasks, seed: int) -> Callable[[int], Task]:
    """ordinal -> task, without end: every epoch is a new permutation of all tasks."""
    if rl.tasks_path:
        tasks, _ = load_tasks(rl.tasks_path, skip_bad=rl.skip_bad)
        return _shuffled(len(tasks), tasks.__getitem__, seed)
    return _shuffled(len(world), world.task_at, seed)


def evaluation_tasks(spec: EvalStage, world: WorldTasks) -> list[Task]:
    """The first `spec.tasks` different tasks of a file, or of the held-out worlds."""
    if spec.tasks_path:
        return load_tasks(spec.tasks_path, skip_bad=spec.skip_bad)[0][: spec.tasks]
    count = spec.tasks
    chosen = replace(world, hops=spec.hops)
    tasks: dict[str, Task] = {}  # two worlds may ask the same question
    for index in range(len(chosen)):
        if len(tasks) == count:
            return list(tasks.values())
        task = chosen.task_at(index)
        tasks.setdefault(task.uid, task)
    raise UserError(
        f"{count} evaluation tasks wanted, the held-out worlds have {len(tasks)}; "
        "raise config.test_tasks.worlds or per_world"
    )


def _shuffled(count: int, task_at: Callable[[int], Task], seed: int) -> Callable[[int], Task]:
    orders: dict[int, np.ndarray] = {}

    def at(ordinal: int) -> Task:
        epoch, index = divmod(ordinal, count)
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([seed, epoch]).permutation(count)
        return task_at(int(orders[epoch][index]))

    return at
