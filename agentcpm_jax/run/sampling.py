"""Samples and grades one task; filters a finished group and assigns its credit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from agentcpm_jax.chat.format import ChatFormat
from agentcpm_jax.config import EvalStage, ExperimentConfig, RLStage
from agentcpm_jax.dock.protocol import OpenToolbox
from agentcpm_jax.evaluate.runner import RunSample
from agentcpm_jax.rewards.advantages import AdvantageConfig, credit_group, punish_overlong
from agentcpm_jax.rewards.denoise import DenoiseConfig, denoise
from agentcpm_jax.rewards.grade import Reward, normalize, score
from agentcpm_jax.rollout.config import EpisodeConfig
from agentcpm_jax.rollout.episode import run_episode
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
    reward: Reward | None = None,
    deadline: float = 0.0,
    redraw: bool = True,
) -> RunSample:
    """A function that plays an episode in a fresh environment and adds its reward.

    reward: None is `grade_exact` of the answer. deadline: seconds of an async one (0: no limit).
    redraw: a further attempt draws other tokens. Evaluation draws the same: an outage that is over
    must change no result, and what a tool fails at must not be drawn until it is something else.
    """

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
                redraw=redraw,
            )
        finally:
            await toolbox.close()
        return await score(trajectory, task, reward, deadline)

    return run_sample


def make_finish(
    denoise_cfg: DenoiseConfig, advantages: AdvantageConfig
) -> Callable[[TrajectoryGroup], GroupOutcome]:
    """A function that filters a group, takes the baseline over the rest, and credits tokens."""
    return partial(_finish, denoise_cfg=denoise_cfg, advantages=advantages)


def _finish(
    group: TrajectoryGroup, *, denoise_cfg: DenoiseConfig, advantages: AdvantageConfig
) -> GroupOutcome:
    clean = denoise(group, denoise_cfg)
    if not clean.keep:
        reason = clean.decisions[-1].filter  # the one that ended the group
        return GroupOutcome(keep=False, reason=reason, decisions=clean.decisions)
    punished = punish_overlong(clean.group.trajectories, advantages)
    scores = [t.reward for t in punish_overlong(clean.baseline, advantages) if t.reward is not None]
    trained = replace(clean.group, trajectories=punished)
    credits = credit_group(trained, advantages, scores, clean.muted_turns)
    return GroupOutcome(
        keep=True,
        credits={
            (trajectory.sample, index): credit
            for trajectory, per_segment in zip(clean.group.trajectories, credits, strict=True)
            for index, credit in enumerate(per_segment)
        },
        decisions=clean.decisions,
    )


def check_held_out(cfg: ExperimentConfig) -> None:
    """Check that no question of a training file is in a file that an eval stage reads.

    Raises:
      UserError: some are (case, white space and surrounding punctuation ignored).
    """
    # A file that is missing is the business of the stage that reads it: it may be done by now.
    trained = [s.rl for s in cfg.stages if s.rl and _is_file(s.rl.tasks_path)]
    held_out = [s.eval for s in cfg.stages if s.eval and _is_file(s.eval.tasks_path)]
    for spec in held_out:
        theirs, _ = load_tasks(spec.tasks_path or "", skip_bad=spec.skip_bad)
        asked = {normalize(task.question) for task in theirs}
        for rl in trained:
            ours, _ = load_tasks(rl.tasks_path or "", skip_bad=rl.skip_bad)
            both = [task for task in ours if normalize(task.question) in asked]
            if both:
                raise UserError(
                    f"{len(both)} questions of {rl.tasks_path} are evaluated in {spec.tasks_path} "
                    f"too, the first is {both[0].question!r:.80}; take them out of one of the files"
                )


def _is_file(path: str | None) -> bool:
    return path is not None and Path(path).is_file()


def task_sequence(rl: RLStage, world: WorldTasks, seed: int) -> Callable[[int], Task]:
    """ordinal -> task, endlessly: every epoch is a new permutation of all tasks."""
    if rl.tasks_path:
        tasks, _ = load_tasks(rl.tasks_path, skip_bad=rl.skip_bad)
        return _shuffled(len(tasks), tasks.__getitem__, seed)
    return _shuffled(len(world), world.task_at, seed)


def evaluation_tasks(spec: EvalStage, world: WorldTasks) -> list[Task]:
    """The first `spec.tasks` different tasks of a file, or of the held-out worlds."""
    if spec.tasks_path:
        return load_tasks(spec.tasks_path, skip_bad=spec.skip_bad)[0][: spec.tasks]
    count = spec.tasks
    tasks: dict[str, Task] = {}  # two worlds may ask the same question
    for index in range(len(world)):
        if len(tasks) == count:
            return list(tasks.values())
        task = world.task_at(index)
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
