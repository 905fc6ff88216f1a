"""What travels beside weights: tokenizer, chat template, generation config."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

from agentcpm_jax.hf.files import json_text, read_json
from agentcpm_jax.hf.names import CONFIG, GENERATION, TOKEN_IDS

TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
#: Of a processor: read by few, older than TEMPLATE.
PROCESSOR_TEMPLATE = "chat_template.json"
#: Each is a tokenizer's vocabulary, the first one there the one that is read.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
FILES = (
    *TOKENIZERS,
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    TOKENIZER_CONFIG,
    TEMPLATE,
    PROCESSOR_TEMPLATE,
    GENERATION,
)


def companions_of(directory: Path) -> list[Path]:
    """Those of `FILES` that are there."""
    return [directory / name for name in FILES if (directory / name).is_file()]


def copy_companions(source: Path, target: Path, but: Container[str] = ()) -> None:
    """Copies `FILES`, where they are there and not in `but`, into a directory that is there."""
    for path in companions_of(source):
        if path.name not in but:
            shutil.copyfile(path, target / path.name)


def tokenizer_file(directory: Path) -> Path | None:
    """The file that holds the vocabulary; None: the directory has no tokenizer."""
    return next((directory / n for n in TOKENIZERS if (directory / n).is_file()), None)


def tokenizer_digest(directory: Path) -> str:
    """SHA-256 of what turns conversations into ids: the vocabulary and the chat template."""
    digest = hashlib.sha256((chat_template(directory) or "").encode())
    for name in (*TOKENIZERS, "merges.txt"):
        if (path := directory / name).is_file():
            digest.update(path.read_bytes())
            if name == TOKENIZERS[0]:  # which is whole
                break
    return digest.hexdigest()


def token_ids(directory: Path, name: str) -> dict[str, Any]:
    """The ids of tokens that `CONFIG` or `GENERATION` names, where it is there."""
    found = read_json(directory / name) if (directory / name).is_file() else {}
    return {key: found[key] for key in TOKEN_IDS if found.get(key) is not None}


def id_list(ids: Any) -> list[int]:
    """An entry of these: one id, several, or none."""
    return [] if ids is None else list(ids) if isinstance(ids, list) else [ids]


def generation(directories: Iterable[Path], stop: int | None) -> tuple[dict[str, Any], str]:
    """(ids of tokens for config.json, text of generation_config.json) of a model.

    Args:
      directories: of the model that it comes from and of its tokenizer; the first that says
        something counts.
      stop: a further id that ends its turns.
    """
    ids: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for directory in directories:
        ids = ids or token_ids(directory, CONFIG)
        if not settings and (path := directory / GENERATION).is_file():
            settings = read_json(path)
    ends = id_list(settings.get("eos_token_id")) or id_list(ids.get("eos_token_id"))
    ends += [stop] if stop is not None and stop not in ends else []
    if ends:
        eos = {"eos_token_id": ends[0] if len(ends) == 1 else ends}
        ids, settings = {**ids, **eos}, {**ids, **settings, **eos}
    return ids, json_text(settings) if settings else ""


def chat_template(directory: Path) -> str | None:
    """The template's text; of several the default one. The files win over the configuration."""
    if (path := directory / TEMPLATE).is_file():
        return path.read_text(encoding="utf-8")
    for name in (TOKENIZER_CONFIG, PROCESSOR_TEMPLATE):
        path = directory / name
        found = read_json(path).get("chat_template") if path.is_file() else None
        if isinstance(found, list):
            found = {entry["name"]: entry["template"] for entry in found}.get("default")
        if isinstance(found, str):
            return found
    return None


def set_chat_template(directory: Path, template: str) -> None:
    """Makes it the only template of the directory."""
    (directory / TEMPLATE).write_text(template, encoding="utf-8")
    (directory / PROCESSOR_TEMPLATE).unlink(missing_ok=True)
    path = directory / TOKENIZER_CONFIG
    if path.is_file() and "chat_template" in (config := read_json(path)):
        del config["chat_template"]
        path.write_text(json_text(config), encoding="utf-8")
