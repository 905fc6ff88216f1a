from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from agentcpm_jax.evaluate.passk import Estimate
from agentcpm_jax.evaluate.report.page import (
    BarChart,
    Headline,
    Panel,
    ReportData,
    StageReport,
    Table,
    TrajectoryReport,
    render,
    write_report,
)

EVIL = '<script>alert("x")</script><img src=https://evil.example/p.png onerror="x()">'
VOID = {"meta", "br", "img", "hr", "input", "link"}


def noisy(rng, start: float, end: float, n: int, noise: float) -> list[tuple[int, float]]:
    fall = end + (start - end) * np.exp(-np.linspace(0, 4, n))
    return [(i, float(v)) for i, v in enumerate(fall + rng.normal(0, noise, n))]


def demo() -> ReportData:
    """A report with every part in it, such as a quickstart run might write."""
    rng = np.random.default_rng(0)
    pretrain = StageReport(
        "base",
        "pretrain",
        212.0,
        {
            "loss/train": noisy(rng, 6.2, 1.1, 1500, 0.06),
            "loss/valid": [(i, 1.2 + 5 * math.exp(-i / 250)) for i in range(0, 1500, 100)],
            "optimizer/grad_norm": noisy(rng, 3.0, 0.6, 1500, 0.15),
            "optimizer/lr": [
                (i, 3e-3 * (1 + math.cos(i / 1500 * math.pi)) / 2) for i in range(1500)
            ],
        },
        (Panel("loss", ("loss/train", "loss/valid")),),
        {"steps": 1500, "tokens": 12_288_000, "parameters": 3_412_992},
    )
    rl = StageReport(
        "rl",
        "rl",
        431.0,
        {
            "reward/mean": noisy(rng, 0.42, 0.71, 120, 0.06),
            "reward/solved_all": noisy(rng, 0.1, 0.3, 120, 0.03),
            "reward/solved_none": noisy(rng, 0.3, 0.12, 120, 0.03),
            "loss/policy": noisy(rng, 0.02, 0.0, 120, 0.01),
            "staleness/mean": noisy(rng, 1.2, 1.4, 120, 0.2),
            "staleness/max": [(i, float(rng.integers(1, 5))) for i in range(120)],
            "filters/format_error": noisy(rng, 5, 1, 120, 0.6),
            "filters/zero_variance": noisy(rng, 2, 7, 120, 0.9),
            "filters/truncated": noisy(rng, 2, 0.3, 120, 0.3),
            "rollout/calls_per_task": noisy(rng, 2.4, 3.6, 120, 0.2),
            "loss/kl": [*noisy(rng, 0.0, 0.01, 60, 0.001), (60, math.nan), (61, math.inf)],
            "empty/metric": [],
        },
        (
            Panel("reward", ("reward/mean", "reward/solved_all", "reward/solved_none")),
            Panel("groups filtered per batch", tuple(f"filters/{n}" for n in FILTERS)),
            Panel("staleness (batches)", ("staleness/mean", "staleness/max")),
        ),
        {"batches": 120, "groups": 3840, "dropped": 0.031},
        "Asynchronous: eta = 4, 32 groups of 8 in a batch.",
    )
    systems = ("base", "SFT", "SFT-merge", "RL")

    def estimates(*values: float) -> tuple[Estimate, ...]:
        return tuple(Estimate(v, max(0, v - 0.03), min(1, v + 0.03), 400) for v in values)

    return ReportData(
        title="Quickstart",
        subtitle="A 3.4M-parameter agent learns to search: base, SFT, merge, RL; 2 CPU cores",
        headlines=(
            Headline("RL - SFT-merge, pass@1", "+17.2 points", "95 % [13.9, 20.6], 400 tasks"),
            Headline("general skills kept", "93.1%", "of the base's, after merge and RL"),
            Headline("wall time", "14 min 21 s", "peak memory 3.1 GiB"),
        ),
        charts=(
            BarChart(
                "Held-out entities, 4 samples at temperature 1, 95 % over tasks",
                systems,
                {
                    "pass@1": estimates(0.012, 0.44, 0.412, 0.584),
                    "pass@4": estimates(0.04, 0.63, 0.61, 0.744),
                    "greedy": (*estimates(0.0, 0.46, 0.43), Estimate(math.nan)),
                },
                "400 tasks; error bars: bootstrap over tasks.",
            ),
        ),
        tables=(
            Table(
                "General skills, share right",
                ("skill", *systems),
                (
                    ("recall", *estimates(0.97, 0.71, 0.93, 0.92)),
                    ("sorting", *estimates(0.88, 0.55, 0.84, 0.83)),
                    ("addition", *estimates(0.91, 0.62, 0.85, 0.86)),
                ),
                "Before and after merging.",
                percent=True,
            ),
            Table("Counts", ("what", "n", "yes"), (("groups", 3840, True), ("none", None, False))),
        ),
        stages=(pretrain, StageReport("merge", "merge", 1.3), rl),
        trajectories=(
            TrajectoryReport(
                "In which city was the founder of Orlan Works born?",
                "right",
                1.0,
                (
                    ("system", "You are an agent that searches.\n# Tools\n<tools>search</tools>"),
                    ("user", "In which city was the founder of Orlan Works born?"),
                    (
                        "assistant",
                        "<think>\nFirst the founder, then the city.\n</think>\n\n<tool_call>\n"
                        '{"name": "search", "arguments": {"query": "Orlan Works founder", "k": 3}}'
                        "\n</tool_call>",
                    ),
                    (
                        "user",
                        "<tool_response>\n1. Orlan Works — founded by Mira Tal.\n"
                        + "\n".join(f"{i}. Orlan page {i}" for i in range(2, 90))
                        + "\n</tool_response>",
                    ),
                    ("assistant", '<tool_call>\n{"name": "visit", "arguments": [1\n</tool_call>'),
                    ("tool", EVIL + " \x00\x1b[31m \ud800 \u202ereversed"),
                    ("assistant", "It is <b>Vell</b>.\n<answer>Vell</answer>"),
                ),
                "hop2, 3 turns of thought",
            ),
            TrajectoryReport(EVIL, "wrong", 0.0, (("user", EVIL), ("assistant", EVIL))),
            TrajectoryReport("no verdict", "unknown", None, (("critic", EVIL), ("assistant", ""))),
        ),
        notes=("RL ran with three seeds; this page is seed 0.", EVIL),
        config={"seed": 0, "name": EVIL, "stages": ["base", "sft"], "lr": 3e-4},
    )


FILTERS = ("format_error", "zero_variance", "truncated")


class Page(HTMLParser):
    """Collects tags, attributes, ids and text, and demands that every tag is closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, k, v or "") for k, v in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, k, v or "") for k, v in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render(demo()))


def test_untrusted_text_stays_text(page):
    assert not {"script", "img", "b><", "iframe", "object"} & set(page.tags)
    assert not [a for a in page.attributes if a[1].startswith("on")]
    # in the title of a trajectory, its turns, the notes and the configuration
    assert page.text.count('<script>alert("x")</script>') >= 5
    assert "<b>Vell</b>" in page.text
    assert "\x00" not in page.text and "\x1b" not in page.text and "\u202e" not in page.text


def test_the_page_loads_nothing(page):
    links = [v for _, k, v in page.attributes if k in ("href", "src", "xlink:href", "action")]
    assert links and all(v.startswith("#") for v in links)
    assert not {"link", "base", "form"} & set(page.tags)
    raw = render(demo())
    style = "".join(re.findall(r"<style>(.*?)</style>", raw, re.DOTALL))
    assert style and not re.search(r"url\(|@import|https?:", style)
    csp = [v for t, k, v in page.attributes if t == "meta" and k == "content"]
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    assert policy in csp


def test_everything_is_there(page):
    data = demo()
    for stage in data.stages:
        assert stage.name in page.words or f"{stage.name} ({stage.kind})" in page.words
    labels = [v for t, k, v in page.attributes if t == "svg" and k == "aria-label"]
    panels = [p for s in data.stages for p in s.panels]
    shown = {m for p in panels for m in p.metrics}
    rest = [m for s in data.stages for m in s.series if m not in shown]
    assert labels == [
        *(c.title for c in data.charts),
        *(t for s in data.stages for t in _chart_titles(s)),
    ]
    assert set(rest) <= set(labels)
    for wanted in (
        *("93.0% [90.0, 96.0]", "+17.2 points", "14 min 21 s", "7 min 11 s", "12,288,000"),
        *("no data yet", "n/a", "malformed call", "Orlan page 89", "more characters", "0.0003"),
    ):
        assert wanted in page.text, wanted
    for role in ("system", "user", "assistant", "tool", "critic"):
        assert role in page.words


def _chart_titles(stage: StageReport) -> list[str]:
    named = {m for p in stage.panels for m in p.metrics}
    return [*(p.title for p in stage.panels), *(m for m in stage.series if m not in named)]


def test_contents_lead_to_every_section(page):
    ids = [v for _, k, v in page.attributes if k == "id"]
    assert len(ids) == len(set(ids))
    links = {v[1:] for t, k, v in page.attributes if t == "a" and k == "href"}
    assert links == set(ids)
    assert page.tags.count("section") == len(ids)


def test_only_the_first_trajectory_is_open(page):
    raw = render(demo())
    assert raw.count('<details class="trajectory" open>') == 1
    assert raw.count('<details class="trajectory">') == 2
    assert raw.index('<details class="trajectory" open>') < raw.index('class="trajectory">')


def test_written_atomically_and_deterministically(tmp_path):
    path = tmp_path / "new" / "report.html"
    write_report(path, demo())
    first = path.read_bytes()
    assert first.decode("utf-8").startswith("<!doctype html>")  # the lone surrogate is replaced
    write_report(path, demo())
    assert path.read_bytes() == first
    broken = ReportData("t", tables=(Table("bad", ("a", "b"), ((1,),)),))
    with pytest.raises(ValueError, match="table bad: 1 cells, 2 columns"):
        write_report(path, broken)
    assert path.read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_long_series_do_not_make_heavy_pages():
    series = {f"m/{i}": [(s, math.sin(s / 1e3)) for s in range(50_000)] for i in range(4)}
    assert len(render(ReportData("t", stages=(StageReport("s", "rl", 1.0, series),)))) < 120_000


def test_an_empty_report_is_a_page():
    assert "nothing yet" in Page(render(ReportData("nothing yet"))).text
