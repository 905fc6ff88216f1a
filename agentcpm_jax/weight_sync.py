"""Weights on their way back to the engines: one directory per version, complete or absent.

`<directory>/weights/v000017/` holds `*.safetensors` with the leaves under their path keys
(`layers/attn/q`), `manifest.json` (sizes and sha256 of every file, names and types of every leaf)
and, written last, an empty `STABLE`. Readers look at stable versions only. A version number names
one set of weights for ever: what was published is not published again, neither when a resumed run
computes the same step a second time nor after the directory was collected.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.flax import load_file, save_file

from agentcpm_jax import tree
from agentcpm_jax.types import UserError

SCHEMA = 1
MAX_FILE_BYTES = 4 << 30


def publish(
    directory: str | Path,
    version: int,
    params: Mapping[str, Any],
    cfg: Any = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> bool:
    """Writes one version of the weights; False when it exists or was collected already.

    Args:
      directory: the stage's directory.
      version: completed RL batches of the stage, 0 to 999,999.
      params: nested dict of arrays, any dtype; bf16 stays bf16. One file's worth at a time is
        copied to the host.
      cfg: the model's frozen configuration, kept in the manifest for people.
      max_file_bytes: a new file is begun before one grows beyond this; a larger leaf has a file of
        its own.
    """
    target = _version_dir(directory, version)
    stable = versions(directory)
    if stable and (version in stable or version < stable[0]):
        return False
    # The process id keeps two writers apart; what a killed writer left is removed by
    # collect_garbage.
    work = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    flat = tree.flatten(params)
    files = {}
    for index, names in enumerate(_shards(flat, max_file_bytes)):
        path = work / f"model-{index:05d}.safetensors"
        save_file({name: flat[name] for name in names}, path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    manifest = {
        "schema": SCHEMA,
        "version": version,
        "model": dataclasses.asdict(cfg) if dataclasses.is_dataclass(cfg) else None,  # pyright: ignore
        "files": files,
        "leaves": {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in flat.items()},
    }
    (work / "manifest.json").write_text(json.dumps(manifest, indent=1, default=str))
    shutil.rmtree(
        target, ignore_errors=True
    )  # without STABLE: a writer was killed between the two lines below
    work.rename(target)
    (target / "STABLE").touch()
    return True


def load(directory: str | Path, version: int) -> dict[str, Any]:
    """The parameters of a stable version, bit for bit, as arrays on the default device.

    Raises:
      UserError: the version is not there, or a file's size or sha256 is not the manifest's.
    """
    path = _version_dir(directory, version)
    if not (path / "STABLE").exists():
        raise UserError(
            f"no stable weights {path}; versions there: {versions(directory) or 'none'}"
        )
    manifest = json.loads((path / "manifest.json").read_text())
    flat: dict[str, Any] = {}
    for name, expected in manifest["files"].items():
        file = path / name
        size = file.stat().st_size if file.exists() else 0
        if size != expected["bytes"] or _sha256(file) != expected["sha256"]:
            raise UserError(
                f"weights {file} are damaged: {size} bytes, {expected['bytes']} expected, or "
                f"another sha256 than manifest.json; remove {path} and load another version"
            )
        flat.update(load_file(file))
    return tree.unflatten(flat)


def versions(directory: str | Path) -> list[int]:
    """Stable versions, ascending; versions being written do not count."""
    return sorted(int(p.parent.name[1:]) for p in _weights(directory).glob("v*/STABLE"))


def collect_garbage(directory: str | Path, keep_from: int) -> list[int]:
    """Removes stable versions below `keep_from` and what killed writers left; returns them.

    The newest stable version always stays, so that an engine that starts late finds one. Call it
    from the process that publishes.
    """
    for leftover in _weights(directory).glob(".v*.tmp"):
        shutil.rmtree(leftover)
    removed = [v for v in versions(directory)[:-1] if v < keep_from]
    for version in removed:
        path = _version_dir(directory, version)
        (
            path / "STABLE"
        ).unlink()  # first, so that no reader takes a half-removed version for a whole one
        shutil.rmtree(path)
    return removed


def _shards(flat: Mapping[str, Any], max_file_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name in sorted(flat):
        nbytes = int(np.prod(flat[name].shape)) * flat[name].dtype.itemsize
        if names and size + nbytes > max_file_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += nbytes
    yield names


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _weights(directory: str | Path) -> Path:
    return Path(directory) / "weights"


def _version_dir(directory: str | Path, version: int) -> Path:
    if not 0 <= version < 10**6:
        raise ValueError(f"version {version} is not within 0..999999")
    return _weights(directory) / f"v{version:06d}"
