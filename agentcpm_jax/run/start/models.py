"""The models of a run are those of its configuration, and the tokenizer is theirs."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agentcpm_jax.chat.format import ChatFormat, template_text
from agentcpm_jax.config import ExperimentConfig, outside_models
from agentcpm_jax.files import write_atomically
from agentcpm_jax.hf.companions import tokenizer_digest
from agentcpm_jax.hf.locate import find_model
from agentcpm_jax.hf.shape import check_weights
from agentcpm_jax.hf.tokenizer import chat_of, check_ids, load_tokenizer
from agentcpm_jax.types import UserError
from agentcpm_jax.world.vocabulary import write_tokenizer

DIGEST = "tokenizer.sha256"  # in the run's directory


@contextmanager
def tokenizer_of(cfg: ExperimentConfig) -> Iterator[Path]:
    """Its directory; the offline world's is made, and is there until the end."""
    with tempfile.TemporaryDirectory() as scratch:
        if not cfg.tokenizer:
            write_tokenizer(scratch, template_text(cfg.template))
        yield find_model(cfg.tokenizer or scratch)


def check_models(cfg: ExperimentConfig, workdir: Path, directory: Path) -> ChatFormat:
    """The tokenizer in `directory`, which fits the models that are still to be read.

    Raises `UserError`: one of the models is not whole or not that of the configuration, or the
    tokenizer has more ids than it, other ids, or is not that of the run.
    """
    name = cfg.tokenizer or "of the offline world"
    tokenizer = load_tokenizer(directory)
    chat = chat_of(tokenizer, directory)
    if chat.vocab_size > cfg.model.vocab_size:
        raise UserError(
            f"tokenizer {name} has {chat.vocab_size} ids, the model {cfg.model.vocab_size} "
            "(vocab_size); use the model's own tokenizer"
        )
    todo = [stage for stage in cfg.stages if not (workdir / stage.name / "DONE").exists()]
    for model in map(find_model, outside_models(cfg, todo)):
        check_weights(model, cfg.model)
        check_ids(tokenizer, directory, model)
    file = workdir / DIGEST
    stored = file.read_bytes().strip() if file.is_file() else b""
    if file.is_file() and not re.fullmatch(rb"[0-9a-f]{64}", stored):
        raise UserError(f"{file} is damaged; remove it (rm {file}): it is written again")
    if stored and stored != tokenizer_digest(directory).encode():
        raise UserError(
            f"tokenizer {name} (its ids or its chat template) is not the one that the run in "
            f"{workdir} began with; restore it, or use another --workdir"
        )
    return chat


def record_tokenizer(workdir: Path, digest: str) -> None:
    """Store the digest of the tokenizer that a run begins with."""
    if not (workdir / DIGEST).exists():
        write_atomically(workdir / DIGEST, digest + "\n")
