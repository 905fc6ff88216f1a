"""What the agent loop needs of a tool server: list the schemas, call a tool, close.

The offline world implements it in-process; AgentDock implements it over REST and MCP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from agentcpm_jax.types import ToolResult


class Toolbox(Protocol):
    """The tools of one episode. A fresh one is opened for every attempt."""

    def schemas(self) -> Sequence[Mapping[str, Any]]:
        """OpenAI function schemas, in the order in which they are shown to the model."""
        ...

    async def call(self, name: str, arguments: Mapping[str, Any]) -> ToolResult:
        """Run one call. Never raises for a failing tool: the status says what happened."""
        ...

    async def close(self) -> None: ...


class OpenToolbox(Protocol):
    """Opens the tools of one attempt; `key` = (issue_id, sample, attempt) seeds injected faults."""

    async def __call__(self, task_meta: Mapping[str, Any], key: tuple[int, ...]) -> Toolbox: ...
