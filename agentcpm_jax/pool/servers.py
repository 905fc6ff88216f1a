"""A pool of SGLang servers as one `TokenPolicy`: ids in; ids, log-probabilities and versions out.

The pool lives in a thread with an event loop of its own, so that the agents' loop, the trainer's
thread and short-lived evaluation loops can all use it. Agents call `sample`; the trainer calls
`update_weights`. Workers may join late, die and come back: requests wait, move and go on.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

import numpy as np

from agentcpm_jax.pool.config import Keys, PoolConfig, check_url
from agentcpm_jax.pool.errors import PoolError, PoolErrorKind
from agentcpm_jax.pool.interruption import PoolCounters, RetryLimits, complete
from agentcpm_jax.pool.members import Members, Weights
from agentcpm_jax.pool.probe import Logprobs, Trainer
from agentcpm_jax.pool.protocol import Chunk, Expected, generate_body, read_generate
from agentcpm_jax.pool.routing import Routes, State, Worker, trajectory_key
from agentcpm_jax.pool.worker import Server, open_client
from agentcpm_jax.rollout.policy import Completion, Finish, SampleRequest
from agentcpm_jax.types import UserError

__all__ = ["PoolConfig", "PoolError", "PoolErrorKind", "SGLangPool", "Trainer"]

T = TypeVar("T")
#: Tokens of a context that servers keep for themselves: an answer may end that much earlier.
_KEPT_BACK = 8


class SGLangPool:
    """A `TokenPolicy` over SGLang servers; call `start` first and `close` last, from any thread.

    Args:
      run: names this run's weights: servers announce version v as `{run}-{v:06d}`. Two runs must
        not share it, or one would take the other's weights for its own.
      keys: bearer keys; by default from the environment.

    Raises:
      UserError: a URL of the config is invalid or contains credentials.
    """

    def __init__(self, cfg: PoolConfig, run: str, *, keys: Keys | None = None) -> None:
        self.cfg, self.run = cfg, run
        self._keys = keys or Keys.from_environment(cfg)
        for url in filter(None, (*cfg.urls, cfg.router_url)):
            check_url(url)
        self._nonce = secrets.token_hex(4)
        self._routes = Routes()
        self.counters = PoolCounters()
        self._closing = False
        self._members: Members | None = None
        self._router: Server | None = None
        self._tasks: set[asyncio.Task[Any]] = set()  # what `close` cancels
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="pool", daemon=True)
        self._thread.start()

    def name(self, version: int) -> str:
        """What servers announce for `version`."""
        return f"{self.run}-{version:06d}"

    def start(self, trainer: Trainer, version: int, path: str) -> None:
        """Bring every reachable worker to `version` in `path`, and check it against the trainer.

        Raises:
          UserError: no worker could be reached, or one is not what the trainer needs.
        """
        self._call(self._start(trainer, Weights(version, self.name(version), path)))

    async def sample(self, request: SampleRequest) -> Completion:
        """One completion, however often it is interrupted; a failure is in `finish` and `error`."""
        if self._closing or self._members is None:
            return _closed()
        work = self._until_closed(self._sample(request))
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        return await asyncio.wrap_future(future)

    def update_weights(
        self, version: int, path: str, logprobs: Logprobs | None = None
    ) -> Mapping[str, str]:
        """Publish `version`: pause, load, verify and continue on every ready worker.

        Blocks until each worker has loaded it or failed (`update_timeout`). Workers that fail leave
        the pool until they have caught up; requests go on as soon as one worker is ready.

        Args:
          path: a Hugging Face directory that every worker can read; with agents, the URL of one
            below `pool.weights_dir/<run>`, from which they copy it.
          logprobs: the trainer's, under the new weights; None compares workers with each other.

        Returns:
          url -> '' where the worker has the weights, else what went wrong.
        """
        weights = Weights(version, self.name(version), path)
        return self._call(self._until_closed(self._get().update(weights, logprobs)))

    def snapshot(self) -> dict[str, float]:
        """`pool/...` figures: workers by state, chunks, interruptions, errors by kind."""
        workers = list(self._members.workers.values()) if self._members else []
        figures = {f"pool/{s}": sum(w.state is s for w in workers) for s in State}
        figures |= {
            "pool/inflight": sum(len(w.in_flight) for w in workers),
            "pool/tokens": self.counters.tokens,
            "pool/legs": self.counters.chunks,
            "pool/aborted_legs": self.counters.aborted,
            "pool/uncertain_tokens": self.counters.uncertain_tokens,
        }
        figures |= {f"pool/trouble_{k}": n for k, n in list(self.counters.errors.items())}
        return {name: float(value) for name, value in figures.items()}

    def workers(self) -> dict[str, str]:
        """url -> state, with the reason where it is not ready."""
        found = self._members.workers.values() if self._members else ()
        return {w.url: f"{w.state}: {w.reason}" if w.reason else str(w.state) for w in found}

    def close(self) -> None:
        """End all requests (`finish=abort`) and the thread. Servers are left running."""
        if self._loop.is_closed():
            return
        self._closing = True
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # --- in the pool's loop -----------------------------------------------------------------

    async def _start(self, trainer: Trainer, weights: Weights) -> None:
        members = Members(self.cfg, trainer, weights, self._nonce, self._keys)
        members.client = open_client()
        if self.cfg.router_url:
            url = check_url(self.cfg.router_url)
            self._router = Server(url, members.client, self._keys, self.cfg)
        try:
            await members.start()
        except BaseException:
            await members.client.aclose()
            raise
        self._members = members
        self._tasks.add(asyncio.create_task(members.watch()))

    async def _stop(self) -> None:
        # Cancel only the tasks that this class started, not those of libraries. In a loop: on
        # Python 3.11 `wait_for` loses a cancellation that coincides with its result.
        while tasks := {task for task in self._tasks if not task.done()}:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=1.0)
        if self._members is not None and self._members.client is not None:
            await self._members.client.aclose()

    async def _until_closed(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work` so that `close` can cancel it."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            return await work
        finally:
            self._tasks.discard(task)

    async def _sample(self, request: SampleRequest) -> Completion:
        avoid = ""

        async def send(prefix: np.ndarray, budget: int, number: int) -> Chunk:
            nonlocal avoid
            try:
                found = await self._send(request, prefix, budget, number, avoid)
            except PoolError as error:
                avoid = error.url
                raise
            avoid = ""
            return found

        limits = RetryLimits(request.deadline or self.cfg.request_timeout)
        try:
            chat = self._get().trainer.chat
            decode = None if chat is None else chat.decode
            return await complete(request, send, limits, self.counters, decode)
        except asyncio.CancelledError:
            if self._closing:
                return _closed()
            raise

    async def _send(
        self, request: SampleRequest, prefix: np.ndarray, budget: int, number: int, avoid: str
    ) -> Chunk:
        """Sample one chunk on one worker and validate it; an error counts against the worker."""
        members = self._get()
        if len(prefix) and not 0 <= prefix.min() <= prefix.max() < members.trainer.vocab_size:
            last = members.trainer.vocab_size - 1
            said = f"the prompt holds ids up to {prefix.max()}; the model's end at {last}"
            raise PoolError(PoolErrorKind.VOCABULARY, "pool", said, final=True)
        worker = await self._ready(trajectory_key(request.rid), avoid)
        room = worker.context - len(prefix) if worker.context else budget
        budget = min(budget, room)
        if budget <= 0:
            raise PoolError(
                PoolErrorKind.BAD_REQUEST,
                worker.url,
                f"prompt of {len(prefix)} tokens leaves no room in a context of {worker.context}; "
                "shorten the prompt or raise the server's context length",
                final=True,
            )
        known = worker.context and self._router is None
        rid = f"{self._nonce}/{request.rid}{number}/"
        seed = _seed(request, len(prefix)) if worker.seeded and not self._router else None
        salt = f"v{worker.version}" if self.cfg.pause == "in_place" else ""
        body = generate_body(rid, prefix, budget, request.params, seed=seed, extra_key=salt)
        oldest = worker.version
        if self._router is not None:
            oldest = min(w.version for w in members.workers.values() if w.version >= 0)
        try:
            status, payload = await self._post(worker, body, trajectory_key(request.rid))
            expected = Expected(
                rid=rid,
                url=worker.url,
                vocab_size=members.trainer.vocab_size,
                budget=budget,
                versions=members.names,
                oldest=oldest,
                least=max(1, min(budget, room - _KEPT_BACK)) if known else 1,
                stop_strings=request.params.stop_strings,
            )
            answer = read_generate(status, payload, expected)
        except PoolError as error:
            # A router does not say which worker it was.
            if self._router is None or error.kind is PoolErrorKind.WRONG_VERSION:
                members.failed(worker, error)
            raise
        members.answered(worker)
        return answer

    async def _post(self, worker: Worker, body: Mapping[str, Any], key: str) -> tuple[int, bytes]:
        """Send the request; it is cancelled when its worker is lost."""
        server = self._router or worker.server
        headers = {"X-SMG-Routing-Key": key} if self._router else None
        post = asyncio.create_task(server.generate(body, self.cfg.attempt_timeout, headers))
        worker.in_flight.add(post)
        try:
            return await post
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise PoolError(
                PoolErrorKind.UNREACHABLE, worker.url, "lost while it answered"
            ) from None
        finally:
            post.cancel()
            worker.in_flight.discard(post)

    async def _ready(self, key: str, avoid: str) -> Worker:
        """Choose a worker; waits while weights load, and `control_timeout` for lost workers."""
        members = self._get()
        clock = asyncio.get_running_loop().time
        patience = clock() + self.cfg.control_timeout
        while True:
            workers = list(members.workers.values())
            others = [w for w in workers if w.url != avoid]
            chosen = self._routes.choose(others, key) or self._routes.choose(workers, key)
            if chosen is not None:
                return chosen
            if any(w.state is State.UPDATING for w in workers):
                patience = clock() + self.cfg.control_timeout
            elif clock() > patience:
                raise PoolError(
                    PoolErrorKind.UNREACHABLE, "pool", f"no worker: {members.describe()}"
                )
            members.changed.clear()
            try:
                async with asyncio.timeout(self.cfg.control_timeout):
                    await members.changed.wait()
            except TimeoutError:
                continue

    def _get(self) -> Members:
        if self._members is None:
            raise UserError("the pool is not started; call start first")
        return self._members

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def _seed(request: SampleRequest, position: int) -> int:
    """A 63-bit seed from the request's seed and the chunk's position in the text."""
    words = [s % 2**32 for s in (*request.params.seed, position)]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


def _closed() -> Completion:
    none = np.zeros(0, np.int32)
    return Completion(none, none.astype(np.float32), none, Finish.ABORT, "the pool is closed")
