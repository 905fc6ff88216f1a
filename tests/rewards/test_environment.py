"""Every way in which the surroundings fail, through the parts that really fail: the sample is
unknown, is tried again, and never enters a baseline."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from agentcpm_jax.rewards import judge
from agentcpm_jax.rewards.denoise import DenoiseConfig, denoise
from agentcpm_jax.rewards.grade import settle
from agentcpm_jax.rewards.judge import JudgeConfig
from agentcpm_jax.rollout.groups import is_known
from agentcpm_jax.rollout.policy import Completion, Finish, SampleRequest
from agentcpm_jax.run.custom import make_reward
from agentcpm_jax.run.sampling import make_run_sample
from agentcpm_jax.types import Task, Trajectory, TrajectoryGroup, Verdict
from agentcpm_jax.world.graph import WorldConfig
from agentcpm_jax.world.tools import SitePages, WorldToolbox, open_toolbox
from tests.doubles.played_endpoint import played
from tests.rollout.scripted_episode import CFG, CHAT, Library, Says

WORLD = WorldConfig()
TASK = Task("What is the capital?", ("Vaduz",), meta={"world": asdict(WORLD)})
CALL = '<tool_call>\n{"name": "search", "arguments": {"query": "x"}}\n</tool_call>'
ANSWER = "<answer>Vaduz</answer>"
NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens


class Broken:
    """An engine that fails."""

    async def sample(self, request: SampleRequest) -> Completion:
        none = np.zeros(0, np.int32)
        return Completion(none, none.astype(np.float32), none, Finish.ERROR, "out of memory")


async def _hang(*_: Any) -> str:
    await asyncio.Event().wait()
    return ""


async def lost_tools(url: str = NOBODY, timeout: float = 5.0) -> Trajectory:
    async def opened(meta: Mapping[str, Any], key: tuple[int, ...]) -> WorldToolbox:
        return WorldToolbox(SitePages(url, timeout), WORLD, key)

    return await make_run_sample(Says(CALL, ANSWER).policy, CHAT, CFG, opened, seed=0)(
        TASK, 1, 2, 0
    )


@pytest.fixture(autouse=True)
def asked_once(monkeypatch):
    monkeypatch.setattr(judge, "RETRIES", 0)


async def slow_tools() -> Trajectory:
    gone = asyncio.Event()

    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        gone.set()

    server = await asyncio.start_server(never, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        trajectory = await lost_tools(f"http://127.0.0.1:{port}", timeout=0.1)
        await gone.wait()
        return trajectory


async def faulty_tools() -> Trajectory:
    faulty = replace(WORLD, tool_fault_rate=1.0, tool_faults=("infra_error",))
    task = replace(TASK, meta={"world": asdict(faulty)})
    run = make_run_sample(Says(CALL, ANSWER).policy, CHAT, CFG, open_toolbox, seed=0)
    return await run(task, 1, 2, 0)


async def broken_engine() -> Trajectory:
    async def opened(meta: Mapping[str, Any], key: tuple[int, ...]) -> Library:
        return Library()

    return await make_run_sample(Broken(), CHAT, CFG, opened, seed=0)(TASK, 1, 2, 0)


async def judged(url: str, **limits: float) -> Trajectory:
    async def opened(meta: Mapping[str, Any], key: tuple[int, ...]) -> Library:
        return Library()

    cfg = replace(JudgeConfig(url, ("m",), None), **limits)
    reward = make_reward("judge", cfg, None)
    policy = Says(ANSWER).policy
    run = make_run_sample(policy, CHAT, CFG, opened, seed=0, reward=reward, deadline=cfg.deadline)
    return await run(TASK, 1, 2, 0)


async def lost_judge() -> Trajectory:
    return await judged(NOBODY)


async def slow_judge() -> Trajectory:
    async with played(_hang) as seen:
        return await judged(seen.url, timeout=0.1)


async def judge_past_its_deadline() -> Trajectory:
    async with played(_hang) as seen:
        return await judged(seen.url, deadline=0.1)


@pytest.mark.parametrize(
    ("failing", "stop", "error"),
    [
        (lost_tools, "infra_error", "ConnectError"),
        (slow_tools, "infra_error", "ReadTimeout"),
        (faulty_tools, "infra_error", "the search server is gone"),
        (broken_engine, "engine_error", "out of memory"),
        (lost_judge, "judge_error", "transport: ConnectError"),
        (slow_judge, "judge_error", "timeout: no reply within 0.1 s"),
        (judge_past_its_deadline, "judge_error", "no verdict within 0.1 s"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_failures_of_the_surroundings_are_noise(failing, stop, error):
    noisy = asyncio.run(failing())
    assert noisy.stop == stop and error in noisy.error
    assert noisy.reward is None and not is_known(noisy)
    known = [
        settle(replace(noisy, stop=s, sample=i), v)
        for i, (s, v) in enumerate(
            [("answered", Verdict.RIGHT), ("answered", Verdict.WRONG)]  # type: ignore[list-item]
        )
    ]
    filters = ("environment", "too_few", "zero_variance")
    group = TrajectoryGroup(1, TASK, (*known, noisy))
    done = denoise(group, DenoiseConfig(filters))
    assert done.keep and done.scores == (1.0, 0.0)
    assert done.counts == {f"environment/{stop}": 1}
