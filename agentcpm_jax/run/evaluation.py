"""The eval stage: each model on held-out tasks (sampled and greedy), on general skills, and the
decisions behind the scores. Every number lands in `results.json`; the log holds every episode."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax

from agentcpm_jax.config import EvalStage, Stage
from agentcpm_jax.engine.config import check_capacity
from agentcpm_jax.engine.local import LocalEngine
from agentcpm_jax.evaluate.passk import TaskScore
from agentcpm_jax.evaluate.runner import evaluate
from agentcpm_jax.evaluate.skills import skill_documents, skill_scores
from agentcpm_jax.rollout.episode import check_prompt
from agentcpm_jax.run.context import RunContext, write_atomically
from agentcpm_jax.run.custom import make_reward, make_tools
from agentcpm_jax.run.decisions import decision_accuracy
from agentcpm_jax.run.interrupt import Interrupted
from agentcpm_jax.run.sampling import evaluation_tasks, make_run_sample
from agentcpm_jax.types import Task

DECISION_TASKS = 96


def run_eval(ctx: RunContext, stage: Stage) -> None:
    """Evaluate every model of the stage; a model whose results are on disk is not run again."""
    spec = stage.eval
    assert spec is not None
    check_capacity(spec.engine, ctx.cfg.episode.max_context)
    check_prompt(ctx.chat, ctx.cfg.episode, make_tools(ctx.cfg.tools)[1])
    tasks = evaluation_tasks(spec, ctx.cfg.test_tasks)
    sources = {name: f"stage:{name}" for name in spec.models} | _sweep_points(ctx)
    for name, source in sources.items():
        path = ctx.directory(stage) / f"{name}.json"
        if not path.exists():
            swept = name not in spec.models
            results = evaluate_model(ctx, stage, name, ctx.load_params(source), tasks, brief=swept)
            write_atomically(path, json.dumps(results, indent=1) + "\n")
        if ctx.stop.requested:
            raise Interrupted(f"stopped after {name} of {stage.name}; same command resumes")


def evaluate_model(
    ctx: RunContext,
    stage: Stage,
    name: str,
    params: Any,
    tasks: Sequence[Task],
    *,
    brief: bool = False,
) -> dict[str, Any]:
    """Scores of one model as plain data; `brief` = greedy and skills only, on fewer tasks."""
    spec = stage.eval
    assert spec is not None
    engine = LocalEngine(params, ctx.cfg.model, spec.engine)
    results: dict[str, Any] = {"name": name}
    try:
        if brief:
            tasks = tasks[: max(len(tasks) // 4, 1)]
        else:
            results["sampled"] = _scores(ctx, stage, f"{name}/sampled", tasks, engine, sampled=True)
        results["greedy"] = _scores(ctx, stage, f"{name}/greedy", tasks, engine, sampled=False)
        documents = skill_documents(spec.skill_tasks, ctx.cfg.seed)
        skills = asyncio.run(skill_scores(engine, ctx.chat.encode_text, documents))
        results["skills"] = {k: [int(ok) for ok in v] for k, v in skills.items()}
    finally:
        engine.close()
    if not brief:
        results["decisions"] = decision_accuracy(
            jax.device_put(params),
            ctx.cfg.model,
            ctx.chat,
            [t for t in tasks if "world" in t.meta][:DECISION_TASKS],
            ctx.cfg.episode.system_prompt,
            length=spec.engine.capacity,
        )
    return results


def _scores(
    ctx: RunContext,
    stage: Stage,
    name: str,
    tasks: Sequence[Task],
    engine: LocalEngine,
    *,
    sampled: bool,
) -> list[dict[str, Any]]:
    """Per task the fields of a `TaskScore`."""
    spec: EvalStage = stage.eval  # type: ignore[assignment]
    episode = ctx.cfg.episode if sampled else replace(ctx.cfg.episode, temperature=0.0)
    bar = ctx.progress(f"{stage.name} {name}", len(tasks))
    scores: list[TaskScore] = asyncio.run(
        evaluate(
            tasks,
            make_run_sample(
                engine,
                ctx.chat,
                episode,
                make_tools(ctx.cfg.tools)[0],
                seed=ctx.cfg.seed,
                reward=make_reward(spec.grader, spec.judge, ctx.workdir),
                deadline=spec.judge.deadline,
            ),
            ctx.log,
            f"{stage.name}/{name}",
            samples=spec.samples if sampled else 1,
            concurrency=spec.engine.slots,
            on_task=bar.update,
        )
    )
    bar.close()
    return [asdict(score) for score in scores]


def _sweep_points(ctx: RunContext) -> dict[str, str]:
    """The merge stages' sweeps: name -> directory."""
    points: dict[str, str] = {}
    for stage in ctx.cfg.stages:
        if stage.merge is not None:
            for alpha in stage.merge.sweep:
                directory: Path = ctx.directory(stage) / "sweep" / f"{alpha:g}"
                points[f"{stage.name}@{alpha:g}"] = str(directory)
    return points
