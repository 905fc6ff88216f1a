"""The model card of an exported directory: what it was made from, how, and what was measured."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agentcpm_jax.config import ExperimentConfig, Stage, to_json
from agentcpm_jax.run.observe.metrics import read_metrics
from agentcpm_jax.weights.store import sha256_of

CARD, LINEAGE = "README.md", "lineage.json"
SCHEMA = 1


def describe(
    cfg: ExperimentConfig,
    stage: Stage | None,
    sources: Mapping[str, Path | None],
    metrics: Path,
    weights: Mapping[str, str],
) -> dict[str, str]:
    """{file: text} of an export: the card, and the lineage that later exports read.

    Args:
      stage: that made it; None: a copy of its one source, e.g. a conversion.
      sources: what it was made from, by name as in the configuration; None: no directory.
      metrics: `metrics.jsonl` of the stage; its last row is shown, when there is one.
      weights: {weight file: sha256}; empty for a published version, whose manifest has checksums.
    """
    lineage = {
        "schema": SCHEMA,
        "run": cfg.name,
        "stage": stage.name if stage else "",
        "kind": stage.kind if stage else "copy",
        "config": _digest(to_json(cfg)),
        "weights": dict(weights),
        "parents": [_parent(name, path) for name, path in sources.items()],
    }
    rows = read_metrics(metrics)
    last = rows[-1] if rows else {}
    return {
        CARD: _card(cfg, stage, lineage, last),
        LINEAGE: json.dumps(lineage, indent=1) + "\n",
    }


def _parent(name: str, path: Path | None) -> dict[str, Any]:
    if path is None:
        return {"source": name}
    if (path / LINEAGE).is_file():
        found = json.loads((path / LINEAGE).read_text())
        return {"source": name, **{k: found[k] for k in ("run", "stage", "weights", "parents")}}
    return {"source": name, "weights": dict(_hashes(path))}


@functools.cache
def _hashes(path: Path) -> tuple[tuple[str, str], ...]:
    """Of weights that do not change while a run reads them; every version published asks."""
    return tuple((file.name, sha256_of(file)) for file in sorted(path.glob("*.safetensors")))


def _card(
    cfg: ExperimentConfig,
    stage: Stage | None,
    lineage: Mapping[str, Any],
    last: Mapping[str, Any],
) -> str:
    what = f"stage `{stage.name}` ({stage.kind})" if stage else "a conversion"
    section = to_json(cfg) if stage is None else _of_stage(to_json(cfg), stage)
    measured = [f"| {name} | {value} |" for name, value in last.items()]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "tags:",
            "- agentcpm_jax",
            "---",
            f"# {cfg.name}: {lineage['stage'] or 'converted'}",
            "",
            f"Made by agentcpm_jax: run `{cfg.name}`, {what}, seed {cfg.seed}.",
            "",
            "## Lineage",
            "",
            f"SHA-256 of the configuration: `{lineage['config']}`",
            "",
            "| model | file | SHA-256 |",
            "|---|---|---|",
            *_files("this", lineage["weights"]),
            *_ancestors(lineage["parents"]),
            "",
            "## Metrics",
            "",
            *(["| last step | |", "|---|---|", *measured] if measured else ["None were written."]),
            "",
            "## Configuration",
            "",
            "```json",
            json.dumps(section, indent=1),
            "```",
            "",
        ]
    )


def _ancestors(parents: Sequence[Mapping[str, Any]], depth: str = "") -> list[str]:
    """Rows of the table, parents below their children."""
    rows = []
    for parent in parents:
        name = f"{depth}made from {parent['source']}"
        rows += _files(name, parent["weights"]) if "weights" in parent else [f"| {name} | | |"]
        rows += _ancestors(parent.get("parents", ()), f"{depth}- ")
    return rows


def _files(model: str, weights: Mapping[str, str]) -> list[str]:
    return [f"| {model} | {file} | `{content}` |" for file, content in weights.items()]


def _of_stage(config: dict[str, Any], stage: Stage) -> dict[str, Any]:
    """The configuration without the other stages."""
    kept = [s for s in config["stages"] if s["name"] == stage.name]
    return {**config, "stages": kept}


def _digest(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
