"""What the stages of a run share: config, workdir, tokenizer, log; where weights come from."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from agentcpm_jax.chat.format import ChatFormat
from agentcpm_jax.checkpoint import newest_snapshot
from agentcpm_jax.config import ExperimentConfig, Stage, sources_of
from agentcpm_jax.hf.companions import tokenizer_digest
from agentcpm_jax.hf.load import load_hf
from agentcpm_jax.hf.locate import find_model
from agentcpm_jax.hf.names import GENERATION
from agentcpm_jax.hf.save import save_hf, save_peft
from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.log.snapshots import locate_log, restore_snapshot
from agentcpm_jax.model import params as model_params
from agentcpm_jax.model.attention.choice import fit_to_device
from agentcpm_jax.run.multihost import gathered, is_main, main_first
from agentcpm_jax.run.observe.card import describe
from agentcpm_jax.run.observe.metrics import Progress, silent
from agentcpm_jax.run.observe.watchdog import Watchdog
from agentcpm_jax.run.start.models import (
    check_models,
    generation_of,
    record_tokenizer,
    tokenizer_of,
)
from agentcpm_jax.run.start.resume import CONFIG as RUN_CONFIG
from agentcpm_jax.run.start.resume import check_config, claim
from agentcpm_jax.run.start.signals import StopSignal
from agentcpm_jax.sharding import make_mesh
from agentcpm_jax.types import UserError


@dataclass(frozen=True)
class RunContext:
    """What `run.stages` passes to every stage; a stage writes only in its own directory."""

    cfg: ExperimentConfig
    workdir: Path
    tokenizer: Path
    chat: ChatFormat
    log: ExperienceLog
    progress: Progress
    stop: StopSignal
    mesh: Mesh
    announce: Callable[[str], None] = lambda line: None  # shows a line to the user
    claim: Callable[[], None] = lambda: None  # the workdir is this configuration's from now on
    watchdog: Watchdog = field(default_factory=Watchdog)
    accept_data: bool = False  # go on with data that are not those that a stage began with

    def directory(self, stage: Stage | str) -> Path:
        """workdir/<stage>."""
        return self.workdir / (stage if isinstance(stage, str) else stage.name)

    def load_params(self, source: str, shardings: Any = None) -> Any:
        """Parameters of 'random', 'stage:<name>' or what `hf.locate` finds under that name.

        `shardings`: one for every parameter; default: not split, on this process's first device.
        Raises `UserError` when there is no model, or one of another shape.
        """
        if source == "random" and shardings is None:
            return model_params.init(jax.random.key(self.cfg.seed), self.cfg.model)
        if source == "random":
            spread = jax.jit(model_params.init, static_argnums=1, out_shardings=shardings)
            return spread(jax.random.key(self.cfg.seed), self.cfg.model)
        path = self._source(source)
        assert path is not None
        return load_hf(path, self.cfg.model, shardings=shardings)[0]

    def save_adapters(self, directory: Path, adapters: Any, base: str) -> None:
        """Save the adapters that a stage trained on `base`, in PEFT's format."""
        host = gathered(adapters)
        if is_main():
            save_peft(directory, host, self.cfg.model, base, partial(self.describe, directory))

    def save_model(self, directory: Path, params: Any) -> None:
        """Save a Hugging Face directory with the run's tokenizer; replaces an unfinished one."""
        if is_main():
            self.claim()
            shutil.rmtree(directory, ignore_errors=True)
        save_hf(
            directory,
            params,
            self.cfg.model,
            tokenizer_from=self.tokenizer,
            describe=partial(self.describe, directory),
            token_ids=self._generation(self._stage_of(directory))[0],
        )

    def _source(self, source: str) -> Path | None:
        """The directory of an `init_from`; None for random parameters."""
        if source == "random":
            return None
        if source.startswith("stage:"):
            return self.directory(source[6:]) / "hf"
        return find_model(source)

    def _found(self, source: str) -> Path | None:
        """The same of a source that may have been removed since the stage began."""
        try:
            return self._source(source)
        except UserError:
            return None

    def describe(self, directory: Path, weights: Mapping[str, str]) -> dict[str, str]:
        """File name -> text of what goes beside the weights of a stage's directory."""
        stage = self._stage_of(directory)
        sources = {source: self._found(source) for source in sources_of(self.cfg, stage)}
        metrics = self.directory(stage) / "metrics.jsonl"
        files = describe(self.cfg, stage, sources, metrics, weights)
        settings = self._generation(stage)[1]
        return files | ({GENERATION: settings} if settings else {})

    def _stage_of(self, directory: Path) -> Stage:
        name = directory.relative_to(self.workdir).parts[0]
        return next(stage for stage in self.cfg.stages if stage.name == name)

    def _generation(self, stage: Stage) -> tuple[dict[str, Any], str]:
        began = self._found(sources_of(self.cfg, stage)[0])
        return generation_of(stage, began, self.tokenizer, self.chat.im_end_id)


def open_context(
    cfg: ExperimentConfig,
    workdir: Path,
    progress: Progress,
    stop: StopSignal,
    announce: Callable[[str], None] = lambda line: None,
) -> RunContext:
    """Create or reopen a workdir; of several processes the first writes it, the others read it.

    Raises:
      UserError: the workdir belongs to another configuration, the mesh does not fit the devices, or
        the tokenizer does not fit the model.
    """
    mesh = make_mesh(cfg.mesh)
    model, fallbacks = fit_to_device(cfg.model, mesh.devices.flat[0])
    # Nothing is written before all checks passed.
    with main_first("context"), tokenizer_of(cfg) as used:
        chat, digest = check_models(cfg, workdir, used), tokenizer_digest(used)
        changed = check_config(cfg, workdir)
        made, claimed = workdir / "tokenizer", (workdir / RUN_CONFIG).exists()
        if not cfg.tokenizer and is_main() and not (claimed and _is_copy(made, digest)):
            shutil.rmtree(made, ignore_errors=True)  # of a start that came to nothing, or damaged
            shutil.copytree(used, made)
        tokenizer = find_model(cfg.tokenizer or made)
    watchdog = Watchdog(cfg.hang_seconds, announce, workdir)
    if not is_main():  # it announces only a hang, and its log is not used
        progress, announce = silent, lambda line: None
    log = open_log(cfg, workdir, announce) if is_main() else _no_log()
    for line in [*fallbacks, *(f"resuming: {change}" for change in changed)]:
        announce(line)
    own = partial(_own, cfg, workdir, digest) if is_main() else lambda: None
    if changed:
        own()
    cfg = replace(cfg, model=model)
    said = {"announce": announce, "claim": own, "watchdog": watchdog}
    return RunContext(cfg, workdir, tokenizer, chat, log, progress, stop, mesh, **said)


def _is_copy(directory: Path, digest: str) -> bool:
    try:
        return directory.is_dir() and tokenizer_digest(directory) == digest
    except (UserError, ValueError):  # its chat template cannot be read
        return False


def _own(cfg: ExperimentConfig, workdir: Path, tokenizer: str) -> None:
    record_tokenizer(workdir, tokenizer)
    claim(cfg, workdir)


def open_log(
    cfg: ExperimentConfig, workdir: Path, announce: Callable[[str], None] = lambda line: None
) -> ExperienceLog:
    """Open the live log; a missing file is restored from the newest checkpoint's snapshot.

    Raises:
      UserError: the log cannot be opened.
    """
    place = locate_log(workdir, cfg.log_url)
    if place.note:
        announce(place.note)
    live, spare = Path(place.url), partial(newest_log, cfg, workdir)
    if not cfg.log_url and not live.exists() and (snapshot := spare()) is not None:
        restore_snapshot(snapshot, live)
        announce(f"{live} was not there: restored from {snapshot}")
    return ExperienceLog.open(place.url, spare)


def newest_log(cfg: ExperimentConfig, workdir: Path) -> Path | None:
    """The newest snapshot of a run's log. Raises `UserError` when it is damaged."""
    return newest_snapshot([workdir / stage.name / "checkpoints" for stage in reversed(cfg.stages)])


def _no_log() -> ExperienceLog:
    scratch = tempfile.TemporaryDirectory()
    atexit.register(scratch.cleanup)
    return ExperienceLog.open(Path(scratch.name) / "experience.db")
