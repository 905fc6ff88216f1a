"""What the stages of a run share: config, workdir, tokenizer, log; where weights come from."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from agentcpm_jax.config import ExperimentConfig, Stage, to_json
from agentcpm_jax.model import params as model_params
from agentcpm_jax.model.hf import load_hf, save_hf
from agentcpm_jax.rollout.chat import ChatFormat, template_text
from agentcpm_jax.rollout.experience import ExperienceLog
from agentcpm_jax.run.interrupt import StopSignal
from agentcpm_jax.run.log import open_log
from agentcpm_jax.run.metrics import Progress
from agentcpm_jax.run.tiny import SHIPPED
from agentcpm_jax.sharding import make_mesh
from agentcpm_jax.types import UserError
from agentcpm_jax.world.vocabulary import write_tokenizer


@dataclass(frozen=True)
class RunContext:
    """Handed down from `run.stages`; stages read it and write below their own directory."""

    cfg: ExperimentConfig
    workdir: Path
    tokenizer: Path
    chat: ChatFormat
    log: ExperienceLog
    progress: Progress
    stop: StopSignal
    mesh: Mesh
    announce: Callable[[str], None] = lambda line: None  # a line for whoever watches the run

    def directory(self, stage: Stage | str) -> Path:
        """workdir/<stage>."""
        return self.workdir / (stage if isinstance(stage, str) else stage.name)

    def load_params(self, source: str) -> Any:
        """Parameters of 'random', 'shipped:base', 'stage:<name>' or a Hugging Face directory."""
        if source == "random":
            return model_params.init(jax.random.key(self.cfg.seed), self.cfg.model)
        path = SHIPPED.get(source) or Path(source)
        if source.startswith("stage:"):
            path = self.directory(source[6:]) / "hf"
        if not (path / "config.json").is_file():
            raise UserError(f"init_from={source!r}: {path} holds no config.json; name a directory")
        loaded, found = load_hf(path, param_dtype=self.cfg.model.param_dtype)
        if found.vocab_size != self.cfg.model.vocab_size or found.width != self.cfg.model.width:
            raise UserError(
                f"{path} is a model of vocabulary {found.vocab_size} and width {found.width}; "
                f"config.model has {self.cfg.model.vocab_size} and {self.cfg.model.width}"
            )
        return loaded

    def save_model(self, directory: Path, params: Any) -> None:
        """A Hugging Face directory with the run's tokenizer; replaces an unfinished one."""
        shutil.rmtree(directory, ignore_errors=True)
        save_hf(directory, params, self.cfg.model, tokenizer_from=self.tokenizer)


def open_context(
    cfg: ExperimentConfig,
    workdir: Path,
    progress: Progress,
    stop: StopSignal,
    announce: Callable[[str], None] = lambda line: None,
) -> RunContext:
    """Create or reopen a workdir.

    Raises:
      UserError: the workdir belongs to another configuration, the mesh does not fit the devices, or
        the tokenizer not the model.
    """
    mesh = make_mesh(cfg.mesh)
    with tempfile.TemporaryDirectory() as scratch:  # nothing is written before all checks passed
        if not cfg.tokenizer:
            write_tokenizer(scratch, template_text(cfg.template))
        chat = ChatFormat.load(cfg.tokenizer or scratch)
        if chat.vocab_size > cfg.model.vocab_size:
            raise UserError(
                f"tokenizer {cfg.tokenizer or 'of the offline world'} has {chat.vocab_size} ids, "
                f"config.model.vocab_size is {cfg.model.vocab_size}; raise it"
            )
        _check_config(cfg, workdir / "config.json")
        tokenizer = Path(cfg.tokenizer or workdir / "tokenizer")
        if not tokenizer.exists():
            shutil.copytree(scratch, tokenizer)
    log = open_log(cfg, workdir, announce)
    return RunContext(cfg, workdir, tokenizer, chat, log, progress, stop, mesh, announce)


def write_atomically(path: Path, text: str) -> None:
    """The file appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _check_config(cfg: ExperimentConfig, path: Path) -> None:
    """One workdir, one configuration: a resume under another one would not be a resume."""
    new = json.loads(json.dumps(to_json(cfg)))
    if path.exists():
        old = json.loads(path.read_text())
        changed = sorted(set(_differences(old, new)))
        changed = [key for key in changed if not key.startswith("workdir")]
        if changed:
            raise UserError(
                f"{path.parent} was started with another configuration ({', '.join(changed[:5])} "
                "differ); use another --workdir or remove it"
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(new, indent=2) + "\n")


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in old.keys() | new.keys():
            inner = f"{path}.{key}" if path else key
            found += _differences(old.get(key), new.get(key), inner)
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = zip(old, new, strict=True)
        return [d for i, (a, b) in enumerate(pairs) for d in _differences(a, b, f"{path}[{i}]")]
    return [] if old == new else [path]
