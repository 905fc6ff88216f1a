"""From a workdir to its report: `summary.json` for programs, `report.html` for people."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from agentcpm_jax.config import EvalStage, Stage, to_json
from agentcpm_jax.disk import read_state
from agentcpm_jax.evaluate.passk import (
    Estimate,
    TaskScore,
    by_kind,
    clopper_pearson,
    estimate,
    mean_at_k,
    paired_difference,
    pass_at_k,
    pass_hat_k,
    per_task,
)
from agentcpm_jax.evaluate.report.formats import format_estimate
from agentcpm_jax.evaluate.report.page import (
    BarChart,
    Cell,
    Headline,
    Panel,
    ReportData,
    ScatterChart,
    StageReport,
    Table,
    TrajectoryReport,
    write_report,
)
from agentcpm_jax.files import write_atomically
from agentcpm_jax.run.context import RunContext
from agentcpm_jax.run.evaluation import DECISIONS, DECODINGS, results_file
from agentcpm_jax.run.observe import health
from agentcpm_jax.run.observe.dataset import data_tables
from agentcpm_jax.run.observe.metrics import series
from agentcpm_jax.types import Trajectory

PANELS = {
    "rl": (
        Panel("Reward of the trained batches", ("reward/mean", "reward/hop1", "reward/hop2")),
        Panel("Staleness of shipped segments (versions)", ("stale/age_mean", "stale/age_max")),
        Panel("Loss", ("train/loss",)),
        Panel("Entropy (nats per token)", ("train/entropy",)),
        Panel("Gradient norm", ("train/grad_norm",)),
        Panel(
            "Mismatch to the sampling policy (nats)", ("loss/kl_behavior_k1", "loss/kl_behavior_k3")
        ),
        Panel("Episode length", ("episode/turns",)),
        Panel(
            "Seconds per step, and waiting for rollouts",
            ("time/step_seconds", "time/waited_seconds"),
        ),
        *health.PANELS,
    ),
    "sft": (Panel("Loss", ("train/loss",)), Panel("Learning rate", ("train/lr",), smooth=False)),
}
EXAMPLES_PER_MODEL = 2
AT_K = {"mean@k": mean_at_k, "pass@k": pass_at_k, "pass^k": pass_hat_k}


def write_summary(ctx: RunContext, announce: Callable[[str], None]) -> Path:
    """Write both files and announce the results; returns the report's path."""
    evaluated = [
        (s, s.eval, model_results(ctx.directory(s), s.eval)) for s in ctx.cfg.stages if s.eval
    ]
    summary = {s.name: summarize(models, spec.k) for s, spec, models in evaluated}
    text = json.dumps(summary, indent=1, allow_nan=False)
    write_atomically(ctx.workdir / "summary.json", text + "\n")
    for models in summary.values():
        for line in result_lines(models):
            announce(line)
    charts: list[BarChart | ScatterChart] = []
    tables: list[Table] = []
    headlines: list[Headline] = []
    for _, spec, models in evaluated:
        headlines += _headlines(models)
        charts += _charts(models)
        tables += _tables(models, spec.k)
    tables += [table for s in ctx.cfg.stages for table in data_tables(ctx.directory(s))]
    charts += [c for s in ctx.cfg.stages if s.merge for c in search_charts(ctx.directory(s))]
    for stage in (s for s in ctx.cfg.stages if s.rl):
        headlines += health.staleness_headline(ctx, stage)
        charts += health.staleness_chart(ctx, stage)
        tables += [*health.advice_table(ctx, stage), *_filter_tables(ctx, stage)]
    path = ctx.workdir / "report.html"
    write_report(
        path,
        ReportData(
            title=f"agentcpm_jax: {ctx.cfg.name}",
            subtitle=" → ".join(s.name for s in ctx.cfg.stages) + f", seed {ctx.cfg.seed}",
            headlines=tuple(headlines),
            charts=tuple(charts),
            tables=tuple(tables),
            stages=tuple(_stage_report(ctx, s) for s in ctx.cfg.stages),
            trajectories=tuple(e for s in ctx.cfg.stages for e in example_trajectories(ctx, s)),
            notes=(
                "Intervals are 95 %: exact binomial ones (Clopper-Pearson) for one sample per task "
                "and for skills, bootstrap over tasks for several samples and for differences.",
                "Sampled = temperature 1; greedy = temperature 0, one sample per task.",
                "Decisions are teacher-forced on flawless episodes of held-out worlds.",
            ),
            config=to_json(ctx.cfg),
        ),
    )
    return path


def model_results(directory: Path, spec: EvalStage) -> dict[str, dict[str, Any]]:
    """model name -> its results, in the order of the stage; sweep points (`merge@0.5`) follow."""
    names = {results_file(model): model for model in spec.models}
    found = {names.get(p.name, p.stem): p for p in sorted(directory.glob("*.json"))}
    order = [m for m in spec.models if m in found]
    order += [m for m in found if _swept(m) and m not in order]
    return {name: _stored(found[name], ()) for name in order}


def _stored(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    done = path.parent / "DONE"
    fix = f"remove it and DONE (rm {path} {done}), and the same command makes it again"
    return read_state(path, keys, fix)


def _swept(name: str) -> bool:
    """Whether a model is a point of a merge's sweep, and not a revision of a repository."""
    return "@" in name and "/" not in name


def scores_of(result: Mapping[str, Any], decode: str) -> list[TaskScore]:
    """The task scores of one model and decoding ('sampled' or 'greedy')."""
    return [TaskScore(**row) for row in result.get(decode, [])]


def general_skill(result: Mapping[str, Any]) -> Estimate:
    """Share of the documents of all skills, equally many of each, that were completed rightly."""
    right = [ok for skill in result["skills"].values() for ok in skill]
    asked = result.get("documents", len(right))
    return replace(clopper_pearson(sum(right), len(right)), asked=asked)


def summarize(models: Mapping[str, Mapping[str, Any]], ks: Sequence[int]) -> dict[str, Any]:
    """Every number of the report that a claim may rest on; null where there is none.

    An estimate has the number of `tasks` it is over and of those that were `asked`; of samples
    there are those with a verdict and those asked.
    """
    out: dict[str, Any] = {}
    for name, result in models.items():
        row: dict[str, Any] = {
            "skills": {k: float(np.mean(v)) if v else None for k, v in result["skills"].items()}
        }
        row["general"] = _row(general_skill(result))
        for decode in DECODINGS:
            scores = scores_of(result, decode)
            if scores:
                graded, unknown = (sum(getattr(s, key) for s in scores) for key in ("n", "unknown"))
                row[decode] = _row(estimate(scores, 1, mean_at_k))
                row[decode] |= {"samples": graded, "samples_asked": graded + unknown}
                row[f"{decode}_by_kind"] = {
                    kind: _row(estimate(some, 1, mean_at_k))
                    for kind, some in by_kind(scores).items()
                }
        if sampled := scores_of(result, "sampled"):
            row["sampled_at_k"] = {
                name.replace("k", str(k)): _row(estimate(sampled, k, metric))
                for k in ks
                for name, metric in AT_K.items()
            }
        if "decisions" in result:
            row["decisions"] = {k: r / n for k, (r, n) in result["decisions"].items() if n}
        out[name] = row
    for a, b in differences(list(models)):
        for decode in DECODINGS:
            left, right = (scores_of(models[m], decode) for m in (a, b))
            if left and right:
                paired = paired_difference(per_task(left), per_task(right))
                out[f"{a} - {b} ({decode})"] = _row(paired)
    return out


def _row(value: Estimate) -> dict[str, Any]:
    """As JSON, which knows no NaN."""
    return {k: v if math.isfinite(v) else None for k, v in asdict(value).items()}


def result_lines(models: Mapping[str, Any]) -> list[str]:
    """The summary of an eval stage as a table for the terminal, in percent; below it what is a mean
    over fewer tasks or samples than were asked."""
    columns = ("sampled", "greedy", "general", *DECISIONS)
    lines = [" ".join(["model".ljust(10), *(c.rjust(9) for c in columns)])]
    for name, row in models.items():
        if "skills" not in row:  # a difference between two models
            continue
        values = [row.get(c, {}).get("value") for c in columns[:3]]
        values += [row.get("decisions", {}).get(c) for c in DECISIONS]
        cells = ["-" if v is None else f"{100 * v:.1f}" for v in values]
        lines.append(" ".join([name.ljust(10), *(c.rjust(9) for c in cells)]))
    return lines + [line for name, row in models.items() for line in _fewer(name, row)]


def _fewer(name: str, row: Mapping[str, Any]) -> list[str]:
    """A line for each figure of a model that stands on less than was asked."""
    lines = []
    for decode in DECODINGS:
        found = row.get(decode, {})
        if found and not found["tasks"]:
            lines.append(f"{name}, {decode}: no graded task (0 of {found['asked']})")
        elif found and found["samples"] < found["samples_asked"]:
            lines.append(
                f"{name}, {decode}: {found['tasks']} of {found['asked']} tasks, {found['samples']} "
                f"of {found['samples_asked']} samples have a verdict; the figure is over these"
            )
    general = row.get("general", {})
    if general and general["tasks"] < general["asked"]:
        lines.append(f"{name}, general: {general['tasks']} of {general['asked']} documents")
    return lines


def differences(names: Sequence[str]) -> list[tuple[str, str]]:
    """Each model against the one before it, leaving out sweep points."""
    plain = [n for n in names if not _swept(n)]
    return list(zip(plain[1:], plain[:-1], strict=True))


def _headlines(models: Mapping[str, Mapping[str, Any]]) -> list[Headline]:
    out = []
    for a, b in differences(list(models))[-1:]:
        for decode in DECODINGS:
            left, right = (scores_of(models[m], decode) for m in (a, b))
            paired = paired_difference(per_task(left), per_task(right))
            out.append(
                Headline(
                    f"{a} against {b}, {decode}",
                    f"{100 * paired.value:+.1f} points",
                    f"95 % interval {100 * paired.low:+.1f} to {100 * paired.high:+.1f}, "
                    f"{_tasks(paired)}",
                )
                if paired.tasks
                else Headline(f"{a} against {b}, {decode}", "no graded task", _tasks(paired))
            )
    plain = [n for n in models if not _swept(n)]
    if len(plain) > 1:
        first, last = (general_skill(models[n]) for n in (plain[0], plain[-1]))
        out.append(
            Headline(
                f"general skill of {plain[0]} that {plain[-1]} keeps",
                f"{100 * last.value / first.value:.0f} %"
                if first.value > 0 and last.tasks
                else "n/a",
                f"{format_estimate(first, percent=True)} before, "
                f"{format_estimate(last, percent=True)} after",
            )
        )
    return out


def _tasks(value: Estimate) -> str:
    asked = f" of {value.asked}" if value.tasks < value.asked else ""
    return f"{value.tasks}{asked} held-out tasks"


def _charts(models: Mapping[str, Mapping[str, Any]]) -> list[BarChart]:
    plain = {n: r for n, r in models.items() if not _swept(n)}
    charts = []
    for decode in DECODINGS:
        kinds = sorted({s.kind for r in plain.values() for s in scores_of(r, decode)})
        columns = {
            kind: [
                estimate([s for s in scores_of(r, decode) if s.kind == kind], 1, mean_at_k)
                for r in plain.values()
            ]
            for kind in kinds
        }
        fewer = [line for n, r in plain.items() for line in _fewer_of(n, scores_of(r, decode))]
        note = f"Over fewer tasks than were asked: {', '.join(fewer)}." if fewer else ""
        charts.append(BarChart(f"Held-out accuracy, {decode}", tuple(plain), columns, note))
    skills = {
        kind: [
            clopper_pearson(sum(r["skills"][kind]), len(r["skills"][kind])) for r in plain.values()
        ]
        for kind in next(iter(plain.values()))["skills"]
    }
    charts.append(BarChart("General skills, greedy", tuple(plain), skills))
    return charts


def _fewer_of(name: str, scores: Sequence[TaskScore]) -> list[str]:
    graded = sum(s.n > 0 for s in scores)
    return [f"{name} {graded} of {len(scores)}"] if graded < len(scores) else []


def search_charts(directory: Path) -> list[ScatterChart]:
    """What a merge stage's searches measured, as agent skill over general skill."""
    charts = []
    for kind in ("search", "soup"):
        path = directory / f"{kind}.json"
        if path.exists():
            content = _stored(path, ("points", "method", "chosen"))
            points, scores = content["points"], ("agent", "general", "pareto")
            labels = [
                ", ".join(f"{k} {v:g}" for k, v in p.items() if k not in scores) for p in points
            ]
            charts.append(
                ScatterChart(
                    f"{directory.name} {kind}: {content['method']}, validation questions",
                    tuple(
                        (100 * p["general"], 100 * p["agent"], label)
                        for p, label in zip(points, labels, strict=True)
                    ),
                    tuple(i for i, p in enumerate(points) if p["pareto"]),
                    "general skill, %",
                    "agent skill, greedy, %",
                    content["chosen"],
                    "The line joins what no other candidate beats on both; the ring is the choice.",
                )
            )
    return charts


def _tables(models: Mapping[str, Mapping[str, Any]], ks: Sequence[int]) -> list[Table]:
    plain = {n: r for n, r in models.items() if not _swept(n)}
    tables = [
        attempts_table(plain, ks),
        Table(
            "What an episode is made of: accuracy of each decision",
            ("model", *DECISIONS),
            tuple(
                (n, *(right / of if of else math.nan for right, of in r["decisions"].values()))
                for n, r in plain.items()
            ),
            percent=True,
        ),
    ]
    if len(plain) < len(models):
        base = general_skill(next(iter(models.values()))).value
        tables.append(
            Table(
                "Merging: what each share of the specialist keeps",
                ("model", "agent, greedy", "general skill", "of the first model's"),
                tuple(
                    (
                        n,
                        estimate(scores_of(r, "greedy"), 1, mean_at_k),
                        general_skill(r),
                        general_skill(r).value / base if base else math.nan,
                    )
                    for n, r in models.items()
                ),
                percent=True,
            )
        )
    return tables


def attempts_table(models: Mapping[str, Mapping[str, Any]], ks: Sequence[int]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for name, result in models.items():
        scores = scores_of(result, "sampled")
        for k in ks:
            values = [estimate(scores, k, metric) for metric in AT_K.values()]
            first = values[0]
            fewer = first.tasks < first.asked
            tasks = f"{first.tasks} of {first.asked}" if fewer else first.tasks
            rows.append((name, k, tasks, *(replace(v, asked=0) for v in values)))
    return Table(
        "Several attempts at a task, temperature 1",
        ("model", "k", "tasks", *AT_K),
        tuple(rows),
        "Of k attempts, mean@k is the share that is right, pass@k the chance that at least one is, "
        "pass^k that all are; of the tasks with at least k graded samples.",
        percent=True,
    )


def _filter_tables(ctx: RunContext, stage: Stage) -> list[Table]:
    counts = ctx.log.counts(stage.name)
    rows = tuple((k, float(n)) for k, n in sorted(counts["state"].items()))
    reasons = tuple((k, float(n)) for k, n in counts["reason"].most_common())
    return [
        Table(f"{stage.name}: groups by state", ("state", "groups"), rows),
        Table(f"{stage.name}: why groups were dropped", ("filter", "groups"), reasons),
    ]


def _stage_report(ctx: RunContext, stage: Stage) -> StageReport:
    directory = ctx.directory(stage)
    done = directory / "DONE"
    found = series(directory / "metrics.jsonl")
    offset = 0
    for phase in sorted(directory.glob("phase*/metrics.jsonl")):
        part = series(phase)
        for name, points in part.items():
            found.setdefault(name, []).extend((step + offset, value) for step, value in points)
        offset += max((step for points in part.values() for step, _ in points), default=0)
    panels = PANELS.get(stage.kind, PANELS["sft"])
    named = {m for p in panels for m in p.metrics}
    shown = {k: v for k, v in found.items() if k in named}
    return StageReport(
        name=stage.name,
        kind=stage.kind,
        wall_seconds=_stored(done, ("seconds",))["seconds"] if done.exists() else math.nan,
        series=shown,
        panels=tuple(p for p in panels if any(m in shown for m in p.metrics)),
        facts={"steps": max((s for v in shown.values() for s, _ in v), default=0)},
    )


def example_trajectories(ctx: RunContext, stage: Stage) -> list[TrajectoryReport]:
    """For each model of an eval stage: the first multi-hop episodes, greedy."""
    if stage.eval is None:
        return []
    found = []
    for model in reversed(stage.eval.models):  # the last one is what the run is about
        issues = ctx.log.issues(f"{stage.name}/{model}/greedy", "eval")
        several = [i for i in issues if i.task.kind != "hop1"] or issues
        for issue in several[:EXAMPLES_PER_MODEL]:
            for trajectory in ctx.log.load_group(issue.issue_id).trajectories[:1]:
                accepted = issue.task.answers[0]
                found.append(
                    TrajectoryReport(
                        title=f"{model}: {issue.task.question}",
                        verdict=str(trajectory.verdict),
                        reward=trajectory.reward,
                        turns=tuple(turns_of(ctx, trajectory)),
                        note=f"stopped: {trajectory.stop}; accepted answer: {accepted}",
                    )
                )
    return found


def turns_of(ctx: RunContext, trajectory: Trajectory) -> list[tuple[str, str]]:
    """(role, text) in order: what was shown, what was sampled, what the tools said."""
    out: list[tuple[str, str]] = []
    for index, turn in enumerate(trajectory.turns):
        ids = np.asarray(trajectory.segments[turn.segment].ids)
        if index == 0:
            out.append(("system", ctx.chat.decode(ids[turn.start : turn.sample_start])))
        out.append(("assistant", ctx.chat.decode(ids[turn.sample_start : turn.end])))
        out += [("tool", result.content) for result in turn.results]
    return out
