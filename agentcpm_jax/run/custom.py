"""Rewards, judges and tools that a config names by a word or as `package.module:function`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agentcpm_jax.config import ExperimentConfig
from agentcpm_jax.dock.functions import NoTools, run_function, schema_of, with_functions
from agentcpm_jax.dock.protocol import OpenToolbox, Toolbox
from agentcpm_jax.rewards.grade import GRADERS, Reward, answer_reward
from agentcpm_jax.rewards.judge import Ask, AskError, Judge, JudgeCache, JudgeConfig
from agentcpm_jax.rollout.policy import ChatPolicy, Finish
from agentcpm_jax.run.start.limits import asking
from agentcpm_jax.types import Task, Trajectory, UserError
from agentcpm_jax.world.tools import SCHEMAS, open_toolbox


def make_reward(grader: str, judge: JudgeConfig, workdir: Path | None) -> Reward:
    """The reward that a config's `grader` names: exact | numeric | list | set | judge, or a
    user's function `(task, trajectory) -> Verdict | bool | float | None`, plain or async.

    Make one per event loop. The judge's cache lies in `workdir`; without one it is in memory.

    Raises:
      UserError: unknown name, no such function, or a judge without URL, model or key.
    """
    if grader in GRADERS:
        return answer_reward(GRADERS[grader])
    if grader == "judge":
        return _judge(judge, workdir)
    function = load_function(grader, "grader", ("task", "trajectory"), words=(*GRADERS, "judge"))

    async def reward(task: Task, trajectory: Trajectory) -> Any:
        return await run_function(function, task, trajectory)

    return reward


def make_tools(names: Sequence[str]) -> tuple[OpenToolbox, tuple[dict[str, Any], ...]]:
    """(how to open the tools of an episode, their schemas): the world's and the named functions.

    With functions, a task that carries no world has only the functions.

    Raises:
      UserError: no such function, or one that cannot be a tool.
    """
    functions = [load_function(name, "tools") for name in names]
    schemas = (*SCHEMAS, *map(schema_of, functions))
    titles = [schema["function"]["name"] for schema in schemas]
    if len(set(titles)) < len(titles):
        raise UserError(f"tools={tuple(names)!r}: of {', '.join(titles)} two have the same name")
    if not functions:
        return open_toolbox, schemas

    async def open_world(task_meta: Mapping[str, Any], key: tuple[int, ...]) -> Toolbox:
        return await open_toolbox(task_meta, key) if "world" in task_meta else NoTools()

    return with_functions(open_world, functions), schemas


def check_custom(cfg: ExperimentConfig) -> None:
    """Check that all that the config names exists, before the first stage. Raises UserError."""
    make_tools(cfg.tools)
    for stage in cfg.stages:
        if (section := asking(stage)) is not None:
            make_reward(section.grader, section.judge, None)


def load_function(
    path: str, key: str, arguments: Sequence[str] | None = None, words: Sequence[str] = ()
) -> Callable[..., Any]:
    """The function at `package.module:function`; modules of the working directory are found.

    Args:
      key: the config key, for messages.
      arguments: names of the positional arguments it will be called with; None: not checked.
      words: other valid values of the key, for messages.

    Raises:
      UserError: no such module or attribute, the module fails, or it cannot be called like that.
    """
    module_name, colon, name = path.partition(":")
    what = f"{key}={path!r}"
    if not colon or not module_name or not name:
        near = difflib.get_close_matches(path, words, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"{what}: {hint}use {', '.join((*words, 'package.module:function'))}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(
                f"{what}: there is no module {error.name!r}; start in its folder or name that "
                "folder in PYTHONPATH"
            ) from None
        raise UserError(
            f"{what}: module {module_name} imports {error.name!r}, which is missing; install it"
        ) from None
    except Exception as error:
        raise UserError(
            f"{what}: module {module_name} fails when imported: {type(error).__name__}: {error}"
        ) from None
    function = getattr(module, name, None)
    if not callable(function):
        own = [v for v in vars(module).values() if getattr(v, "__module__", "") == module_name]
        public = [v.__name__ for v in own if callable(v) and not v.__name__.startswith("_")]
        near = difflib.get_close_matches(name, public, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(public[:8]) or 'none'}"
        raise UserError(f"{what}: {module_name} has no function {name!r}; {hint}")
    if arguments is not None:
        _check_signature(function, arguments, what)
    return function


def _check_signature(function: Callable[..., Any], arguments: Sequence[str], what: str) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # some built-ins have none
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        wanted = f"({', '.join(arguments)})"
        raise UserError(
            f"{what} takes {signature}, it is called with {wanted} ({error}); change its parameters"
        ) from None


def _judge(cfg: JudgeConfig, workdir: Path | None) -> Judge:
    if not cfg.url or not cfg.models:
        raise UserError(
            f"grader='judge' with judge.url={cfg.url!r} and judge.models={cfg.models!r}; name an "
            "OpenAI-compatible server and a model it serves"
        )
    path = workdir / "judge_cache.db" if workdir else None
    asks = {model: _ask(cfg, cfg.url, model) for model in cfg.models}
    return Judge(asks, cfg, JudgeCache(path))


def _ask(cfg: JudgeConfig, url: str, model: str) -> Ask:
    from agentcpm_jax.rollout.endpoint import ChatEndpoint, may_retry  # with its HTTP client

    endpoint: ChatPolicy = ChatEndpoint(url, model, key_env=cfg.key_env, timeout=cfg.timeout)

    async def ask(prompt: str) -> str:
        reply = await endpoint.reply([{"role": "user", "content": prompt}])
        if reply.finish is Finish.ERROR:
            raise AskError(reply.error, retry=may_retry(reply.error))
        return reply.content

    return ask
