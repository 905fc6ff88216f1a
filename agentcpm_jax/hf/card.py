"""The model card of a directory, and the lineage that later cards read."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from agentcpm_jax.hf.files import read_json, sha256_of

CARD, LINEAGE = "README.md", "lineage.json"


def model_card(tag: str, title: str, body: Iterable[str], made_from: Iterable[str] = ()) -> str:
    """README.md with the metadata that the Hub reads; `made_from`: the models it came from."""
    # JSON is YAML, whatever is in a name
    names = [json.dumps(name, ensure_ascii=False) for name in dict.fromkeys(made_from)]
    bases = ["base_model:", *(f"- {name}" for name in names)] if names else []
    head = ["---", "library_name: transformers", *bases, "tags:", f"- {tag}", "---", f"# {title}"]
    return "\n".join([*head, "", *body, ""])


def file_table(
    heads: tuple[str, str, str], models: Iterable[tuple[str, Mapping[str, str] | None]]
) -> list[str]:
    """Lines that identify the files of models.

    `models`: (name, {file: what identifies its content}; None: the model has no files).
    """
    rows = []
    for model, files in models:
        if files is None:
            rows.append(f"| {model} | | |")
        else:
            rows += [f"| {model} | {file} | `{content}` |" for file, content in files.items()]
    return [f"| {' | '.join(heads)} |", "|---|---|---|", *rows]


def parent(name: str, directory: Path | None) -> dict[str, Any]:
    """What a lineage says of a model that another was made from; None: no directory."""
    if directory is None:
        return {"source": name}
    if (directory / LINEAGE).is_file():
        found = read_json(directory / LINEAGE)
        return {"source": name, **{k: found[k] for k in ("run", "stage", "weights", "parents")}}
    return {"source": name, "weights": dict(_hashes(directory))}


def copied(name: str) -> dict[str, Any]:
    """The lineage of a copy of a model that has none."""
    return {"run": "", "stage": "", "kind": "copy", "weights": {}, "parents": [{"source": name}]}


def origins(parents: Iterable[Mapping[str, Any]]) -> list[str]:
    """The models at the roots of a lineage, which others made; a run's own stages are none."""
    found: list[str] = []
    for model in parents:
        source = model["source"]
        own = source == "random" or source.startswith("stage:")
        found += origins(model.get("parents", ())) or ([] if own else [source])
    return found


def lineage_files(lineage: Mapping[str, Any]) -> list[tuple[str, Mapping[str, str] | None]]:
    """Rows of a `file_table`: the model itself, then parents below their children."""
    return [("this", lineage["weights"]), *_ancestors(lineage["parents"])]


@functools.cache
def _hashes(path: Path) -> tuple[tuple[str, str], ...]:
    """Of weights that do not change while a run reads them; every version published asks."""
    return tuple((file.name, sha256_of(file)) for file in sorted(path.glob("*.safetensors")))


def _ancestors(
    parents: Iterable[Mapping[str, Any]], depth: str = ""
) -> list[tuple[str, Mapping[str, str] | None]]:
    rows: list[tuple[str, Mapping[str, str] | None]] = []
    for found in parents:
        rows.append((f"{depth}made from {found['source']}", found.get("weights")))
        rows += _ancestors(found.get("parents", ()), f"{depth}- ")
    return rows
