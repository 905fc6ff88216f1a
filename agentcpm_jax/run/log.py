"""The experience log of a run: placed, restored when its disk is gone, opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from agentcpm_jax.checkpoint import newest_snapshot
from agentcpm_jax.config import ExperimentConfig
from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.log.snapshots import locate_log, restore_snapshot


def open_log(
    cfg: ExperimentConfig, workdir: Path, announce: Callable[[str], None] = lambda line: None
) -> ExperienceLog:
    """The live log; from the newest checkpoint's snapshot when the file is not there.

    Raises:
      UserError: the log cannot be opened.
    """
    place = locate_log(workdir, cfg.log_url)
    if place.note:
        announce(place.note)
    live = Path(place.url)
    if not cfg.log_url and not live.exists():
        stages = [workdir / stage.name / "checkpoints" for stage in reversed(cfg.stages)]
        snapshot = newest_snapshot(stages)
        if snapshot is not None:
            restore_snapshot(snapshot, live)
            announce(f"{live} was not there: restored from {snapshot}")
    return ExperienceLog.open(place.url)
