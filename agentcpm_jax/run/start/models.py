"""The models of a run are those of its configuration, and the tokenizer is theirs."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agentcpm_jax.chat.format import ChatFormat, template_text
from agentcpm_jax.config import ExperimentConfig, Stage, outside_models
from agentcpm_jax.files import write_atomically
from agentcpm_jax.hf.companions import generation, tokenizer_digest
from agentcpm_jax.hf.locate import find_model
from agentcpm_jax.hf.shape import check_weights
from agentcpm_jax.hf.tokenizer import chat_of, check_ids, check_size, load_tokenizer
from agentcpm_jax.rollout.episode import check_prompt
from agentcpm_jax.run.custom import make_tools
from agentcpm_jax.run.start.limits import asking
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

    Raises `UserError`: one of the models is not whole or not that of the configuration; the
    tokenizer has more ids than it, other ids, or is not that of the run; with it an episode's
    prompt is longer than the context.
    """
    name = cfg.tokenizer or "of the offline world"
    tokenizer = load_tokenizer(directory)
    chat = chat_of(tokenizer, directory)
    check_size(chat, cfg.model.vocab_size, name)
    todo = [stage for stage in cfg.stages if not (workdir / stage.name / "DONE").exists()]
    if any(map(asking, todo)):
        check_prompt(chat, cfg.episode, make_tools(cfg.tools)[1])
    for model in map(find_model, outside_models(cfg, todo)):
        check_weights(model, cfg.model)
        check_ids(tokenizer, directory, model, f"the tokenizer {name}")
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


def generation_of(
    stage: Stage, began: Path | None, tokenizer: Path, end: int | None
) -> tuple[dict[str, Any], str]:
    """`companions.generation` of what a stage writes: what the model it began with stops at, and
    `end` of a turn, with which every turn that SFT and RL train ends."""
    stop = end if stage.kind in ("sft", "rl") else None
    return generation([*([began] if began else []), tokenizer], stop)


def record_tokenizer(workdir: Path, digest: str) -> None:
    """Store the digest of the tokenizer that a run begins with."""
    if not (workdir / DIGEST).exists():
        write_atomically(workdir / DIGEST, digest + "\n")
