"""Where a directory of weights may be written: looked at before any work is done.

A result grows beside its place and is renamed to it. So the place must be one that a directory can
be renamed to, and what lies there must be nothing, or a model directory and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from agentcpm_jax.hf.card import CARD, LINEAGE
from agentcpm_jax.hf.companions import FILES
from agentcpm_jax.hf.files import read_json
from agentcpm_jax.hf.names import CONFIG, INDEX, SINGLE
from agentcpm_jax.types import UserError

#: All that a model directory of ours can hold.
OURS = (CONFIG, INDEX, CARD, LINEAGE, *FILES)
MOUNTS = Path("/proc/self/mountinfo")  # of Linux
WEIGHTS = re.compile(rf"{re.escape(SINGLE)}|model-\d{{5}}-of-\d{{5}}\.safetensors")


def output_place(out: Path, inputs: Iterable[Path] = ()) -> Path:
    """The directory that will be written: behind links, absolute.

    Raises UserError when nothing can be renamed to it, or it lies inside one of `inputs`.
    """
    try:
        place = out.resolve()
    except (OSError, RuntimeError) as e:
        raise UserError(f"output {out} is no place: {e}; choose another") from None
    if place == Path.cwd():
        raise UserError(f"output {out} is the working directory; give a directory below it")
    if _is_mounted(place):
        raise UserError(f"output {out} is a mount point; give a directory below it")
    for path in inputs:
        if place.is_relative_to(path.resolve()):
            raise UserError(f"output {out} lies inside {path}, which is read; choose another place")
    return place


def check_free(out: Path) -> None:
    """Raises UserError if something is at `out`; an empty directory is nothing."""
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"output {out} already exists; choose another or remove it")


def check_replaceable(out: Path) -> None:
    """Raises UserError if something is at `out` that is not a model directory and nothing else."""
    if not os.path.lexists(out):
        return
    found = sorted(out.iterdir()) if out.is_dir() else [out]
    foreign = [p.name for p in found if p.is_symlink() or not p.is_file() or not _ours(p.name)]
    if foreign or (found and not _is_model(out)):
        what = f"holds {foreign[0]}" if foreign else "is no model's"
        raise UserError(f"output {out} already exists and {what}; choose another place")


def _ours(name: str) -> bool:
    return name in OURS or WEIGHTS.fullmatch(name) is not None


def _is_model(directory: Path) -> bool:
    """Whether config.json is a model's and weights lie beside it."""
    weights = any(WEIGHTS.fullmatch(path.name) for path in directory.iterdir())
    return weights and "model_type" in read_json(directory / CONFIG)


def _is_mounted(place: Path) -> bool:
    """Also of a folder that is mounted from the same disk, which has the device of its parent."""
    if os.path.ismount(place):
        return True
    with contextlib.suppress(OSError):
        for line in MOUNTS.read_text(errors="replace").splitlines():
            mounted = line.split()[4].encode().decode("unicode_escape")  # a space is \040
            if mounted == str(place):
                return True
    return False
