"""Recomputes a recorded step from log and nearest checkpoint, and compares it bit for bit.

It calls the code of the loop: its learner, its rows, its packing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from agentcpm_jax.checkpoint import Checkpointer
from agentcpm_jax.config import RLStage, Stage
from agentcpm_jax.data.rows import shipped_rows
from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.run.context import RunContext
from agentcpm_jax.run.inspect.opened import open_run
from agentcpm_jax.run.learner import make_batches, make_learner
from agentcpm_jax.run.observe import machine
from agentcpm_jax.run.observe.metrics import read_metrics, scalar
from agentcpm_jax.types import UserError

HEADLINE = ("train/loss", "train/grad_norm")


@dataclass(frozen=True)
class Replay:
    """What a step computed then and now.

    Attributes:
      step: 1 is the first.
      start: completed steps of the checkpoint it began from; 0: the initial parameters.
      recorded, computed: metric -> value, of the metrics that the step itself returns.
      elsewhere: how the machine that recorded the step differs from this one.
    """

    stage: str
    step: int
    start: int
    recorded: Mapping[str, Any]
    computed: Mapping[str, Any]
    elsewhere: tuple[str, ...]

    @property
    def differing(self) -> dict[str, tuple[Any, Any]]:
        """metric -> (recorded, computed) where they are not the same number."""
        return {
            name: (self.recorded[name], value)
            for name, value in self.computed.items()
            if self.recorded[name] != value
        }

    @property
    def equal(self) -> bool:
        return not self.differing


def replay(
    workdir: str | Path,
    step: int,
    stage: str = "",
    announce: Callable[[str], None] = lambda line: None,
) -> Replay:
    """Computes step `step` of an RL stage again and compares it with `metrics.jsonl`.

    Works on a finished, an interrupted or a running run; writes nothing.

    Raises:
      UserError: no such run, stage or step; a damaged checkpoint; the mesh does not fit.
    """
    with open_run(workdir) as run:
        chosen, rl = run.stage(stage)
        directory = run.workdir / chosen.name
        recorded = _recorded(directory, step)
        _check_log(run.log, chosen.name, step)
        start, computed = _compute(run.context(), chosen, rl, step, announce)
    here = machine.differences(machine.of_step(directory, step), machine.describe())
    computed = {k: scalar(v) for k, v in computed.items() if k in recorded}
    missing = [name for name in HEADLINE if name not in computed]
    if missing:
        raise UserError(
            f"step {step} of {directory / 'metrics.jsonl'} holds no {missing[0]}: written by "
            "another release; use the one that wrote it"
        )
    recorded = {k: recorded[k] for k in computed}
    return Replay(chosen.name, step, start, recorded, computed, tuple(here))


def describe(found: Replay) -> list[str]:
    """The outcome in lines for a terminal."""
    origin = f"checkpoint {found.start}" if found.start else "the initial parameters"
    values = ", ".join(f"{name} {found.computed[name]!r}" for name in HEADLINE)
    if found.equal:
        lines = [
            f"{found.stage} step {found.step} from {origin}: bit-equal ({values}; "
            f"{len(found.computed)} metrics compared)"
        ]
    else:
        lines = [f"{found.stage} step {found.step} from {origin}: NOT equal"]
        ordered = sorted(found.differing.items(), key=lambda item: (item[0] not in HEADLINE, item))
        lines += [f"  {name}: recorded {a!r}, computed {b!r}" for name, (a, b) in ordered]
    if found.elsewhere:
        cause = "so equal bits were not to be expected" if not found.equal else "equal even so"
        lines.append(f"  recorded on another machine ({'; '.join(found.elsewhere)}): {cause}")
    return lines


def _recorded(directory: Path, step: int) -> dict[str, Any]:
    rows = {row["step"]: row for row in read_metrics(directory / "metrics.jsonl")}
    if step not in rows:
        known = f"it has {min(rows)} to {max(rows)}" if rows else "no step is complete yet"
        raise UserError(f"no step {step} in {directory / 'metrics.jsonl'}; {known}")
    return rows[step]


def _check_log(log: ExperienceLog, stage: str, step: int) -> None:
    """Batch n of the log belongs to step n + 1 of the metrics."""
    if (last := log.last_shipped_step(stage)) < step - 1:
        raise UserError(
            f"step {step} of stage {stage!r} is not in {log.where}, whose last is {last + 1}; "
            "give the workdir that holds the run's own log"
        )


def _compute(
    ctx: RunContext, stage: Stage, rl: RLStage, step: int, announce: Callable[[str], None]
) -> tuple[int, dict[str, Any]]:
    """(completed steps of the checkpoint, metrics of the last step)."""
    learner = make_learner(ctx, stage, rl)
    state = learner.state
    checkpoints = Checkpointer(ctx.directory(stage) / "checkpoints")
    start = max((s for s in checkpoints.steps() if s < step), default=0)
    if start:
        restored = checkpoints.restore(start, abstract_state=state)
        assert restored is not None
        state = restored.state
    batches = make_batches(rl, lambda n: shipped_rows(ctx.log.shipped(stage.name, n)))
    values: dict[str, Any] = {}
    for version in range(start, step):
        announce(f"step {version + 1} of {start + 1} to {step}")
        state, values = learner.step(state, batches.batch(version), jnp.int32(version))
    return start, jax.device_get(values)
