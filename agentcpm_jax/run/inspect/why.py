"""Why was an issue trained as it was? Gathers everything the run knows about it into one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agentcpm_jax.chat.format import ChatFormat
from agentcpm_jax.config import RLStage
from agentcpm_jax.disk import refusals
from agentcpm_jax.evaluate.report.page import Cell, Table
from agentcpm_jax.evaluate.report.why import SampleView, SegmentView, WhyPage, render_why
from agentcpm_jax.files import write_atomically
from agentcpm_jax.log.schema import Issue
from agentcpm_jax.rewards.advantages import estimate
from agentcpm_jax.rewards.denoise import DenoisedGroup, denoise
from agentcpm_jax.run.inspect.current import current_logprobs
from agentcpm_jax.run.inspect.opened import Run, open_run
from agentcpm_jax.run.sampling import make_finish
from agentcpm_jax.types import Credit, Trajectory, TrajectoryGroup, UserError


@dataclass(frozen=True)
class _Credits:
    """Credits by (sample, segment), and for those that were shipped the batch, counted from 0."""

    of: Mapping[tuple[int, int], Credit]
    batch: Mapping[tuple[int, int], int]
    note: str


def write_why(
    workdir: str | Path, issue_id: int, sample: int | None = None, out: str | Path | None = None
) -> Path:
    """Writes the page about an issue (of one sample of it); returns its path.

    `out` defaults to `why-<issue>[-<sample>].html` in the run's directory.

    Raises:
      UserError: no such run, issue or sample; nothing sampled yet.
    """
    with open_run(workdir) as run:
        issue = run.issue(issue_id)
        page = gather(run, issue, sample)
    suffix = "" if sample is None else f"-{sample}"
    path = Path(out) if out is not None else Path(workdir) / f"why-{issue_id}{suffix}.html"
    with refusals(path, "or give another --out"):
        write_atomically(path, render_why(page))
    return path


def gather(run: Run, issue: Issue, sample: int | None = None) -> WhyPage:
    """Everything about an issue; arguments and errors as `write_why`."""
    group = run.log.load_group(issue.issue_id)
    chosen = _chosen(run, issue, group, sample)
    rl = next((s.rl for s in run.cfg.stages if s.name == issue.stage), None)
    clean = denoise(group, rl.denoise) if rl is not None else None
    credits = _credits(run, issue, group, rl)
    segments = [segment for t in chosen for segment in t.segments]
    current, about = current_logprobs(run, issue.stage, segments) if rl else (None, "")
    now = iter(current or [None] * len(segments))
    chat = run.chat()
    notes = _turn_notes(clean)
    views = [
        SampleView(
            trajectory=t,
            segments=[
                _segment_view(chat, t, index, credits, next(now))
                for index in range(len(t.segments))
            ],
            facts=_sample_facts(t, credits),
            turn_notes=notes.get(t.sample, {}),
        )
        for t in chosen
    ]
    state = issue.state + (f" ({issue.reason})" if issue.reason else "")
    batches = sorted(set(credits.batch.values()))
    facts = {
        "issue": str(issue.issue_id),
        "stage": f"{issue.stage} ({issue.kind})",
        "state": state,
        "trained in step": ", ".join(str(b + 1) for b in batches) or "none",
        "epoch": str(issue.epoch),
        "task": f"{issue.task.kind}, {issue.task.uid}",
    }
    answers = ", ".join(issue.task.answers)
    return WhyPage(
        title=f"issue {issue.issue_id} of {run.cfg.name}",
        question=issue.task.question,
        subtitle=f"accepted: {answers}",
        facts=facts,
        tables=[*_group_tables(run, issue, group, clean, rl, credits)],
        samples=views,
        notes=[n for n in (credits.note, about) if n],
    )


def token_texts(chat: ChatFormat, ids: np.ndarray) -> list[str]:
    """The text of each token; where several make up one character, the last one has it."""
    out, pending = [], []
    for token in ids:
        pending.append(int(token))
        text = chat.decode(pending)
        if text.endswith("\ufffd") and len(pending) < 4:  # UTF-8 has no longer characters
            out.append("")
        else:
            out.append(text)
            pending = []
    if pending:  # a character that never ends
        out[-1] = chat.decode(pending)
    return out


def _chosen(
    run: Run, issue: Issue, group: TrajectoryGroup, sample: int | None
) -> Sequence[Trajectory]:
    if not group.trajectories:
        raise UserError(
            f"issue {issue.issue_id} of {run.workdir} is {issue.state} and has no finished sample; "
            "look again later or name another issue"
        )
    if sample is None:
        return group.trajectories
    found = [t for t in group.trajectories if t.sample == sample]
    if not found:
        known = ", ".join(str(t.sample) for t in group.trajectories)
        raise UserError(f"issue {issue.issue_id} has no sample {sample}; it has {known}")
    return found


def _credits(run: Run, issue: Issue, group: TrajectoryGroup, rl: RLStage | None) -> _Credits:
    """The credits that were shipped; of another group, those it would get if shipped now."""
    shipped = run.log.credits(issue.issue_id)
    if shipped:
        of = {key: found.credit for key, found in shipped.items()}
        return _Credits(of, {key: found.step for key, found in shipped.items()}, "")
    if rl is None:
        return _Credits({}, {}, "An evaluation issue: nothing of it is trained.")
    outcome = make_finish(rl.denoise, rl.credit)(group)
    if not outcome.keep:
        why = f"The group was not shipped: {outcome.reason or issue.state}. No token has credit."
        return _Credits({}, {}, why)
    return _Credits(
        outcome.credits, {}, f"The group is {issue.state}: advantages are those it would ship with."
    )


def _segment_view(
    chat: ChatFormat, t: Trajectory, index: int, credits: _Credits, now: np.ndarray | None
) -> SegmentView:
    segment, key = t.segments[index], (t.sample, index)
    credit = credits.of.get(key)
    trained = None
    if credit is not None:  # the first token is never trained: nothing predicts it
        trained = segment.sampled & np.asarray(credit.keep, bool)
        trained[:1] = False
    return SegmentView(
        segment=segment,
        texts=token_texts(chat, segment.ids),
        advantage=None if credit is None else credit.advantage,
        trained=trained,
        current=now,
        step=credits.batch.get(key),
    )


def _sample_facts(t: Trajectory, credits: _Credits) -> dict[str, str]:
    facts = {"answer": t.answer if t.answer is not None else "(none)"}
    if t.error:
        facts["error"] = t.error
    facts["attempt"] = str(t.attempt)
    facts["seconds"] = f"{t.seconds:.2f}"
    steps = sorted({b + 1 for (s, _), b in credits.batch.items() if s == t.sample})
    if steps:
        facts["trained in step"] = ", ".join(map(str, steps))
    return facts


def _group_tables(
    run: Run,
    issue: Issue,
    group: TrajectoryGroup,
    clean: DenoisedGroup | None,
    rl: RLStage | None,
    credits: _Credits,
) -> list[Table]:
    baseline = {t.sample: t for t in clean.baseline} if clean else {}
    scores = {s: float(t.reward) for s, t in baseline.items() if t.reward is not None}
    raw: dict[int, float] = {}
    if rl is not None and scores:
        raw = dict(
            zip(
                scores,
                estimate(list(scores.values()), rl.credit).tolist(),
                strict=True,
            )
        )
    rows: list[tuple[Cell, ...]] = []
    for t in group.trajectories:
        others = [v for s, v in scores.items() if s != t.sample]
        shaped = [_range(c.advantage, c.keep) for (s, _), c in credits.of.items() if s == t.sample]
        kept = sum(int(np.sum(c.keep)) for (s, _), c in credits.of.items() if s == t.sample)
        sampled = sum(int(seg.sampled.sum()) for seg in t.segments)
        oldest, newest = t.versions
        rows.append(
            (
                f"sample {t.sample}",
                str(t.stop),
                str(t.verdict),
                t.reward,
                (float(np.mean(others)) if others else None) if t.sample in scores else "left out",
                raw.get(t.sample),
                "; ".join(filter(None, shaped)) or "none",
                f"{kept} of {sampled}",
                str(oldest) if oldest == newest else f"{oldest} to {newest}",
                t.attempt + 1,
            )
        )
    how = "" if rl is None else f"Estimator: {rl.credit.estimator}. "
    columns = ("sample", "stop", "verdict", "reward", "mean of the others", "raw advantage",
               "token advantage", "tokens trained", "versions", "attempts")  # fmt: skip
    note = how + "Raw: before presets, sign clamp and scale."
    tables = [Table("The group and its baseline", columns, tuple(rows), note)]
    decided = _decision_rows(run, issue, clean)
    if decided:
        columns = ("filter", "about", "action", "reason")
        tables.append(Table("What the filters decided, in order", columns, tuple(decided)))
    return tables


def _decision_rows(
    run: Run, issue: Issue, clean: DenoisedGroup | None
) -> list[tuple[str, str, str, str]]:
    """Decisions of the log; turn and action are those of the filters run again, if they agree."""
    again = list(clean.decisions) if clean else []
    rows = []
    for n, logged in enumerate(run.log.decisions(issue.issue_id)):
        about = "the group" if logged.sample < 0 else f"sample {logged.sample}"
        action = ""
        if n < len(again) and (again[n].sample, again[n].filter, again[n].reason) == (
            logged.sample,
            logged.filter,
            logged.reason,
        ):
            action = again[n].action
            about += f", turn {again[n].turn}" if again[n].turn >= 0 else ""
        rows.append((logged.filter, about, action, logged.reason))
    return rows


def _turn_notes(clean: DenoisedGroup | None) -> dict[int, dict[int, list[str]]]:
    found: dict[int, dict[int, list[str]]] = {}
    for d in clean.decisions if clean else ():
        if d.turn >= 0:
            text = f"{d.filter}: {d.action} ({d.reason})"
            found.setdefault(d.sample, {}).setdefault(d.turn, []).append(text)
    return found


def _range(advantage: np.ndarray, keep: np.ndarray) -> str:
    kept = np.asarray(advantage)[np.asarray(keep, bool)]
    if not len(kept):
        return ""
    low, high = float(kept.min()), float(kept.max())
    return f"{low:+.3g}" if low == high else f"{low:+.3g} to {high:+.3g}"
