"""The model card of an exported directory: what it was made from, how, and what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agentcpm_jax.config import ExperimentConfig, Stage, to_json
from agentcpm_jax.hf.card import (
    CARD,
    LINEAGE,
    file_table,
    lineage_files,
    model_card,
    origins,
    parent,
)
from agentcpm_jax.hf.files import json_digest
from agentcpm_jax.run.observe.metrics import read_metrics

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
        "config": json_digest(to_json(cfg)),
        "weights": dict(weights),
        "parents": [parent(name, path) for name, path in sources.items()],
    }
    rows = read_metrics(metrics)
    last = rows[-1] if rows else {}
    return {
        CARD: _card(cfg, stage, lineage, last),
        LINEAGE: json.dumps(lineage, indent=1) + "\n",
    }


def _card(
    cfg: ExperimentConfig,
    stage: Stage | None,
    lineage: Mapping[str, Any],
    last: Mapping[str, Any],
) -> str:
    what = f"stage `{stage.name}` ({stage.kind})" if stage else "a conversion"
    section = to_json(cfg) if stage is None else _of_stage(to_json(cfg), stage)
    measured = [f"| {name} | {value} |" for name, value in last.items()]
    body = [
        f"Made by agentcpm_jax: run `{cfg.name}`, {what}, seed {cfg.seed}.",
        "",
        "## Lineage",
        "",
        f"SHA-256 of the configuration: `{lineage['config']}`",
        "",
        *file_table(("model", "file", "SHA-256"), lineage_files(lineage)),
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
    ]
    title = f"{cfg.name}: {lineage['stage'] or 'converted'}"
    return model_card("agentcpm_jax", title, body, origins(lineage["parents"]))


def _of_stage(config: dict[str, Any], stage: Stage) -> dict[str, Any]:
    """The configuration without the other stages."""
    kept = [s for s in config["stages"] if s["name"] == stage.name]
    return {**config, "stages": kept}
