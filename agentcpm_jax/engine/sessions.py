"""Runs requests through an engine chunk by chunk, so that they can be held, ended and streamed.

An engine behind `ServedEngine` samples a whole request at once. A session asks it for `chunk`
tokens at a time, with what was sampled so far as part of the prompt (the engine's prefix cache
makes that cheap). Between two chunks a request can be held (pause); it is ended (abort, a stop
string) and streamed as its tokens come. Tokens carry the version under which they were sampled.

Deviations from SGLang 0.5:
1. `in_place` does the same as `retract`: this engine never keeps keys and values across a weight
   update, so no token comes from a mixture of two models;
2. an update without a pause takes effect between two chunks instead of waiting for all requests;
3. log-probabilities are those of temperature 1, as with SGLANG_RETURN_ORIGINAL_LOGPROB=1.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any, Protocol

import numpy as np

from agentcpm_jax.engine.running import cut_at_stop
from agentcpm_jax.rollout.policy import Completion, Finish, SampleRequest, SamplingParams
from agentcpm_jax.types import UserError


class ServedEngine(Protocol):
    """What a server needs of an engine. Versions are integers that the server counts itself."""

    capacity: int  # tokens, prompt and completion
    vocab_size: int

    @property
    def failure(self) -> str:
        """Why it can never sample again; empty while it can."""
        ...

    async def sample(self, request: SampleRequest) -> Completion: ...

    def load(self, path: str, version: int) -> None:
        """Sample with the weights in `path` from now on; when it raises, the old ones stay."""
        ...

    def flush(self) -> bool:
        """Forget cached prefixes; False while requests run."""
        ...

    def close(self) -> None: ...


class EngineFailure(Exception):
    """The engine could not sample: status 500."""


@dataclass
class GenerationJob:
    """A request and its tokens so far; `versions` has the name of the weights of each token."""

    rid: str
    prompt: np.ndarray  # i32[P]
    max_new_tokens: int
    temperature: float = 1.0
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    seed: int | None = None
    options: dict[str, Any] = field(default_factory=dict)  # further SamplingParams, e.g. top_p
    keep_stop: bool = False  # the text of the answer includes the stop string or id
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)
    finish: dict[str, Any] | None = None  # SGLang's finish_reason
    retractions: int = 0
    cached: int = 0  # tokens of the prompt that the engine had in its prefix cache
    aborted: str = ""  # the reason, once the request has been aborted
    wake: asyncio.Event = field(default_factory=asyncio.Event)  # there is something new

    @property
    def text_ids(self) -> list[int]:
        """The ids whose text an answer has while it grows: what stops it is cut off at the end."""
        stopped = bool(self.ids) and self.ids[-1] in self.stop_ids and not self.keep_stop
        return self.ids[:-1] if stopped else self.ids

    def abort(self) -> None:
        """End it; it keeps what it has."""
        self.aborted = self.aborted or ("Aborted" if self.ids else "Abort before prefill")
        self.wake.set()


_TOTALS = ("requests", "aborted", "prompt_tokens", "cached_tokens", "generated_tokens")


class Sessions:
    """All requests of one server, and the weights they are sampled with."""

    def __init__(
        self,
        engine: ServedEngine,
        *,
        version: str,
        chunk: int,
        decode: Callable[[Sequence[int]], str] | None = None,
        path: str = "",
    ) -> None:
        self.engine, self.chunk, self.decode = engine, chunk, decode
        self.path, self.version = path, version  # of the weights for what is sampled next
        self._names = [version]  # indexed by the engine's version
        self._current = 0  # the engine's version that `version` names
        self._jobs: dict[str, GenerationJob] = {}
        self._new: dict[str, GenerationJob] = {}  # came during a pause, which they wait for
        self._sampling = 0  # chunks that the engine is sampling
        self._open, self._quiet, self._none = asyncio.Event(), asyncio.Event(), asyncio.Event()
        for event in (self._open, self._quiet, self._none):
            event.set()
        self._updating = asyncio.Lock()
        self._loading: set[asyncio.Task[None]] = set()
        self.total = dict.fromkeys(_TOTALS, 0)

    @property
    def paused(self) -> bool:
        return not self._open.is_set()

    @property
    def running(self) -> int:
        """Requests that have begun and are not answered."""
        return len(self._jobs)

    async def run(self, job: GenerationJob) -> AsyncGenerator[GenerationJob, None]:
        """Yields the job when it has grown; the last time with `finish` set.

        Raises:
          UserError: a request with the same rid is running.
          EngineFailure: the engine failed.
        """
        if job.rid in self._jobs or job.rid in self._new:
            raise UserError(f"duplicate request id rid={job.rid!r}; give each request its own")
        self._new[job.rid] = job
        try:
            await self._until_open(job)
        finally:
            del self._new[job.rid]
        self._jobs[job.rid] = job
        self._none.clear()
        seed = secrets.randbits(63) if job.seed is None else job.seed
        try:
            while job.finish is None:
                await self._until_open(job)
                if job.aborted:
                    job.finish = {"type": "abort", "message": job.aborted}
                    self.total["aborted"] += 1
                else:
                    before, sampling = len(job.ids), self._begin(job, seed)
                    try:
                        while await self._grows(job, sampling):
                            yield job
                        if sampling.done():
                            self._end(job, before, sampling.result())
                    finally:
                        sampling.cancel()
                yield job
        finally:
            del self._jobs[job.rid]
            self.total["requests"] += 1
            self.total["prompt_tokens"] += len(job.prompt)
            self.total["generated_tokens"] += len(job.ids)
            if not self._jobs:
                self._none.set()

    def abort(self, *rids: str, everything: bool = False) -> None:
        """End all requests, or those whose rid begins with one of `rids`; also those that wait."""
        for job in [*self._jobs.values(), *self._new.values()]:
            if everything or job.rid.startswith(rids):
                job.abort()

    async def pause(self, mode: str) -> None:
        """End all requests (`abort`) or hold them; returns once nothing is being sampled."""
        self._open.clear()
        for job in self._jobs.values():
            if mode == "abort":
                job.abort()
            job.retractions += mode == "retract"
        await (self._none if mode == "abort" else self._quiet).wait()

    def resume(self) -> None:
        """Let held and waiting requests go on."""
        self._open.set()
        for job in [*self._jobs.values(), *self._new.values()]:
            job.wake.set()

    async def update(self, path: str, version: str | None) -> None:
        """Sample with the weights in `path` from now on, named `version` (None: the old name).

        Goes on when its caller is cancelled: weights cannot be half loaded. Raises what the engine
        raises when the directory does not hold them; weights and all names are as before.
        """
        loading = asyncio.ensure_future(self._load(path, version))
        self._loading.add(loading)
        loading.add_done_callback(self._loaded)
        await asyncio.shield(loading)

    def rename(self, version: str) -> None:
        """Announce the present weights under another name."""
        self._names[self._current] = self.version = version

    async def _load(self, path: str, version: str | None) -> None:
        async with self._updating:
            # Name them before loading: their first token may arrive before `load` returns.
            index, name = len(self._names), self.version if version is None else version
            self._names.append(name)
            try:
                await asyncio.to_thread(self.engine.load, path, index)
            except BaseException:
                self._names.pop()
                raise
            self._current, self.version, self.path = index, name, path

    def _loaded(self, loading: asyncio.Task[None]) -> None:
        self._loading.discard(loading)
        if not loading.cancelled():
            loading.exception()  # its caller may be gone: then nobody else looks at it

    async def _until_open(self, job: GenerationJob) -> None:
        while self.paused and not job.aborted:
            job.wake.clear()
            await job.wake.wait()

    def _begin(self, job: GenerationJob, seed: int) -> asyncio.Future[Completion]:
        """Have the engine sample the next chunk."""
        left = job.max_new_tokens - len(job.ids)
        prompt = np.concatenate([job.prompt, np.asarray(job.ids, np.int32)])
        params = SamplingParams(
            temperature=job.temperature,
            stop_ids=job.stop_ids,
            seed=(seed & 0xFFFFFFFF, seed >> 32, len(job.ids)),
            **job.options,
        )
        progress = partial(self._append, job)
        request = SampleRequest(job.rid, prompt, min(self.chunk, left), params, progress=progress)

        def ended(_: asyncio.Future[Completion]) -> None:
            self._sampling -= 1
            if not self._sampling:
                self._quiet.set()
            job.wake.set()

        self._sampling += 1
        self._quiet.clear()
        sampling = asyncio.ensure_future(self.engine.sample(request))
        sampling.add_done_callback(ended)
        return sampling

    async def _grows(self, job: GenerationJob, sampling: asyncio.Future[Completion]) -> bool:
        """Wait until there is something new; False when the chunk is over."""
        await job.wake.wait()
        job.wake.clear()
        return not (sampling.done() or job.finish or job.aborted)

    def _append(
        self,
        job: GenerationJob,
        ids: Sequence[int],
        logprobs: Sequence[float],
        versions: Sequence[int],
    ) -> None:
        """Add sampled tokens, unless the job has ended meanwhile."""
        if job.finish or job.aborted or not ids:
            return
        job.ids += ids
        job.logprobs += logprobs
        job.versions += [self._names[v] for v in versions]
        if job.stop_strings and self.decode is not None:
            count, found = cut_at_stop(self.decode, job.ids, len(ids), job.stop_strings)
            if count is not None:
                for kept in (job.ids, job.logprobs, job.versions):
                    del kept[count:]
                job.finish = {"type": "stop", "matched": found}
        job.wake.set()

    def _end(self, job: GenerationJob, before: int, done: Completion) -> None:
        """A chunk, which began at token `before`, is sampled: its completion has the last word."""
        if done.finish in (Finish.ERROR, Finish.ABORT):
            raise EngineFailure(done.error)
        if not before:
            job.cached = done.cached_tokens
            self.total["cached_tokens"] += job.cached
        if job.finish or job.aborted:
            return
        for kept in (job.ids, job.logprobs, job.versions):
            del kept[before:]
        columns = (done.ids, done.logprobs, done.versions)
        self._append(job, *(column.tolist() for column in columns))
        if job.finish:
            return
        if done.finish is Finish.STOP:
            job.finish = {"type": "stop", "matched": job.ids[-1]}
        elif len(job.ids) >= job.max_new_tokens:
            job.finish = {"type": "length", "length": len(job.ids)}


def version_spans(versions: Sequence[str], current: str) -> list[dict[str, Any]]:
    """SGLang's `weight_versions`: half-open spans, contiguous from 0; [0, 0) without tokens."""
    if not versions:
        return [{"version": current, "start": 0, "end": 0}]
    spans, start = [], 0
    for name, group in groupby(versions):
        end = start + len(list(group))
        spans.append({"version": name, "start": start, "end": end})
        start = end
    return spans
