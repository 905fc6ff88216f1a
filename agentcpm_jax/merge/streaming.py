"""Merges checkpoint directories without JAX, a few tensors in memory at a time."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agentcpm_jax.merge.methods import FLOATS, linear, task_arithmetic
from agentcpm_jax.merge.recipe import MergeRecipe
from agentcpm_jax.merge.shards import Checkpoint, TensorInfo, write_shards
from agentcpm_jax.types import UserError

#: Files that travel with the weights, copied from the base or else the first model.
COMPANIONS = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"),
    *("merges.txt", "added_tokens.json", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json"),
)
#: Equal shapes do not make equal models: these must agree where both configs name them.
ARCHITECTURE = (
    *("model_type", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("tie_word_embeddings", "rope_theta", "rope_scaling", "rms_norm_eps"),
)


@dataclass(frozen=True)
class MergeResult:
    """What was written."""

    directory: Path
    tensors: int
    parameters: int
    nbytes: int


def merge_checkpoints(
    recipe: MergeRecipe,
    out: Path,
    roots: Sequence[Path] = (Path(),),
    max_shard_bytes: int = 5_000_000_000,
    progress: Callable[[int, int], None] | None = None,
) -> MergeResult:
    """Writes the merged model as a Hugging Face directory that appears whole or not at all.

    Args:
      recipe: what to merge.
      out: must not exist, or be an empty directory.
      roots: relative model paths are tried against these in order.
      max_shard_bytes: size at which a new safetensors file is begun.
      progress: called with (tensors done, tensors in all).

    Raises:
      UserError: missing, truncated or mismatched checkpoint, `out` taken; nothing is left behind.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"output {out} already exists; choose another or remove it")
    names = [m.model for m in recipe.inputs]
    if recipe.merge_method == "task_arithmetic":
        names = [recipe.base_model, *names]
    with contextlib.ExitStack() as stack:
        models = [stack.enter_context(Checkpoint(_find(name, roots))) for name in names]
        _check_same(models, names)
        tensors = {
            name: TensorInfo(
                info.shape, _out_dtype(recipe, [m.tensors[name].dtype for m in models])
            )
            for name, info in models[0].tensors.items()
        }
        donor = models[names.index(recipe.base_model)] if recipe.base_model else models[0]
        done = 0

        def merged(name: str) -> np.ndarray:
            nonlocal done
            value = _merge_tensor(recipe, name, [m.read(name) for m in models], tensors[name])
            done += 1
            if progress:
                progress(done, len(tensors))
            return value

        with _appearing(out) as partial:
            write_shards(partial, tensors, merged, max_shard_bytes)
            _write_config(partial, donor, {t.dtype for t in tensors.values()})
            for file in COMPANIONS:
                if (donor.directory / file).is_file():
                    shutil.copyfile(donor.directory / file, partial / file)
            card = _model_card(recipe, list(zip(names, models, strict=True)))
            (partial / "README.md").write_text(card, encoding="utf-8")
    return MergeResult(
        directory=out,
        tensors=len(tensors),
        parameters=sum(int(np.prod(t.shape)) for t in tensors.values()),
        nbytes=sum(t.nbytes for t in tensors.values()),
    )


def _merge_tensor(
    recipe: MergeRecipe, name: str, values: list[np.ndarray], info: TensorInfo
) -> np.ndarray:
    if recipe.dtype:
        values = [v.astype(FLOATS[recipe.dtype]) for v in values]
    trees = [{name: v} for v in values]  # the name, for the error message
    weights = [m.weight for m in recipe.inputs]
    dtype = FLOATS[info.dtype]
    if recipe.merge_method == "linear":
        out = linear(trees, weights, recipe.normalized, dtype)
    else:
        compute = None if recipe.compute_dtype == "native" else np.float32
        out = task_arithmetic(
            *(trees[0], trees[1:], weights, recipe.lambda_, recipe.normalized, dtype, compute)
        )
    return out[name]


def _out_dtype(recipe: MergeRecipe, stored: list[str]) -> str:
    if unknown := [d for d in stored if d not in FLOATS]:
        raise UserError(f"dtype {unknown[0]} cannot be merged; convert the checkpoint to a float")
    promoted = np.result_type(*(FLOATS[d] for d in stored)).name
    return recipe.out_dtype or recipe.dtype or promoted


def _check_same(models: list[Checkpoint], names: list[str]) -> None:
    """Same tensors, shapes, architecture and token ids, or a UserError that says which differs."""
    union = sorted({t for m in models for t in m.tensors})
    for tensor in union:
        for m, name in zip(models, names, strict=True):
            if tensor not in m.tensors:
                raise UserError(
                    f"tensor {tensor} is missing from {name}; merge models of one architecture, "
                    "all with tied or all with untied embeddings"
                )
            mine, first = m.tensors[tensor].shape, models[0].tensors[tensor].shape
            if mine != first:
                raise UserError(
                    f"tensor {tensor} has shape {first} in {names[0]} but {mine} in {name}; "
                    "merge models of one architecture and one vocabulary"
                )
    first_config, first_vocab = _architecture(models[0].config), _vocabulary(models[0])
    for m, name in zip(models[1:], names[1:], strict=True):
        config = _architecture(m.config)
        for key in ARCHITECTURE:
            a, b = first_config.get(key), config.get(key)
            if a is not None and b is not None and a != b:
                raise UserError(
                    f"{key} is {a!r} in {names[0]} but {b!r} in {name}; "
                    "merge models of one architecture"
                )
        for token, i in _vocabulary(m).items():
            if first_vocab.get(token, i) != i:
                raise UserError(
                    f"token {token!r} has id {first_vocab[token]} in {names[0]} but {i} in {name}; "
                    "merge models of one tokenizer"
                )


def _architecture(config: dict[str, Any]) -> dict[str, Any]:
    """The config with rope settings under their older names, which transformers 5 nests."""
    rope = config.get("rope_parameters")
    return {**config, "rope_theta": rope.get("rope_theta")} if isinstance(rope, dict) else config


def _vocabulary(model: Checkpoint) -> dict[str, int]:
    """Token -> id from tokenizer.json; empty when there is none or it is of another kind."""
    path = model.directory / "tokenizer.json"
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{path} is not JSON ({e}); copy the checkpoint again") from None
    vocab = data.get("model", {}).get("vocab", {})
    added = {t["content"]: t["id"] for t in data.get("added_tokens", [])}
    return {**vocab, **added} if isinstance(vocab, dict) else added


def _find(name: str, roots: Sequence[Path]) -> Path:
    tried = [root / name for root in roots]
    for path in tried:
        if path.is_dir():
            return path
    raise UserError(
        f"model {name} is not a directory (tried {', '.join(str(p) for p in tried)}); "
        "give the path of a Hugging Face checkpoint"
    )


@contextlib.contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A directory beside `out` that becomes `out` when the block ends well, and vanishes if not."""
    partial = out.absolute().with_name(f".{out.absolute().name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
    except OSError as e:
        raise UserError(f"output {out} cannot be created: {e}; choose another") from None
    try:
        yield partial
        os.replace(partial, out)
    except BaseException as e:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(e, OSError):  # a full disk, most of the time
            raise UserError(f"output {out} cannot be written: {e}; free space or move it") from e
        raise


def _write_config(directory: Path, donor: Checkpoint, dtypes: set[str]) -> None:
    config = dict(donor.config)
    if len(dtypes) == 1:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = next(iter(dtypes))
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")


def _model_card(recipe: MergeRecipe, models: list[tuple[str, Checkpoint]]) -> str:
    rows = [
        f"| {name} | {file} | `{digest}` |"
        for name, model in models
        for file, digest in model.sha256().items()
    ]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "tags:",
            "- merge",
            "---",
            "# Merged model",
            "",
            f"{recipe.merge_method.replace('_', ' ').capitalize()} of {len(recipe.inputs)} "
            "checkpoints, accumulated in float32 and rounded once.",
            "",
            "```yaml",
            recipe.to_yaml().rstrip(),
            "```",
            "",
            "| input | file | sha256 |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )
