"""Every text on a page may come from a stranger: none of it becomes markup, and none is run.

The oracle is the same page with harmless text of the same length in the place of each string: both
have the same elements with the same attributes, in the same order.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from enum import Enum
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from agentcpm_jax.evaluate.passk import Estimate
from agentcpm_jax.evaluate.report.page import ReportData, ScatterChart, Table, render
from agentcpm_jax.evaluate.report.why import SampleView, SegmentView, WhyPage, render_why
from agentcpm_jax.types import (
    Provenance,
    Segment,
    StopReason,
    ToolCall,
    ToolResult,
    ToolStatus,
    Trajectory,
    Turn,
    TurnFlag,
    Verdict,
)
from tests.evaluate.report.test_page import demo

HOSTILE = {
    "script": "<script>alert(1)</script>",
    "image": '<img src=x onerror="alert(1)">',
    "drawing": "<svg/onload=alert(1)><a xlink:href='javascript:alert(1)'>x</a></svg>",
    "double quotes": '" onmouseover="alert(1)" style="background:url(//evil.example)',
    "single quotes": "' onfocus='alert(1)' autofocus tabindex='1",
    "end of style": "</style></title></pre></textarea><script src=//evil.example></script>",
    "comment": "--><!--><script>alert(1)</script><!--",
    "character data": "]]><![CDATA[<script>alert(1)</script>",
    "entities": "&#60;script&#62;alert(1)&lt;/script&gt;&",
    "template": "{{ 7 * 7 }}{% include '/etc/passwd' %}{# x #}${7*7}",
    "redirect": '<meta http-equiv="refresh" content="0;url=//evil.example"><base href=//evil>',
    "links": '[x](javascript:alert(1)) <a href="javascript:alert(1)">y</a>',
    "controls": "\x00\x08\x1b[31m\u202e\u2066\x7f\ud800",
    "long": "<b>" * 50,
}
#: Words that a page reads; once as they are, so that their branches are taken, once as the others.
READ = ("right", "wrong", "unknown", "system", "user", "assistant", "tool", "rl", "sft", "eval")


def changed(value: Any, change: Callable[[str], str]) -> Any:
    """The value with every string in it, keys and fields, changed; words of enumerations stay."""
    if isinstance(value, Enum | np.ndarray | Estimate):
        return value
    if isinstance(value, str):
        return change(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **{k: changed(v, change) for k, v in fields.items()})
    if isinstance(value, Mapping):
        return {changed(k, change): changed(v, change) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(changed(v, change) for v in value)
    return value


class Structure(HTMLParser):
    """Elements with the names of their attributes, in order; links, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, ...]] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.policy = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, *(name for name, _ in attrs)))
        found = dict(attrs)
        self.links += [v or "" for k, v in attrs if k in ("href", "src", "xlink:href", "action")]
        if found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"] or ""

    def handle_endtag(self, tag: str) -> None:
        self.elements.append((f"/{tag}",))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def handle_comment(self, data: str) -> None:
        self.elements.append(("a comment", data))

    def handle_decl(self, decl: str) -> None:
        self.elements.append((decl,))

    def unknown_decl(self, data: str) -> None:
        self.elements.append(("a declaration", data))


def report() -> ReportData:
    points = ((1.0, 2.0, "a"), (2.0, 1.0, "b"))
    chart = ScatterChart("candidates", points, (0, 1), "x", "y", 0, "note")
    data = demo()
    return dataclasses.replace(data, charts=(*data.charts, chart))


def why() -> WhyPage:
    ids = np.arange(12, dtype=np.int32)
    kinds = np.array([Provenance.TEMPLATE] * 4 + [Provenance.SAMPLED] * 6 + [Provenance.TOOL] * 2)
    sampled = kinds == Provenance.SAMPLED
    logprob = np.where(sampled, -0.5, np.nan).astype(np.float32)
    version = np.where(sampled, 3, -1).astype(np.int32)
    segment = Segment(ids, kinds.astype(np.uint8), logprob, version)
    fork = dataclasses.replace(segment, parent_segment=0, shared_prefix_len=4, edit_reason="cut")
    call = ToolCall("search", {"query": "who", "k": [1, "two"]}, span=(5, 7))
    broken = ToolCall("broken", None, "bad_json", "no object", (7, 8))
    result = ToolResult(ToolStatus.OK, "found", 0.1)
    flags = (TurnFlag.FORMAT_ERROR,)
    turns = (
        Turn(0, 0, 4, 10, (call, broken), (result, result), flags),
        Turn(1, 0, 4, 10, (call,), (result,)),
    )
    trajectory = Trajectory(
        (segment, fork), turns, StopReason.ANSWERED, 1, 0, answer="me", verdict=Verdict.RIGHT,
        reward=1.0, error="none",
    )  # fmt: skip
    views = [
        SegmentView(s, [f"t{i}" for i in range(12)], np.ones(12, np.float32), sampled, logprob, 4)
        for s in (segment, fork)
    ]
    sample = SampleView(trajectory, views, {"answer": "me"}, {0: ["muted"]})
    table = Table("decisions", ("filter", "reason"), (("format", "bad"), ("age", 3)), "note")
    return WhyPage("why", "who wrote it?", "of a run", {"stage": "rl"}, [table], [sample], ["note"])


PAGES = {"report": (report, render), "why": (why, render_why)}


@pytest.mark.parametrize("kept", [READ, ()], ids=["words read", "all changed"])
@pytest.mark.parametrize("evil", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("name", PAGES)
def test_hostile_text_in_every_field_is_text(name: str, evil: str, kept: tuple[str, ...]) -> None:
    make, draw = PAGES[name]

    def written(ending: str) -> str:
        return draw(changed(make(), lambda s: s if s in kept else s + ending))

    hostile, harmless = written(evil), Structure(written("x" * len(evil)))
    found = Structure(hostile)
    assert found.elements == harmless.elements
    assert found.links == harmless.links and all(link.startswith("#") for link in found.links)
    assert found.policy.startswith("default-src 'none'; style-src 'unsafe-inline'")
    assert not re.search("[\x00\x08\x1b\u202e\u2066\x7f]", hostile)
    shown = "".join(found.words)
    expected = re.sub("[\x00\x08\x1b\u202e\u2066\x7f]", "\ufffd", evil)
    assert shown.count(expected) > 10, "the traps must be on the page"
    assert shown.count("49") == "".join(harmless.words).count("49")


def test_every_page_has_a_policy_that_forbids_to_run_and_to_load() -> None:
    for make, draw in PAGES.values():
        policy = Structure(draw(make())).policy.split("; ")
        assert policy[0] == "default-src 'none'"
        assert {"base-uri 'none'", "form-action 'none'"} <= set(policy)
        assert not any("script" in part for part in policy)
