"""The health of a stage: a non-finite loss stops it; the report shows staleness and advice.

Staleness is shown as the share of samples lost to it, by length of the trajectories.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from agentcpm_jax.config import Stage
from agentcpm_jax.data.batch import Batch
from agentcpm_jax.evaluate.passk import clopper_pearson
from agentcpm_jax.evaluate.report.page import BarChart, Headline, Panel, Table
from agentcpm_jax.files import naming
from agentcpm_jax.run.context import RunContext
from agentcpm_jax.run.observe.alerts import history
from agentcpm_jax.run.observe.metrics import read_metrics
from agentcpm_jax.run.observe.staleness import length_deciles, stale_drops
from agentcpm_jax.types import UserError

PANELS = (
    Panel("Idle share of trainer and pool", ("time/trainer_idle", "pool/idle")),
    Panel("Age of shipped segments (shares)", tuple(f"stale/age_share/{k}" for k in range(9))),
    Panel("Share of samples lost to staleness", ("stale/dropped",)),
    Panel(
        "Clipped and masked tokens (shares)",
        ("loss/clip_fraction", "loss/bound_fraction", "loss/mask_fraction"),
    ),
    Panel("Effective sample size (share)", ("loss/ess",)),
    Panel("Event-loop lag (ms)", ("loop/lag_mean_ms", "loop/lag_max_ms")),
    Panel("Resident memory (MiB)", ("memory/rss_mib",)),
    Panel("Growth of memory (MiB per step)", ("memory/rss_slope",)),
)


def stop_if_not_finite(
    values: Mapping[str, Any],
    batch: Batch,
    directory: Path,
    name: str,
    step: int,
    issue_ids: Iterable[int] = (),
) -> None:
    """If the loss is not finite, dumps the batch of `step` as `directory`/nonfinite-step-<n>.npz
    (each process the rows that it made) and raises.

    The update was skipped and no checkpoint of this step is made, so the newest checkpoint is the
    last good one. A non-finite gradient with a finite loss is only skipped and counted.

    Raises:
      UserError: the loss is not finite; names the step and the issues of its batch.
    """
    loss = float(values["train/loss"])
    if math.isfinite(loss):
        return
    own = f".process-{jax.process_index()}" if jax.process_count() > 1 else ""
    path = directory / f"nonfinite-step-{step}{own}.npz"
    arrays: dict[str, Any] = {k: np.asarray(v) for k, v in vars(batch).items() if v is not None}
    with naming(path):
        np.savez_compressed(path, **arrays)
    ids = sorted(set(issue_ids))
    of_issues = f" of issues {', '.join(map(str, ids))}" if ids else ""
    then = "the same command goes on from there with another batch, " if ids else ""
    raise UserError(
        f"{name}: the loss of step {step} is {loss}; the batch{of_issues} is in {path}, the last "
        f"good checkpoint is kept; {then}look for absurd rewards or weights in this one, or lower "
        "the rate in another --workdir"
    )


def staleness_headline(ctx: RunContext, stage: Stage) -> list[Headline]:
    """Share of samples lost to staleness, overall and of the longest; none without samples."""
    samples = stale_drops(ctx.log, stage.name, recent=None)
    if not samples:
        return []
    share = float(np.mean([lost for _, lost in samples]))
    detail = f"{len(samples):,} samples"
    if tenths := length_deciles(samples):
        longest, shortest = (np.mean([lost for _, lost in tenths[k]]) for k in (-1, 0))
        detail = f"longest tenth {longest:.1%}, shortest {shortest:.1%}, of {detail}"
    return [Headline(f"{stage.name}: samples lost to staleness", f"{share:.1%}", detail)]


def staleness_chart(ctx: RunContext, stage: Stage) -> list[BarChart]:
    """Share of samples lost to staleness, for each tenth by length, with exact intervals."""
    tenths = length_deciles(stale_drops(ctx.log, stage.name, recent=None))
    if not tenths:
        return []
    shares = [clopper_pearson(sum(stale for _, stale in tenth), len(tenth)) for tenth in tenths]
    # The longest of a tenth names it: ranges would not fit below the bars.
    labels = tuple(f"≤ {tenth[-1][0]:,}" for tenth in tenths)
    return [
        BarChart(
            f"{stage.name}: share lost to staleness, by tenths of length (tokens)",
            labels,
            {"lost": shares},
            note="Of the samples that passed every filter. Bars that rise to the right are a bias "
            "against long trajectories.",
        )
    ]


def advice_table(ctx: RunContext, stage: Stage) -> list[Table]:
    """The run's advice by ranges of steps; none when nothing was ever wrong."""
    assert stage.rl is not None
    rows = read_metrics(ctx.directory(stage) / "metrics.jsonl")
    found = history(rows, lockstep=is_lockstep(stage))
    if not found:
        return []
    told = tuple((f"{a}" if a == b else f"{a} to {b}", line) for a, b, line in found)
    return [Table(f"{stage.name}: advice", ("steps", "advice"), told)]


def is_lockstep(stage: Stage) -> bool:
    """Whether trainer and rollouts take turns by design, so that idle times are expected."""
    stream = stage.rl.stream if stage.rl is not None else None
    return stream is not None and (stream.deterministic or stream.max_staleness == 0)
