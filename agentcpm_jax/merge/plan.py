"""What a merge would do, without doing it: parameters, bytes, memory, time, and where models clash.

Also the line that shows how far a running merge is.

Conflict map, per layer, over a sample of every tensor's entries d_m = W_m - B:

    disagreement  share of entries, among those that at least two models move, that they move in
                  different directions
    cosine        <d_i, d_j> / |d_i||d_j|, the mean over pairs of models
"""

from __future__ import annotations

import itertools
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import xxhash

from agentcpm_jax.files import duration_text, nearest_existing, size_text
from agentcpm_jax.hf.files import FLOATS
from agentcpm_jax.merge.inputs import MergeInput
from agentcpm_jax.merge.recipe import MergeRecipe
from agentcpm_jax.merge.resolve import TensorJob
from agentcpm_jax.merge.streaming import merged_tensor, open_inputs
from agentcpm_jax.merge.trimming import with_kept_counts

BLOCKS, BLOCK = 16, 1 << 14  # of a tensor: 262,144 entries at most
INTERPRETER = 80_000_000  # bytes: numpy, chunks, headers
TRIAL = 4_000_000  # entries of the tensor that is timed, at most


@dataclass(frozen=True)
class Conflict:
    """How the task vectors of a layer (or of what lies outside the layers) agree."""

    layer: str
    disagreement: float
    cosine: float


@dataclass(frozen=True)
class MergePlan:
    """What a merge would read, write and need; sizes in bytes, time in seconds.

    Attributes:
      parameters: per output tensor, 'name=value' of every parameter, models' by their position.
      models: in that order.
    """

    method: str
    models: tuple[str, ...]
    base: str
    tensors: tuple[tuple[str, tuple[int, ...], str], ...]
    parameters: Mapping[str, str]
    read: int
    written: int
    peak_memory: int
    free_disk: int
    seconds: float
    conflicts: tuple[Conflict, ...]
    notes: tuple[str, ...]

    def text(self) -> str:
        """The plan as lines of text."""
        lines = [f"method   {self.method}"]
        lines += [f"base     {self.base}"] if self.base else []
        lines += [f"model {i}  {name}" for i, name in enumerate(self.models, 1)]
        lines += [
            f"reads    {size_text(self.read)}",
            f"writes   {size_text(self.written)} in {len(self.tensors)} tensors; "
            f"{size_text(self.free_disk)} are free",
            f"memory   {size_text(self.peak_memory)} at most, besides mapped files",
            f"time     about {_about(self.seconds)}",
            *(f"note     {note}" for note in self.notes),
            "",
        ]
        names = [name for name, _, _ in self.tensors]
        width = max(map(len, names), default=0)
        for name, shape, dtype in self.tensors:
            size = "x".join(map(str, shape))
            lines.append(f"{name:{width}}  {size:>12} {dtype:8}  {self.parameters[name]}")
        if self.conflicts:
            lines += ["", "task vectors by layer   signs that disagree   cosine"]
            for c in self.conflicts:
                bar = "#" * round(20 * c.disagreement)
                lines.append(f"{c.layer:>21}   {c.disagreement:6.1%} {bar:20} {c.cosine:+.3f}")
        return "\n".join(lines)


def plan_merge(recipe: MergeRecipe, roots: Sequence[Path], out: Path, seed: int = 0) -> MergePlan:
    """Reads headers and a sample of the weights; writes nothing.

    Raises UserError as `streaming.merge_checkpoints` does before it writes.
    """
    with open_inputs(recipe, roots) as opened:
        jobs, models = opened.jobs, opened.models
        read = sum(models[m].tensors[n].nbytes for j in jobs for m, n in j.places)
        return MergePlan(
            method=recipe.merge_method + (" as in mergekit" if recipe.compat else ""),
            models=tuple(model for model, _ in jobs[0].inputs),
            base=jobs[0].base[0] if jobs[0].base else "",
            tensors=tuple((j.name, j.info.shape, j.info.dtype) for j in jobs),
            parameters={j.name: _parameters(j) for j in jobs},
            read=read,
            written=opened.nbytes,
            peak_memory=INTERPRETER + max(_memory(recipe, j, models) for j in jobs),
            free_disk=shutil.disk_usage(nearest_existing(out)).free,
            seconds=_seconds(recipe, jobs, models, seed, read),
            conflicts=tuple(conflicts(jobs, models)),
            notes=opened.notes,
        )


class ProgressLine:
    """Rewrites one line of a terminal; silent on a stream that is not a terminal."""

    def __init__(self, stream: TextIO):
        self._stream = stream if stream.isatty() else None
        self._start = time.monotonic()
        self._first: int | None = None
        self._shown = 0.0

    def show(self, done: int, total: int) -> None:
        """`done` of `total` bytes are written; at most ten lines a second."""
        now = time.monotonic()
        if self._first is None:  # what an earlier run left says nothing about the rate
            self._first, self._start = done, now
        if self._stream is None or (done < total and now - self._shown < 0.1):
            return
        self._shown = now
        line = progress_line(done, total, done - self._first, now - self._start)
        self._stream.write(f"\r{line}\x1b[K" + ("\n" if done >= total else ""))
        self._stream.flush()


def progress_line(done: int, total: int, since: int, seconds: float) -> str:
    """`done` of `total` bytes, of which `since` took `seconds`."""
    text = f"{done / 1e9:.2f} of {total / 1e9:.2f} GB, {done / max(total, 1):.0%}"
    if since <= 0 or seconds <= 0:
        return text
    rate = since / seconds
    return f"{text}, {rate / 1e6:,.0f} MB/s, {_about((total - done) / rate)} left"


def conflicts(jobs: Sequence[TensorJob], models: Mapping[str, MergeInput]) -> list[Conflict]:
    """The conflict map; empty without a base or with fewer than two other models."""
    sums: dict[int | None, np.ndarray] = {}  # layer -> clash, moved, and the Gram matrix
    for job in jobs:
        if job.base is None or len(job.inputs) < 2:
            continue
        base = _sample(models[job.base[0]].read(job.base[1]))
        d = np.stack([_sample(models[m].read(n)) - base for m, n in job.inputs])
        signs = np.sign(d)
        several = np.count_nonzero(signs, axis=0) >= 2
        clash = several & (np.abs(signs.sum(axis=0)) < np.abs(signs).sum(axis=0))
        # a sample of each tensor stands for all of it
        share = math.prod(job.info.shape) / max(base.size, 1)
        found = np.array([clash.sum(), several.sum(), *(d @ d.T).reshape(-1)]) * share
        sums[job.layer] = sums.get(job.layer, 0.0) + found
    order = sorted(sums, key=lambda layer: (layer is None, layer or 0))
    return [_conflict(layer, sums[layer]) for layer in order]


def _conflict(layer: int | None, sums: np.ndarray) -> Conflict:
    clash, moved, *flat = sums
    count = math.isqrt(len(flat))
    gram = np.array(flat).reshape(count, count)
    norms = np.sqrt(np.diag(gram))
    pairs = itertools.combinations(range(count), 2)
    cosines = [gram[i, j] / (norms[i] * norms[j] or 1.0) for i, j in pairs]
    name = "outside the layers" if layer is None else f"layer {layer}"
    return Conflict(name, float(clash / max(moved, 1.0)), float(np.mean(cosines)))


def _sample(x: np.ndarray) -> np.ndarray:
    """Evenly spaced runs of entries, float64."""
    flat = x.reshape(-1)
    if flat.size > BLOCKS * BLOCK:
        starts = np.linspace(0, flat.size - BLOCK, BLOCKS).astype(int)
        flat = np.concatenate([flat[s : s + BLOCK] for s in starts])
    return flat.astype(np.float64)


def _parameters(job: TensorJob) -> str:
    shared = [f"{key}={_shown(value)}" for key, value in job.shared.items()]
    own = [
        f"{key}={','.join(_shown(o[key]) for o in job.own)}"
        for key in (job.own[0] if job.own else {})
        if key != "keep"
    ]
    return " ".join([*own, *shared])


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, int | float) else str(value)


def _memory(recipe: MergeRecipe, job: TensorJob, models: Mapping[str, MergeInput]) -> int:
    """Bytes of the result, and of the inputs that must be copied out of their files."""
    total = job.info.nbytes
    for model, name in job.places:
        info = models[model].tensors[name]
        if recipe.dtype and recipe.dtype != info.dtype:
            total += math.prod(info.shape) * FLOATS[recipe.dtype].itemsize
        if models[model].copies(name):
            total += info.nbytes
    if recipe.merge_method == "arcee_fusion":
        total += 2 * math.prod(job.info.shape) * 4  # the scores, and a copy to find their median
    return total


def _seconds(
    recipe: MergeRecipe,
    jobs: Sequence[TensorJob],
    models: Mapping[str, MergeInput],
    seed: int,
    read: int,
) -> float:
    """An estimate, from merging one tensor and hashing some bytes."""
    small = [j for j in jobs if math.prod(j.info.shape) <= TRIAL] or [jobs[0]]
    (job,) = with_kept_counts(recipe, [max(small, key=lambda j: j.info.nbytes)], models)
    start = time.perf_counter()
    merged_tensor(recipe, job, models, seed)
    merging = (time.perf_counter() - start) / max(job.info.nbytes, 1)
    start = time.perf_counter()
    xxhash.xxh3_128(bytes(TRIAL))
    hashing = (time.perf_counter() - start) / TRIAL
    return merging * sum(j.info.nbytes for j in jobs) + hashing * read


def _about(seconds: float) -> str:
    return duration_text(round(seconds))
