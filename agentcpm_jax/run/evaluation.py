"""The eval stage: each model on held-out tasks (sampled and greedy), on general skills, and the
decisions behind the scores. Every number lands in `results.json`; the log holds every episode."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from agentcpm_jax.chat.format import ChatFormat
from agentcpm_jax.config import Stage, model_source
from agentcpm_jax.engine.config import check_capacity
from agentcpm_jax.engine.local import LocalEngine
from agentcpm_jax.evaluate.passk import TaskScore
from agentcpm_jax.evaluate.runner import evaluate
from agentcpm_jax.evaluate.skills import skill_documents, skill_scores
from agentcpm_jax.files import write_atomically
from agentcpm_jax.model.config import ModelConfig
from agentcpm_jax.model.qwen3 import forward
from agentcpm_jax.rollout.episode import check_prompt
from agentcpm_jax.rollout.policy import TokenPolicy
from agentcpm_jax.run.context import RunContext
from agentcpm_jax.run.custom import make_reward, make_tools
from agentcpm_jax.run.observe.dataset import announce_tasks
from agentcpm_jax.run.sampling import evaluation_tasks, make_run_sample
from agentcpm_jax.run.start.signals import Interrupted
from agentcpm_jax.types import Provenance, Task
from agentcpm_jax.world.names import FIRST, RELATIONS, SECOND
from agentcpm_jax.world.questions import demonstration
from agentcpm_jax.world.search import search_index
from agentcpm_jax.world.tools import SCHEMAS, config_of

DECISIONS = ("syntax", "relation", "lookup", "copying")
DECISION_TASKS = 96
DECISION_ROWS = 16  # episodes of a forward pass


def run_eval(ctx: RunContext, stage: Stage) -> None:
    """Evaluate every model of the stage; a model whose results are on disk is not run again."""
    spec = stage.eval
    assert spec is not None
    check_capacity(spec.engine, ctx.cfg.episode.max_context)
    check_prompt(ctx.chat, ctx.cfg.episode, make_tools(ctx.cfg.tools)[1])
    tasks = evaluation_tasks(spec, ctx.cfg.test_tasks)
    announce_tasks(ctx, stage, spec)
    sources = {name: model_source(name) for name in spec.models} | _sweep_points(ctx)
    for name, source in sources.items():
        path = ctx.directory(stage) / results_file(name)
        if not path.exists():
            ctx.claim()
            swept = name not in spec.models
            results = evaluate_model(ctx, stage, name, ctx.load_params(source), tasks, brief=swept)
            write_atomically(path, json.dumps(results, indent=1) + "\n")
        if ctx.stop.requested:
            raise Interrupted(f"stopped after {name} of {stage.name}; same command resumes")


def results_file(model: str) -> str:
    """What the results of a model are stored as."""
    return f"{model.replace('/', '--')}.json"


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
    policy: TokenPolicy,
    *,
    sampled: bool,
) -> list[dict[str, Any]]:
    """Per task the fields of a `TaskScore`."""
    spec = stage.eval
    assert spec is not None
    episode = ctx.cfg.episode if sampled else replace(ctx.cfg.episode, temperature=0.0)
    bar = ctx.progress(f"{stage.name} {name}", len(tasks))
    scores: list[TaskScore] = asyncio.run(
        evaluate(
            tasks,
            make_run_sample(
                policy,
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


def decision_accuracy(
    params: Any,
    model: ModelConfig,
    chat: ChatFormat,
    tasks: Sequence[Task],
    system_prompt: str | None,
    length: int,
) -> dict[str, tuple[int, int]]:
    """Decision -> (tokens of that kind whose most likely prediction is right, all of them).

    Measured with teacher forcing on flawless held-out episodes of at most `length` tokens. The
    accuracy of whole episodes hides which part fails; these four name it:

        syntax     the agent writes well-formed calls and answers (everything that is not below)
        relation   the relation word of the next query or of the answer
        lookup     the name that stands behind that word, found on a page
        copying    a name repeated from the question or from its own query
    """
    kinds = _word_kinds(chat)
    tokens, labels = [], []
    for task in tasks:
        ids, label = _labelled(chat, task, system_prompt, kinds)
        if len(ids) <= length:
            tokens.append(np.pad(ids, (0, length - len(ids))))
            labels.append(np.pad(label, (0, length - len(ids)), constant_values=-1))
    while len(tokens) % DECISION_ROWS:
        tokens.append(np.zeros(length, np.int32))
        labels.append(np.full(length, -1))
    counts: dict[str, tuple[int, int]] = dict.fromkeys(DECISIONS, (0, 0))
    for start in range(0, len(tokens), DECISION_ROWS):
        rows = slice(start, start + DECISION_ROWS)
        batch, label = np.stack(tokens[rows]), np.stack(labels[rows])
        right = np.asarray(_argmax(params, model, batch))[:, :-1] == batch[:, 1:]
        for code, name in enumerate(DECISIONS):
            here = label[:, 1:] == code
            r, n = counts[name]
            counts[name] = (r + int(right[here].sum()), n + int(here.sum()))
    return counts


def _argmax(params: Any, model: ModelConfig, tokens: np.ndarray) -> jax.Array:
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return _predict(params, model, tokens, positions, np.ones(tokens.shape, np.int32))


@partial(jax.jit, static_argnums=1)
def _predict(params: Any, model: ModelConfig, *arrays: jax.Array) -> jax.Array:
    return forward(params, model, *arrays).argmax(axis=-1)


def _word_kinds(chat: ChatFormat) -> dict[int, str]:
    """token id -> 'relation' | 'name' for tokens that are whole words of the world."""
    kinds: dict[int, str] = {}
    for words, kind in (
        ([f"{r} " for r in RELATIONS], "relation"),
        ([f"{f} " for f in FIRST] + list(SECOND), "name"),
    ):
        for word in words:
            ids = chat.encode_text(word)
            if len(ids) == 1:
                kinds[int(ids[0])] = kind
    return kinds


def _labelled(
    chat: ChatFormat, task: Task, system_prompt: str | None, kinds: dict[int, str]
) -> tuple[np.ndarray, np.ndarray]:
    """ids i32[T] of the flawless episode and, for what the agent writes, the decision's index.

    A name behind a relation word of the same message is a lookup, any other name is copied.
    """
    world = search_index(config_of(task.meta)).world
    messages = demonstration(task, world, rng=random.Random(0)).messages
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    segment = chat.demo_segment(system + messages, SCHEMAS)
    labels = np.full(len(segment), -1)
    behind_relation = False
    for t in np.flatnonzero(segment.provenance == Provenance.DEMO):
        kind = kinds.get(int(segment.ids[t]))
        if kind == "relation":
            labels[t], behind_relation = 1, True
        elif kind == "name":
            labels[t] = 2 if behind_relation else 3
        else:
            labels[t], behind_relation = 0, False
    return segment.ids, labels
