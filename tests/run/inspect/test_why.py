"""The page about an issue says what was trained, and nothing on it can act."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from agentcpm_jax.evaluate.report.why import MERGE_ABOVE, render_why
from agentcpm_jax.model.logprobs import token_logprobs
from agentcpm_jax.run.inspect.opened import open_run
from agentcpm_jax.run.inspect.why import gather, token_texts, write_why
from agentcpm_jax.run.learner import make_learner
from agentcpm_jax.types import Provenance, UserError
from tests.run.recorded_run import CFG, EVIL, STEPS, checkpoints, finished

pytestmark = pytest.mark.runs


class Page(HTMLParser):
    """Tags, their attributes, and (classes, detail, text) of every token."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.tokens: list[tuple[list[str], str, str]] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {k: v or "" for k, v in attrs}
        self.tags.add(tag)
        self.attributes |= found.keys()
        if "data-t" in found:
            self.tokens.append((found["class"].split(), found["data-t"], ""))
            self._inside = True

    def handle_data(self, data: str) -> None:
        if self._inside and data != "↵":
            classes, detail, text = self.tokens[-1]
            self.tokens[-1] = (classes, detail, text + data)

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "i"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("why") / "new" / "page.html"
    assert write_why(finished(), 1, out=out) == out
    return out.read_text()


def test_every_token_of_every_sample_is_there_once(page: str) -> None:
    with open_run(finished()) as run:
        group, chat = run.log.load_group(1), run.chat()
    shown = Page(page).tokens
    # A fork's second turn shows no prefix again: what its segment shares is its parent's.
    expected = [
        (t, s, i)
        for t in group.trajectories
        for s in range(len(t.segments))
        for i in range(t.segments[s].shared_prefix_len, len(t.segments[s]))
    ]
    assert len(shown) == len(expected)
    first = [text for _, _, text in shown[: len(group.trajectories[0].segments[0])]]
    original = chat.decode(group.trajectories[0].segments[0].ids)
    assert "".join(first).replace("◌", "") == original.replace("\u202e", "\ufffd")


def test_colours_and_details_are_those_of_the_shipped_credit(page: str) -> None:
    with open_run(finished()) as run:
        shipped = {(s.sample, s.segment_index): s for s in run.log.shipped("rl", 0)}
    tokens = Page(page).tokens
    at = 0
    for sample in range(3):  # those of one segment
        entry = shipped[sample, 0]
        trained = entry.segment.sampled & entry.credit.keep
        for i in range(len(entry.segment)):
            classes, detail, _ = tokens[at]
            at += 1
            who = Provenance(int(entry.segment.provenance[i]))
            assert classes[0] == f"p{int(who)}" and who.name.lower() in detail
            assert ("y" in classes) == bool(trained[i])
            if not entry.segment.sampled[i]:
                assert "not trained" in detail and len(classes) == 1
                continue
            assert f"log-prob {entry.segment.logprob[i]:.4f} " in detail
            assert "version 0 (age 0)" in detail and "g0" in classes
            if trained[i]:
                assert f"advantage {entry.credit.advantage[i]:+.4f}" in detail
            else:  # the malformed call of sample 1 has lost its credit
                assert "NOT trained" in detail and sample == 1
    negative = [c for c, _, _ in tokens if any(x.startswith("am") for x in c)]
    positive = [c for c, _, _ in tokens if {"a1", "a2", "a3"} & set(c)]
    assert negative and positive


def test_current_logprobs_are_those_of_the_newest_checkpoint(page: str) -> None:
    assert f"under the parameters after step {STEPS}" in page
    with open_run(finished()) as run:
        segment = run.log.load_group(1).trajectories[0].segments[0]
        state = make_learner(run.context(), *run.stage()).state
    restored = checkpoints(finished()).restore(abstract_state=state)
    assert restored is not None
    n = len(segment)
    ids, here = jnp.asarray(segment.ids[None]), jnp.arange(n, dtype=jnp.int32)[None]
    where = (ids, here, jnp.ones((1, n), jnp.int32))
    expected = np.asarray(token_logprobs(restored.state.params, CFG.model, *where))[0]
    shown = {
        int(m[1]): float(m[2])
        for _, detail, _ in Page(page).tokens[:n]
        if (m := re.match(r"#(\d+) .* now (-?[\d.]+) ", detail))
    }
    assert sorted(shown) == np.flatnonzero(segment.sampled).tolist()
    for position, value in shown.items():
        assert value == pytest.approx(expected[position], abs=2e-4)


def test_group_baseline_and_decisions(page: str) -> None:
    text = re.sub(r"<[^>]+>", "|", page)
    text = re.sub(r"\s*\|[|\s]*", "|", text)
    # Two of four are right: leave-one-out gives -2/3 and 2/3, scaled by 2.
    assert "|sample 0|answered|wrong|0|0.667|-0.667|-1.33|" in text
    assert "|sample 1|answered|right|1|0.333|0.667|+1.33|" in text
    assert "|format|sample 1, turn 0|note|bad_json|" in text
    assert "|over_age|sample 3|segment 1: version 0, 1 is the oldest allowed|" in text
    assert "trained in step|1|" in text


def test_nothing_on_the_page_can_act(page: str) -> None:
    assert "&lt;script&gt;alert(1)" in page, "the trap must be on the page"
    found = Page(page)
    assert not found.tags & {"script", "img", "link", "iframe", "object", "svg", "a", "form", "b1"}
    assert found.tags <= {
        "html", "head", "meta", "title", "style", "body", "main", "header", "h1", "h2", "p", "dl",
        "div", "dt", "dd", "table", "caption", "thead", "tbody", "tr", "th", "td", "span", "input",
        "label", "i", "s", "details", "summary", "section", "br", "small", "b", "em", "pre",
    }  # fmt: skip
    assert not {a for a in found.attributes if a.startswith("on") or a in ("src", "href")}
    assert "default-src 'none'" in page and "\u202e" not in page and EVIL not in page
    assert not re.search(r"url\(|@import|https?://", page)


def test_one_sample_and_its_default_place(tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished(), tmp_path / "run"))
    shutil.rmtree(run / "rl" / "checkpoints")
    path = write_why(run, 1, sample=2)
    assert path == run / "why-1-2.html"
    text = path.read_text()
    assert 'id="sample-2"' in text and 'id="sample-0"' not in text
    assert "No checkpoint yet" in text and "(ratio " not in text


def test_issues_that_were_not_shipped() -> None:
    with open_run(finished()) as run:
        states = {i.state: i for i in run.log.issues("rl")}
        dropped = gather(run, states["dropped"])
        assert "over_age" in dropped.facts["state"] and dropped.facts["trained in step"] == "none"
        ready = gather(run, states["ready"], sample=0)
        assert "would ship with" in " ".join(ready.notes)
        assert ready.samples[0].segments[0].trained is not None
        with pytest.raises(UserError, match="no finished sample"):
            gather(run, states["issued"])
        with pytest.raises(UserError, match="no sample 9; it has 0, 1, 2, 3"):
            gather(run, states["ready"], sample=9)


def test_characters_of_several_tokens_are_whole() -> None:
    with open_run(finished()) as run:
        chat = run.chat()
    text = "naïve 東京 🙂\n"
    ids = chat.encode_text(text)
    texts = token_texts(chat, ids)
    assert len(texts) == len(ids) and "".join(texts) == text
    assert "" in texts, "the tokenizer has no whole token for some of these"


def test_very_long_pages_merge_what_nobody_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MERGE_ABOVE > 1000
    monkeypatch.setattr("agentcpm_jax.evaluate.report.why.MERGE_ABOVE", 10)
    with open_run(finished()) as run:
        text = render_why(gather(run, run.issue(1), sample=0))
        segment = run.log.load_group(1).trajectories[0].segments[0]
    runs = 1 + int((np.diff(segment.sampled.astype(int)) != 0).sum())
    expected = int(segment.sampled.sum()) + (runs + 1) // 2
    assert len(Page(text).tokens) == expected
    assert "choose one sample" in text
