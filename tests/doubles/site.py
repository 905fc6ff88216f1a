"""The offline web as a real HTTP site on the loopback interface (aiohttp, ephemeral port).

Each world has a path prefix: `/<world>/wiki/<title>` is a page, `/<world>/search?q=` answers
`{"titles": [...]}`; everything else is a 404.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from types import TracebackType

from aiohttp import web

from agentcpm_jax.world.graph import WorldConfig
from agentcpm_jax.world.search import SearchIndex, search_index


class Site:
    """`async with Site() as site: url = site.add(cfg)`. Worlds can be added while it runs."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self._host, self._port = host, port
        self._worlds: dict[str, WorldConfig] = {}
        self._runner: web.AppRunner | None = None
        self.url = ""

    def add(self, cfg: WorldConfig) -> str:
        """The URL prefix of a world, without a final slash. Adding twice gives the same prefix."""
        if not self.url:
            raise RuntimeError("the site is not running: use `async with Site() as site`")
        body = json.dumps(asdict(cfg), sort_keys=True)
        name = hashlib.sha256(body.encode()).hexdigest()[:16]
        self._worlds[name] = cfg
        return f"{self.url}/{name}"

    async def __aenter__(self) -> Site:
        app = web.Application()
        app.router.add_get("/{world}/wiki/{title:.+}", self._page)
        app.router.add_get("/{world}/search", self._search)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._port).start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        self._runner, self.url = None, ""

    async def _page(self, request: web.Request) -> web.Response:
        title = request.match_info["title"]
        source = self._index(request).html(title)
        if source is None:
            raise web.HTTPNotFound(text=f"no page titled {title}")
        return web.Response(text=source, content_type="text/html", charset="utf-8")

    async def _search(self, request: web.Request) -> web.Response:
        titles = self._index(request).search(request.query.get("q", ""))
        return web.json_response({"titles": titles})

    def _index(self, request: web.Request) -> SearchIndex:
        cfg = self._worlds.get(request.match_info["world"])
        if cfg is None:
            raise web.HTTPNotFound(text=f"no world {request.match_info['world']}")
        return search_index(cfg)
