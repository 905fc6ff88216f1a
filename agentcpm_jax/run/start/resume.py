"""A run is resumed under the configuration it was started with, but for what computes nothing.

`COMPUTES` and `FREE` together name every field: patterns of its path, with the kind in the place
of the stage. A change of a field of the first list would give a run that is neither the old one nor
the new one, and is refused; one of the second is announced and stored. What a run was started with
beside its configuration (files of data) is compared here too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from agentcpm_jax.config import ExperimentConfig, config_from_json, read_config, to_json
from agentcpm_jax.files import write_atomically
from agentcpm_jax.types import UserError

CONFIG = "config.json"

#: Pattern -> why it may change.
FREE = {
    "workdir": "where the run lies",
    "log_url": "an address: a checkpoint refuses a log that lacks its batches",
    "hang_seconds": "a time limit",
    "profile": "it only looks",
    "mesh.*": "where it is computed: changes the last bits alone",
    "merge.where": "where it is computed",
    "*.shape.checkpoint_every": "how often is saved",
    "*.shape.log_every": "how often is told",
    "*.shape.steps": "more of them, where the learning rate does not depend on their number",
    "sft.epochs": "as steps",
    "*.shape.micro_rows": "the layout of a batch: changes the last bits alone",
    "*.shape.buckets": "the layout of a batch",
    "rl.shape.row_length": "the layout of a batch that the log holds; see `_layout`",
    "rl.shape.rows": "the layout of a batch that the log holds; see `_layout`",
    "rl.stream.max_concurrent_groups": "how much runs at a time",
    "rl.stream.retries": "how often a failure is tried again",
    "rl.stream.breaker": "when failures stop the run",
    "rl.stream.stall_timeout": "a time limit",
    "rl.workers.*": "who samples",
    "*.engine.*": "how the engine works: what it drew is stored with its log-probabilities",
    **{f"rl.pool.{name}": "where the servers and the weights are" for name in (
        "urls", "urls_file", "router_url", "weights_dir", "agent_port", "api_key_env",
        "keep_versions",
    )},
    "rl.pool.*_timeout": "a time limit",
    "rl.pool.health_every": "how often is looked",
    "rl.pool.max_gap": "when a server is refused",
    "*.judge.url": "an address",
    "*.judge.key_env": "where the key is",
    "*.judge.timeout": "a time limit",
    "*.judge.deadline": "a time limit",
}  # fmt: skip

_EVAL = ("models", "tasks_path", "skip_bad", "tasks", "samples", "k", "skill_tasks", "grader")
#: Everything else; a new field is in one list or the other.
COMPUTES = (
    *("name", "seed", "base", "tokenizer", "template", "tools", "model.*", "episode.*"),
    *("train_tasks.*", "test_tasks.*", "stage.name", "stage.kind", "stage.init_from"),
    *("*.optimizer.*", "*.judge.models", "*.judge.disagreement"),
    *("pretrain.phases.mix", "pretrain.phases.shape.row_length", "pretrain.phases.shape.rows"),
    *("sft.data.*", "sft.demonstrations.*", "sft.shape.row_length", "sft.shape.rows"),
    *("rl.tasks_path", "rl.skip_bad", "rl.loss.*", "rl.grader", "rl.advantages.*"),
    *("rl.denoise.*", "rl.pool.pause", "rl.stream.batch_groups", "rl.stream.group_size"),
    *("rl.stream.max_staleness", "rl.stream.deterministic", "rl.stream.over_age"),
    *("merge.method", "merge.general", "merge.alpha", "merge.density", "merge.soup"),
    *("merge.souping", "merge.keep", "merge.sweep"),
    *(f"{stage}.{name}" for stage in ("eval", "merge.validation") for name in _EVAL),
)


def check_config(cfg: ExperimentConfig, workdir: Path) -> list[str]:
    """Check that a workdir is resumed under its own configuration; a line per change that is free.

    Raises `UserError` when what computes has changed. A workdir without a run takes anything.
    """
    stored = _stored(workdir)
    if stored is None:
        return []
    old, new = to_json(stored), to_json(cfg)
    changed = sorted(set(_differences(old, new)))
    for path in changed:
        _check_length(workdir, path, old, new)
    pinned = [path for path in changed if not _is_free(path, old)]
    if pinned:
        raise UserError(
            f"{workdir} was started with another configuration ({', '.join(pinned[:5])} "
            "differ); use another --workdir or remove it"
        )
    shown = [path for path in changed if path != "workdir"]
    return [f"{path} is {_at(new, path)!r}, was {_at(old, path)!r}" for path in shown]


def _stored(workdir: Path) -> ExperimentConfig | None:
    """What a run goes on with: its own file, or what its newest checkpoint says of a lost one."""
    if (workdir / CONFIG).exists():
        return read_config(workdir)
    steps = "checkpoints/*/meta/metadata"
    found = [path for where in ("*", "*/phase*") for path in workdir.glob(f"{where}/{steps}")]
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        with suppress(ValueError, KeyError, TypeError):
            return config_from_json(json.loads(path.read_bytes())["config"], path)
    return None


def claim(cfg: ExperimentConfig, workdir: Path) -> None:
    """Store the configuration that the run in `workdir` goes on with, if it is another one.

    Called before the first checkpoint or row of the log: until then a start may fail, and the next
    one try something else.
    """
    path, text = workdir / CONFIG, json.dumps(to_json(cfg), indent=2) + "\n"
    if not path.exists() or check_config(cfg, workdir):
        write_atomically(path, text)


def kind_path(path: str) -> str:
    """`stages[3].rl.pool.urls[0]` -> `rl.pool.urls`: as the lists spell it."""
    path = re.sub(r"^stages\[\d+\]\.(name|kind|init_from)$", r"stage.\1", path)
    return re.sub(r"\[\d+\]", "", path.removeprefix("stages[").partition("].")[2] or path)


def is_listed(path: str, patterns: Any) -> bool:
    """Whether a path of `kind_path` fits one of the patterns."""
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def _is_free(path: str, old: Mapping[str, Any]) -> bool:
    kind = kind_path(path)
    return is_listed(kind, FREE) and _layout(kind, path, old)


def _layout(kind: str, path: str, old: Mapping[str, Any]) -> bool:
    """Of a batch in several updates, the rows say which segments are of which update."""
    if kind not in ("rl.shape.row_length", "rl.shape.rows"):
        return True
    return _at(old, path.partition(".shape.")[0])["loss"]["updates"] == 1


def _check_length(workdir: Path, path: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Steps and epochs may grow; not where that would move the learning rate in mid-run."""
    if kind_path(path) != "sft.epochs" and not path.endswith(".shape.steps"):
        return
    was, wanted = _at(old, path), _at(new, path)
    optimizer = _at(old, re.sub(r"\.(shape\.steps|epochs)$", ".optimizer", path))
    if was is None or wanted is None or wanted < was:
        raise UserError(
            f"{workdir}: {path} is {wanted}, the run was started with {was}; it may only grow"
        )
    if optimizer["schedule"] != "constant" or 0 < optimizer["warmup"] < 1:
        raise UserError(
            f"{workdir}: {path} is {wanted}, the run was started with {was} and its learning rate "
            f"follows their number ({optimizer['schedule']}): it would change in mid-run; keep "
            f"{was}, or train on in another --workdir whose init_from is the hf directory here"
        )


def _at(config: Any, path: str) -> Any:
    for key in re.findall(r"[^.\[\]]+", path):
        try:
            config = config[int(key)] if isinstance(config, list | tuple) else config[key]
        except (KeyError, IndexError):
            return None
    return config


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
