"""The merge stage: weights between the specialist and the general model, at a chosen share."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from agentcpm_jax.config import MergeStage, Stage
from agentcpm_jax.engine.local import LocalEngine
from agentcpm_jax.evaluate.skills import skill_documents, skill_scores
from agentcpm_jax.merge.methods import linear, task_arithmetic
from agentcpm_jax.run.context import RunContext, write_atomically
from agentcpm_jax.types import UserError


def run_merge(ctx: RunContext, stage: Stage) -> None:
    """alpha * specialised + (1 - alpha) * general, and the sweep's points beside it."""
    merge = stage.merge
    assert merge is not None
    special, general = ctx.load_params(stage.init_from), ctx.load_params(merge.general)

    def merged(alpha: float) -> Any:
        if merge.method == "linear":
            return linear([special, general], [alpha, 1.0 - alpha])
        if merge.method == "task_arithmetic":
            return task_arithmetic(general, [special], [alpha])
        raise UserError(f"merge.method={merge.method!r}; linear or task_arithmetic")

    directory = ctx.directory(stage)
    alpha = choose_alpha(ctx, merge, merged) if merge.candidates else merge.alpha
    write_atomically(directory / "alpha.json", json.dumps({"alpha": alpha}) + "\n")
    for point in merge.sweep:
        ctx.save_model(directory / "sweep" / f"{point:g}", merged(point))
    ctx.save_model(directory / "hf", merged(alpha))


def choose_alpha(ctx: RunContext, merge: MergeStage, merged: Callable[[float], Any]) -> float:
    """The largest candidate that keeps `merge.keep` of the general model's skill.

    Held out from training and from the final test: names of the validation split, documents of
    their own.
    """
    documents = skill_documents(merge.skill_tasks, ctx.cfg.seed, "validation")

    def general_skill(alpha: float) -> float:
        engine = LocalEngine(merged(alpha), ctx.cfg.model, merge.engine)
        try:
            scores = asyncio.run(skill_scores(engine, ctx.chat.encode_text, documents))
        finally:
            engine.close()
        return float(np.mean([np.mean(right) for right in scores.values()]))

    wanted = merge.keep * general_skill(0.0)
    for alpha in sorted(merge.candidates, reverse=True):
        if general_skill(alpha) >= wanted:
            return alpha
    return min(merge.candidates)
