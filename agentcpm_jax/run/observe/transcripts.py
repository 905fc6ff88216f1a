"""Readable episodes for the report, decoded from the experience log."""

from __future__ import annotations

from typing import Any

import numpy as np

from agentcpm_jax.config import Stage
from agentcpm_jax.run.context import RunContext
from agentcpm_jax.types import Trajectory

PER_MODEL = 2


def example_trajectories(ctx: RunContext, stage: Stage) -> list[dict[str, Any]]:
    """For each model of an eval stage: the first multi-hop episodes, greedy, as report rows."""
    if stage.eval is None:
        return []
    rows = []
    for model in reversed(stage.eval.models):  # the last one is what the run is about
        issues = ctx.log.issues(f"{stage.name}/{model}/greedy", "eval")
        several = [i for i in issues if i.task.kind != "hop1"] or issues
        for issue in several[:PER_MODEL]:
            group = ctx.log.load_group(issue.issue_id)
            for trajectory in group.trajectories[:1]:
                rows.append(
                    {
                        "title": f"{model}: {issue.task.question}",
                        "verdict": str(trajectory.verdict),
                        "reward": trajectory.reward,
                        "turns": tuple(turns_of(ctx, trajectory)),
                        "note": f"stopped: {trajectory.stop}; accepted answer: "
                        f"{issue.task.answers[0]}",
                    }
                )
    return rows


def turns_of(ctx: RunContext, trajectory: Trajectory) -> list[tuple[str, str]]:
    """(role, text) in order: what was shown, what was sampled, what the tools said."""
    out: list[tuple[str, str]] = []
    for index, turn in enumerate(trajectory.turns):
        ids = np.asarray(trajectory.segments[turn.segment].ids)
        if index == 0:
            out.append(("system", ctx.chat.decode(ids[turn.start : turn.sample_start])))
        out.append(("assistant", ctx.chat.decode(ids[turn.sample_start : turn.end])))
        out += [("tool", result.content) for result in turn.results]
    return out
