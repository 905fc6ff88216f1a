"""One issue, token by token, as a page: who wrote what, what was trained on it, and why.

Self-contained and without a script: colours switch by radio buttons, details show at the foot of
the window while the pointer rests on a token.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from agentcpm_jax.evaluate.report.page import Table
from agentcpm_jax.evaluate.report.render import render_template
from agentcpm_jax.types import Provenance, Segment, ToolCall, ToolResult, Trajectory, Turn

FOLD_ABOVE = 500  # characters of a prompt or observation that are shown without a fold
MERGE_ABOVE = 40_000  # tokens of a page above which those not sampled are shown in runs
SURPRISE = (0.05, 0.3, 1.0, 2.0, 4.0)  # nats: bounds of the log-prob colours
CHANGE = (0.02, 0.2, 1.0)  # nats: bounds of the colours of log pi now - log pi then


@dataclass(frozen=True)
class SegmentView:
    """A segment with what the trainer knows about its tokens.

    Attributes:
      texts: of each token.
      advantage: f32[T], and trained bool[T]: the credit; None when none was given.
      current: f32[T], log-probabilities under the newest checkpoint; None when there is none.
      step: version of the batch, minus which a token's version is its age; None: not shipped.
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
    notes = [*page.notes]
    if not per_token:
        notes.append(
            f"The page has {tokens:,} tokens: those that were not sampled are shown in runs; "
            "choose one sample to see each token."
        )
    return render_template(
        "why.html.j2",
        title=page.title,
        page=page,
        notes=notes,
        scales=_scales(),
        samples=[_sample(sample, per_token) for sample in page.samples],
        opened=_first_trained(page.samples),
    )


class _Token(NamedTuple):
    """A token, or a run of them: its colours as CSS classes, the details shown below, its text."""

    classes: str
    detail: str
    text: str


class _Step(NamedTuple):
    """A turn, or the tokens after the last turn of a segment, as the template shows it."""

    title: str
    place: str
    blocks: Sequence[tuple[str, Sequence[_Token]]]  # summary of the fold, or ""; its tokens
    fork: str = ""  # where its segment forks from, shown above it
    flags: Sequence[str] = ()
    notes: Sequence[str] = ()
    calls: Sequence[ToolCall] = ()
    results: Sequence[ToolResult] = ()


class _Sample(NamedTuple):
    """A sample as the template shows it."""

    number: int
    verdict: str
    size: str
    facts: Mapping[str, str]
    steps: Sequence[_Step]


def _sample(view: SampleView, per_token: bool) -> _Sample:
    t = view.trajectory
    reward = "no reward" if t.reward is None else f"reward {t.reward:g}"
    steps, segment = [], 0
    for i, turn in enumerate(t.turns):
        fork = _fork(t, turn.segment) if turn.segment != segment else ""
        segment = turn.segment
        notes = view.turn_notes.get(i, ())
        steps.append(_turn(i, turn, view.segments[segment], fork, notes, per_token))
    for index in range(len(view.segments)):
        steps += _tail(view, index, per_token)
    size = f"{t.stop}, {reward}, {len(t.turns)} turns, {t.num_tokens:,} tokens"
    return _Sample(t.sample, str(t.verdict), size, view.facts, steps)


def _fork(t: Trajectory, index: int) -> str:
    if index == 0:
        return "segment 0"
    s = t.segments[index]
    told = f"segment {index} forks from segment {s.parent_segment} after {s.shared_prefix_len}"
    return f"{told} tokens" + (f": {s.edit_reason}" if s.edit_reason else "")


def _turn(
    index: int,
    turn: Turn,
    view: SegmentView,
    fork: str,
    notes: Sequence[str],
    per_token: bool,
) -> _Step:
    shown = _tokens(view, turn.start, turn.sample_start, per_token)
    long = sum(map(len, view.texts[turn.start : turn.sample_start])) > FOLD_ABOVE
    fold = _provenances(view.segment.provenance[turn.start : turn.sample_start]) if long else ""
    said = _tokens(view, turn.sample_start, turn.end, per_token)
    return _Step(
        f"turn {index}",
        f"tokens {turn.start} to {turn.end}",
        [*([(fold, shown)] if shown else []), ("", said)],
        fork,
        [str(flag) for flag in turn.flags],
        notes,
        turn.calls,
        turn.results,
    )


def _tail(view: SampleView, index: int, per_token: bool) -> list[_Step]:
    """The tokens after the last turn of a segment, e.g. the end of a message."""
    start = max((t.end for t in view.trajectory.turns if t.segment == index), default=0)
    segment = view.segments[index]
    rest = _tokens(segment, start, len(segment.texts), per_token)
    place = f"segment {index}, from token {start}"
    return [_Step("after the last turn", place, [("", rest)])] if rest else []


def _tokens(view: SegmentView, start: int, end: int, per_token: bool) -> list[_Token]:
    out: list[_Token] = []
    t = start
    sampled = view.segment.provenance == Provenance.SAMPLED
    while t < end:
        last = t + 1
        if not per_token and not sampled[t]:
            same = view.segment.provenance[t]
            while last < end and view.segment.provenance[last] == same:
                last += 1
        classes = _classes(view, t, bool(sampled[t]))
        detail = _detail(view, t, last, bool(sampled[t]))
        out.append(_Token(classes, detail, "".join(view.texts[t:last])))
        t = last
    return out


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


def _provenances(provenance: np.ndarray) -> str:
    counts = Counter(Provenance(int(p)).name.lower() for p in provenance)
    return "shown: " + ", ".join(f"{n:,} {name}" for name, n in counts.most_common()) + " tokens"


def _first_trained(samples: Sequence[SampleView]) -> int:
    for n, sample in enumerate(samples):
        if any(v.trained is not None and v.trained.any() for v in sample.segments):
            return n
    return 0


def _scales() -> list[tuple[str, list[tuple[str, str]]]]:
    """Each scale's name, and its legend: classes that why.css colours, and their meaning."""
    provenance = [
        *((f"p{int(p)}", p.name.lower()) for p in Provenance if p != Provenance.SAMPLED),
        ("p1 y", "sampled and trained"),
        ("p1 n", "sampled, not trained"),
    ]
    advantage = [("am3", "≤ -0.75"), ("am2", "-0.75 to -0.25"), ("am1", "-0.25 to 0"), ("a0", "0"),
                 ("a1", "0 to 0.25"), ("a2", "0.25 to 0.75"), ("a3", "≥ 0.75")]  # fmt: skip
    change = [
        *((f"cm{i}", f"less likely by {CHANGE[i - 1]:g} nats") for i in (3, 2, 1)),
        ("c0", "same"),
        *((f"c{i}", f"more likely by {CHANGE[i - 1]:g} nats") for i in (1, 2, 3)),
    ]
    age = [("g0", "age 0"), ("g1", "1"), ("g2", "2"), ("g3", "3"), ("g4", "4 or more versions")]
    return [
        ("provenance", provenance),
        ("advantage", advantage),
        ("log-prob", [(f"l{i}", n) for i, n in enumerate(_between("surprise", SURPRISE))]),
        ("change", change),
        ("age", age),
    ]


def _between(what: str, bounds: Sequence[float]) -> list[str]:
    first, last = f"{what} below {bounds[0]:g} nats", f"above {bounds[-1]:g}"
    middle = [f"{a:g} to {b:g}" for a, b in pairwise(bounds)]
    return [first, *middle, last]
