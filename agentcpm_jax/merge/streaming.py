"""Merges checkpoint directories without JAX, one tensor in memory at a time."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agentcpm_jax.files import nearest_existing, size_text
from agentcpm_jax.hf.card import CARD
from agentcpm_jax.hf.files import (
    FLOATS,
    index_text,
    json_digest,
    not_finite,
    plan_files,
    write_files,
)
from agentcpm_jax.hf.names import INDEX
from agentcpm_jax.hf.place import check_free, output_place
from agentcpm_jax.merge.agreement import check_models, check_rows
from agentcpm_jax.merge.companions import (
    card,
    donor_of,
    stop_notes,
    template_for,
    write_companions,
)
from agentcpm_jax.merge.inputs import MergeInput, fingerprint, identity, open_input
from agentcpm_jax.merge.kernels.methods import merge_tensors
from agentcpm_jax.merge.recipe import MergeRecipe
from agentcpm_jax.merge.resolve import TensorJob, resolve_jobs, rounding_notes, unmatched_filters
from agentcpm_jax.merge.staging import staging, staging_path
from agentcpm_jax.merge.trimming import with_kept_counts
from agentcpm_jax.merge.vocabulary import Vocabulary, align, check_adapters, check_same_ids
from agentcpm_jax.types import UserError

MAX_FILE_BYTES = 5_000_000_000  # of weights; a new file is begun before one grows beyond this
#: Written bytes between two entries of the journal.
SAVE_EVERY = 256_000_000


@dataclass(frozen=True)
class MergeResult:
    """What was written, and what a person should know about it."""

    directory: Path
    tensors: int
    parameters: int
    nbytes: int
    resumed: int = 0  # tensors that an interrupted merge had left
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line for people."""
        kept = f", {self.resumed} of them kept from an interrupted merge" if self.resumed else ""
        return (
            f"{self.directory}: {self.tensors} tensors{kept}, {self.parameters:,} parameters, "
            f"{self.nbytes / 1e6:,.1f} MB"
        )


@dataclass(frozen=True)
class Opened:
    """The inputs of a merge, checked, and what is to be done with them."""

    models: Mapping[str, MergeInput]
    jobs: Sequence[TensorJob]
    vocabulary: Vocabulary | None
    template: str | None
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Size of the output's weights."""
        return sum(job.info.nbytes for job in self.jobs)


def merge_checkpoints(
    recipe: MergeRecipe,
    out: Path,
    roots: Sequence[Path] = (Path(),),
    progress: Callable[[int, int], None] | None = None,
    seed: int = 0,
) -> MergeResult:
    """Writes the merged model as a Hugging Face directory that appears whole or not at all.

    A killed merge is continued by the same call; the result is the same bit for bit.

    Args:
      recipe: what to merge.
      out: must not exist, or be an empty directory.
      roots: relative model paths are tried against these in order.
      progress: called with (bytes written, bytes in all) after each tensor.
      seed: of DARE's and DELLA's random masks.

    Raises:
      UserError: missing, truncated or mismatched checkpoint, `out` taken, disk full; nothing is
        left behind.
    """
    place = output_place(out)
    check_free(place)
    with open_inputs(recipe, roots) as opened:
        output_place(out, {path.parent for m in opened.models.values() for path in m.files})
        tensors = {job.name: job.info for job in opened.jobs}
        files = plan_files(tensors, MAX_FILE_BYTES)
        key = _identity(recipe, seed, opened.models)
        _check_space(place, opened.nbytes)
        with staging(place, key) as grown, _hashes(opened.models) as hashes:
            jobs = {j.name: j for j in with_kept_counts(recipe, opened.jobs, opened.models)}
            sizes = [tensors[name].nbytes for file in files for name, _ in file.tensors]
            written = _Written(list(itertools.accumulate(sizes)), grown.record, progress)

            def values(name: str) -> Iterator[np.ndarray]:
                yield merged_tensor(recipe, jobs[name], opened.models, seed)

            write_files(grown.path, files, values, grown.done, written.note)
            if len(files) > 1:
                (grown.path / INDEX).write_text(index_text(files, tensors), encoding="utf-8")
            write_companions(
                grown.path,
                recipe,
                opened.models,
                opened.jobs,
                opened.vocabulary,
                opened.template,
            )
            text = card(recipe, seed, hashes(), opened.notes)
            (grown.path / CARD).write_text(text, encoding="utf-8")
    return MergeResult(
        directory=out,
        tensors=len(tensors),
        parameters=sum(int(np.prod(t.shape)) for t in tensors.values()),
        nbytes=opened.nbytes,
        resumed=grown.done,
        notes=opened.notes,
    )


@contextlib.contextmanager
def open_inputs(recipe: MergeRecipe, roots: Sequence[Path]) -> Iterator[Opened]:
    """Opens every model, aligns vocabularies, resolves parameters; reads no weights.

    Raises UserError for whatever makes the merge impossible.
    """
    with contextlib.ExitStack() as stack:
        stored = {n: stack.enter_context(open_input(n, roots)) for n in recipe.models}
        check_models({name: model.config for name, model in stored.items()})
        models: Mapping[str, MergeInput] = stored
        vocabulary = None
        notes = [*recipe.notes, *(n for m in stored.values() for n in getattr(m, "notes", ()))]
        check_rows(stored)
        check_adapters(stored)
        if recipe.tokenizer is None:
            notes += check_same_ids(stored, donor_of(recipe), recipe.compat)
        else:
            models, vocabulary = align(
                recipe.tokenizer, recipe.base_model, stored, donor_of(recipe), recipe.compat
            )
        template = template_for(recipe, models)
        jobs = resolve_jobs(recipe, models)
        notes += [*unmatched_filters(recipe, jobs), *rounding_notes(recipe, jobs, models)]
        notes += vocabulary.notes if vocabulary else ()
        notes += stop_notes(recipe, models, vocabulary)
        yield Opened(models, jobs, vocabulary, template, tuple(notes))


def merged_tensor(
    recipe: MergeRecipe, job: TensorJob, models: Mapping[str, MergeInput], seed: int
) -> np.ndarray:
    """Reads the inputs of one job and merges them."""
    arrays = [
        _cast(models[model].read(name), recipe, f"{name} of {model}") for model, name in job.places
    ]
    merged = merge_tensors(
        recipe.merge_method,
        arrays[: len(job.inputs)],
        base=arrays[-1] if job.base else None,
        global_params=job.shared,
        model_params=job.own,
        name=job.name,
        seed=seed,
        compat=recipe.compat,
        # mergekit rounds to the dtype of the inputs before it rounds to that of the output
        dtype=None if recipe.compat else FLOATS[job.info.dtype],
        labels=[model for model, _ in job.places],
    )
    for model, name in job.places:
        models[model].release(name)
    with np.errstate(over="ignore"):
        merged = merged.astype(FLOATS[job.info.dtype], copy=False)
    _check_held(merged, job.name, "out_dtype bfloat16 or float32, or smaller weights")
    return merged


def _check_held(value: np.ndarray, name: str, fix: str) -> None:
    if count := not_finite(value):
        raise UserError(
            f"tensor {name} has {count} values that {value.dtype} cannot hold; give {fix}"
        )


def _identity(recipe: MergeRecipe, seed: int, models: Mapping[str, MergeInput]) -> str:
    """Of a merge: equal for the same recipe, seed and inputs."""
    merge = {"recipe": dict(recipe.raw), "seed": seed, "shards": MAX_FILE_BYTES}
    return json_digest([merge, [identity(model) for model in models.values()]])


def _cast(value: np.ndarray, recipe: MergeRecipe, name: str) -> np.ndarray:
    """The input in the recipe's dtype; half precision may stay where float32 is computed anyway."""
    if not recipe.dtype or value.dtype == FLOATS[recipe.dtype]:
        return value
    if recipe.dtype == "float32" and value.dtype.itemsize == 2 and not recipe.compat:
        return value
    with np.errstate(over="ignore"):
        cast = value.astype(FLOATS[recipe.dtype])
    if recipe.dtype == "float16" and not not_finite(value):  # else the input is what is wrong
        _check_held(cast, name, "dtype bfloat16 or float32")
    return cast


def _check_space(out: Path, nbytes: int) -> None:
    partial = staging_path(out)
    there = sum(p.stat().st_size for p in partial.glob("*.safetensors")) if partial.is_dir() else 0
    free = shutil.disk_usage(nearest_existing(out)).free + there
    if free < nbytes:
        raise UserError(
            f"output {out} needs {size_text(nbytes)}, the disk has {size_text(free)} free; "
            "free space or choose another disk"
        )


class _Written:
    """Tells the journal, when it is due, and the progress line how many bytes are written.

    `sizes` are the bytes of the first tensor, of the first two, and so on.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        record: Callable[[int, int], None],
        progress: Callable[[int, int], None] | None,
    ):
        self._sizes, self._record, self._progress = sizes, record, progress
        self._recorded = 0

    def note(self, fd: int, count: int) -> None:
        """After each tensor: `count` are in the files."""
        done = self._sizes[count - 1]
        if done - self._recorded >= SAVE_EVERY:
            self._record(fd, count)
            self._recorded = done
        if self._progress:
            self._progress(done, self._sizes[-1])


@contextlib.contextmanager
def _hashes(
    models: Mapping[str, MergeInput],
) -> Iterator[Callable[[], dict[str, dict[str, str]]]]:
    """Digests of all inputs, computed beside the merge; call what this yields to wait for them."""
    stop = threading.Event()
    with ThreadPoolExecutor(1, "hashes") as executor:
        digests = {n: executor.submit(fingerprint, m, stop) for n, m in models.items()}
        try:
            yield lambda: {name: future.result() for name, future in digests.items()}
        finally:
            stop.set()
