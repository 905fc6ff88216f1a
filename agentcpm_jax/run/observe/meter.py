"""Metrics of the process while it samples: is the pool idle, does the loop lag, does memory grow?

They depend on the clock; `outcomes.py` has those of what is trained.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from agentcpm_jax.evaluate.runner import RunSample
from agentcpm_jax.rollout.policy import Completion, SampleRequest, TokenPolicy
from agentcpm_jax.types import Task, Trajectory

PROBE_SECONDS = 0.05
RSS_WINDOW = 64  # steps over which the slope is fitted
RSS_LEAST = 8  # steps below which no slope is given


class RolloutMeter:
    """Measures in the rollout thread; the trainer calls `drain` once per step."""

    def __init__(self) -> None:
        self._lag, self._memory = LoopLag(), ResidentMemory()
        self._pool: PolicyWatch | None = None

    def watching_policy(self, policy: TokenPolicy) -> TokenPolicy:
        """`policy`, with its idle time measured here."""
        self._pool = PolicyWatch(policy)
        return self._pool

    def watching(self, run_sample: RunSample) -> RunSample:
        """`run_sample`, with the event loop probed that its episodes run in."""

        async def watched(task: Task, issue_id: int, sample: int, attempt: int) -> Trajectory:
            self.probe()
            return await run_sample(task, issue_id, sample, attempt)

        return watched

    def probe(self) -> None:
        """Probes the event loop of the coroutine that calls this."""
        self._lag.ensure()

    def drain(self) -> dict[str, float]:
        """`pool/*`, `loop/*`, `memory/*` since the last call."""
        values = self._lag.drain() | self._memory.drain()
        return values | (self._pool.drain() if self._pool is not None else {})


class PolicyWatch:
    """Wraps a `TokenPolicy` and measures how long no request is in flight.

    The pool is idle while no request is in flight: admission is closed, or every running episode
    waits for a tool. `clock` returns seconds.
    """

    def __init__(self, policy: TokenPolicy, clock: Callable[[], float] = time.monotonic) -> None:
        self._policy, self._clock = policy, clock
        self._lock = threading.Lock()
        self._in_flight = 0
        self._since = self._started = clock()
        self._idle = self._load = 0.0  # seconds; request-seconds

    async def sample(self, request: SampleRequest) -> Completion:
        """As the wrapped policy's `sample`."""
        self._change(+1)
        try:
            return await self._policy.sample(request)
        finally:
            self._change(-1)

    def drain(self) -> dict[str, float]:
        """`pool/idle` (share of the time since the last call), `pool/in_flight` (mean requests)."""
        self._change(0)
        with self._lock:
            span = self._since - self._started
            idle, load = self._idle, self._load
            self._idle = self._load = 0.0
            self._started = self._since
        return {"pool/idle": idle / span, "pool/in_flight": load / span} if span > 0 else {}

    def _change(self, by: int) -> None:
        with self._lock:
            now = self._clock()
            passed = now - self._since
            self._idle += 0.0 if self._in_flight else passed
            self._load += passed * self._in_flight
            self._since = now
            self._in_flight += by


class LoopLag:
    """Sleeps repeatedly in an event loop and measures by how much it oversleeps."""

    def __init__(self, interval: float = PROBE_SECONDS) -> None:
        self._interval = interval
        self._task: asyncio.Task[None] | None = None
        self._lock = threading.Lock()
        self._lags: list[float] = []

    def ensure(self) -> None:
        """Starts the probe in the running loop, once; it ends with the loop."""
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._probe())

    def drain(self) -> dict[str, float]:
        """`loop/lag_mean_ms` and `loop/lag_max_ms` since the last call; nothing without probes."""
        with self._lock:
            lags, self._lags = self._lags, []
        if not lags:
            return {}
        return {
            "loop/lag_mean_ms": 1e3 * float(np.mean(lags)),
            "loop/lag_max_ms": 1e3 * max(lags),
        }

    async def _probe(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + self._interval
            await asyncio.sleep(self._interval)
            with self._lock:
                self._lags.append(max(0.0, loop.time() - due))


class ResidentMemory:
    """Resident memory of this process and its trend; `read` returns MiB."""

    def __init__(self, read: Callable[[], float] | None = None) -> None:
        self._read = read or rss_mib
        self._seen: deque[tuple[int, float]] = deque(maxlen=RSS_WINDOW)

    def drain(self) -> dict[str, float]:
        """`memory/rss_mib`; `memory/rss_slope` (MiB per call) once there are enough calls."""
        now = self._read()
        count = self._seen[-1][0] + 1 if self._seen else 0
        self._seen.append((count, now))
        found = {"memory/rss_mib": now}
        if len(self._seen) >= RSS_LEAST:
            found["memory/rss_slope"] = robust_slope(list(self._seen))
        return found


def rss_mib() -> float:
    """Resident set size of this process in MiB; where /proc is missing, its peak."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (OSError, ValueError, IndexError):
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)


def robust_slope(points: Sequence[tuple[float, float]]) -> float:
    """The median of all pairwise slopes (Theil 1950, Sen 1968); 0 for fewer than two points.

    One jump, e.g. a compilation, does not move it.
    """
    x, y = np.asarray(points, np.float64).reshape(-1, 2).T
    i, j = np.triu_indices(len(x), 1)
    different = x[i] != x[j]
    slopes = (y[j] - y[i])[different] / (x[j] - x[i])[different]
    return float(np.median(slopes)) if len(slopes) else 0.0
