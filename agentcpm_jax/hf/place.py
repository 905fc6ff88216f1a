"""Where a directory of weights may be written: looked at before any work is done.

A result grows beside its place and is renamed to it. So the place must be one that a directory can
be renamed to, and what lies there must be nothing, or a model directory and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from agentcpm_jax.files import naming, sync_directory, sync_tree
from agentcpm_jax.hf.card import CARD, LINEAGE
from agentcpm_jax.hf.companions import FILES
from agentcpm_jax.hf.files import read_json
from agentcpm_jax.hf.names import CONFIG, GENERATION, INDEX, PEFT_CONFIG, PEFT_WEIGHTS, SINGLE
from agentcpm_jax.types import UserError

#: All that a model directory of ours can hold.
OURS = (CONFIG, INDEX, CARD, LINEAGE, *FILES)
#: All that an adapter's directory of ours can hold.
ADAPTERS = (PEFT_CONFIG, PEFT_WEIGHTS, CARD, LINEAGE, GENERATION)
MOUNTS = Path("/proc/self/mountinfo")  # of Linux
WEIGHTS = re.compile(rf"{re.escape(SINGLE)}|model-\d{{5}}-of-\d{{5}}\.safetensors")


def output_place(out: Path, inputs: Iterable[Path] = ()) -> Path:
    """The directory that will be written: behind links, absolute.

    Raises UserError when nothing can be written or renamed there, or it is inside one of `inputs`.
    """
    try:
        place = out.resolve()
    except (OSError, RuntimeError) as e:
        raise UserError(f"output {out} is no place: {e}; choose another") from None
    if place == Path.cwd():
        raise UserError(f"output {out} is the working directory; give a directory below it")
    if _is_mounted(place):
        raise UserError(f"output {out} is a mount point; give a directory below it")
    above = next(p for p in place.parents if os.path.lexists(p))
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise UserError(f"output {out}: {above} cannot be written to; choose another place")
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
    _check_holds(out, _ours, _is_model, "model")


def check_adapters(out: Path) -> None:
    """The same of a directory of adapters."""
    _check_holds(out, ADAPTERS.__contains__, lambda d: (d / PEFT_CONFIG).is_file(), "adapter")


def _check_holds(
    out: Path, ours: Callable[[str], bool], whole: Callable[[Path], bool], what: str
) -> None:
    if not os.path.lexists(out):
        return
    found = sorted(out.iterdir()) if out.is_dir() else [out]
    foreign = [p.name for p in found if p.is_symlink() or not p.is_file() or not ours(p.name)]
    if foreign or (found and not whole(out)):
        why = f"holds {foreign[0]}" if foreign else f"is no {what}'s"
        raise UserError(f"output {out} already exists and {why}; choose another place")


@contextlib.contextmanager
def whole_or_not_at_all(place: Path, check: Callable[[Path], None]) -> Iterator[Path]:
    """A new directory beside `place`, which takes its place at the end of the block, on disk.

    `check` is asked before the work and after it: the place may have been filled meanwhile. An
    `OSError` that names no file names the place.
    """
    check(place)
    fresh, old = (place.with_name(f".{place.name}.{w}-{os.getpid()}") for w in ("tmp", "old"))
    with naming(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        try:
            yield fresh
            check(place)
            sync_tree(fresh)
            _exchange(fresh, place, old)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def _exchange(fresh: Path, place: Path, old: Path) -> None:
    """Puts one directory in the place of another, which is removed only then."""
    if place.exists():
        place.rename(old)
    try:
        fresh.rename(place)
    except OSError:
        if old.exists():
            old.rename(place)
        raise
    sync_directory(place.parent)
    shutil.rmtree(old, ignore_errors=True)


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
