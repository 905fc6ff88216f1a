"""The merge stage: weights between the specialist and the general model, searched for or given."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from agentcpm_jax.config import MergeStage, Stage
from agentcpm_jax.engine.local import LocalEngine
from agentcpm_jax.evaluate.passk import estimate, mean_at_k
from agentcpm_jax.evaluate.runner import evaluate
from agentcpm_jax.evaluate.skills import skill_documents, skill_scores
from agentcpm_jax.files import write_atomically
from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.merge.kernels.methods import METHODS
from agentcpm_jax.merge.kernels.trees import Tree, linear, merge_tree
from agentcpm_jax.merge.search import (
    Evaluator,
    Point,
    SearchResult,
    alpha_sweep,
    pareto_set,
    soup_search,
    sweep,
)
from agentcpm_jax.merge.soups import ema, warp
from agentcpm_jax.model.params import param_specs
from agentcpm_jax.run.context import RunContext
from agentcpm_jax.run.custom import make_reward, make_tools
from agentcpm_jax.run.sampling import evaluation_tasks, make_run_sample
from agentcpm_jax.sharding import param_shardings
from agentcpm_jax.types import UserError

GENERAL_MODEL = Point((("alpha", 0.0),), 0.0, 0.0)


def run_merge(ctx: RunContext, stage: Stage) -> None:
    """Saves the merged model, the sweep's models and, after a search, what it measured."""
    merge = stage.merge
    assert merge is not None
    _check(merge)
    directory = ctx.directory(stage)
    special, general, *others = (
        _load(ctx, merge, source) for source in (stage.init_from, merge.general, *merge.soup)
    )
    choice: dict[str, float] = {"alpha": merge.alpha[0], "density": merge.density[0]}
    greedy = bool(others) and merge.souping == "greedy"
    if others and not greedy:
        special = averaged(merge, special, others, general)
    if greedy or merge.searched:
        with ExperienceLog.open(directory / "search.db") as log:
            skills = Skills(ctx, merge, log)
            if greedy:
                special, tried = soup_search([special, *others], skills.agent, skills.general)
                _write(directory / "soup.json", {"chosen": None, **tried.to_dict()})
            if merge.searched:
                result = search(merge, special, general, (skills.agent, skills.general))
                point = choose(merge, result)
                choice |= dict(point.choice)
                chosen = result.points.index(point)
                _write(directory / "search.json", {"chosen": chosen, **result.to_dict()})
    _write(directory / "alpha.json", {"alpha": choice["alpha"]})
    for alpha in merge.sweep:
        point_model = merged(merge, special, general, choice | {"alpha": alpha})
        ctx.save_model(directory / "sweep" / f"{alpha:g}", point_model)
    ctx.save_model(directory / "hf", merged(merge, special, general, choice))


def averaged(merge: MergeStage, special: Tree, others: Sequence[Tree], general: Tree) -> Tree:
    """The stage's model and the soup's as one, by a rule that measures nothing."""
    if merge.souping == "ema":
        return ema([*others, special])
    return warp(general, [special, *others])


def merged(merge: MergeStage, special: Tree, general: Tree, choice: Mapping[str, float]) -> Tree:
    """The model of one choice of alpha and density."""
    alpha = choice["alpha"]
    if merge.method == "linear":
        return linear([special, general], [alpha, 1.0 - alpha])
    own = _own(merge, choice.get("density", merge.density[0]))
    return merge_tree(merge.method, [special], general, [own], {"lambda": alpha})


def search(
    merge: MergeStage, special: Tree, general: Tree, skills: tuple[Evaluator, Evaluator]
) -> SearchResult:
    """Both skills of the general model, which is the first point, and of every candidate."""
    reference = replace(GENERAL_MODEL, agent=skills[0](general), general=skills[1](general))
    alphas, density = sorted(merge.alpha), merge.density[0]
    if merge.method == "linear":
        found = alpha_sweep(general, special, alphas, *skills).points
    else:
        grid: dict[str, tuple[float, ...]] = {"lambda": tuple(alphas)}
        if len(merge.density) > 1 and "density" in METHODS[merge.method].model_params:
            grid["density"] = merge.density
        own = [_own(merge, density)]
        found = sweep(merge.method, [special], general, grid, *skills, own=own).points
        found = tuple(replace(p, choice=_named_alpha(p)) for p in found)
    points = (reference, *found)
    return SearchResult(merge.method, points, pareto_set(points))


def choose(merge: MergeStage, result: SearchResult) -> Point:
    """The candidate that the stage takes; see `MergeStage`."""
    reference, *found = result.points
    able = [p for p in found if p.general >= merge.keep * reference.general]
    alpha = dict.fromkeys(found)  # keeps the order of trying among equals
    if not able:
        return min(alpha, key=lambda p: (dict(p.choice)["alpha"], -p.agent))
    return max(able, key=lambda p: (dict(p.choice)["alpha"], p.agent))


class Skills:
    """The two evaluators of a search: params -> share of validation questions answered rightly.

    The agent's episodes go into a log of the search's own, so that a merge that is interrupted
    repeats no candidate, and the run's own numbering of tasks does not depend on the search.
    """

    def __init__(self, ctx: RunContext, merge: MergeStage, log: ExperienceLog) -> None:
        self._ctx, self._spec, self._log = ctx, merge.validation, log
        held_out = replace(ctx.cfg.test_tasks, split="validation")
        self._tasks = evaluation_tasks(self._spec, held_out) if self._spec.tasks else []
        documents = self._spec.skill_tasks
        self._documents = skill_documents(documents, ctx.cfg.seed, "validation")
        self._candidate = 0
        count = 1 + len(merge.alpha) * len(merge.density)
        if merge.soup and merge.souping == "greedy":
            count += 1 + 2 * len(merge.soup)
        self._bar = ctx.progress("merge search", count)

    def agent(self, params: Tree) -> float:
        """Greedy accuracy on the validation tasks; 0 when there are none."""
        if not self._tasks:
            return 0.0
        ctx, spec = self._ctx, self._spec
        engine = LocalEngine(params, ctx.cfg.model, spec.engine)
        run_sample = make_run_sample(
            engine,
            ctx.chat,
            replace(ctx.cfg.episode, temperature=0.0),
            make_tools(ctx.cfg.tools)[0],
            seed=ctx.cfg.seed,
            reward=make_reward(spec.grader, spec.judge, ctx.workdir),
            deadline=spec.judge.deadline,
        )
        name = f"candidate {self._candidate}"
        try:
            scores = asyncio.run(
                evaluate(
                    self._tasks,
                    run_sample,
                    self._log,
                    name,
                    samples=1,
                    concurrency=spec.engine.slots,
                )
            )
        finally:
            engine.close()
        self._candidate += 1
        return estimate(scores, 1, mean_at_k).value

    def general(self, params: Tree) -> float:
        """Mean over the general skills of the share of documents completed rightly."""
        engine = LocalEngine(params, self._ctx.cfg.model, self._spec.engine)
        try:
            scores = asyncio.run(skill_scores(engine, self._ctx.chat.encode_text, self._documents))
        finally:
            engine.close()
        self._bar.update()
        return float(np.mean([np.mean(right) for right in scores.values()]))


def _load(ctx: RunContext, merge: MergeStage, source: str) -> Tree:
    """Parameters where they are merged: spread over the run's mesh, or as numpy arrays."""
    if merge.where == "mesh":
        return ctx.load_params(source, param_shardings(param_specs(ctx.cfg.model), ctx.mesh))
    return jax.tree.map(np.asarray, ctx.load_params(source))


def _check(merge: MergeStage) -> None:
    if merge.where == "mesh" and jax.process_count() > 1:
        raise UserError(
            f"merge.where is 'mesh', which spans {jax.process_count()} processes; the stage runs "
            "in the first one alone: use 'host'"
        )


def _own(merge: MergeStage, density: float) -> dict[str, float]:
    return {
        "weight": 1.0,
        **({"density": density} if "density" in METHODS[merge.method].model_params else {}),
    }


def _named_alpha(point: Point) -> tuple[tuple[str, Any], ...]:
    return tuple(("alpha" if key == "lambda" else key, value) for key, value in point.choice)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=1) + "\n")
