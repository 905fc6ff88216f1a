"""The engine of an RL stage: in this process, or a pool of servers given weights on disk."""

from __future__ import annotations

import re
import secrets
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agentcpm_jax.config import RLStage, Stage
from agentcpm_jax.engine.config import check_capacity
from agentcpm_jax.engine.local import LocalEngine
from agentcpm_jax.files import write_atomically
from agentcpm_jax.model.config import ModelConfig, to_hf_config
from agentcpm_jax.model.logprobs import token_logprobs
from agentcpm_jax.pool.config import PoolConfig
from agentcpm_jax.pool.probe import Trainer
from agentcpm_jax.pool.servers import SGLangPool
from agentcpm_jax.rollout.policy import Completion, Engine, SampleRequest
from agentcpm_jax.run.context import RunContext
from agentcpm_jax.types import UserError
from agentcpm_jax.weights.publish import publish_version
from agentcpm_jax.weights.store import collect_garbage, open_root, remove_roots, version_path


def open_engine(ctx: RunContext, stage: Stage, rl: RLStage, params: Any, version: int) -> Engine:
    """The stage's engine with `params` as `version`: a pool with `pool.urls`, else in-process.

    Raises `UserError` when the context lengths do not fit, or the pool is unreachable or does not
    match the trainer.
    """
    if not (rl.pool.urls or rl.pool.urls_file):
        check_capacity(rl.engine, ctx.cfg.episode.max_context)
        return LocalEngine(
            params,
            ctx.cfg.model,
            rl.engine,
            version=version,
            deterministic=rl.stream.deterministic,
        )
    if rl.stream.deterministic:
        raise UserError(
            f"config.stage.{stage.name}: stream.deterministic needs the engine in the process; "
            "clear pool.urls or switch it off"
        )
    return PoolEngine(ctx, stage, rl, params, version)


def engine_metrics(engine: Engine) -> dict[str, float]:
    """Metrics `engine/...`, and `pool/...` of a pool."""
    figures = {
        "engine/tokens_sampled": engine.tokens_sampled,
        "engine/tokens_prefilled": engine.tokens_prefilled,
    }
    return figures | (engine.pool.snapshot() if isinstance(engine, PoolEngine) else {})


class PoolEngine:
    """A pool as an `Engine`: `set_params` publishes a Hugging Face directory.

    Every start of the trainer publishes under a new name, with which the versions that servers
    announce begin: no name ever stands for two sets of weights, even when a resumed run recomputes
    a step. The last versions are kept for workers that join late.
    """

    def __init__(
        self, ctx: RunContext, stage: Stage, rl: RLStage, params: Any, version: int
    ) -> None:
        self._model, self._tokenizer, self._cfg = ctx.cfg.model, ctx.tokenizer, rl.pool
        directory = ctx.directory(stage)
        self._card = partial(ctx.describe, directory, {})
        mine = weights_name(ctx.cfg.name, stage.name, _run_id(directory / "run_id"))
        name = f"{mine}.{secrets.token_hex(3)}"
        where = weights_place(rl.pool, directory / "pool_weights")
        self._root = f"{where}/{name}"
        self.version = version
        self.tokens_prefilled = 0  # servers do not report it
        self.pool = SGLangPool(rl.pool, name)
        trainer = Trainer(
            vocab_size=self._model.vocab_size,
            chat=ctx.chat,
            logprobs=probe_logprobs(params, self._model),
            temperature=ctx.cfg.episode.temperature,
            config=to_hf_config(self._model),
        )
        try:
            self.pool.start(trainer, version, self._publish(params, version))
        except BaseException:
            self.pool.close()
            raise
        remove_roots(where, f"{mine}.", but=name)  # of earlier starts

    @property
    def tokens_sampled(self) -> int:
        return self.pool.counters.tokens

    async def sample(self, request: SampleRequest) -> Completion:
        return await self.pool.sample(request)

    def set_params(self, params: Any, version: int) -> None:
        """Publish; returns when each worker has the weights or is out of the pool."""
        path = self._publish(params, version)
        self.pool.update_weights(version, path, probe_logprobs(params, self._model))
        self.version = version
        collect_garbage(self._root, version + 1 - self._cfg.keep_versions)

    def close(self) -> None:
        self.pool.close()

    def _publish(self, params: Any, version: int) -> str:
        publish_version(
            self._root,
            version,
            params,
            self._model,
            dtype=self._model.dtype,
            tokenizer_from=self._tokenizer,
            describe=self._card,
        )
        return version_path(self._root, version)


def weights_place(pool: PoolConfig, default: Path) -> str:
    """Where a pool's weights are published: an absolute path, or a URL.

    Raises `UserError` when workers could not read from it.
    """
    where = (pool.weights_dir or "").rstrip("/") or str(default)
    place = open_root(where)
    if place.local:
        return place.path  # absolute
    if not pool.agent_port:
        raise UserError(
            f"pool.weights_dir={where!r}: workers read local files; start launch/pool_agent.py on "
            "their hosts and name its port in pool.agent_port"
        )
    return where


def weights_name(*parts: str) -> str:
    """The parts as a name for directories and versions."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", "-".join(parts)).strip("-")


def probe_logprobs(params: Any, model: ModelConfig, length: int = 32):
    """The trainer's log-probabilities, for the pool's probes: i32[T] -> f32[T], T <= `length`."""
    compiled = jax.jit(token_logprobs, static_argnums=1)
    positions = jnp.arange(length, dtype=jnp.int32)[None]

    def logprobs(ids: np.ndarray) -> np.ndarray:
        padded = np.zeros((1, length), np.int32)
        padded[0, : len(ids)] = ids
        segments = (positions < len(ids)).astype(jnp.int32)
        values = compiled(params, model, jnp.asarray(padded), positions, segments)
        return np.asarray(values)[0, : len(ids)]

    return logprobs


def _run_id(path: Path) -> str:
    """A random id of the stage directory: two runs of one name must not share their weights."""
    stored = path.read_bytes() if path.exists() else b""
    if not re.fullmatch(rb"[0-9a-f]{8}", stored.strip()):  # new, or torn: then by another name
        stored = secrets.token_hex(4).encode()
        write_atomically(path, stored)
    return stored.decode().strip()
