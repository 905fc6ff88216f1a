"""What the stages of a run share: config, workdir, tokenizer, log; where weights come from."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from agentcpm_jax.chat.format import ChatFormat, template_text
from agentcpm_jax.checkpoint import newest_snapshot
from agentcpm_jax.config import ExperimentConfig, Stage, read_config, to_json
from agentcpm_jax.files import write_atomically
from agentcpm_jax.hf.files import read_json
from agentcpm_jax.hf.load import load_hf
from agentcpm_jax.hf.locate import find_model
from agentcpm_jax.hf.names import CONFIG
from agentcpm_jax.hf.save import save_hf, save_peft
from agentcpm_jax.hf.tokenizer import load_chat
from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.log.snapshots import locate_log, restore_snapshot
from agentcpm_jax.model import params as model_params
from agentcpm_jax.model.attention.choice import fit_to_device
from agentcpm_jax.model.config import from_hf_config
from agentcpm_jax.run.multihost import StopSignal, gathered, is_main, main_first
from agentcpm_jax.run.observe.card import describe
from agentcpm_jax.run.observe.metrics import Progress, silent
from agentcpm_jax.run.observe.watchdog import Watchdog
from agentcpm_jax.sharding import make_mesh
from agentcpm_jax.types import UserError
from agentcpm_jax.world.vocabulary import write_tokenizer

#: Keys that a resume may change: they change no result, or (mesh) only its last bits.
FREE = ("workdir", "hang_seconds", "profile", "mesh")


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
    watchdog: Watchdog = field(default_factory=Watchdog)
    accept_data: bool = False  # go on with data that are not those that a stage began with

    def directory(self, stage: Stage | str) -> Path:
        """workdir/<stage>."""
        return self.workdir / (stage if isinstance(stage, str) else stage.name)

    def load_params(self, source: str, shardings: Any = None) -> Any:
        """Parameters of 'random', 'stage:<name>' or what `hf.locate` finds under that name.

        `shardings`: one for every parameter; default: not split, on this process's first device.
        Raises `UserError` when there is no model, or one of another vocabulary or width.
        """
        if source == "random" and shardings is None:
            return model_params.init(jax.random.key(self.cfg.seed), self.cfg.model)
        if source == "random":
            spread = jax.jit(model_params.init, static_argnums=1, out_shardings=shardings)
            return spread(jax.random.key(self.cfg.seed), self.cfg.model)
        path = self._source(source)
        assert path is not None
        found = from_hf_config(read_json(path / CONFIG))
        if found.vocab_size != self.cfg.model.vocab_size or found.width != self.cfg.model.width:
            raise UserError(
                f"{path} is a model of vocabulary {found.vocab_size} and width {found.width}; "
                f"config.model has {self.cfg.model.vocab_size} and {self.cfg.model.width}"
            )
        return load_hf(path, param_dtype=self.cfg.model.param_dtype, shardings=shardings)[0]

    def save_adapters(self, directory: Path, adapters: Any, base: str) -> None:
        """Save the adapters that a stage trained on `base`, in PEFT's format."""
        host = gathered(adapters)
        if is_main():
            save_peft(directory, host, self.cfg.model, base, partial(self.describe, directory))

    def save_model(self, directory: Path, params: Any) -> None:
        """Save a Hugging Face directory with the run's tokenizer; replaces an unfinished one."""
        if is_main():
            shutil.rmtree(directory, ignore_errors=True)
        described = partial(self.describe, directory)
        tokenizer = self.tokenizer
        save_hf(directory, params, self.cfg.model, tokenizer_from=tokenizer, describe=described)

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
        """File name -> text of the model card for an export in a stage's directory."""
        name = directory.relative_to(self.workdir).parts[0]
        stage = next(stage for stage in self.cfg.stages if stage.name == name)
        made_from = [stage.init_from]
        if stage.merge is not None:
            made_from += [stage.merge.general, *stage.merge.soup]
        if stage.kind == "pretrain" and self.cfg.base != "scratch":
            made_from = [self.cfg.base]
        sources = {source: self._found(source) for source in made_from}
        metrics = self.directory(stage) / "metrics.jsonl"
        return describe(self.cfg, stage, sources, metrics, weights)


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
    with main_first("context"), tempfile.TemporaryDirectory() as scratch:
        if not cfg.tokenizer:
            write_tokenizer(scratch, template_text(cfg.template))
        chat = load_chat(cfg.tokenizer or scratch)
        if chat.vocab_size > cfg.model.vocab_size:
            raise UserError(
                f"tokenizer {cfg.tokenizer or 'of the offline world'} has {chat.vocab_size} ids, "
                f"config.model.vocab_size is {cfg.model.vocab_size}; raise it"
            )
        check_config(cfg, workdir / "config.json")
        made = workdir / "tokenizer"
        if not cfg.tokenizer and not made.exists():
            shutil.copytree(scratch, made)
        tokenizer = find_model(cfg.tokenizer or made)
    watchdog = Watchdog(cfg.hang_seconds, announce, workdir)
    if not is_main():  # it announces only a hang, and its log is not used
        progress, announce = silent, lambda line: None
    log = open_log(cfg, workdir, announce) if is_main() else _no_log()
    for line in fallbacks:
        announce(line)
    cfg = replace(cfg, model=model)
    return RunContext(cfg, workdir, tokenizer, chat, log, progress, stop, mesh, announce, watchdog)


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
    live = Path(place.url)
    if not cfg.log_url and not live.exists():
        stages = [workdir / stage.name / "checkpoints" for stage in reversed(cfg.stages)]
        snapshot = newest_snapshot(stages)
        if snapshot is not None:
            restore_snapshot(snapshot, live)
            announce(f"{live} was not there: restored from {snapshot}")
    return ExperienceLog.open(place.url)


def _no_log() -> ExperienceLog:
    scratch = tempfile.TemporaryDirectory()
    atexit.register(scratch.cleanup)
    return ExperienceLog.open(Path(scratch.name) / "experience.db")


def check_config(cfg: ExperimentConfig, path: Path) -> None:
    """Check that a workdir is resumed under its own configuration; a new one stores `cfg`."""
    if path.exists():
        old = to_json(read_config(path.parent))
        changed = sorted(set(_differences(old, to_json(cfg))))
        changed = [key for key in changed if key.split(".")[0] not in FREE]
        if changed:
            raise UserError(
                f"{path.parent} was started with another configuration ({', '.join(changed[:5])} "
                "differ); use another --workdir or remove it"
            )
        return
    write_atomically(path, json.dumps(to_json(cfg), indent=2) + "\n")


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in old.keys() | new.keys():
            inner = f"{path}.{key}" if path else key
            found += _differences(old.get(key), new.get(key), inner)
        return found
    if isinstance(old, tuple) and isinstance(new, tuple) and len(old) == len(new):
        pairs = zip(old, new, strict=True)
        return [d for i, (a, b) in enumerate(pairs) for d in _differences(a, b, f"{path}[{i}]")]
    return [] if old == new else [path]
