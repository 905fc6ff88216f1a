"""The in-process JAX engine: a `TokenPolicy` with batched decoding and a KV cache.

Requests of any number of episodes are decoded together. A slot keeps its keys and values between
the turns of an episode, so a turn costs only its new tokens. A weight update takes effect between
two decode chunks: cached keys and values are dropped and re-made under the new weights, so every
token's log-probability is exactly that of the version stamped on it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from agentcpm_jax.engine.device import DecodeRows, decode, prefill
from agentcpm_jax.model.config import ModelConfig
from agentcpm_jax.model.decode import init_cache
from agentcpm_jax.rollout.policy import Completion, Finish, SampleRequest
from agentcpm_jax.types import UserError

MAX_STOP_IDS = 4


@dataclass(frozen=True)
class EngineConfig:
    """Shapes of the engine. `fixed_shapes` and no prefix reuse make a row's bits independent of
    what else runs (deterministic mode)."""

    slots: int = 96
    capacity: int = 512  # tokens per slot: prompt + completion
    chunk: int = 8  # decode steps per device call
    row_buckets: tuple[int, ...] = (16, 48)  # `slots` is always the last bucket
    token_buckets: tuple[int, ...] = (16, 64)
    length_buckets: tuple[int, ...] = ()  # of the cache that is read; `capacity` is the last
    deterministic: bool = False


@dataclass
class _Running:
    request: SampleRequest
    future: asyncio.Future
    loop: asyncio.AbstractEventLoop
    deadline: float
    budget: int
    key: np.ndarray
    slot: int = -1
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)


class LocalEngine:
    """Continuous batching over a fixed number of slots; one engine thread, started on first use."""

    def __init__(
        self, params: dict, model: ModelConfig, cfg: EngineConfig, *, version: int = 0
    ) -> None:
        self.cfg, self.model = cfg, model
        self._params, self.version = jax.tree.map(jnp.copy, params), version
        self._next_params: tuple[dict, int] | None = None
        self._cache = init_cache(model, cfg.slots, cfg.capacity)
        self._cached: list[np.ndarray] = [np.zeros(0, np.int32)] * cfg.slots
        self._last_used = [0.0] * cfg.slots
        self._waiting: deque[_Running] = deque()
        self._running: dict[int, _Running] = {}
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._failure = ""
        self.tokens_sampled = 0
        self.tokens_prefilled = 0

    # --- the policy ------------------------------------------------------------------------

    async def sample(self, request: SampleRequest) -> Completion:
        """One completion; an engine failure is a completion with `finish=error`, never a raise."""
        budget = min(request.max_new_tokens, self.cfg.capacity - len(request.prompt_ids))
        if budget <= 0:
            return _failed(
                f"prompt of {len(request.prompt_ids)} tokens leaves no room in a context of "
                f"{self.cfg.capacity}; raise engine.capacity or shorten the prompt"
            )
        if len(request.params.stop_ids) > MAX_STOP_IDS:
            return _failed(f"{len(request.params.stop_ids)} stop ids; at most {MAX_STOP_IDS}")
        loop = asyncio.get_running_loop()
        run = _Running(
            request=request,
            future=loop.create_future(),
            loop=loop,
            deadline=time.monotonic() + request.deadline if request.deadline else float("inf"),
            budget=budget,
            key=np.random.SeedSequence([s % 2**32 for s in request.params.seed]).generate_state(2),
        )
        with self._wake:
            if self._closed or self._failure:
                return _failed(self._failure or "engine is closed")
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
                self._thread.start()
            self._waiting.append(run)
            self._wake.notify()
        return await run.future

    def set_params(self, params: dict, version: int) -> None:
        """Swap weights before the next decode chunk. Takes a copy: the trainer donates its own."""
        copied = jax.block_until_ready(jax.tree.map(jnp.copy, params))
        with self._wake:
            self._next_params = (copied, version)
            if not self._running and not self._waiting:
                self._swap()
            self._wake.notify()

    def close(self) -> None:
        """Abort what runs and end the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    # --- the engine thread -----------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while True:
                with self._wake:
                    while not (self._waiting or self._running or self._closed):
                        self._wake.wait()
                    if self._closed:
                        break
                    if self._next_params is not None:
                        self._swap()
                    self._admit()
                self._drop_dead()
                if self._running:
                    self._feed_prompts()
                    self._decode_chunk()
        except Exception as error:  # the thread must never die silently: everyone waits on it
            self._failure = f"engine failed: {type(error).__name__}: {error}"
        reason = self._failure or "engine is closed"
        with self._wake:
            for run in [*self._running.values(), *self._waiting]:
                finish = Finish.ERROR if self._failure else Finish.ABORT
                self._resolve(run, finish, reason)
            self._running.clear()
            self._waiting.clear()

    def _swap(self) -> None:
        assert self._next_params is not None
        self._params, self.version = self._next_params
        self._next_params = None
        self._cached = [np.zeros(0, np.int32)] * self.cfg.slots

    def _admit(self) -> None:
        """Give waiting requests a slot: the one that already holds the longest prefix."""
        free = [s for s in range(self.cfg.slots) if s not in self._running]
        while self._waiting and free:
            run = self._waiting.popleft()
            prompt = np.asarray(run.request.prompt_ids, np.int32)
            if self.cfg.deterministic:
                slot, shared = min(free), 0
            else:
                slot, shared = self._best_slot(free, prompt)
            free.remove(slot)
            # At least one token must be fed to get logits, so the last is never taken as cached.
            self._cached[slot] = prompt[: min(shared, len(prompt) - 1)]
            run.slot = slot
            self._running[slot] = run

    def _best_slot(self, free: Sequence[int], prompt: np.ndarray) -> tuple[int, int]:
        best, best_shared = -1, 0
        for slot in free:
            shared = _shared_prefix(self._cached[slot], prompt)
            # A slot whose whole content is our prefix costs nobody anything.
            if shared > best_shared and 2 * shared >= len(self._cached[slot]):
                best, best_shared = slot, shared
        if best >= 0:
            return best, best_shared
        return min(free, key=lambda s: self._last_used[s]), 0

    def _drop_dead(self) -> None:
        """End requests whose deadline has passed or whose caller was cancelled."""
        now = time.monotonic()
        for slot, run in list(self._running.items()):
            if run.future.cancelled():
                del self._running[slot]
            elif now > run.deadline:
                del self._running[slot]
                self._resolve(run, Finish.ABORT, "deadline passed")

    def _feed_prompts(self) -> None:
        """Prefill until each running row has exactly one token that is not in the cache."""
        while True:
            pending = {s: n for s, r in self._running.items() if (n := self._missing(r)) > 1}
            if not pending:
                return
            buckets = self.cfg.token_buckets
            width = (
                buckets[-1]
                if self.cfg.deterministic
                else _bucket(max(pending.values()) - 1, buckets)
            )
            slots = list(pending)
            size = self._row_bucket(len(slots))
            tokens = np.zeros((size, width), np.int32)
            counts = np.zeros(size, np.int32)
            lengths = np.zeros(size, np.int32)
            index = np.full(size, self.cfg.slots, np.int32)
            for row, slot in self._rows(slots, size):
                text = self._text(self._running[slot])
                start = len(self._cached[slot])
                part = text[start : min(start + width, len(text) - 1)]
                tokens[row, : len(part)], counts[row] = part, len(part)
                lengths[row], index[row] = start, slot
                self._cached[slot] = text[: start + len(part)]
                self.tokens_prefilled += len(part)
            self._cache = prefill(
                self._params,
                self.model,
                self._cache,
                index,
                lengths,
                tokens,
                counts,
                self._length_bucket(int((lengths + counts).max())),
                size == self.cfg.slots,
            )

    def _decode_chunk(self) -> None:
        slots = list(self._running)
        size = self._row_bucket(len(slots))
        rows = DecodeRows(
            index=np.full(size, self.cfg.slots, np.int32),  # type: ignore[arg-type]
            length=np.zeros(size, np.int32),  # type: ignore[arg-type]
            token=np.zeros(size, np.int32),  # type: ignore[arg-type]
            budget=np.zeros(size, np.int32),  # type: ignore[arg-type]
            generated=np.zeros(size, np.int32),  # type: ignore[arg-type]
            temperature=np.ones(size, np.float32),  # type: ignore[arg-type]
            key=np.zeros((size, 2), np.uint32),  # type: ignore[arg-type]
            stop=np.full((size, MAX_STOP_IDS), -1, np.int32),  # type: ignore[arg-type]
        )
        placed = self._rows(slots, size)
        for row, slot in placed:
            run = self._running[slot]
            text = self._text(run)
            rows.index[row], rows.length[row] = slot, len(text) - 1
            rows.token[row] = text[-1]
            rows.budget[row] = run.budget - len(run.ids)
            rows.generated[row] = len(run.ids)
            rows.temperature[row] = run.request.params.temperature
            rows.key[row] = run.key
            stop = run.request.params.stop_ids
            rows.stop[row, : len(stop)] = stop
        self._cache, ids, logprobs, valid = decode(
            self._params,
            self.model,
            self._cache,
            rows,
            self.cfg.chunk,
            self._length_bucket(int(np.max(rows.length)) + self.cfg.chunk),
            size == self.cfg.slots,
        )
        ids, logprobs, valid = np.asarray(ids), np.asarray(logprobs), np.asarray(valid)
        now = time.monotonic()
        for row, slot in placed:
            run = self._running[slot]
            count = int(valid[:, row].sum())
            run.ids += ids[:count, row].tolist()
            run.logprobs += logprobs[:count, row].tolist()
            run.versions += [self.version] * count
            self.tokens_sampled += count
            # The last sampled token has not been fed, so it is not in the cache.
            self._cached[slot] = self._text(run)[:-1]
            self._last_used[slot] = now
            stopped = bool(run.ids) and run.ids[-1] in run.request.params.stop_ids
            if stopped or len(run.ids) >= run.budget:
                del self._running[slot]
                self._resolve(run, Finish.STOP if stopped else Finish.LENGTH, "")

    # --- small parts -----------------------------------------------------------------------

    def _text(self, run: _Running) -> np.ndarray:
        return np.concatenate(
            [np.asarray(run.request.prompt_ids, np.int32), np.asarray(run.ids, np.int32)]
        )

    def _missing(self, run: _Running) -> int:
        return len(run.request.prompt_ids) + len(run.ids) - len(self._cached[run.slot])

    def _row_bucket(self, count: int) -> int:
        if self.cfg.deterministic:
            return self.cfg.slots
        return _bucket(count, (*self.cfg.row_buckets, self.cfg.slots))

    def _length_bucket(self, length: int) -> int:
        if self.cfg.deterministic:
            return self.cfg.capacity
        return _bucket(length, (*self.cfg.length_buckets, self.cfg.capacity))

    def _rows(self, slots: Sequence[int], size: int) -> list[tuple[int, int]]:
        """(row, slot) pairs; with a row for every slot, a slot is its own row."""
        return [(s, s) if size == self.cfg.slots else (i, s) for i, s in enumerate(slots)]

    def _resolve(self, run: _Running, finish: Finish, error: str) -> None:
        completion = Completion(
            ids=np.asarray(run.ids, np.int32),
            logprobs=np.asarray(run.logprobs, np.float32),
            versions=np.asarray(run.versions, np.int32),
            finish=finish,
            error=error,
        )

        def deliver() -> None:
            if not run.future.done():
                run.future.set_result(completion)

        if not run.loop.is_closed():
            run.loop.call_soon_threadsafe(deliver)


def check_capacity(cfg: EngineConfig, max_context: int) -> None:
    """Raise `UserError` when episodes may outgrow a slot."""
    if max_context > cfg.capacity:
        raise UserError(
            f"episode.max_context={max_context} exceeds engine.capacity={cfg.capacity}; "
            "raise the capacity or lower the context"
        )


def _bucket(count: int, buckets: Sequence[int]) -> int:
    return next((b for b in buckets if b >= count), buckets[-1])


def _shared_prefix(cached: np.ndarray, prompt: np.ndarray) -> int:
    n = min(len(cached), len(prompt))
    different = np.flatnonzero(cached[:n] != prompt[:n])
    return int(different[0]) if len(different) else n


def _failed(error: str) -> Completion:
    empty = np.zeros(0, np.int32)
    return Completion(empty, np.zeros(0, np.float32), empty, Finish.ERROR, error)
