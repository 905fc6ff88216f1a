from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject

from agentcpm_jax.types import ToolResult, ToolStatus, UserError
from agentcpm_jax.world.graph import WorldConfig
from agentcpm_jax.world.questions import questions
from agentcpm_jax.world.search import search_index
from agentcpm_jax.world.tools import answer_call, call_latency, open_toolbox
from tests.doubles.site import Site
from tests.doubles.virtual_time import run_virtual
from tests.world.flawless import oracle_calls

CFG = WorldConfig(stale=0.2, injections=0.2, distractors=3)
NAME = search_index(CFG).world.entities[0]


def test_schemas_to_the_letter() -> None:
    box = asyncio.run(open_toolbox(_meta(CFG), (0, 0, 0)))
    assert list(box.schemas()) == [
        {
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
        for name, description, argument in (
            ("search", "Find pages.", "query"),
            ("visit", "Read a page.", "title"),
        )
    ]


@pytest.mark.parametrize(
    ("name", "arguments", "status", "words"),
    [
        ("visit", {"title": "No Body"}, ToolStatus.TOOL_ERROR, "no page titled No Body"),
        ("visit", {"title": "x\ud800"}, ToolStatus.TOOL_ERROR, "no page titled x?"),
        ("search", {"query": "zeppelin"}, ToolStatus.OK, "no pages found"),
        ("visit", {"query": NAME}, ToolStatus.BAD_ARGUMENTS, "no argument query, it takes title"),
        ("visit", {}, ToolStatus.BAD_ARGUMENTS, "needs the argument title"),
        ("search", {"query": 7}, ToolStatus.BAD_ARGUMENTS, "query must be a string, not int"),
        ("search", {"query": None}, ToolStatus.BAD_ARGUMENTS, "not NoneType"),
        ("fly", {"to": "Rome"}, ToolStatus.TOOL_ERROR, "no tool named fly, use search or visit"),
    ],
)
def test_failures_are_observations(
    name: str, arguments: dict[str, Any], status: ToolStatus, words: str
) -> None:
    (result,) = _run(CFG, [(name, arguments)])
    assert result.status == status and words in result.content
    plain = answer_call(search_index(CFG), name, arguments)
    assert (plain.status, plain.content) == (result.status, result.content)


def test_http_and_in_process_say_the_same() -> None:
    cfg = replace(CFG, tool_fault_rate=0.2)
    index = search_index(cfg)
    calls = [c for task in questions(index.world, (1, 2, 3), 15) for c in oracle_calls(task)]
    calls += [("visit", {"title": title}) for title in index.titles]
    calls += [("search", {"query": q}) for q in ("", "a&b=c#d", "founder\n", "\ud800", "x" * 9000)]
    odd = (
        "",
        ".",
        "..",
        "../..",
        "a/b",
        "%2e%2e",
        "a?b#c",
        "\x00",
        "\ud800",
        NAME + "\n",
        "é" * 999,
    )
    calls += [("visit", {"title": t}) for t in odd]
    local, remote = _run(cfg, calls), _run(cfg, calls, over_http=True)
    for call, a, b in zip(calls, local, remote, strict=True):
        assert (a.status, a.content) == (b.status, b.content), call
    assert {r.status for r in local} == {"ok", "tool_error", "infra_error"}


@settings(deadline=None, max_examples=5)
@given(st.data())
def test_http_and_in_process_agree_on_any_text(data: DataObject) -> None:
    texts = data.draw(st.lists(st.text(st.characters(codec=None), max_size=20), max_size=25))
    calls = [("visit", {"title": t}) for t in texts] + [("search", {"query": t}) for t in texts]
    local, remote = _run(CFG, calls), _run(CFG, calls, over_http=True)
    assert [(r.status, r.content) for r in local] == [(r.status, r.content) for r in remote]


def test_the_site_serves_pages_search_and_404s_for_many_worlds() -> None:
    other = replace(CFG, split="test")

    async def browse() -> None:
        async with Site() as site, httpx.AsyncClient(trust_env=False) as client:
            url = site.add(CFG)
            assert url != site.add(other) and url == site.add(CFG)
            for cfg in (CFG, other):
                index = search_index(cfg)
                title = index.world.entities[1]
                page = await client.get(f"{site.add(cfg)}/wiki/{title}")
                assert page.text == index.html(title)
                assert page.headers["content-type"] == "text/html; charset=utf-8"
                link = page.text.split('<a href="')[1].split('"')[0]
                assert (await client.get(page.url.join(link))).status_code == 200
                hits = (await client.get(f"{site.add(cfg)}/search", params={"q": title})).json()
                assert hits == {"titles": index.search(title)}
            for path in ("/wiki/No%20Body", "/wiki/", "/nothing"):
                assert (await client.get(url + path)).status_code == 404
            assert (await client.get(f"{site.url}/absent/wiki/{NAME}")).status_code == 404

    asyncio.run(browse())


def test_a_lost_site_is_an_infrastructure_error() -> None:
    async def play() -> ToolResult:
        async with Site() as site:
            box = await open_toolbox(_meta(CFG), (0, 0, 0), url_of=site.add)
        result = await box.call("visit", {"title": NAME})
        await box.close()
        return result

    assert asyncio.run(play()).status == ToolStatus.INFRA_ERROR


def test_faults_are_seeded_by_issue_sample_attempt_and_call() -> None:
    cfg = replace(CFG, tool_fault_rate=0.5)
    calls = [("visit", {"title": NAME})] * 60
    clean = answer_call(search_index(CFG), *calls[0]).content
    first, again = (_kinds(_run(cfg, calls, (3, 1, 0)), clean) for _ in range(2))
    assert first == again
    for other in ((4, 1, 0), (3, 2, 0), (3, 1, 1)):
        assert _kinds(_run(cfg, calls, other), clean) != first
    counts = Counter(first)
    assert set(counts) == {"ok", "tool_error", "infra_error", "truncated"}
    assert 18 <= counts["ok"] <= 42
    assert set(_kinds(_run(CFG, calls), clean)) == {"ok"}


def test_a_retry_can_succeed() -> None:
    cfg = replace(CFG, tool_fault_rate=0.3)
    for issue in range(20):
        statuses = [
            _run(cfg, [("visit", {"title": NAME})], (issue, 0, a))[0].status for a in range(8)
        ]
        assert ToolStatus.OK in statuses


def test_a_task_without_a_world_is_a_user_error() -> None:
    for meta in ({}, {"world": {"sead": 1}}, {"world": None}):
        with pytest.raises(UserError, match="no usable 'world'"):
            asyncio.run(open_toolbox(meta, (0, 0, 0)))


def _run(
    cfg: WorldConfig,
    calls: list[tuple[str, dict[str, Any]]],
    key: tuple[int, ...] = (0, 0, 0),
    over_http: bool = False,
) -> list[ToolResult]:
    async def play() -> list[ToolResult]:
        async with Site() as site:
            opened = functools.partial(open_toolbox, url_of=site.add) if over_http else open_toolbox
            box = await opened(_meta(cfg), key)
            results = [await box.call(name, arguments) for name, arguments in calls]
            await box.close()
            return results

    return asyncio.run(play())


def _kinds(results: list[ToolResult], clean: str) -> list[str]:
    return [
        "truncated" if r.status == "ok" and r.content == clean[: len(clean) // 2] else str(r.status)
        for r in results
    ]


def _meta(cfg: WorldConfig) -> Mapping[str, Any]:
    return {"world": asdict(cfg)}


def test_a_call_takes_its_own_seeded_time_at_every_scale() -> None:
    cfg = replace(CFG, tool_latency=3.0)

    async def play() -> list[float]:
        box, loop, spans = await open_toolbox(_meta(cfg), (5, 1, 0)), asyncio.get_running_loop(), []
        for _ in range(4):
            before = loop.time()
            await box.call("visit", {"title": NAME})
            spans.append(loop.time() - before)
        return spans

    drawn = [call_latency(cfg, (5, 1, 0, call)) for call in range(4)]
    assert run_virtual(play()) == pytest.approx(drawn)
    double = replace(cfg, tool_latency=6.0)
    assert [call_latency(double, (5, 1, 0, call)) for call in range(4)] == pytest.approx(
        [2 * seconds for seconds in drawn]
    )
    logs = np.log([call_latency(cfg, (issue, 0, 0, 0)) for issue in range(4000)])
    assert np.mean(logs) == pytest.approx(np.log(3.0), abs=0.05)
    assert np.std(logs) == pytest.approx(1.0, abs=0.05)
    assert call_latency(CFG, (5, 1, 0, 0)) == 0.0


def test_the_kinds_of_faults_can_be_chosen() -> None:
    cfg = replace(CFG, tool_fault_rate=1.0, tool_faults=("truncated",))
    whole = answer_call(search_index(CFG), "visit", {"title": NAME}).content
    for result in _run(cfg, [("visit", {"title": NAME})] * 5):
        assert (result.status, result.content) == (ToolStatus.OK, whole[: len(whole) // 2])
    from_json = WorldConfig(**asdict(cfg) | {"tool_faults": ["truncated"]})  # type: ignore[arg-type]
    assert from_json == cfg and hash(from_json) == hash(cfg)
    with pytest.raises(UserError, match=r"tool_faults is \('slow',\); use some of tool_error"):
        replace(CFG, tool_faults=("slow",))
