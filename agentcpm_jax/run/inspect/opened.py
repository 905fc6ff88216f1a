"""Opens a run for inspection, whether it is finished, interrupted or still going."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from agentcpm_jax.chat.format import ChatFormat
from agentcpm_jax.checkpoint import newest_snapshot
from agentcpm_jax.config import ExperimentConfig, RLStage, Stage, read_config
from agentcpm_jax.hf.locate import find_model
from agentcpm_jax.hf.tokenizer import load_chat
from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.log.schema import Issue
from agentcpm_jax.log.snapshots import locate_log, restore_snapshot
from agentcpm_jax.run.context import RunContext
from agentcpm_jax.run.observe.metrics import silent
from agentcpm_jax.run.start.signals import StopSignal
from agentcpm_jax.sharding import make_mesh
from agentcpm_jax.types import UserError


@dataclass(frozen=True)
class Run:
    """The contents of a workdir; its log may be written meanwhile."""

    workdir: Path
    cfg: ExperimentConfig
    log: ExperienceLog

    @property
    def tokenizer(self) -> Path:
        """The directory of the run's tokenizer."""
        return find_model(self.cfg.tokenizer or self.workdir / "tokenizer")

    def stage(self, name: str = "") -> tuple[Stage, RLStage]:
        """The RL stage of this name; the last one when empty. Raises `UserError`."""
        found = {s.name: (s, s.rl) for s in self.cfg.stages if s.rl is not None}
        if not found:
            kinds = ", ".join(f"{s.name} ({s.kind})" for s in self.cfg.stages)
            raise UserError(f"{self.workdir} has no RL stage, it has {kinds}; name another run")
        if name and name not in found:
            raise UserError(f"no RL stage {name!r} in {self.workdir}; use {' or '.join(found)}")
        return found[name] if name else list(found.values())[-1]

    def issue(self, issue_id: int) -> Issue:
        """One issue. Raises `UserError` when the log does not have it."""
        found = self.log.find_issue(issue_id)
        if found is not None:
            return found
        ids = self.log.id_range()
        known = "the log is empty" if ids is None else f"the log holds {ids[0]} to {ids[1]}"
        raise UserError(f"no issue {issue_id} in {self.workdir}; {known}")

    def chat(self) -> ChatFormat:
        """The tokenizer of the run."""
        return load_chat(self.tokenizer)

    def context(self) -> RunContext:
        """The stages' context. Raises `UserError` when the mesh does not fit the devices here."""
        return RunContext(
            cfg=self.cfg,
            workdir=self.workdir,
            tokenizer=self.tokenizer,
            chat=self.chat(),
            log=self.log,
            progress=silent,
            stop=StopSignal(),
            mesh=make_mesh(self.cfg.mesh),
        )


@contextmanager
def open_run(workdir: str | Path) -> Iterator[Run]:
    """Opens a workdir and changes nothing in it, except to migrate a log of an older schema.

    When the live log is gone, a copy of the newest checkpoint's snapshot is read.

    Raises:
      UserError: there is no run, or its configuration or log is of another schema version.
    """
    path = Path(workdir)
    cfg = read_config(path)
    with ExitStack() as stack:
        where = locate_log(path, cfg.log_url).url
        if not cfg.log_url and not Path(where).is_file():
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            where = str(_copy_of_snapshot(path, cfg, where, scratch))
        yield Run(path, cfg, stack.enter_context(ExperienceLog.open(where)))


def _copy_of_snapshot(workdir: Path, cfg: ExperimentConfig, live: str, scratch: Path) -> Path:
    stages = [workdir / stage.name / "checkpoints" for stage in reversed(cfg.stages)]
    snapshot = newest_snapshot(stages)
    if snapshot is None:
        raise UserError(f"{live} is missing, and no checkpoint has a snapshot; name another run")
    restore_snapshot(snapshot, scratch / "experience.db")
    return scratch / "experience.db"
