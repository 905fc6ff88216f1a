"""Idle time, lag and memory, measured with clocks and readings that the test controls."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from agentcpm_jax.rollout.policy import SampleRequest, Scripted
from agentcpm_jax.run.observe.meter import (
    RSS_LEAST,
    LoopLag,
    PolicyWatch,
    ResidentMemory,
    robust_slope,
    rss_mib,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Waiting:
    """A policy that answers when told."""

    def __init__(self) -> None:
        self.doors: list[asyncio.Future[None]] = []

    async def sample(self, request: SampleRequest):
        door = asyncio.get_running_loop().create_future()
        self.doors.append(door)
        await door
        return await Scripted(lambda r: [1]).sample(request)


def test_a_pool_is_idle_while_nobody_asks_it() -> None:
    clock, policy = Clock(), Waiting()
    watch = PolicyWatch(policy, clock)
    request = SampleRequest("a/", np.array([1], np.int32), 4)

    async def scenario() -> None:
        clock.now += 2  # idle
        first = asyncio.create_task(watch.sample(request))
        await asyncio.sleep(0)
        clock.now += 3  # one in flight
        second = asyncio.create_task(watch.sample(request))
        await asyncio.sleep(0)
        clock.now += 1  # two
        policy.doors[0].set_result(None)
        await first
        second.cancel()  # a request that ends in any way is no longer in flight
        await asyncio.gather(second, return_exceptions=True)
        clock.now += 4  # idle

    asyncio.run(scenario())
    assert watch.drain() == {"pool/idle": pytest.approx(0.6), "pool/in_flight": pytest.approx(0.5)}
    clock.now += 1
    assert watch.drain() == {"pool/idle": 1.0, "pool/in_flight": 0.0}
    assert watch.drain() == {}


def test_work_that_blocks_the_loop_is_lag() -> None:
    lag = LoopLag(interval=0.001)

    async def scenario() -> None:
        lag.ensure()
        lag.ensure()
        await asyncio.sleep(0.01)
        time.sleep(0.1)  # blocks the loop: what the probe is there to find
        await asyncio.sleep(0.01)

    asyncio.run(scenario())
    found = lag.drain()
    assert found["loop/lag_max_ms"] > 50
    assert found["loop/lag_max_ms"] >= found["loop/lag_mean_ms"] >= 0
    assert lag.drain() == {}


def test_one_jump_does_not_move_the_slope() -> None:
    line = [(float(x), 3.0 + 0.5 * x) for x in range(20)]
    assert robust_slope(line) == pytest.approx(0.5)
    jump = [(x, y + (400.0 if x > 9 else 0.0)) for x, y in line]
    flat = [(x, 400.0 if x == 3 else 1.0) for x, _ in line]
    assert robust_slope(flat) == 0.0
    assert robust_slope(jump[:10]) == pytest.approx(0.5)
    assert robust_slope([]) == robust_slope([(1.0, 5.0)]) == 0.0


def test_memory_has_a_slope_when_there_are_enough_steps() -> None:
    readings = iter(np.arange(100.0, 200.0, 2.0))
    memory = ResidentMemory(lambda: float(next(readings)))
    rows = [memory.drain() for _ in range(RSS_LEAST)]
    assert "memory/rss_slope" not in rows[-2]
    assert rows[-1] == {"memory/rss_mib": 114.0, "memory/rss_slope": pytest.approx(2.0)}


def test_resident_memory_is_that_of_this_process() -> None:
    before = rss_mib()
    held = np.ones(40 * 2**17)  # 40 MiB, written to
    assert 30 < rss_mib() - before < 80 and held.sum() > 0
