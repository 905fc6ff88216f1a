"""Toy servers in a thread of their own, and the oracle of what they say."""

from __future__ import annotations

import asyncio
import threading
import zlib
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from aiohttp import web

from agentcpm_jax.engine.server import EngineServer
from agentcpm_jax.pool.interruption import RetryLimits
from agentcpm_jax.pool.probe import Trainer
from agentcpm_jax.pool.servers import PoolConfig, SGLangPool
from agentcpm_jax.rollout.policy import Completion, SampleRequest, SamplingParams
from tests.doubles.fault_server import toy_next, toy_state

T = TypeVar("T")

#: Looks often and waits little; patient enough for a machine that is busy with other things.
QUICK = PoolConfig(
    start_timeout=30.0,
    request_timeout=60.0,
    attempt_timeout=20.0,
    control_timeout=20.0,
    update_timeout=20.0,
    health_every=0.05,
    max_gap=1e-5,
)


class Servers:
    """Runs servers in one background loop; `kill` breaks every connection of one."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self._runners: dict[str, web.AppRunner] = {}

    def start(self, server: EngineServer) -> str:
        """Its url."""
        runner, url = self.call(server.start())
        self._runners[url] = runner
        return url

    def kill(self, url: str) -> None:
        runner = self._runners.pop(url)

        async def end() -> None:
            assert runner.server is not None
            for connection in list(runner.server.connections):
                if connection.transport is not None:
                    connection.transport.abort()
            await runner.cleanup()

        self.call(end())

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    def close(self) -> None:
        for url in list(self._runners):
            self.kill(url)
        self.call(self._drain())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    async def _drain(self) -> None:
        others = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


def toy_weights(root: Path, name: str) -> str:
    """A directory that the toy loads as weights `name`."""
    (root / name).mkdir(exist_ok=True)
    (root / name / "toy.txt").write_text(name)
    return str(root / name)


def toy_trainer(weights: str, vocab_size: int = 97) -> Trainer:
    """What the toy's trainer would compute under `weights`."""
    return Trainer(vocab_size, logprobs=lambda ids: toy_logprobs(ids, weights, vocab_size))


def toy_logprobs(ids: np.ndarray, weights: str, vocab_size: int = 97) -> np.ndarray:
    """At index t what the toy says of its next id after ids[:t]; -9 where that is not ids[t]."""
    state, found = 0, np.zeros(len(ids), np.float32)
    for t, given in enumerate(ids):
        token, value = toy_next(state, weights, vocab_size)
        found[t] = value if token == given else -9.0
        state = zlib.crc32(int(given).to_bytes(4, "little"), state)
    return found


def open_pool(
    urls: Iterable[str],
    root: Path,
    cfg: PoolConfig = QUICK,
    *,
    weights: str = "w0",
    version: int = 0,
    **changes: Any,
) -> SGLangPool:
    """A started pool over toy servers."""
    pool = SGLangPool(replace(cfg, urls=tuple(urls), **changes), "run")
    try:
        pool.start(toy_trainer(weights), version, toy_weights(root, weights))
    except BaseException:
        pool.close()
        raise
    return pool


def request(
    number: int = 0, new: int = 24, turn: int = 0, prompt: Sequence[int] = (1, 2, 3)
) -> SampleRequest:
    ids = np.asarray([*prompt, number % 97], np.int32)
    return SampleRequest(f"{number}-0-0/{turn}/", ids, new, SamplingParams(1.0, (), (number,)))


def check_toy(asked: SampleRequest, done: Completion, weights: Mapping[int, str]) -> None:
    """Every id, log-probability and version of a completion, recomputed from the first on."""
    text = list(asked.prompt_ids)
    for token, logprob, version in zip(done.ids, done.logprobs, done.versions, strict=True):
        expected = toy_next(toy_state(text), weights[int(version)], 97)
        assert (int(token), float(logprob)) == expected
        text.append(int(token))


def wait_for(condition: Callable[[], object]) -> None:
    """Polls within a generous bound; what is waited for is an event of another thread."""

    async def poll() -> None:
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.005)

    asyncio.run(poll())


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Servers]:
    """Servers of one test, closed after it; a pool tries again soon."""
    limits = partial(RetryLimits, backoff=0.01, backoff_max=0.05)
    monkeypatch.setattr("agentcpm_jax.pool.servers.RetryLimits", limits)
    running = Servers()
    yield running
    running.close()


def sample_all(pool: SGLangPool, requests: Iterable[SampleRequest]) -> list[Completion]:
    """All requests at once; their completions in the same order."""

    async def together() -> list[Completion]:
        return list(await asyncio.gather(*(pool.sample(r) for r in requests)))

    return asyncio.run(together())
