"""Checks each external part that a configuration names; one line each: what is wrong, the fix.

Every launch runs the checks before its first stage; `--doctor` runs only them, `--nodoctor` skips
them. A pool is checked with real weights: random ones of the run's shape are published, loaded by
every worker, announced under their version and compared with the trainer's log-probabilities.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import secrets
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path

import httpx
import jax

from agentcpm_jax import tree
from agentcpm_jax.chat.format import ChatFormat
from agentcpm_jax.config import ExperimentConfig, RLStage, Stage, outside_models
from agentcpm_jax.database import LogBroken, sqlite_remedy, try_writing
from agentcpm_jax.files import nearest_existing, size_text
from agentcpm_jax.hf.companions import tokenizer_file
from agentcpm_jax.hf.files import sha256_of
from agentcpm_jax.hf.locate import find_model
from agentcpm_jax.hf.shape import check_weights, shape_text, where_said
from agentcpm_jax.hf.tokenizer import load_chat
from agentcpm_jax.log.snapshots import locate_log, replacement
from agentcpm_jax.model import params as model_params
from agentcpm_jax.model.config import to_hf_config
from agentcpm_jax.model.params import param_specs
from agentcpm_jax.pool.config import Keys, PoolConfig
from agentcpm_jax.pool.probe import Trainer
from agentcpm_jax.pool.servers import SGLangPool
from agentcpm_jax.pool.worker import open_client
from agentcpm_jax.rewards.judge import JudgeConfig, judge_prompt, parse_verdict
from agentcpm_jax.rollout.endpoint import ChatEndpoint
from agentcpm_jax.rollout.policy import ChatPolicy, Finish
from agentcpm_jax.run.commandline import Command
from agentcpm_jax.run.context import newest_log
from agentcpm_jax.run.custom import make_tools
from agentcpm_jax.run.engines import probe_logprobs, weights_name, weights_place
from agentcpm_jax.run.multihost import is_main
from agentcpm_jax.run.observe.dataset import data_lines
from agentcpm_jax.run.sampling import task_sequence
from agentcpm_jax.run.start.limits import asking
from agentcpm_jax.run.start.models import check_models, tokenizer_of
from agentcpm_jax.sharding import make_mesh, param_shardings
from agentcpm_jax.types import Task, ToolStatus, UserError
from agentcpm_jax.weights.publish import publish_version
from agentcpm_jax.weights.store import remove_roots, version_path

LOCK_SECONDS = 5.0  # that another writer may hold the lock
MAX_SKEW = 30.0  # s; leases and logs of several machines are compared by their clocks
PATIENCE = 30.0  # s that --doctor waits for servers to start; a launch waits pool.start_timeout
QUESTION = Task("How many legs does a spider have?", ("8",))


@dataclass(frozen=True)
class Finding:
    """The result for one part. `needed`: a launch fails without it; else a run can wait for it."""

    part: str
    ok: bool
    text: str
    needed: bool = True

    def __str__(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL'}  {self.part}: {self.text}"


def check(command: Command, announce: Callable[[str], None]) -> bool:
    """Runs the checks that the command line asks for; True when it asks for nothing else.

    A launch announces only failures. Raises `UserError` when a check failed that is needed, or with
    `--doctor` any check.
    """
    if command.doctor is False or (command.doctor is None and not is_main()):
        return False
    alone = command.doctor is True
    failed = 0
    pools = [
        s.rl.pool for s in command.config.stages if s.rl and (s.rl.pool.urls or s.rl.pool.urls_file)
    ]
    if pools and not alone:
        wait = max(pool.start_timeout for pool in pools)
        announce(f"trying the pool before the launch; its servers have {wait:g} s to start")
    for finding in examine(command.config, command.workdir, thorough=alone):
        if alone or not finding.ok:
            announce(str(finding))
        failed += not finding.ok and (alone or finding.needed)
    if failed:
        fix = "mend what FAIL names" + ("" if alone else ", or launch with --nodoctor")
        raise UserError(f"{failed} of the checks failed; {fix}")
    return alone


def examine(cfg: ExperimentConfig, workdir: Path, *, thorough: bool = True) -> Iterator[Finding]:
    """Checks every external part of the stages that are still to run.

    Args:
      thorough: also check what a run itself checks in its first second.
    """
    todo = [stage for stage in cfg.stages if not (workdir / stage.name / "DONE").exists()]
    yield _find("disk", lambda: _disk(cfg, todo, workdir))
    if thorough:
        yield _find("model", lambda: _model(cfg, todo))
        yield _find("tokenizer", lambda: _tokenizer(cfg, workdir))
        for stage in todo:
            found = _find(f"data of {stage.name}", lambda stage=stage: _data(cfg, stage))
            if found.text:
                yield found
        for stage in todo:
            if (rl := stage.rl) is not None:
                yield _find(f"tools of {stage.name}", lambda rl=rl: asyncio.run(_tools(cfg, rl)))
    yield _find("database", lambda: _database(cfg, workdir))
    for judge in {s.judge for stage in todo if (s := asking(stage)) and s.grader == "judge"}:
        for model in dict.fromkeys(judge.models):
            yield _find(f"judge {model}", lambda judge=judge, model=model: _judge(judge, model))
    for stage in todo:
        if stage.rl is not None and (stage.rl.pool.urls or stage.rl.pool.urls_file):
            yield from _pool(cfg, stage, stage.rl, workdir, PATIENCE if thorough else math.inf)


def _find(part: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(part, True, check())
    except UserError as error:
        return Finding(part, False, str(error))


async def _tools(cfg: ExperimentConfig, rl: RLStage) -> str:
    """Calls the first tool of the first task once; any observation is accepted."""
    task = task_sequence(rl, cfg.train_tasks, cfg.seed)(0)
    open_tools, _ = make_tools(cfg.tools)
    said = ""
    for attempt in range(3):  # injected faults are seeded by the attempt
        tools = await open_tools(task.meta, (0, 0, attempt))
        try:
            function = tools.schemas()[0]["function"]
            wanted = function["parameters"].get("properties", {})
            values = {"string": task.question, "integer": 1, "number": 1.0, "boolean": False}
            arguments = {
                name: values.get(schema.get("type"), []) for name, schema in wanted.items()
            }
            async with asyncio.timeout(PATIENCE):
                result = await tools.call(function["name"], arguments)
        except TimeoutError:
            raise UserError(
                f"{function['name']} has not answered within {PATIENCE:g} s; look at its server"
            ) from None
        finally:
            await tools.close()
        shown = " ".join(result.content.split())[:60]
        said = f"{function['name']} answers {result.status}: {shown}"
        if result.status is not ToolStatus.INFRA_ERROR:
            return said
    raise UserError(f"{said}; mend the tool, or its server")


def _data(cfg: ExperimentConfig, stage: Stage) -> str:
    """What becomes of each record of the stage's file."""

    def chat() -> ChatFormat:
        with tokenizer_of(cfg) as directory:
            return load_chat(directory)

    return "\n".join(data_lines(stage, chat))


def _disk(cfg: ExperimentConfig, todo: list[Stage], workdir: Path) -> str:
    """Space for checkpoints (two, and one being written: parameters, two moments) and models."""
    shapes = tree.flatten(param_specs(cfg.model)).values()
    width = 4 if cfg.model.param_dtype == "float32" else 2
    model = sum(math.prod(spec.shape) for spec in shapes) * width
    trained = sum(stage.kind in ("pretrain", "sft", "rl") for stage in todo)
    needed = model * (9 * trained + len(todo))
    place = nearest_existing(workdir)
    free = shutil.disk_usage(place).free
    said = f"{size_text(free)} free at {place}, about {size_text(needed)} needed"
    if free < needed:
        raise UserError(f"{said}; free some space or choose another --workdir")
    return said


def _model(cfg: ExperimentConfig, todo: list[Stage]) -> str:
    """Its shape, and what says it; the weights that the run reads are of that shape."""
    names = outside_models(cfg, todo)
    for name in names:
        check_weights(find_model(name), cfg.model)
    return f"{shape_text(cfg.model)}, by {where_said(names)}"


def _tokenizer(cfg: ExperimentConfig, workdir: Path) -> str:
    with tokenizer_of(cfg) as directory:
        chat = check_models(cfg, workdir, directory)
        file = tokenizer_file(directory)
        digest = sha256_of(file)[:12] if file else ""
    rendered = chat.prompt_ids([{"role": "user", "content": QUESTION.question}])
    template = hashlib.sha256(rendered.tobytes()).hexdigest()[:12]
    return f"{chat.vocab_size} ids, sha256 {digest}; template sha256 {template}"


def _database(cfg: ExperimentConfig, workdir: Path) -> str:
    """Writes to the database and rolls back."""
    place = locate_log(workdir, cfg.log_url)
    if not cfg.log_url:
        return _sqlite(Path(place.url), partial(newest_log, cfg, workdir))
    shown, skew = try_writing(place.url)
    return f"{shown} takes writes; {_check_skew(shown, skew)}"


def _sqlite(path: Path, spare: Callable[[], Path | None]) -> str:
    new = not path.exists()
    with (
        tempfile.TemporaryDirectory(dir=nearest_existing(path.parent))
        if new
        else contextlib.nullcontext(path.parent) as folder
    ):
        try:
            with contextlib.closing(
                sqlite3.connect(
                    Path(folder) / path.name, timeout=LOCK_SECONDS, isolation_level=None
                )
            ) as conn:
                conn.execute("BEGIN IMMEDIATE")
                conn.execute("CREATE TABLE doctor (x INTEGER)")
                conn.execute("ROLLBACK")
        except sqlite3.Error as error:
            try:
                fix = sqlite_remedy(error, path) or "make its directory writable"
            except LogBroken:
                fix = replacement(path, spare())
            raise UserError(f"{path}: {error}; {fix}") from None
    return f"{path} takes writes"


def _judge(cfg: JudgeConfig, model: str) -> str:
    """A question that every judge can answer."""
    endpoint: ChatPolicy = ChatEndpoint(
        cfg.url or "", model, key_env=cfg.key_env, timeout=cfg.timeout
    )
    prompt, code = judge_prompt(QUESTION, "8")
    started = time.monotonic()
    reply = asyncio.run(endpoint.reply([{"role": "user", "content": prompt}]))
    if reply.finish is Finish.ERROR:
        raise UserError(f"{cfg.url}: {reply.error}; check judge.url, judge.models and the key")
    verdict = parse_verdict(reply.content, code)
    if verdict is None:
        said = " ".join(reply.content.split())[-80:]
        raise UserError(f"{cfg.url} gives no verdict but {said!r}; use a model that follows orders")
    return f"{cfg.url} says {verdict} in {time.monotonic() - started:.1f} s"


def _pool(
    cfg: ExperimentConfig, stage: Stage, rl: RLStage, workdir: Path, patience: float
) -> Iterator[Finding]:
    part = f"pool of {stage.name}"
    timeout = min(rl.pool.start_timeout, patience)
    name = f"{weights_name('doctor', cfg.name)}.{secrets.token_hex(4)}"
    pool = SGLangPool(replace(rl.pool, start_timeout=timeout), name)
    try:
        where = weights_place(rl.pool, nearest_existing(workdir) / f".{pool.run}")
        root = f"{where}/{pool.run}"
        try:
            _start(cfg, pool, root)
        finally:
            remove_roots(where, pool.run)
            shutil.rmtree(nearest_existing(workdir) / f".{pool.run}", ignore_errors=True)
        for url, state in pool.workers().items():
            ready = state == "ready"
            text = "took weights and version, log-probs are the trainer's" if ready else state
            yield Finding(f"{part}, {url}", ready, text, needed=False)
            if ready:  # one that is down may come later, and shows its clock then
                yield _find(f"clock of {url}", lambda url=url: asyncio.run(_clock(rl.pool, url)))
    except UserError as error:
        yield Finding(part, False, str(error))
    finally:
        pool.close()


def _start(cfg: ExperimentConfig, pool: SGLangPool, root: str) -> None:
    with tokenizer_of(cfg) as tokenizer:
        mesh = make_mesh(cfg.mesh)
        spread = param_shardings(param_specs(cfg.model), mesh) if mesh.size > 1 else None
        init = jax.jit(model_params.init, static_argnums=1, out_shardings=spread)
        params = init(jax.random.key(cfg.seed), cfg.model)
        dtype = cfg.model.dtype
        publish_version(root, 0, params, cfg.model, dtype=dtype, tokenizer_from=tokenizer)
        trainer = Trainer(
            vocab_size=cfg.model.vocab_size,
            chat=load_chat(tokenizer),
            logprobs=probe_logprobs(params, cfg.model),
            temperature=cfg.episode.temperature,
            config=to_hf_config(cfg.model),
        )
        pool.start(trainer, 0, version_path(root, 0))


async def _clock(cfg: PoolConfig, url: str) -> str:
    """Compares the server's clock with ours, by the Date header (whole seconds) of an answer."""
    key = Keys.from_environment(cfg).generate
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with open_client() as client:
        before = time.time()
        try:
            answer = await client.get(f"{url}/model_info", headers=headers, timeout=10.0)
        except httpx.HTTPError as error:
            raise UserError(f"{type(error).__name__} {error}; is the server up?") from None
        middle = (before + time.time()) / 2
    if "date" not in answer.headers:
        return "it does not tell its time"
    return _check_skew(url, middle - parsedate_to_datetime(answer.headers["date"]).timestamp())


def _check_skew(what: str, skew: float) -> str:
    if abs(skew) > MAX_SKEW:
        raise UserError(f"{what} and this machine differ by {skew:.0f} s; set both clocks (NTP)")
    return f"clock within {max(1.0, abs(skew)):.0f} s"
