"""The workers of a pool: how they join, take weights, get lost and come back.

Everything here runs in the pool's own event loop. A worker is `ready` only while it is verified to
hold the weights published last; workers that join late or were lost catch up first.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from agentcpm_jax.pool.config import ADMIN_KEY_ENV, Keys, PoolConfig, agent_url, check_url
from agentcpm_jax.pool.errors import GONE, SUSPECT, PoolError, PoolErrorKind
from agentcpm_jax.pool.fields import Fields
from agentcpm_jax.pool.probe import (
    CONVENTION_TEMPERATURE,
    TOKENS,
    Answer,
    Logprobs,
    Mismatch,
    Trainer,
    check_gap,
    check_model,
    check_temperature,
    check_text,
    gap_between,
    gap_to_trainer,
    probe_prompts,
)
from agentcpm_jax.pool.protocol import Chunk, Expected, generate_body, read_generate
from agentcpm_jax.pool.routing import Doubt, State, Worker
from agentcpm_jax.pool.worker import Server, asked
from agentcpm_jax.rollout.policy import SamplingParams
from agentcpm_jax.types import UserError

#: Seconds for an agent to copy weights to its host; workers generate meanwhile.
PREFETCH_TIMEOUT = 900.0
#: Seconds without one usable answer after which a worker has to pass its checks again.
DOUBT = 2.0
#: A refused worker is asked again after `health_every`, then twice that, ... up to this (s).
ASK_AGAIN = 600.0


@dataclass(frozen=True)
class Weights:
    """One published version: the number, the name that servers announce, a directory they read."""

    version: int
    name: str
    path: str

    @property
    def run(self) -> str:
        """The run's name: `name` without the version, and the directory of all its versions."""
        return self.name.rpartition("-")[0]


class Members:
    """Membership, health and weight updates; `changed` is set whenever a state changes."""

    def __init__(
        self, cfg: PoolConfig, trainer: Trainer, weights: Weights, nonce: str, keys: Keys
    ) -> None:
        self.cfg, self.trainer, self.target = cfg, trainer, weights
        self.names: dict[str, int] = {weights.name: weights.version}
        self.workers: dict[str, Worker] = {}
        self.changed = asyncio.Event()
        self.client: httpx.AsyncClient | None = None
        self._keys, self._nonce = keys, nonce
        self._logprobs: Logprobs | None = trainer.logprobs
        self._fingerprint: list[Answer] | None = None
        self._numbers = itertools.count()
        self._checks: dict[str, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()

    def add(self, url: str) -> None:
        """Add a worker; the pool tries to reach it from now on."""
        url = check_url(url)
        if url not in self.workers:
            assert self.client is not None
            server = Server(url, self.client, self._keys, self.cfg)
            self.workers[url] = Worker(server)
            self._wake.set()

    def lost(self, worker: Worker, reason: str) -> None:
        """Take a worker out until it has passed its checks again."""
        if worker.state is State.READY:
            self._set(worker, State.JOINING, reason)
            self._wake.set()

    def answered(self, worker: Worker) -> None:
        """An answer of a worker was usable."""
        worker.doubt = None

    def failed(self, worker: Worker, error: PoolError) -> None:
        """An answer of a worker was not usable: how long that goes on counts, not how often.

        Many requests at once fail in the same moment, and each of them is asked again.
        """
        loop = asyncio.get_running_loop()
        if worker.state is not State.READY:
            return
        if worker.doubt is None:
            loop.call_later(DOUBT + 0.01, self._wake.set)
        worker.doubt = Doubt(worker.doubt.since if worker.doubt else loop.time(), error)
        if error.kind in SUSPECT:
            self.lost(worker, str(error))
        else:
            self._judge(worker)

    def describe(self) -> str:
        """One line: every worker that is not ready, and why."""
        absent = (w for w in self.workers.values() if w.state is not State.READY)
        return "; ".join(f"{w.url} is {w.state}: {w.reason}" for w in absent) or "none is named"

    async def start(self) -> None:
        """Wait until one worker is ready and every worker has been tried once.

        Raises `UserError`: a worker does not match the trainer, or none was ready in time.
        """
        deadline = asyncio.get_running_loop().time() + self.cfg.start_timeout
        for url in self.cfg.urls:
            self.add(url)
        while True:
            self._read_urls_file()
            await asyncio.gather(*(self._join(w) for w in list(self.workers.values())))
            states = {w.state for w in self.workers.values()}
            refused = [
                w.reason
                for w in self.workers.values()
                # Where others took the weights, one that died was ended by something else.
                if w.state is State.REFUSED and not (w.died and State.READY in states)
            ]
            if refused:
                raise UserError(refused[0])
            if State.READY in states:
                self._logprobs = None  # training changes the parameters; the fingerprint stays
                return
            if asyncio.get_running_loop().time() > deadline:
                raise UserError(
                    f"no worker of the pool could be used within {self.cfg.start_timeout:g} s: "
                    f"{self.describe()}; start the servers or correct pool.urls"
                )
            await asyncio.sleep(min(1.0, self.cfg.start_timeout / 10))

    async def watch(self) -> None:
        """Check workers' health and admit late joiners, until cancelled."""
        try:
            while True:
                # Not `wait_for`: on Python 3.11 it swallows a cancellation that coincides.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self.cfg.health_every):
                        await self._wake.wait()
                self._wake.clear()
                # Another process may be writing the file: what is no url today is one later.
                with contextlib.suppress(OSError, ValueError, UserError):
                    self._read_urls_file()
                for worker in list(self.workers.values()):
                    running = self._checks.get(worker.url)
                    if running is None or running.done():
                        self._checks[worker.url] = asyncio.create_task(self._check(worker))
        finally:
            for check in self._checks.values():
                check.cancel()
            await asyncio.gather(*self._checks.values(), return_exceptions=True)

    async def update(self, weights: Weights, logprobs: Logprobs | None) -> Mapping[str, str]:
        """Load `weights` on every ready worker; returns url -> '' or what went wrong.

        Workers that fail leave the pool until they have caught up. While there is none that was
        compared with `logprobs`, they are tried again for up to `update_timeout`: later there is
        nothing to compare them with.
        """
        self.target = weights
        self.names[weights.name] = weights.version
        self._logprobs, self._fingerprint = logprobs, None
        told = [w for w in self.workers.values() if w.state is State.READY]
        await asyncio.gather(*(self._prefetch(w) for w in told))  # while they generate
        ready = [w for w in told if w.state is State.READY]
        for worker in ready:  # all at once: else aborted requests go to the next one to load
            self._set(worker, State.UPDATING, f"loading {weights.name}")
        await asyncio.gather(*(self._update_ready(w) for w in ready))
        for worker in self.workers.values():
            if worker.state is State.REFUSED and worker not in told:
                self._set(worker, State.JOINING, worker.reason)
        self._wake.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.cfg.update_timeout):
                while logprobs is not None and self._fingerprint is None:
                    await asyncio.sleep(min(0.1, self.cfg.health_every))
        self._logprobs = None
        return {w.url: "" if w.state is State.READY else w.reason for w in told}

    # --- one worker -------------------------------------------------------------------------

    async def _prefetch(self, worker: Worker) -> None:
        """Copy the weights to the worker's host; if that fails the worker leaves the pool."""
        try:
            await self._path(worker, self.target)
        except PoolError as error:
            self.lost(worker, str(error))
            worker.drop_requests()

    async def _update_ready(self, worker: Worker) -> None:
        target = self.target
        try:
            async with asyncio.timeout(self.cfg.update_timeout + 3 * self.cfg.control_timeout):
                await self._load(worker, target)
                await self._verify(worker, target)
            self._set(worker, State.READY, "")
        except TimeoutError:
            said = f"no weights within {self.cfg.update_timeout:g} s"
            self._set(worker, State.JOINING, said)
        except Exception as error:  # whatever it is: nobody else would end `UPDATING`
            self._set(worker, State.JOINING, _reason(error))

    async def _check(self, worker: Worker) -> None:
        self._judge(worker)
        if worker.state is State.READY:
            healthy = await worker.server.healthy()
            worker.missed = 0 if healthy else worker.missed + 1
            if worker.missed >= 2:
                self.lost(
                    worker, f"{PoolErrorKind.UNREACHABLE}: {worker.url}: two health checks failed"
                )
                worker.drop_requests()
        elif worker.state is not State.REFUSED or worker.again <= _now():
            await self._join(worker)

    def _judge(self, worker: Worker) -> None:
        """Take a worker out that has given nothing usable for too long; a full queue may last."""
        if worker.doubt is None or worker.state is not State.READY:
            return
        busy = worker.doubt.error.kind is PoolErrorKind.BUSY
        passed = _now() - worker.doubt.since
        if passed >= (self.cfg.control_timeout if busy else DOUBT):
            self.lost(worker, f"{worker.doubt.error}; nothing usable for {passed:.0f} s")

    async def _join(self, worker: Worker) -> None:
        """Load the published weights on a worker and let it in; else `reason` says why not."""
        if worker.state not in (State.JOINING, State.REFUSED):
            return
        try:
            while True:
                target = self.target
                served = await self._inform(worker)
                # Compare text first: SGLang crashes on an id beyond its vocabulary, and only a
                # server that took the run's weights surely has the trainer's ids.
                if self.trainer.chat is not None and not worker.probed:
                    await check_text(worker.server, self.trainer.chat)
                if served != target.name or worker.refusals:  # its word is not enough any more
                    await self._load(worker, target)
                else:  # it may have been paused and not have heard that it may go on
                    await asked(worker.server.resume)
                await self._verify(worker, target)
                if not worker.probed:
                    await self._probe(worker)
                if self.target is target:  # else weights were published meanwhile
                    break
            worker.refusals, worker.died = 0, False
            self._set(worker, State.READY, "")
        except PoolError as error:
            self._not_joined(worker, error)
        except Mismatch as error:
            self._refuse(worker, str(error))
        except Exception as error:  # whatever it is: this worker's, and not the pool's
            self._set(worker, State.JOINING, _reason(error))

    def _not_joined(self, worker: Worker, error: PoolError) -> None:
        if error.kind is PoolErrorKind.UPDATE_REFUSED:
            said = f"wrong model on {worker.url}: it does not take the run's weights: "
            self._refuse(worker, said + error.detail)
        elif error.kind is PoolErrorKind.DIED_LOADING and worker.version < 0:
            said = f"wrong model on {worker.url}? It ended while it loaded the run's first "
            said += "weights; serve the run's model, and read the server's log"
            worker.refusals, worker.died = worker.refusals + 1, True  # it cannot say it twice
            self._refuse(worker, said)
        elif error.kind is PoolErrorKind.FORBIDDEN:
            names = f"{self.cfg.api_key_env} and {ADMIN_KEY_ENV}"
            self._refuse(worker, f"{error}; set {names}")
        else:
            self._set(worker, State.JOINING, str(error))
            if error.kind in GONE:
                worker.drop_requests()

    def _refuse(self, worker: Worker, reason: str) -> None:
        """Believe it at the second time; then ask a worker ever later: it may be started anew."""
        pause = min(self.cfg.health_every * 2 ** min(worker.refusals, 16), ASK_AGAIN)
        worker.refusals, worker.again = worker.refusals + 1, _now() + pause
        self._set(worker, State.REFUSED if worker.refusals > 1 else State.JOINING, reason)

    async def _inform(self, worker: Worker) -> str | None:
        """Learn what a server is; returns the name of the weights that it announces."""
        info = await asked(worker.server.model_info)
        if info.flag("is_generation") is False:
            raise Mismatch(f"wrong model on {worker.url}: it does not generate")
        check_model(worker.server, info, self.trainer.config)
        arguments = await asked(worker.server.server_info)
        worker.context = _context(arguments)
        worker.seeded = bool(arguments.flag("enable_deterministic_inference"))
        return info.text("weight_version")

    async def _load(self, worker: Worker, target: Weights) -> None:
        """Pause, load, and resume the server even after a failure."""
        server, mode = worker.server, self.cfg.pause
        path = await self._path(worker, target)
        try:
            await asked(partial(server.pause, mode))
            await server.update_from_disk(path, target.name, flush=mode != "in_place")
        except BaseException:
            with contextlib.suppress(PoolError):  # the first error says more
                await _to_its_end(asked(server.resume))
            raise
        await _to_its_end(asked(server.resume))

    async def _path(self, worker: Worker, target: Weights) -> str:
        """Directory of the weights on the worker's host; waits while its agent copies them."""
        if not self.cfg.agent_port:
            return target.path
        assert self.client is not None
        url = agent_url(worker.url, self.cfg.agent_port)
        agent = Server(url, self.client, self._keys, self.cfg)
        pause = 0.05
        try:
            async with asyncio.timeout(PREFETCH_TIMEOUT):
                while (path := await agent.pull(target.run, target.version)) is None:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, 1.0)
                return path
        except TimeoutError:
            said = f"{target.name}: not copied within {PREFETCH_TIMEOUT:g} s"
            raise PoolError(PoolErrorKind.NO_WEIGHTS, url, said) from None

    async def _verify(self, worker: Worker, target: Weights) -> None:
        """Check that the server announces the version and that its answers match the weights."""
        announced = (await asked(worker.server.model_info)).text("weight_version")
        if announced != target.name:
            raise PoolError(
                PoolErrorKind.WRONG_VERSION,
                worker.url,
                f"announces weights {announced!r} after loading {target.name!r}",
            )
        answers = [
            await self._ask(worker, prompt, 0.0)
            for prompt in probe_prompts(self.trainer.vocab_size)
        ]
        if self._logprobs is not None:
            gap = await asyncio.to_thread(gap_to_trainer, answers, self._logprobs)
            check_gap(worker.server, gap, self.cfg.max_gap, "the trainer's")
        elif self._fingerprint is not None:
            gap = gap_between(self._fingerprint, answers)
            check_gap(worker.server, gap, self.cfg.max_gap, "those of the other workers")
        self._fingerprint = self._fingerprint or answers
        worker.version = target.version

    async def _probe(self, worker: Worker) -> None:
        """Compare log-probabilities at the run's temperature with the trainer's."""
        trainer = self.trainer
        if self._logprobs is not None:
            prompts = probe_prompts(trainer.vocab_size)
            gaps = {}
            for temperature in (CONVENTION_TEMPERATURE, trainer.temperature):
                answers = [await self._ask(worker, p, temperature) for p in prompts]
                gaps[temperature] = await asyncio.to_thread(gap_to_trainer, answers, self._logprobs)
            original = gaps[CONVENTION_TEMPERATURE] <= self.cfg.max_gap
            convention = "before" if original else "after"
            check_temperature(
                worker.server,
                trainer.temperature,
                gaps[trainer.temperature],
                self.cfg.max_gap,
                f"log-probs from {convention} the temperature",
            )
        worker.probed = True

    async def _ask(self, worker: Worker, prompt: np.ndarray, temperature: float) -> Answer:
        return Answer(prompt, await asked(lambda: self._generate(worker, prompt, temperature)))

    async def _generate(self, worker: Worker, prompt: np.ndarray, temperature: float) -> Chunk:
        rid = f"{self._nonce}/probe/{next(self._numbers)}/"
        body = generate_body(rid, prompt, TOKENS, SamplingParams(temperature=temperature))
        status, payload = await worker.server.generate(body, self.cfg.control_timeout)
        expected = Expected(
            rid=rid,
            url=worker.url,
            vocab_size=self.trainer.vocab_size,
            budget=TOKENS,
            versions=self.names,
            oldest=-1,
            least=TOKENS,
        )
        return read_generate(status, payload, expected)

    def _set(self, worker: Worker, state: State, reason: str) -> None:
        worker.state, worker.reason, worker.missed, worker.doubt = state, reason, 0, None
        self.changed.set()

    def _read_urls_file(self) -> None:
        if self.cfg.urls_file and Path(self.cfg.urls_file).is_file():
            for line in Path(self.cfg.urls_file).read_text().split():
                self.add(line)


def _context(arguments: Fields) -> int:
    """The tokens that a request may have, prompt and completion; 0: the server does not say."""
    length = arguments.count("context_length") or arguments.count("max_req_input_len")
    limits = (length, arguments.count("max_total_num_tokens"))
    return min((n for n in limits if n), default=0)


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Await `work` also when cancelled meanwhile: a pool that ends leaves no server paused."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        with contextlib.suppress(PoolError):
            await task
        raise


def _reason(error: Exception) -> str:
    known = isinstance(error, PoolError | Mismatch)
    return str(error) if known else f"{type(error).__name__}: {error}"


def _now() -> float:
    return asyncio.get_running_loop().time()
