"""The list of stages: run in order, skip those with DONE, resume the first without."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from agentcpm_jax.config import ExperimentConfig, Stage
from agentcpm_jax.disk import read_state, refusals
from agentcpm_jax.files import write_atomically
from agentcpm_jax.plan.explain import naming_what_is_too_large
from agentcpm_jax.run.context import RunContext, open_context
from agentcpm_jax.run.custom import check_custom
from agentcpm_jax.run.evaluation import run_eval
from agentcpm_jax.run.loop import train
from agentcpm_jax.run.merging import run_merge
from agentcpm_jax.run.multihost import decide, is_main
from agentcpm_jax.run.observe.dataset import check_data
from agentcpm_jax.run.observe.metrics import Progress, silent
from agentcpm_jax.run.observe.summary import write_summary
from agentcpm_jax.run.sampling import check_held_out
from agentcpm_jax.run.start.limits import check_limits
from agentcpm_jax.run.start.owner import owned
from agentcpm_jax.run.start.signals import Interrupted, StopSignal
from agentcpm_jax.run.supervised import run_pretrain, run_sft


def run_experiment(
    cfg: ExperimentConfig,
    workdir: str | Path | None = None,
    accept_data: bool = False,
    *,
    progress: Progress = silent,
    announce: Callable[[str], None] = lambda line: None,
    stop: StopSignal | None = None,
) -> Path:
    """Run (or resume) every stage; returns the path of the HTML report.

    `accept_data`: a stage is resumed although its data were edited; the report says so.

    Raises:
      UserError: a mistake that the user can fix.
      Interrupted: a signal (of `stop`, if it is given) asked the run to stop; the same call resumes
        it.
    """
    check_limits(cfg)
    check_custom(cfg)
    check_held_out(cfg)
    place = Path(workdir or cfg.workdir)
    check_data(cfg, place)
    with nullcontext(stop) if stop else StopSignal() as stop, ExitStack() as ending:
        decide("owner", lambda: ending.enter_context(owned(place, announce)))
        ending.enter_context(refusals(place))
        ctx = open_context(cfg, place, progress, stop, announce)
        ctx = replace(ctx, accept_data=accept_data)
        with ctx.log:
            for stage in cfg.stages:
                if decide(f"{stage.name}/done", partial(is_done, ctx.directory(stage))):
                    ctx.announce(f"{stage.name}: done before, skipped")
                    continue
                started = time.monotonic()
                whole = run_stage(ctx, stage)
                seconds = time.monotonic() - started
                if whole:
                    mark_done(ctx, stage, seconds)
                ctx.announce(f"{stage.name}: done in {seconds:.0f} s")
                if decide(f"{stage.name}/stop", lambda: ctx.stop.requested):
                    raise Interrupted(f"stopped after {stage.name}; same command resumes")
            return Path(decide("report", lambda: str(write_summary(ctx, ctx.announce))))


def run_stage(ctx: RunContext, stage: Stage) -> bool:
    """Run one stage to its end: training in every process, merging and evaluation in the first.

    False: the same command has something left to ask, of an evaluation that an outage ended.
    """
    ctx.directory(stage).mkdir(parents=True, exist_ok=True)
    trains = {"pretrain": run_pretrain, "sft": run_sft, "rl": train}
    if stage.kind in trains:
        with naming_what_is_too_large(ctx.cfg, stage, ctx.mesh):
            trains[stage.kind](ctx, stage)
        return True
    alone = {"merge": run_merge, "eval": run_eval}[stage.kind]
    return decide(f"{stage.name}/end", lambda: alone(ctx, stage)) is not False


def is_done(directory: Path) -> bool:
    """Whether a stage is complete. Raises `UserError`: its DONE is damaged."""
    path = directory / "DONE"
    fix = f"remove it (rm {path}), and the same command ends the stage again"
    return path.exists() and bool(read_state(path, ("stage", "seconds"), fix))


def mark_done(ctx: RunContext, stage: Stage, seconds: float) -> None:
    """Write DONE, which marks a stage as complete."""
    if not is_main():
        return
    ctx.claim()
    content = {"stage": stage.name, "kind": stage.kind, "seconds": round(seconds, 1)}
    write_atomically(ctx.directory(stage) / "DONE", json.dumps(content) + "\n")
