"""What travels beside weights: tokenizer, chat template, generation config."""

from __future__ import annotations

import shutil
from collections.abc import Container
from pathlib import Path

from agentcpm_jax.hf.files import json_text, read_json

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
    "generation_config.json",
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
