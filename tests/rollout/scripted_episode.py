"""A scripted policy and a toolbox that remembers: what the tests of the episode loop share."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from agentcpm_jax.chat.format import ChatFormat, template_text
from agentcpm_jax.rollout.config import EpisodeConfig
from agentcpm_jax.rollout.episode import run_episode
from agentcpm_jax.rollout.policy import SampleRequest, Scripted, TokenPolicy
from agentcpm_jax.types import (
    Task,
    ToolResult,
    ToolStatus,
    Trajectory,
)
from tests.chat.qwen_style import qwen_style_tokenizer

CHAT = ChatFormat.from_parts(qwen_style_tokenizer(), template_text("qwen3-instruct-2507"))
THINKING = ChatFormat.from_parts(qwen_style_tokenizer(), template_text("qwen3-thinking-2507"))
TASK = Task("What is the capital?", ("Vaduz",))
CFG = EpisodeConfig(system_prompt="Find out.", max_context=20_000, max_new_tokens=500)
ANSWER = "<answer>Vaduz</answer>"
ENGLISH = "no call here"


def search(query: str = "x") -> str:
    return f'<tool_call>\n{{"name": "search", "arguments": {{"query": "{query}"}}}}\n</tool_call>'


class Library:
    """A toolbox that answers from a dict of query -> result and records what it was asked."""

    def __init__(self, results: Mapping[str, ToolResult] | None = None) -> None:
        self.results = results or {}
        self.asked: list[str] = []

    def schemas(self) -> Sequence[Mapping[str, Any]]:
        parameters = {"type": "object", "properties": {"query": {"type": "string"}}}
        function = {"name": "search", "description": "Search the web", "parameters": parameters}
        return [{"type": "function", "function": function}]

    async def call(self, name: str, arguments: Mapping[str, Any]) -> ToolResult:
        self.asked.append(arguments["query"])
        found = ToolResult(ToolStatus.OK, f"about {arguments['query']}")
        return self.results.get(arguments["query"], found)

    async def close(self) -> None: ...


class Says:
    """A scripted policy: turn k says text k (the last one for ever) and <|im_end|>."""

    def __init__(self, *texts: str, end: bool = True) -> None:
        self.requests: list[SampleRequest] = []
        self._texts, self._end = texts, end
        self.policy = Scripted(self._next, version=3)

    def _next(self, request: SampleRequest) -> list[int]:
        text = self._texts[min(len(self.requests), len(self._texts) - 1)]
        self.requests.append(request)
        return list(self._tokens(text)) + [CHAT.im_end_id] * self._end

    def _tokens(self, text: str) -> list[int]:
        """As a policy would sample it: tags are control tokens."""
        return qwen_style_tokenizer().encode(text).ids


def play(
    *texts: str,
    cfg: EpisodeConfig = CFG,
    toolbox: Library | None = None,
    chat: ChatFormat = CHAT,
    policy: TokenPolicy | None = None,
) -> Trajectory:
    return asyncio.run(
        run_episode(
            TASK,
            policy or Says(*texts).policy,
            toolbox or Library(),
            chat,
            cfg,
            issue_id=7,
            sample=1,
            attempt=0,
            seed=11,
        )
    )


def check_consistent(trajectory: Trajectory, cfg: EpisodeConfig = CFG) -> None:
    """What must hold of every trajectory, however it ended."""
    (segment,) = trajectory.segments
    assert len(segment) <= cfg.max_context
    end = 0
    sampled = np.zeros(len(segment), bool)
    for turn in trajectory.turns:
        assert turn.start == end
        assert turn.start <= turn.sample_start <= turn.end
        assert len(turn.results) <= len(turn.calls)
        sampled[turn.sample_start : turn.end] = True
        end = turn.end
        for call in turn.calls:
            assert turn.sample_start <= call.span[0] <= call.span[1] <= turn.end
    assert end == len(segment)
    assert (segment.sampled == sampled).all()
    assert (np.isnan(segment.logprob) == ~sampled).all()
    assert ((segment.version == 3) == sampled).all()
    assert (segment.version[~sampled] == -1).all()
