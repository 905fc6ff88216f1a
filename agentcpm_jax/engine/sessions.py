"""Runs requests through an engine chunk by chunk, so that they can be held, ended and streamed.

An engine behind `ServedEngine` samples a whole request at once. A session asks it for `chunk`
tokens at a time, with what was sampled so far as part of the prompt (the engine's prefix cache
makes that cheap). Between two chunks a request can be held (pause), ended (abort) or streamed, and
stop strings are detected. Tokens carry the version under which the engine sampled them.

Deviations from SGLang 0.5:
1. `in_place` does the same as `retract`: this engine never keeps keys and values across a weight
   update, so no token comes from a mixture of two models;
2. an update without a pause takes effect between two chunks instead of waiting for all requests;
3. log-probabilities are those of temperature 1, as with SGLANG_RETURN_ORIGINAL_LOGPROB=1.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
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

    async def sample(self, request: SampleRequest) -> Completion: ...

    def load(self, path: str, version: int) -> None:
        """Sample with the weights in `path` from now on; on `UserError` the old ones stay."""
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
    wake: asyncio.Event = field(default_factory=asyncio.Event)  # a held request checks again


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
    ) -> None:
        self.engine, self.chunk, self.decode = engine, chunk, decode
        self.version = version  # name of the weights for what is sampled next
        self._names = [version]  # indexed by the engine's version
        self._jobs: dict[str, GenerationJob] = {}
        self._sampling = 0  # chunks that the engine is sampling
        self._open, self._quiet, self._none = asyncio.Event(), asyncio.Event(), asyncio.Event()
        for event in (self._open, self._quiet, self._none):
            event.set()
        self._updating = asyncio.Lock()
        self.total = dict.fromkeys(_TOTALS, 0)

    @property
    def paused(self) -> bool:
        return not self._open.is_set()

    @property
    def running(self) -> int:
        """Requests that have not been answered."""
        return len(self._jobs)

    async def run(self, job: GenerationJob) -> AsyncIterator[GenerationJob]:
        """Yields the job after every chunk; the last time with `finish` set.

        Raises:
          UserError: a request with the same rid is running.
          EngineFailure: the engine failed.
        """
        if job.rid in self._jobs:
            raise UserError(f"duplicate request id {job.rid!r}; give each request its own")
        await self._open.wait()  # while paused, new requests wait here
        if job.rid in self._jobs:
            raise UserError(f"duplicate request id {job.rid!r}; give each request its own")
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
                    await self._chunk(job, seed)
                yield job
        finally:
            del self._jobs[job.rid]
            self.total["requests"] += 1
            self.total["prompt_tokens"] += len(job.prompt)
            self.total["generated_tokens"] += len(job.ids)
            if not self._jobs:
                self._none.set()

    def abort(self, rid: str, *, everything: bool = False, reason: str = "Aborted") -> None:
        """Ends requests whose rid begins with `rid` after their current chunk."""
        for job in self._jobs.values():
            if everything or (rid and job.rid.startswith(rid)):
                job.aborted = job.aborted or (reason if job.ids else "Abort before prefill")
                job.wake.set()

    async def pause(self, mode: str) -> None:
        """End all requests (`abort`) or hold them; returns once nothing is being sampled."""
        self._open.clear()
        if mode == "abort":
            self.abort("", everything=True)
            await self._none.wait()
            return
        for job in self._jobs.values():
            job.retractions += mode == "retract"
        await self._quiet.wait()

    def resume(self) -> None:
        """Let held and waiting requests go on."""
        self._open.set()
        for job in self._jobs.values():
            job.wake.set()

    async def update(self, path: str, version: str | None) -> None:
        """Sample with the weights in `path` from now on, named `version` (None: the old name).

        Raises `UserError` when the directory does not hold them; the old ones stay.
        """
        async with self._updating:
            # Name them before loading: their first token may arrive before `load` returns.
            self._names.append(self.version if version is None else version)
            await asyncio.to_thread(self.engine.load, path, len(self._names) - 1)
            self.version = self._names[-1]

    def rename(self, version: str) -> None:
        """Announce the present weights under another name."""
        self._names[-1] = self.version = version

    async def _until_open(self, job: GenerationJob) -> None:
        while self.paused and not job.aborted:
            job.wake.clear()
            await job.wake.wait()

    async def _chunk(self, job: GenerationJob, seed: int) -> None:
        left = job.max_new_tokens - len(job.ids)
        prompt = np.concatenate([job.prompt, np.asarray(job.ids, np.int32)])
        params = SamplingParams(
            temperature=job.temperature,
            stop_ids=job.stop_ids,
            seed=(seed & 0xFFFFFFFF, seed >> 32, len(job.ids)),
            **job.options,
        )
        request = SampleRequest(job.rid, prompt, min(self.chunk, left), params)
        self._sampling += 1
        self._quiet.clear()
        try:
            done = await self.engine.sample(request)
        finally:
            self._sampling -= 1
            if not self._sampling:
                self._quiet.set()
        if done.finish in (Finish.ERROR, Finish.ABORT):
            raise EngineFailure(done.error)
        if not job.ids:
            job.cached = done.cached_tokens
            self.total["cached_tokens"] += job.cached
        job.ids += done.ids.tolist()
        job.logprobs += done.logprobs.tolist()
        job.versions += [self._names[v] for v in done.versions.tolist()]
        if self._matched(job, len(done.ids)):
            return
        if done.finish is Finish.STOP:
            job.finish = {"type": "stop", "matched": job.ids[-1]}
        elif len(job.ids) >= job.max_new_tokens:
            job.finish = {"type": "length", "length": len(job.ids)}

    def _matched(self, job: GenerationJob, new: int) -> bool:
        """Cut the job after a completed stop string; returns whether there was one."""
        if not job.stop_strings or self.decode is None:
            return False
        count, found = cut_at_stop(self.decode, job.ids, new, job.stop_strings)
        if count is None:
            return False
        for kept in (job.ids, job.logprobs, job.versions):
            del kept[count:]
        job.finish = {"type": "stop", "matched": found}
        return True


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
