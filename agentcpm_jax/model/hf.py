"""Hugging Face checkpoint directories: safetensors in, safetensors out, bit for bit.

Only numpy touches the files. The key map and the layout come from `params.param_specs`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from agentcpm_jax import tree
from agentcpm_jax.model.config import DTYPES, ModelConfig, from_hf_config, to_hf_config
from agentcpm_jax.model.hf_files import (
    INDEX,
    SINGLE,
    Tensors,
    aligned_empty,
    read_json,
    transpose_into,
)
from agentcpm_jax.model.params import Params, ParamSpec, param_specs
from agentcpm_jax.types import UserError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def load_hf(
    directory: str | os.PathLike[str],
    cfg: ModelConfig | None = None,
    param_dtype: str | None = None,
    shardings: Mapping[str, Any] | None = None,
) -> tuple[Params, ModelConfig]:
    """Parameters and configuration of a Qwen3 checkpoint directory.

    Files are mapped, not read: beside the parameters themselves no more than one device's part of
    one parameter is in memory.

    Args:
      directory: holds config.json and safetensors, in one file or sharded with an index.
      cfg: must agree with config.json in sizes and numerics; its dtypes and remat are kept.
        Default: what config.json says.
      param_dtype: 'float32' or 'bfloat16'. Default: `cfg.param_dtype` if cfg is given, else the
        dtype that is stored, so that nothing is rounded.
      shardings: one for every parameter (`sharding.param_shardings`); each process then reads its
        devices' parts. Default: whole, on the default device.

    Returns:
      The tree of `params.init` as jax arrays, and the configuration with its `param_dtype` set.

    Raises:
      UserError: something is missing, truncated, unexpected or of another shape.
    """
    directory = Path(directory)
    stored = from_hf_config(read_json(directory, "config.json"))
    if cfg is None:
        cfg = stored
    else:
        _same_model(directory, cfg, stored)
        param_dtype = param_dtype or cfg.param_dtype
    with contextlib.ExitStack() as stack:
        tensors = Tensors(directory, stack)
        tensors.check_keys(hf_shapes(cfg), cfg.tied_embeddings)
        if param_dtype is None:
            param_dtype = tensors.dtype(param_specs(cfg)["embed"].hf_key)
        cfg = dataclasses.replace(cfg, param_dtype=param_dtype)

        def leaf(_: str, spec: ParamSpec, sharding: Any = None) -> Any:
            if sharding is None:
                return jnp.asarray(_slice(tensors, spec, (slice(None),) * len(spec.shape), cfg))
            return jax.make_array_from_callback(
                spec.shape, sharding, lambda index: _slice(tensors, spec, index or (), cfg)
            )

        specs = param_specs(cfg)
        return tree.map_with_path(leaf, specs, *([shardings] if shardings else [])), cfg


def save_hf(
    directory: str | os.PathLike[str],
    params: Mapping[str, Any],
    cfg: ModelConfig,
    *,
    dtype: str | None = None,
    tokenizer_from: str | os.PathLike[str] | None = None,
    max_shard_bytes: int = 4 << 30,
) -> None:
    """Writes a directory that `load_hf` and `transformers.AutoModelForCausalLM` read.

    It appears whole or not at all: written beside its place, then renamed. A checkpoint that is
    there already is replaced.

    Args:
      directory: the place; its parents are made.
      params: the tree of `params.init`, of jax or numpy arrays.
      cfg: its configuration.
      dtype: 'float32' or 'bfloat16'; default: as the parameters are.
      tokenizer_from: a directory whose tokenizer, chat template and generation config are copied.
      max_shard_bytes: larger checkpoints are split into several files with an index.

    Raises:
      UserError: the place holds something else than a checkpoint, there is no tokenizer in
        `tokenizer_from`, or the dtype is unknown.
      ValueError: `params` are not the parameters of `cfg`.
    """
    directory = Path(directory).absolute()
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not supported; use {' or '.join(DTYPES)}")
    if directory.exists() and not _replaceable(directory):
        raise UserError(f"{directory} exists and is no checkpoint directory; choose another place")
    if tokenizer_from is not None and not (Path(tokenizer_from) / "tokenizer.json").is_file():
        raise UserError(f"{Path(tokenizer_from) / 'tokenizer.json'} is missing; name its directory")
    _check_params(params, cfg)
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (
        directory.with_name(f".{directory.name}.{w}-{os.getpid()}") for w in ("tmp", "old")
    )
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        _write_shards(fresh, params, cfg, dtype, max_shard_bytes)
        saved = dtype or str(np.dtype(params["embed"].dtype))
        hf_config = to_hf_config(dataclasses.replace(cfg, param_dtype=saved))
        (fresh / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n")
        if tokenizer_from is not None:
            for name in TOKENIZER_FILES:
                if (Path(tokenizer_from) / name).is_file():
                    shutil.copyfile(Path(tokenizer_from) / name, fresh / name)
        if directory.exists():
            directory.rename(old)
        fresh.rename(directory)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def hf_tensors(
    params: Mapping[str, Any], cfg: ModelConfig, dtype: str | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """(key, contiguous host array) of every tensor of the file format, one at a time.

    Any tree shaped like the parameters will do, gradients for instance.
    """
    flat = tree.flatten(params)
    for path, spec in tree.flatten(param_specs(cfg)).items():
        host = np.asarray(flat[path])
        for key, index in _keys(spec):
            yield key, _to_hf(host[index], spec, dtype)


def hf_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{key: shape} of every tensor of the file format."""
    specs = tree.flatten(param_specs(cfg)).values()
    return {key: _hf_shape(spec) for spec in specs for key, _ in _keys(spec)}


def _keys(spec: ParamSpec) -> list[tuple[str, Any]]:
    """(file key, index into the stacked parameter); the whole of one that is not stacked."""
    if spec.axes[0] != "layers":
        return [(spec.hf_key, ...)]
    return [(spec.hf_key.format(layer), layer) for layer in range(spec.shape[0])]


def _inputs_outputs(spec: ParamSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    shape = spec.shape[1:] if spec.axes[0] == "layers" else spec.shape
    return shape[: spec.hf_inputs], shape[spec.hf_inputs :]


def _hf_shape(spec: ParamSpec) -> tuple[int, ...]:
    inputs, outputs = _inputs_outputs(spec)
    return (math.prod(outputs), math.prod(inputs)) if inputs else outputs


def _to_hf(x: np.ndarray, spec: ParamSpec, dtype: str | None) -> np.ndarray:
    inputs, _ = _inputs_outputs(spec)
    if inputs:
        x = x.reshape(math.prod(inputs), -1).T
    # safetensors writes the buffer as it lies: a transposed view would be stored scrambled.
    return np.ascontiguousarray(x, dtype=None if dtype is None else jnp.dtype(dtype))


def _slice(tensors: Tensors, spec: ParamSpec, index: tuple[slice, ...], cfg: ModelConfig) -> Any:
    """The part `index` of a stacked parameter, in `cfg.param_dtype`, from the files."""
    ranges = [range(*part.indices(size)) for part, size in zip(index, spec.shape, strict=True)]
    out = aligned_empty(tuple(len(r) for r in ranges), jnp.dtype(cfg.param_dtype))
    keys = _keys(spec)
    stacked = spec.axes[0] == "layers"
    inputs, outputs = _inputs_outputs(spec)
    inner = index[1:] if stacked else index
    for place, number in enumerate(ranges[0] if stacked else (0,)):
        key = keys[number][0]
        found = tensors.get(key, _hf_shape(spec))
        target = out[place] if stacked else out
        if inputs:
            cut = len(inputs)
            part = found.reshape(*outputs, *inputs)[(*inner[cut:], *inner[:cut])]
            transpose_into(target.reshape(math.prod(target.shape[:cut]), -1), part)
        else:
            target[...] = found[inner]
        tensors.release(key)
    return out


def _same_model(directory: Path, cfg: ModelConfig, stored: ModelConfig) -> None:
    free = {"dtype", "param_dtype", "lm_head_fp32", "max_positions"}
    free |= {"remat", "attention", "logits_chunk", "lora_rank", "lora_alpha"}
    for field in dataclasses.fields(ModelConfig):
        ours, theirs = getattr(cfg, field.name), getattr(stored, field.name)
        if field.name not in free and ours != theirs:
            raise UserError(
                f"{directory / 'config.json'} says {field.name} {theirs!r}, the config says "
                f"{ours!r}; make them agree"
            )


def _check_params(params: Mapping[str, Any], cfg: ModelConfig) -> None:
    def same_shape(path: str, spec: ParamSpec, leaf: Any) -> None:
        if tuple(leaf.shape) != spec.shape:
            raise ValueError(f"{path} has shape {tuple(leaf.shape)}, expected {spec.shape}")

    tree.map_with_path(same_shape, param_specs(cfg), params)


def _replaceable(directory: Path) -> bool:
    if not directory.is_dir():
        return False
    return (directory / "config.json").is_file() or not any(directory.iterdir())


def _write_shards(
    directory: Path,
    params: Mapping[str, Any],
    cfg: ModelConfig,
    dtype: str | None,
    max_shard_bytes: int,
) -> None:
    shards = _plan(params, cfg, dtype, max_shard_bytes)
    tensors = hf_tensors(params, cfg, dtype)
    weight_map: dict[str, str] = {}
    total = 0
    for number, keys in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        shard = dict(next(tensors) for _ in keys)
        safetensors.numpy.save_file(shard, directory / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(keys, name))
        total += sum(tensor.nbytes for tensor in shard.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _plan(
    params: Mapping[str, Any], cfg: ModelConfig, dtype: str | None, max_shard_bytes: int
) -> list[list[str]]:
    """Keys in the order of `hf_tensors`, cut so that no shard but a single tensor is too large."""
    flat = tree.flatten(params)
    shards: list[list[str]] = [[]]
    size = 0
    for path, spec in tree.flatten(param_specs(cfg)).items():
        width = np.dtype(jnp.dtype(dtype) if dtype else flat[path].dtype).itemsize
        nbytes = math.prod(_hf_shape(spec)) * width
        for key, _ in _keys(spec):
            if shards[-1] and size + nbytes > max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(key)
            size += nbytes
    return shards
