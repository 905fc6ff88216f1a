"""Where a model lies: a directory, or a snapshot in the local Hub cache.

    checkpoints/sft            relative to the working directory, then to a recipe's file
    shipped:base               comes with the package
    org/name  org/name@v1      models--org--name of HF_HUB_CACHE, at refs/main or at a revision
    model+lora                 a PEFT adapter, found the same way, is added to the model

Nothing is downloaded. A directory whose name itself holds `@` or `+` is found under that name.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agentcpm_jax.files import SHIPPED
from agentcpm_jax.types import UserError


@dataclass(frozen=True)
class Location:
    """Directories of a model and of the adapter to add to it, if there is one."""

    model: Path
    adapter: Path | None = None


def find_model(name: str | os.PathLike[str], roots: Sequence[Path] = (Path(),)) -> Path:
    """The directory of a model; raises UserError with every place that was tried."""
    name = os.fspath(name)
    if (found := _directory(name, roots)) is not None:
        return found
    repository, _, revision = name.partition("@")
    if revision and (found := _directory(repository, roots)) is not None:
        raise UserError(
            f"{name}: {found} is a directory and has no revisions; leave @{revision} out"
        )
    if (found := _snapshot(repository, revision or "main", name)) is not None:
        return found
    tried = [*(str(root / name) for root in roots), str(_cached(repository))]
    raise UserError(
        f"model {name} is not a directory (tried {', '.join(dict.fromkeys(tried))}); give the path "
        "of a Hugging Face checkpoint, or download the repository first"
    )


def locate(name: str, roots: Sequence[Path]) -> Location:
    """The same of a model that may have an adapter."""
    if (whole := _directory(name, roots)) is not None:
        return Location(whole)
    if "+" in name:
        model, adapter = name.rsplit("+", 1)
        return Location(find_model(model, roots), find_model(adapter, roots))
    return Location(find_model(name, roots))


def hub_cache() -> Path:
    """The local Hub cache, by the variables huggingface_hub reads."""
    env = os.environ
    if cache := env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE"):
        return Path(cache).expanduser()
    default = Path(env.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(env.get("HF_HOME") or default).expanduser() / "hub"


def _directory(name: str, roots: Sequence[Path]) -> Path | None:
    if name in SHIPPED:
        return SHIPPED[name]
    paths = (root / Path(name).expanduser() for root in roots)
    return next((path for path in paths if path.is_dir()), None)


def _cached(repository: str) -> Path:
    return hub_cache() / f"models--{repository.replace('/', '--')}"


def _snapshot(repository: str, revision: str, name: str) -> Path | None:
    cache = _cached(repository)
    if not cache.is_dir():
        return None
    ref = cache / "refs" / revision
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
    snapshots = sorted(p.name for p in (cache / "snapshots").glob("*") if p.is_dir())
    found = [s for s in snapshots if s == commit or (len(commit) >= 7 and s.startswith(commit))]
    if len(found) != 1:
        raise UserError(
            f"model {name}: {cache} has no snapshot {revision} (it has "
            f"{', '.join(snapshots) or 'none'}); download that revision first"
        )
    return cache / "snapshots" / found[0]
