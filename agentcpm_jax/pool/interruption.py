"""One completion out of as many chunks as it takes; the agent above never sees the seams.

    kept = []
    while the completion is not finished:
        chunk = generate(prompt + kept, budget - len(kept))      under a rid of its own
        kept += chunk                                            ids, log-probabilities, versions

A weight update that aborts generation, a worker that dies and a busy server are handled alike: the
tokens received are kept and the prefix is sent again. The prefix is recomputed under the weights of
the new chunk, so each token's log-probability is that of the version stamped on it.
After AReaL (arXiv 2505.24298, section 4.1, interruptible rollout workers). Deviations:
1. versions are those that the server reports for each token, not the client's belief on arrival;
2. a stop string split over two chunks, which no server sees, is found in the joined text; tokens
   sampled after it are cut off;
3. the token budget shrinks by the tokens kept; at zero the completion finishes with `length`;
4. chunks in a row without a token are bounded: a server that only aborts is an error, not a loop;
5. that a request is bad or forbidden is believed when two attempts in a row say so.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from agentcpm_jax.pool.errors import OF_THE_REQUEST, PoolError, PoolErrorKind
from agentcpm_jax.pool.protocol import Chunk
from agentcpm_jax.rollout.policy import Completion, Finish, SampleRequest

#: ids -> text
Decode = Callable[[Sequence[int]], str]
#: (prefix i32[P], budget, chunk number) -> the chunk; raises `PoolError`.
SendChunk = Callable[[np.ndarray, int, int], Awaitable[Chunk]]


@dataclass(frozen=True)
class RetryLimits:
    """When to stop trying."""

    timeout: float  # s for all chunks together
    failures: int = 8  # attempts in a row that bring nothing
    backoff: float = 0.2  # s after the first failure; doubles up to `backoff_max`
    backoff_max: float = 8.0  # s


@dataclass
class PoolCounters:
    """Counts of chunks, tokens and errors, for metrics."""

    chunks: int = 0
    aborted: int = 0  # chunks that ended by an interruption
    uncertain_tokens: int = 0
    tokens: int = 0
    errors: dict[str, int] = field(default_factory=dict)

    def count(self, error: PoolError) -> None:
        self.errors[error.kind] = self.errors.get(error.kind, 0) + 1


async def complete(
    request: SampleRequest,
    send: SendChunk,
    limits: RetryLimits,
    counters: PoolCounters,
    decode: Decode | None = None,
) -> Completion:
    """Sample the whole completion; on failure `finish` is `error` or `abort`, `error` says why.

    Tokens received before a failure are returned. Only cancellation raises. Without `decode` only
    the server looks for stop strings.
    """
    kept = _Kept()
    reason = "no worker took the request"
    try:
        async with asyncio.timeout(limits.timeout):
            failures = number = 0
            refused = None  # what the last attempt said of the request
            while len(kept.ids) < request.max_new_tokens:
                prefix = np.concatenate([np.asarray(request.prompt_ids, np.int32), kept.array()])
                budget = request.max_new_tokens - len(kept.ids)
                number += 1
                try:
                    chunk = await send(prefix, budget, number)
                except PoolError as error:
                    counters.count(error)
                    reason, failures = str(error), failures + 1
                    again = error.kind is refused and refused in OF_THE_REQUEST
                    if error.final or again or failures >= limits.failures:
                        return kept.completion(Finish.ERROR, reason)
                    refused = error.kind
                    await asyncio.sleep(_pause(limits, failures))
                    continue
                seam, refused = len(kept.ids), None
                kept.add(chunk, counters)
                if seam and decode is not None and kept.cut(request.params.stop_strings, decode):
                    return kept.completion(Finish.STOP)
                if chunk.finish is not Finish.ABORT:
                    return kept.completion(chunk.finish)
                reason = f"aborted: {chunk.message or 'by the server'}"
                failures = 0 if len(chunk.ids) else failures + 1
                if failures >= limits.failures:
                    return kept.completion(Finish.ERROR, f"{reason}, {failures} times in a row")
                if failures > 1:
                    await asyncio.sleep(_pause(limits, failures - 1))
            return kept.completion(Finish.LENGTH)
    except TimeoutError:
        late = f"{PoolErrorKind.TIMEOUT}: not complete within {limits.timeout:g} s; last: {reason}"
        return kept.completion(Finish.ABORT, late)


class _Kept:
    """Everything sampled so far."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._logprobs: list[float] = []
        self._versions: list[int] = []

    def array(self) -> np.ndarray:
        return np.asarray(self.ids, np.int32)

    def add(self, chunk: Chunk, counters: PoolCounters) -> None:
        self.ids += chunk.ids.tolist()
        self._logprobs += chunk.logprobs.tolist()
        self._versions += chunk.versions.tolist()
        counters.chunks += 1
        counters.tokens += len(chunk.ids)
        counters.aborted += chunk.finish is Finish.ABORT
        counters.uncertain_tokens += len(chunk.ids) * chunk.uncertain

    def cut(self, strings: Sequence[str], decode: Decode) -> bool:
        """Cut after the id that completes one of `strings`, if any; returns whether it did."""

        def complete(count: int) -> bool:
            text = decode(self.ids[:count])
            return any(string in text for string in strings)

        if not strings or not complete(len(self.ids)):
            return False
        count = bisect_left(range(len(self.ids)), True, key=complete)
        for values in (self.ids, self._logprobs, self._versions):
            del values[count:]
        return True

    def completion(self, finish: Finish, error: str = "") -> Completion:
        return Completion(
            ids=self.array(),
            logprobs=np.asarray(self._logprobs, np.float32),
            versions=np.asarray(self._versions, np.int32),
            finish=finish,
            error=error,
        )


def _pause(limits: RetryLimits, failures: int) -> float:
    return min(limits.backoff * 2 ** (failures - 1), limits.backoff_max)
