"""From parameters to Hugging Face directories: a model's, and PEFT's of an adapter.

Conversion streams: a piece of one layer's tensor goes from the device to the host, into the file
and away. Of parameters on several devices one layer's tensor at a time is put together on the host.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from agentcpm_jax import tree
from agentcpm_jax.hf.companions import companions_of, tokenizer_file
from agentcpm_jax.hf.files import (
    FileLayout,
    TensorInfo,
    as_bytes,
    index_text,
    json_text,
    not_finite,
    plan_files,
    transpose_into,
    write_file,
)
from agentcpm_jax.hf.names import (
    CONFIG,
    INDEX,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    check_shape,
    file_shape,
    file_tensors,
    inputs_outputs,
)
from agentcpm_jax.hf.place import (
    check_adapters,
    check_replaceable,
    output_place,
    whole_or_not_at_all,
)
from agentcpm_jax.model.config import DTYPES, ModelConfig, to_hf_config
from agentcpm_jax.model.lora import adapter_specs
from agentcpm_jax.model.params import ParamSpec, param_specs
from agentcpm_jax.types import UserError

MAX_FILE_BYTES = 4 << 30  # of weights; a new file is begun before one grows beyond this
PIECE_BYTES = 32 << 20  # of a tensor, on its way through the host
AHEAD = 3  # pieces that are ready before they are written
Describe = Callable[[Mapping[str, str]], Mapping[str, str]]


def save_hf(
    directory: str | os.PathLike[str],
    params: Mapping[str, Any],
    cfg: ModelConfig,
    *,
    dtype: str = "",
    tokenizer_from: str | os.PathLike[str] | None = None,
    describe: Describe = lambda hashes: {},
    token_ids: Mapping[str, Any] = {},
) -> None:
    """Writes a directory that `load_hf` and `transformers.AutoModelForCausalLM` read.

    It appears whole or not at all: written beside its place, then renamed. A checkpoint that is
    there already is replaced. Of several processes all call this, and the first one writes.

    Args:
      directory: the place; its parents are made.
      params: the tree of `params.init`, of jax or numpy arrays.
      cfg: its configuration.
      dtype: 'float32' or 'bfloat16'; empty: as the parameters are, bit for bit.
      tokenizer_from: a directory whose tokenizer, chat template and generation config are copied.
      describe: {weight file: sha256} -> {file: text} of what else goes into the directory, such as
        a model card.
      token_ids: what config.json says of them: `eos_token_id` ...

    Raises:
      UserError: the place cannot be written or holds something else than a model of ours, there is
        no tokenizer in `tokenizer_from`, the dtype is unknown, or a parameter is not finite.
      ValueError: `params` are not the parameters of `cfg`.
    """
    place = output_place(Path(directory))
    check_replaceable(place)
    contents = directory_contents(params, cfg, dtype, tokenizer_from, token_ids)
    if jax.process_index() > 0:
        for _, pieces in contents:  # this process's part of every gathering
            deque(pieces, maxlen=0)
        return
    with whole_or_not_at_all(place, check_replaceable) as fresh:
        hashes = {name: write_file(fresh / name, pieces) for name, pieces in contents}
        weights = {name: h for name, h in hashes.items() if name.endswith(".safetensors")}
        for name, text in describe(weights).items():
            (fresh / name).write_text(text)


def directory_contents(
    params: Mapping[str, Any],
    cfg: ModelConfig,
    dtype: str = "",
    tokenizer_from: str | os.PathLike[str] | None = None,
    token_ids: Mapping[str, Any] = {},
) -> Iterator[tuple[str, Iterable[Any]]]:
    """(name, bytes-like pieces) of every file of a directory, to be taken in order.

    Arguments and what is raised, at once: as of `save_hf`.
    """
    if dtype and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not supported; use {' or '.join(DTYPES)}")
    if tokenizer_from is not None and tokenizer_file(Path(tokenizer_from)) is None:
        raise UserError(f"{Path(tokenizer_from) / 'tokenizer.json'} is missing; name its directory")
    flat, specs = tree.flatten(params), tree.flatten(param_specs(cfg))
    _check_params(flat, specs)
    saved = dtype or str(np.dtype(params["embed"].dtype))
    config = {**to_hf_config(dataclasses.replace(cfg, param_dtype=saved)), **token_ids}

    def contents() -> Iterator[tuple[str, Iterable[Any]]]:
        yield from _weight_files(flat, specs, saved, MAX_FILE_BYTES)
        yield CONFIG, [json_text(config).encode()]
        for path in companions_of(Path(tokenizer_from)) if tokenizer_from is not None else ():
            yield path.name, [path.read_bytes()]

    return contents()


def save_peft(
    directory: str | os.PathLike[str],
    adapters: Mapping[str, Any],
    cfg: ModelConfig,
    base: str,
    describe: Describe = lambda hashes: {},
) -> None:
    """Writes a directory that `peft.PeftModel.from_pretrained(model, directory)` reads.

    It appears whole or not at all, as that of `save_hf`; earlier adapters there are replaced.

    Args:
      base: name or path of the base model, recorded in its config.
      describe: as of `save_hf`.
    """
    specs = {
        path: dataclasses.replace(spec, hf_key=f"base_model.model.{spec.hf_key}")
        for path, spec in tree.flatten(adapter_specs(cfg)).items()
    }
    (content,) = _weight_files(tree.flatten(adapters), specs, "float32", sys.maxsize)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": cfg.lora_rank,
        "lora_alpha": cfg.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({spec.hf_key.split(".")[-3] for spec in specs.values()}),
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with whole_or_not_at_all(output_place(Path(directory)), check_adapters) as fresh:
        hashes = {PEFT_WEIGHTS: write_file(fresh / PEFT_WEIGHTS, content[1])}
        for name, text in {PEFT_CONFIG: json_text(config), **describe(hashes)}.items():
            (fresh / name).write_text(text)


def _check_params(flat: Mapping[str, Any], specs: Mapping[str, ParamSpec]) -> None:
    if flat.keys() != specs.keys():
        wrong = sorted(flat.keys() ^ specs.keys())
        raise ValueError(f"parameters {wrong} are missing or too many")
    for path, spec in specs.items():
        fix = "give the parameters of this configuration"
        check_shape(path, flat[path].shape, spec.shape, fix, ValueError)


def _weight_files(
    flat: Mapping[str, Any], specs: Mapping[str, ParamSpec], dtype: str, max_file_bytes: int
) -> Iterator[tuple[str, Iterable[Any]]]:
    """The safetensors files and, of several, their index."""
    sources = file_tensors(specs)
    infos = {k: TensorInfo(file_shape(specs[path]), dtype) for k, (path, _) in sources.items()}
    layouts = plan_files(infos, max_file_bytes)
    for layout in layouts:
        places = [sources[key] for key, _ in layout.tensors]
        parts = [
            (key, flat[path], layer, specs[path])
            for (key, _), (path, layer) in zip(layout.tensors, places, strict=True)
        ]
        yield layout.name, _file(layout, parts, dtype)
    if len(layouts) > 1:
        yield INDEX, [index_text(layouts, infos).encode()]


def _file(
    layout: FileLayout, parts: Iterable[tuple[str, Any, int | None, ParamSpec]], dtype: str
) -> Iterator[Any]:
    """A safetensors file as byte buffers: the header, then every tensor in pieces.

    The next pieces are converted while one is written. Their memory is used again and again: fresh
    pages would cost as much as the conversion.
    """
    yield layout.header
    waiting: deque[tuple[Future[np.ndarray], np.ndarray]] = deque()
    free = [np.empty(PIECE_BYTES, np.uint8) for _ in range(AHEAD + 1)]  # untouched, it costs none

    def oldest() -> Iterator[Any]:
        piece, memory = waiting.popleft()
        yield as_bytes(piece.result())
        free.append(memory)

    with ThreadPoolExecutor(2) as converters:
        for key, leaf, layer, spec in parts:
            for work in _pieces(leaf, layer, spec, dtype):
                memory = free.pop()
                waiting.append((converters.submit(_checked, key, work, memory), memory))
                if not free:
                    yield from oldest()
        while waiting:
            yield from oldest()


def _checked(key: str, work: Callable[[np.ndarray], np.ndarray], memory: np.ndarray) -> np.ndarray:
    """A piece that a reader would take."""
    with np.errstate(over="ignore"):
        piece = work(memory)
    if count := not_finite(piece):
        raise UserError(
            f"tensor {key} has {count} values that are not finite as {piece.dtype}; use an earlier "
            "checkpoint, or another dtype"
        )
    return piece


def _pieces(
    leaf: Any, layer: int | None, spec: ParamSpec, dtype: str
) -> Iterator[Callable[[np.ndarray], np.ndarray]]:
    """How to make the rows of the tensor as files hold it, [outputs, inputs] for a matrix.

    Each takes memory that it may use.
    """
    rows, *rest = file_shape(spec)
    kind = jnp.dtype(dtype)
    step = max(1, PIECE_BYTES // (math.prod(rest) * kind.itemsize))
    turned = math.prod(inputs_outputs(spec)[0]) if spec.hf_inputs else 0
    if isinstance(leaf, jax.Array):
        if len(leaf.devices()) == 1 and not _in_host_memory(leaf):
            for start in range(0, rows, step):
                size = min(step, rows - start)
                yield partial(_device_rows, leaf, layer, start, size, turned, dtype)
            return
        leaf, layer = _on_host(leaf, layer), None
    x = leaf if layer is None else leaf[layer]
    for start in range(0, rows, step):
        yield partial(_host_rows, x, slice(start, start + step), turned, kind)


def _in_host_memory(leaf: jax.Array) -> bool:
    return next(iter(leaf.devices())).platform == "cpu"


def _on_host(leaf: jax.Array, layer: int | None) -> np.ndarray:
    """One layer of a parameter, or all of it, put together from the devices that hold it."""
    if not leaf.is_fully_addressable:  # spread over processes
        whole = NamedSharding(leaf.sharding.mesh, PartitionSpec())  # type: ignore[attr-defined]
        number = None if layer is None else jnp.int32(layer)
        return np.asarray(_gather(whole)(leaf, number).addressable_data(0))
    if len(leaf.devices()) == 1:
        return np.asarray(leaf) if layer is None else np.asarray(leaf)[layer]  # a view
    first = 0 if layer is None else 1
    out = np.empty(leaf.shape[first:], leaf.dtype)
    for shard in leaf.addressable_shards:  # no rule splits the axis of layers
        if shard.replica_id == 0:
            data: Any = np.asarray(shard.data) if _in_host_memory(shard.data) else shard.data
            out[shard.index[first:]] = data if layer is None else data[layer]
    return out


@functools.cache
def _gather(whole: NamedSharding) -> Any:
    def one(x: jax.Array, layer: jax.Array | None) -> jax.Array:
        return x if layer is None else jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)

    return jax.jit(one, out_shardings=whole)


def _host_rows(
    x: np.ndarray, rows: slice, turned: int, kind: np.dtype, out: np.ndarray
) -> np.ndarray:
    if not turned:
        return x[rows].astype(kind, copy=False)
    part = x.reshape(turned, -1)[:, rows]
    needed = part.size * kind.itemsize
    memory = out[:needed] if needed <= len(out) else np.empty(needed, np.uint8)
    piece = memory.view(kind).reshape(part.shape[::-1])
    transpose_into(piece, part)
    return piece


def _device_rows(*what: Any) -> np.ndarray:
    return np.ascontiguousarray(_rows(*what[:-1]))  # its memory is its own


@partial(jax.jit, static_argnums=(3, 4, 5))
def _rows(x: Any, layer: Any, start: Any, size: int, turned: int, dtype: str) -> Any:
    if layer is not None:
        x = x[layer]
    if turned:
        x = x.reshape(turned, -1)
    x = jax.lax.dynamic_slice_in_dim(x, start, size, axis=1 if turned else 0)
    return (x.T if turned else x).astype(dtype)
