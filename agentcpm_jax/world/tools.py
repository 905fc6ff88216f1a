"""The world's tools: `search` and `visit`, in-process or through the HTTP site, with seeded faults
and latencies.

`WorldToolbox` is a `dock.protocol.Toolbox`; `open_toolbox` is an `OpenToolbox`. Both back ends give
the same statuses and texts.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Protocol
from urllib.parse import quote

from agentcpm_jax.types import ToolResult, ToolStatus, UserError
from agentcpm_jax.world.graph import WorldConfig
from agentcpm_jax.world.pages import page_text
from agentcpm_jax.world.search import SearchIndex, search_index

#: The one argument of each tool.
ARGUMENT = {"search": "query", "visit": "title"}
#: Longer titles and queries are cut: they name no page, and no URL should carry them.
MAX_ARGUMENT_CHARS = 300


def _schema(name: str, description: str) -> dict[str, Any]:
    argument = ARGUMENT[name]
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {argument: {"type": "string"}},
                "required": [argument],
            },
        },
    }


SCHEMAS: tuple[dict[str, Any], ...] = (
    _schema("search", "Find pages."),
    _schema("visit", "Read a page."),
)


class Pages(Protocol):
    """Source of titles and pages; `OSError` and `httpx.HTTPError` mean that it is lost."""

    async def search(self, query: str) -> list[str]: ...

    async def html(self, title: str) -> str | None: ...

    async def close(self) -> None: ...


class WorldToolbox:
    """The tools of one attempt. `key` = (issue_id, sample, attempt) seeds faults and latencies."""

    def __init__(self, pages: Pages, cfg: WorldConfig, key: tuple[int, ...] = ()) -> None:
        self._pages, self._cfg, self._key = pages, cfg, key
        self._calls = 0

    def schemas(self) -> Sequence[Mapping[str, Any]]:
        return SCHEMAS

    async def call(self, name: str, arguments: Mapping[str, Any]) -> ToolResult:
        """Run one call. Calls are numbered in the order in which they arrive."""
        start = time.perf_counter()
        key = (*self._key, self._calls)
        fault, latency = _fault(self._cfg, key), call_latency(self._cfg, key)
        self._calls += 1
        if latency:
            await asyncio.sleep(latency)
        status, content = await self._answer(name, arguments, fault)
        return ToolResult(status, content, time.perf_counter() - start)

    async def close(self) -> None:
        await self._pages.close()

    async def _answer(
        self, name: str, arguments: Mapping[str, Any], fault: str
    ) -> tuple[ToolStatus, str]:
        if (refused := check_arguments(name, arguments)) is not None:
            return refused
        if fault == "infra_error":
            return ToolStatus.INFRA_ERROR, f"the {name} server is gone"
        if fault == "tool_error":
            return ToolStatus.TOOL_ERROR, f"{name} failed, try again"
        import httpx  # here: the config tree imports this module and must not load a client

        value = _clean(arguments[ARGUMENT[name]])
        try:
            if name == "search":
                status, content = found(await self._pages.search(value))
            else:
                status, content = read(value, await self._pages.html(value))
        except (OSError, httpx.HTTPError) as error:
            return ToolStatus.INFRA_ERROR, f"{name}: {type(error).__name__}: {error}"
        if fault == "truncated":
            content = content[: len(content) // 2]
        return status, content


async def open_toolbox(
    task_meta: Mapping[str, Any],
    key: tuple[int, ...],
    *,
    url_of: Callable[[WorldConfig], str] | None = None,
) -> WorldToolbox:
    """The tools for a task whose meta carries its world: `{"world": asdict(WorldConfig)}`.

    Worlds are cached by config. `functools.partial(open_toolbox, url_of=site.add)` reads the same
    pages through a running site. Raises `UserError` when the task carries no world.
    """
    cfg = config_of(task_meta)
    pages = SitePages(url_of(cfg)) if url_of else LocalPages(search_index(cfg))
    return WorldToolbox(pages, cfg, tuple(key))


def config_of(task_meta: Mapping[str, Any]) -> WorldConfig:
    """The world that a task was made in."""
    try:
        return WorldConfig(**task_meta["world"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"task meta {dict(task_meta)!r:.200} has no usable 'world' ({error}); "
            "world tools need tasks made by agentcpm_jax.world.questions"
        ) from None


def answer_call(index: SearchIndex, name: str, arguments: Mapping[str, Any]) -> ToolResult:
    """Run a tool as a plain function, without faults or an event loop."""
    if (refused := check_arguments(name, arguments)) is not None:
        return ToolResult(*refused)
    value = _clean(arguments[ARGUMENT[name]])
    if name == "search":
        return ToolResult(*found(index.search(value)))
    return ToolResult(*read(value, index.html(value)))


def check_arguments(name: str, arguments: Mapping[str, Any]) -> tuple[ToolStatus, str] | None:
    """None when the call fits its schema, else status and message for the model."""
    if name not in ARGUMENT:
        return ToolStatus.TOOL_ERROR, f"no tool named {_clean(name)}, use {' or '.join(ARGUMENT)}"
    argument = ARGUMENT[name]
    for given in arguments:
        if given != argument:
            return (
                ToolStatus.BAD_ARGUMENTS,
                f"{name} has no argument {_clean(str(given))}, it takes {argument}",
            )
    if argument not in arguments:
        return ToolStatus.BAD_ARGUMENTS, f"{name} needs the argument {argument}"
    if not isinstance(arguments[argument], str):
        kind = type(arguments[argument]).__name__
        return ToolStatus.BAD_ARGUMENTS, f"{name}: {argument} must be a string, not {kind}"
    return None


def found(titles: Sequence[str]) -> tuple[ToolStatus, str]:
    """The result of a `search` that found `titles`."""
    return ToolStatus.OK, "\n".join(titles) if titles else "no pages found"


def read(title: str, source: str | None) -> tuple[ToolStatus, str]:
    """The result of a `visit`; source: HTML, None without such a page."""
    if source is None:
        return ToolStatus.TOOL_ERROR, f"no page titled {title}"
    return ToolStatus.OK, page_text(source)


class LocalPages:
    """Reads the world in this process."""

    def __init__(self, index: SearchIndex) -> None:
        self._index = index

    async def search(self, query: str) -> list[str]:
        return self._index.search(query)

    async def html(self, title: str) -> str | None:
        return self._index.html(title)

    async def close(self) -> None:
        """Nothing to release: the world stays in the cache."""


class SitePages:
    """Reads the world over HTTP. `url` is the world's prefix on the site, without a final slash."""

    def __init__(self, url: str, timeout_s: float = 30.0) -> None:
        import httpx

        self._url = url
        # trust_env=False: a proxy of the environment must not see loopback traffic
        self._client = httpx.AsyncClient(timeout=timeout_s, trust_env=False, verify=False)

    async def search(self, query: str) -> list[str]:
        reply = await self._client.get(f"{self._url}/search?q={quote(query, safe='')}")
        reply.raise_for_status()
        return list(reply.json()["titles"])

    async def html(self, title: str) -> str | None:
        reply = await self._client.get(f"{self._url}/wiki/{quote(title, safe='')}")
        if reply.status_code == HTTPStatus.NOT_FOUND:
            return None
        reply.raise_for_status()
        return reply.text

    async def close(self) -> None:
        await self._client.aclose()


def call_latency(cfg: WorldConfig, key: tuple[int, ...]) -> float:
    """Injected latency (s) of the call `key` = (issue_id, sample, attempt, call).

    Proportional to `cfg.tool_latency`: a call has the same draw at every scale.
    """
    if not cfg.tool_latency:
        return 0.0
    rng = random.Random(f"latency/{cfg.key}/{key}")
    return cfg.tool_latency * rng.lognormvariate(0.0, cfg.tool_latency_sigma)


def _clean(text: str) -> str:
    """Untrusted text made short and encodable (a lone surrogate becomes `?`)."""
    return text[:MAX_ARGUMENT_CHARS].encode("utf-8", "replace").decode("utf-8")


def _fault(cfg: WorldConfig, key: tuple[int, ...]) -> str:
    """The fault injected into this call, or "". The attempt is in the key: a retry may succeed."""
    if not cfg.tool_fault_rate:
        return ""
    rng = random.Random(f"fault/{cfg.key}/{key}")
    if rng.random() >= cfg.tool_fault_rate:
        return ""
    return rng.choice(cfg.tool_faults)
