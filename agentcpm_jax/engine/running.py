"""One request inside the engine, from submission to its completion."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from agentcpm_jax.engine.slots import CacheSlot
from agentcpm_jax.rollout.policy import Completion, Finish, SampleRequest


@dataclass
class Running:
    """A request, its tokens so far, and the future that its caller awaits."""

    request: SampleRequest
    prompt: np.ndarray  # i32[P]
    budget: int
    deadline: float  # in time.monotonic
    key: np.ndarray  # u32[2]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Completion]
    place: CacheSlot = field(default_factory=lambda: CacheSlot(-1, 0))
    leader: Running | None = None  # the request that feeds the prefix we wait for
    cached: int = 0  # prompt tokens that did not have to be fed
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    @staticmethod
    def of(request: SampleRequest, budget: int) -> Running:
        """Create one for a caller in the running event loop."""
        loop = asyncio.get_running_loop()
        seed = [s % 2**32 for s in request.params.seed]
        return Running(
            request=request,
            prompt=np.asarray(request.prompt_ids, np.int32),
            budget=budget,
            deadline=time.monotonic() + request.deadline if request.deadline else float("inf"),
            key=np.random.SeedSequence(seed).generate_state(2),
            loop=loop,
            future=loop.create_future(),
        )

    def record(
        self,
        ids: np.ndarray,
        logprobs: np.ndarray,
        version: int,
        text: Callable[[Sequence[int]], str] | None,
    ) -> Finish | None:
        """Append a chunk's tokens; returns how the request finishes, None if not yet."""
        params = self.request.params
        self.ids += ids.tolist()
        self.logprobs += logprobs.tolist()
        self.versions += [version] * len(ids)
        if params.stop_strings and text is not None:
            count, _ = cut_at_stop(text, self.ids, len(ids), params.stop_strings)
            if count is not None:
                for kept in (self.ids, self.logprobs, self.versions):
                    del kept[count:]
                return Finish.STOP
        if self.ids[-1] in params.stop_ids:
            return Finish.STOP
        return Finish.LENGTH if len(self.ids) >= self.budget else None

    def report(self, start: int) -> None:
        """Tell the caller of the tokens from `start` on, if it wants to know; from any thread."""
        if self.request.progress is not None:
            new = (self.ids[start:], self.logprobs[start:], self.versions[start:])
            self._call(self.request.progress, *new)

    def resolve(self, finish: Finish, error: str = "") -> None:
        """Deliver the completion to the caller's event loop; from any thread."""
        completion = Completion(
            ids=np.asarray(self.ids, np.int32),
            logprobs=np.asarray(self.logprobs, np.float32),
            versions=np.asarray(self.versions, np.int32),
            finish=finish,
            error=error,
            cached_tokens=self.cached,
        )

        def deliver() -> None:
            if not self.future.done():
                self.future.set_result(completion)

        self._call(deliver)

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # its loop has been closed: nobody waits
            self.loop.call_soon_threadsafe(function, *arguments)


def failed(error: str) -> Completion:
    """A completion without tokens, `finish=error`."""
    empty = np.zeros(0, np.int32)
    return Completion(empty, np.zeros(0, np.float32), empty, Finish.ERROR, error)


def cut_at_stop(
    text: Callable[[Sequence[int]], str], ids: Sequence[int], new: int, stops: Sequence[str]
) -> tuple[int | None, str]:
    """Find the first of the last `new` ids that completes a stop string; `text` decodes ids.

    Returns (number of ids to keep, the stop string), or (None, '') when none is complete.
    """
    # An id is at least one byte: of what is older no byte can belong to a stop that ends only now.
    start = max(len(ids) - new - max(len(stop.encode()) for stop in stops), 0)
    whole = text(ids[start:])
    if not any(stop in whole for stop in stops):
        return None, ""
    for count in range(len(ids) - new + 1, len(ids) + 1):
        part = text(ids[start:count])
        found = next((stop for stop in stops if stop in part), None)
        if found is not None:
            return count, found
    return None, ""
