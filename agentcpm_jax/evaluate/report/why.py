"""One issue, token by token, as a page: who wrote what, what was trained on it, and why.

Self-contained and without a script: colours switch by radio buttons, details show at the foot of
the window while the pointer rests on a token. Everything that a model or a tool wrote is escaped.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from agentcpm_jax.evaluate.report.page import STYLE as REPORT_STYLE
from agentcpm_jax.evaluate.report.page import Table, table
from agentcpm_jax.evaluate.report.style import STYLE
from agentcpm_jax.evaluate.report.transcript import escape
from agentcpm_jax.types import Provenance, Segment, Trajectory, Turn

FOLD_ABOVE = 500  # characters of a prompt or observation that are shown without a fold
MERGE_ABOVE = 40_000  # tokens of a page above which what nobody sampled is no longer per token
SCALES = ("provenance", "advantage", "log-prob", "change", "age")
SURPRISE = (0.05, 0.3, 1.0, 2.0, 4.0)  # nats: bounds of the log-prob colours
CHANGE = (0.02, 0.2, 1.0)  # nats: bounds of the colours of log pi now - log pi then


@dataclass(frozen=True)
class SegmentView:
    """A segment with what the trainer knows about its tokens.

    texts: of each token. advantage f32[T] and trained bool[T]: the credit (None: none was given).
    current f32[T]: log-probabilities under the newest checkpoint (None: there is none). step: the
    batch's version, from which ages count (None: not shipped).
    """

    segment: Segment
    texts: Sequence[str]
    advantage: np.ndarray | None = None
    trained: np.ndarray | None = None
    current: np.ndarray | None = None
    step: int | None = None


@dataclass(frozen=True)
class SampleView:
    """One sample. `facts` are shown above its turns; `turn_notes`: turn index -> decisions."""

    trajectory: Trajectory
    segments: Sequence[SegmentView]
    facts: Mapping[str, str] = field(default_factory=dict)
    turn_notes: Mapping[int, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class WhyPage:
    """The whole page: facts of the issue, tables of group and decisions, the samples."""

    title: str
    question: str
    subtitle: str
    facts: Mapping[str, str]
    tables: Sequence[Table]
    samples: Sequence[SampleView]
    notes: Sequence[str] = ()


def render_why(page: WhyPage) -> str:
    """The page as text."""
    tokens = sum(len(v.texts) for s in page.samples for v in s.segments)
    per_token = tokens <= MERGE_ABOVE
    radios = "".join(
        f'<input type="radio" name="scale" id="by-{i}"{" checked" if i == 0 else ""}>'
        f'<label for="by-{i}">{name}</label>'
        for i, name in enumerate(SCALES)
    )
    notes = [*page.notes]
    if not per_token:
        notes.append(
            f"The page has {tokens:,} tokens: what nobody sampled is shown in runs; choose one "
            "sample to see each token."
        )
    listed = "".join(f'<p class="note">{escape(n)}</p>' for n in notes)
    body = "".join(
        _sample(s, per_token, opened=n == _first_trained(page.samples))
        for n, s in enumerate(page.samples)
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(page.title)}</title><style>{REPORT_STYLE}{STYLE}</style></head>"
        f"<body><main><header><h1>{escape(page.question)}</h1>"
        f'<p class="subtitle" dir="auto">{escape(page.subtitle)}</p>{_facts(page.facts)}</header>'
        f"{''.join(map(table, page.tables))}{listed}"
        f'<h2>Tokens</h2><div class="scale"><span>colour by</span>{radios}{_legends()}'
        f'<div class="samples">{body}</div></div></main></body></html>\n'
    )


def _sample(view: SampleView, per_token: bool, opened: bool) -> str:
    t = view.trajectory
    reward = "no reward" if t.reward is None else f"reward {t.reward:g}"
    turns = [
        _turn(i, turn, view.segments[turn.segment], view.turn_notes.get(i, ()), per_token)
        for i, turn in enumerate(t.turns)
    ]
    forks = {
        i: f"segment {i} forks from segment {s.parent_segment} after {s.shared_prefix_len} tokens"
        + (f": {s.edit_reason}" if s.edit_reason else "")
        for i, s in enumerate(t.segments)
        if i
    }
    out, segment = [], 0
    for turn, shown in zip(t.turns, turns, strict=True):
        if turn.segment != segment:
            segment = turn.segment
            out.append(f'<p class="fork">{escape(forks.get(segment, f"segment {segment}"))}</p>')
        out.append(shown)
    out += [_tail(view, index, per_token) for index in range(len(view.segments))]
    verdict = str(t.verdict)
    return (
        f'<details class="sample" id="sample-{t.sample}"{" open" if opened else ""}><summary>'
        f'<span class="verdict {escape(verdict)}">sample {t.sample}: {escape(verdict)}</span>'
        f'<span class="size">{escape(str(t.stop))}, {reward}, {len(t.turns)} turns, '
        f"{t.num_tokens:,} tokens</span></summary>{_facts(view.facts)}{''.join(out)}</details>"
    )


def _turn(index: int, turn: Turn, view: SegmentView, notes: Sequence[str], per_token: bool) -> str:
    shown = _tokens(view, turn.start, turn.sample_start, per_token)
    said = _tokens(view, turn.sample_start, turn.end, per_token)
    count = turn.sample_start - turn.start
    if sum(map(len, view.texts[turn.start : turn.sample_start])) > FOLD_ABOVE:
        what = _provenances(view.segment.provenance[turn.start : turn.sample_start])
        shown = f"<details><summary>{escape(what)}</summary>{_block(shown)}</details>"
    else:
        shown = _block(shown) if count else ""
    marks = [*(f'<span class="flag">{escape(str(f))}</span>' for f in turn.flags)]
    marks += [f'<span class="flag decided">{escape(n)}</span>' for n in notes]
    calls = "".join(
        f'<div class="called{" broken" if c.error else ""}"><b>{escape(c.name or "?")}</b> '
        f"{escape(_arguments(c.arguments))}"
        f"{f' <em>{escape(c.error)}: {escape(c.message)}</em>' if c.error else ''}"
        f"{f' <small>tokens {c.span[0]} to {c.span[1]}</small>' if c.span[0] >= 0 else ''}</div>"
        for c in turn.calls
    )
    results = "".join(
        f'<details class="result {escape(str(r.status))}"><summary>{escape(str(r.status))} '
        f"after {r.seconds:.2g} s: {escape(r.content[:90])}</summary>"
        f'<pre dir="auto">{escape(r.content)}</pre></details>'
        for r in turn.results
    )
    return (
        f'<section class="step"><p class="where">turn {index}<br><small>tokens {turn.start} to '
        f"{turn.end}</small>{''.join(marks)}</p><div>{shown}{_block(said)}{calls}{results}</div>"
        "</section>"
    )


def _tail(view: SampleView, index: int, per_token: bool) -> str:
    """What stands behind the last turn of a segment, e.g. the end of a message."""
    ends = [t.end for t in view.trajectory.turns if t.segment == index]
    segment = view.segments[index]
    start = max(ends, default=0)
    if start >= len(segment.texts):
        return ""
    rest = _tokens(segment, start, len(segment.texts), per_token)
    return (
        f'<section class="step"><p class="where">after the last turn<br><small>segment {index}, '
        f"from token {start}</small></p><div>{_block(rest)}</div></section>"
    )


def _tokens(view: SegmentView, start: int, end: int, per_token: bool) -> str:
    out, t = [], start
    sampled = view.segment.provenance == Provenance.SAMPLED
    while t < end:
        last = t + 1
        if not per_token and not sampled[t]:
            same = view.segment.provenance[t]
            while last < end and view.segment.provenance[last] == same:
                last += 1
        text = "".join(view.texts[t:last])
        classes = _classes(view, t, bool(sampled[t]))
        detail = _detail(view, t, last, bool(sampled[t]))
        out.append(f'<i class="{classes}" data-t="{escape(detail)}">{_visible(text)}</i>')
        t = last
    return "".join(out)


def _classes(view: SegmentView, t: int, sampled: bool) -> str:
    names = [f"p{int(view.segment.provenance[t])}"]
    if not sampled:
        return names[0]
    trained = view.trained is not None and bool(view.trained[t])
    names.append("y" if trained else "n")
    if trained and view.advantage is not None:
        a = float(view.advantage[t])
        size = 0 if a == 0 else 1 if abs(a) < 0.25 else 2 if abs(a) < 0.75 else 3
        names.append(f"a{'m' if a < 0 else ''}{size}")
    then = float(view.segment.logprob[t])
    if math.isfinite(then):
        names.append(f"l{sum(-then > b for b in SURPRISE)}")
        if view.current is not None:
            moved = float(view.current[t]) - then
            names.append(f"c{'m' if moved < 0 else ''}{sum(abs(moved) > b for b in CHANGE)}")
    if view.step is not None:
        names.append(f"g{min(4, max(0, view.step - int(view.segment.version[t])))}")
    return " ".join(names)


def _detail(view: SegmentView, t: int, end: int, sampled: bool) -> str:
    who = Provenance(int(view.segment.provenance[t])).name.lower()
    if end > t + 1:
        return f"#{t} to {end - 1}  {end - t} tokens  {who}, not trained"
    head = f"#{t}  id {int(view.segment.ids[t])}  {who}"
    if not sampled:
        return f"{head}, not trained"
    trained = view.trained is not None and bool(view.trained[t])
    parts = [f"{head}, {'trained' if trained else 'NOT trained'}"]
    then = float(view.segment.logprob[t])
    parts.append(f"log-prob {then:.4f} (p {math.exp(min(then, 0.0)):.3f})")
    if view.current is not None:
        now = float(view.current[t])
        ratio = math.exp(max(-20.0, min(20.0, now - then)))
        parts.append(f"now {now:.4f} (ratio {ratio:.3f})")
    version = int(view.segment.version[t])
    aged = "" if view.step is None else f" (age {view.step - version})"
    parts.append(f"version {version}{aged}")
    if view.advantage is not None and trained:
        parts.append(f"advantage {float(view.advantage[t]):+.4f}")
    return "   ".join(parts)


def _visible(text: str) -> str:
    """Escaped; a token that only begins a character shows as a dotted circle."""
    return escape(text).replace("\n", "<s>↵</s>\n") if text else "<s>◌</s>"


def _block(tokens: str) -> str:
    return f'<div class="tokens" dir="auto">{tokens}</div>'


def _provenances(provenance: np.ndarray) -> str:
    counts = Counter(Provenance(int(p)).name.lower() for p in provenance)
    return "shown: " + ", ".join(f"{n:,} {name}" for name, n in counts.most_common()) + " tokens"


def _arguments(arguments: Mapping[str, object] | None) -> str:
    if arguments is None:
        return "(no arguments could be read)"
    return ", ".join(f"{key} = {value!r}" for key, value in arguments.items())


def _facts(facts: Mapping[str, str]) -> str:
    listed = "".join(
        f'<div><dt>{escape(k)}</dt><dd dir="auto">{escape(v)}</dd></div>' for k, v in facts.items()
    )
    return f'<dl class="facts">{listed}</dl>' if facts else ""


def _first_trained(samples: Sequence[SampleView]) -> int:
    for n, sample in enumerate(samples):
        if any(v.trained is not None and v.trained.any() for v in sample.segments):
            return n
    return 0


def _legends() -> str:
    names = {
        0: [
            *((f"p{int(p)}", p.name.lower()) for p in Provenance if p != Provenance.SAMPLED),
            ("p1 y", "sampled and trained"),
            ("p1 n", "sampled, not trained"),
        ],
        1: [("am3", "≤ -0.75"), ("am2", "-0.75 to -0.25"), ("am1", "-0.25 to 0"), ("a0", "0"),
            ("a1", "0 to 0.25"), ("a2", "0.25 to 0.75"), ("a3", "≥ 0.75")],
        2: [(f"l{i}", n) for i, n in enumerate(_between("surprise", SURPRISE))],
        3: [(f"cm{i}", f"less likely by {CHANGE[i - 1]:g} nats") for i in (3, 2, 1)]
        + [("c0", "same")]
        + [(f"c{i}", f"more likely by {CHANGE[i - 1]:g} nats") for i in (1, 2, 3)],
        4: [("g0", "age 0"), ("g1", "1"), ("g2", "2"), ("g3", "3"), ("g4", "4 or more versions")],
    }  # fmt: skip
    return "".join(
        f'<div class="legend of-{i}">'
        + "".join(f'<i class="{c}">{escape(n)}</i>' for c, n in entries)
        + "</div>"
        for i, entries in names.items()
    )


def _between(what: str, bounds: Sequence[float]) -> list[str]:
    first, last = f"{what} below {bounds[0]:g} nats", f"above {bounds[-1]:g}"
    middle = [f"{a:g} to {b:g}" for a, b in pairwise(bounds)]
    return [first, *middle, last]
