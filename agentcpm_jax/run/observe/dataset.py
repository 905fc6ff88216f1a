"""The data of a stage: announced at its start, recorded beside it, compared when it is resumed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from agentcpm_jax.chat.format import ChatFormat
from agentcpm_jax.config import EvalStage, ExperimentConfig, RLStage, Stage
from agentcpm_jax.data.examine import NAMED, Examined, examine_conversations, examine_tasks
from agentcpm_jax.data.sft import read_conversations
from agentcpm_jax.disk import read_state
from agentcpm_jax.evaluate.report.page import Cell, Marked, Table
from agentcpm_jax.files import write_atomically
from agentcpm_jax.run.context import RunContext
from agentcpm_jax.tasks.jsonl import load_tasks
from agentcpm_jax.types import UserError

FILE = "data.json"
#: In the record, so many dropped rows are named; in the report, of each reason so many.
RECORDED, SHOWN = 1000, 20
EXAMPLE = 8000  # characters of the example in the report


def announce_data(
    directory: Path,
    found: Examined,
    announce: Callable[[str], None],
    accept: bool = False,
    begun: bool = False,
) -> None:
    """Say what becomes of a stage's data and record it in the stage's directory.

    `accept`: data that are not those that the stage began with are noted, and used. `begun`: the
    stage has used its data, which a checkpoint shows too.

    Raises:
      UserError: the stage began with other data.
    """
    path, notes = directory / FILE, []
    if path.exists():
        before = _recorded(path)
        notes = before["changes"]
        begun = begun or any((directory / "checkpoints").glob("*"))
        change = _change(before["digests"], found) if begun else ""
        if change and not accept:
            raise UserError(
                f"{change}; what {directory.name} has done so far was with the other data: restore "
                "the file, use another --workdir, or go on with --accept_data, which the report "
                "will say"
            )
        notes += [change] if change else []
    for line in found.lines(NAMED):
        announce(line)
    record = asdict(found) | {"changes": notes, "counts": dict(found.counts)}
    record["dropped"] = found.dropped[:RECORDED]
    write_atomically(path, json.dumps(record, ensure_ascii=False) + "\n")


def _recorded(path: Path) -> dict[str, Any]:
    fix = f"remove it (rm {path}): the stage goes on with the data as they are now"
    keys = ("path", "counts", "dropped", "lengths", "trained", "notes", "example")
    return read_state(path, (*keys, "digests", "changes"), fix)


def announce_tasks(ctx: RunContext, stage: Stage, spec: RLStage | EvalStage) -> None:
    """`announce_data` of the stage's file of tasks, if it has one.

    A stage has begun with them once the log has one of its episodes, or a model has its results.
    """
    if not spec.tasks_path:
        return
    names = [stage.name]
    if isinstance(spec, EvalStage):
        names = [f"{stage.name}/{m}/{how}" for m in spec.models for how in ("sampled", "greedy")]
    begun = any(ctx.log.counts(name)["state"] for name in names)
    found = _tasks(spec)
    announce_data(ctx.directory(stage), found, ctx.announce, ctx.accept_data, begun)


def data_lines(stage: Stage, chat: Callable[[], ChatFormat]) -> list[str]:
    """What becomes of the records of a stage that is still to run, or nothing."""
    if stage.sft is not None and stage.sft.data.path:
        data, length = stage.sft.data, stage.sft.shape.row_length
        return examine_conversations(data.path or "", chat(), data, length)[1].lines(NAMED)
    spec = stage.rl or stage.eval
    if spec is None or not spec.tasks_path:
        return []
    return _tasks(spec).lines(NAMED)


def _tasks(spec: RLStage | EvalStage) -> Examined:
    """What becomes of the tasks of a file; an evaluation may use the first ones alone."""
    found = examine_tasks(spec.tasks_path or "", skip_bad=spec.skip_bad)
    if isinstance(spec, EvalStage) and found.kept > spec.tasks:
        note = f"the first {spec.tasks:,} of them are evaluated; raise tasks for more"
        return replace(found, notes=(*found.notes, note))
    return found


def check_data(cfg: ExperimentConfig, workdir: Path) -> None:
    """Raise `UserError` for a file that a stage still to run could not read."""
    for stage in cfg.stages:
        if (workdir / stage.name / "DONE").exists():
            continue
        if stage.sft is not None and stage.sft.data.path:
            read_conversations(stage.sft.data.path, stage.sft.data.skip_bad)
        spec = stage.rl or stage.eval
        if spec is not None and spec.tasks_path:
            load_tasks(spec.tasks_path, skip_bad=spec.skip_bad)


def data_tables(directory: Path) -> list[Table]:
    """The tables of a stage's data in the report, or none."""
    path = directory / FILE
    if not path.exists():
        return []
    found = _recorded(path)
    lengths = found["lengths"]
    notes = [*found["notes"], *(f"Resumed with other data: {c}." for c in found["changes"])]
    if lengths:
        share = found["trained"] / max(sum(lengths), 1)
        notes.insert(
            0,
            f"{sum(lengths):,} tokens, {share:.0%} of them trained; a row has {min(lengths):,} to "
            f"{max(lengths):,}; none is truncated.",
        )
    title = f"{directory.name}: records of {found['path']}"
    counts = tuple(found["counts"].items())
    said = " ".join(f"{note.removesuffix('.')}." for note in notes)
    tables = [Table(title, ("what became of them", "records"), counts, said)]
    if found["dropped"]:
        title = f"{directory.name}: dropped records"
        tables.append(Table(title, ("reason", "which, and why"), tuple(_dropped(found))))
    if found["example"]:
        title = f"{directory.name}: one row, what is trained in colour"
        tables.append(Table(title, ("text",), ((_marked(found["example"]),),)))
    return tables


def _dropped(found: Mapping[str, Any]) -> Iterator[tuple[Cell, ...]]:
    """Some records of each reason, and how many more there are."""
    for reason, number in found["counts"].items():
        which = [text for r, text in found["dropped"] if r == reason][:SHOWN]
        yield from ((reason, text) for text in which)
        if which and number > len(which):
            yield reason, f"{number - len(which):,} more: launch/data.py check names all"


def _marked(example: list[tuple[str, bool]]) -> Marked:
    """The beginning of an example."""
    pieces, room = [], EXAMPLE
    for text, trained in example:
        if room > 0:
            pieces.append((text if len(text) <= room else text[:room] + " …", trained))
        room -= len(text)
    return Marked(tuple(pieces))


def _change(before: list[str], found: Examined) -> str:
    """How the rows differ from those of the stage's beginning; '' when they do not."""
    now = list(found.digests)
    if now == before:
        return ""
    same = next((i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b), None)
    if same is None and len(now) > len(before):
        return f"{len(now) - len(before)} rows were appended to {found.path} since the stage began"
    if same is None:
        return f"{len(before) - len(now)} of {len(before)} rows are gone from {found.path}"
    counts = f"{len(before)} rows then, {len(now)} now"
    return f"row {same + 1} of {found.path} is not what it was when the stage began ({counts})"
