"""Hugging Face checkpoint directories: safetensors in, safetensors out, bit for bit.

Only numpy touches the files. The key map and the layout come from `params.param_specs`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from agentcpm_jax import tree
from agentcpm_jax.model.config import DTYPES, ModelConfig, from_hf_config, to_hf_config
from agentcpm_jax.model.hf_files import (
    INDEX,
    SINGLE,
    Tensors,
    aligned_empty,
    read_json,
    transpose_into,
    write_file,
)
from agentcpm_jax.model.params import Params, ParamSpec, param_specs
from agentcpm_jax.types import UserError

PIECE_BYTES = 256 << 20  # of a parameter, on its way to a device
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
    layers_at_once: int | None = None,
) -> tuple[Params, ModelConfig]:
    """Parameters and configuration of a Qwen3 checkpoint directory.

    Files are mapped, not read. On the CPU what is read becomes the parameters; for other devices
    some layers of one parameter, and of them this host's part, are in memory at a time.

    Args:
      directory: holds config.json and safetensors, in one file or sharded with an index.
      cfg: must agree with config.json in sizes and numerics; its dtypes and remat are kept.
        Default: what config.json says.
      param_dtype: 'float32' or 'bfloat16'. Default: `cfg.param_dtype` if cfg is given, else the
        dtype that is stored, so that nothing is rounded.
      shardings: one for every parameter (`sharding.param_shardings`); each process then reads its
        devices' parts. Default: whole, on the default device.
      layers_at_once: how many layers of a parameter are on their way at a time. Default: all on the
        CPU, elsewhere as many as `PIECE_BYTES` hold.

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
            some = layers_at_once or _layers_at_once(spec, cfg)
            if spec.axes[0] == "layers" and some < spec.shape[0]:
                return _in_pieces(tensors, spec, cfg, sharding, some)
            return _layers(tensors, spec, cfg, sharding, range(spec.shape[0]))

        specs = param_specs(cfg)
        return tree.map_with_path(leaf, specs, *([shardings] if shardings else [])), cfg


def _layers_at_once(spec: ParamSpec, cfg: ModelConfig) -> int:
    if jax.default_backend() == "cpu":
        return spec.shape[0]
    layer = math.prod(spec.shape[1:]) * jnp.dtype(cfg.param_dtype).itemsize
    return max(1, PIECE_BYTES // layer)


def _in_pieces(
    tensors: Tensors, spec: ParamSpec, cfg: ModelConfig, sharding: Any, some: int
) -> jax.Array:
    """A stacked parameter, made on its devices from `some` layers at a time."""
    zeros = jax.jit(partial(jnp.zeros, spec.shape, cfg.param_dtype), out_shardings=sharding)
    put = jax.jit(jax.lax.dynamic_update_slice_in_dim, static_argnums=3, donate_argnums=0)
    out = zeros()
    for first in range(0, spec.shape[0], some):
        first = min(first, spec.shape[0] - some)  # the last piece overlaps: one shape, one program
        piece = _layers(tensors, spec, cfg, sharding, range(first, first + some))
        out = put(out, piece, first, 0).block_until_ready()  # and the host's part is free
    return out


def _layers(
    tensors: Tensors, spec: ParamSpec, cfg: ModelConfig, sharding: Any, rows: range
) -> jax.Array:
    """The part `rows` of a parameter along its first axis."""
    shape = (len(rows), *spec.shape[1:])

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None, "arrays, no other elements"
        own = rows[index[0]]
        return _slice(tensors, spec, (slice(own.start, own.stop), *index[1:]), cfg)

    if sharding is None:
        # Not jnp.asarray, which copies what device_put takes over.
        return jax.device_put(part((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, sharding, part)


def save_hf(
    directory: str | os.PathLike[str],
    params: Mapping[str, Any],
    cfg: ModelConfig,
    *,
    dtype: str | None = None,
    tokenizer_from: str | os.PathLike[str] | None = None,
    max_shard_bytes: int = 4 << 30,
    describe: Callable[[Mapping[str, str]], Mapping[str, str]] = lambda hashes: {},
) -> None:
    """Writes a directory that `load_hf` and `transformers.AutoModelForCausalLM` read.

    It appears whole or not at all: written beside its place, then renamed. A checkpoint that is
    there already is replaced. Of parameters on a mesh one tensor of one layer is gathered at a
    time; of several processes all call this, and the first one writes.

    Args:
      directory: the place; its parents are made.
      params: the tree of `params.init`, of jax or numpy arrays.
      cfg: its configuration.
      dtype: 'float32' or 'bfloat16'; default: as the parameters are.
      tokenizer_from: a directory whose tokenizer, chat template and generation config are copied.
      max_shard_bytes: larger checkpoints are split into several files with an index.
      describe: {weight file: sha256} -> {file: text} of what else goes into the directory, such as
        a model card.

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
    if jax.process_index() > 0:
        for _ in hf_tensors(params, cfg, dtype):  # this process's part of every gathering
            pass
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (
        directory.with_name(f".{directory.name}.{w}-{os.getpid()}") for w in ("tmp", "old")
    )
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        hashes = _write_shards(fresh, params, cfg, dtype, max_shard_bytes)
        saved = dtype or str(np.dtype(params["embed"].dtype))
        hf_config = to_hf_config(dataclasses.replace(cfg, param_dtype=saved))
        (fresh / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n")
        if tokenizer_from is not None:
            for name in TOKENIZER_FILES:
                if (Path(tokenizer_from) / name).is_file():
                    shutil.copyfile(Path(tokenizer_from) / name, fresh / name)
        for name, text in describe(hashes).items():
            (fresh / name).write_text(text)
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
        for key, index in _keys(spec):
            yield key, _to_hf(_on_host(flat[path], index), spec, dtype)


def hf_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{key: shape} of every tensor of the file format."""
    specs = tree.flatten(param_specs(cfg)).values()
    return {key: _hf_shape(spec) for spec in specs for key, _ in _keys(spec)}


def _on_host(leaf: Any, index: Any) -> np.ndarray:
    """One layer of a parameter, or all of it (...), put together from the devices that hold it."""
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)[index]
    if not leaf.is_fully_addressable:  # spread over processes
        layer = None if index is ... else jnp.int32(index)
        whole = NamedSharding(leaf.sharding.mesh, PartitionSpec())  # type: ignore[attr-defined]
        return np.asarray(_gather(whole)(leaf, layer).addressable_data(0))
    parts = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
    if len(parts) == 1:
        return _part(parts[0].data, index)
    out = np.empty(leaf.shape if index is ... else leaf.shape[1:], leaf.dtype)
    for shard in parts:  # no rule splits the axis of layers
        out[shard.index if index is ... else shard.index[1:]] = _part(shard.data, index)
    return out


def _part(data: jax.Array, index: Any) -> np.ndarray:
    if next(iter(data.devices())).platform == "cpu":
        return np.asarray(data)[index]  # a view
    return np.asarray(data[index])


@functools.cache
def _gather(whole: NamedSharding) -> Any:
    def one(x: jax.Array, layer: jax.Array | None) -> jax.Array:
        return x if layer is None else jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)

    return jax.jit(one, out_shardings=whole)


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
) -> dict[str, str]:
    shards = _plan(params, cfg, dtype, max_shard_bytes)
    tensors = hf_tensors(params, cfg, dtype)
    weight_map: dict[str, str] = {}
    hashes: dict[str, str] = {}
    total = 0
    for number, keys in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        shapes = {key: hf_shapes(cfg)[key] for key in keys}
        stored = dtype or str(np.dtype(params["embed"].dtype))
        pieces = (next(tensors)[1] for _ in keys)
        written, hashes[name] = write_file(directory / name, shapes, stored, pieces)
        total += written
        weight_map.update(dict.fromkeys(keys, name))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return hashes


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
