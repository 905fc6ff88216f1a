"""From a Hugging Face directory to parameters, bit for bit; numpy alone touches the files."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agentcpm_jax import tree
from agentcpm_jax.hf.files import Checkpoint, transpose_into
from agentcpm_jax.hf.locate import find_model
from agentcpm_jax.hf.names import (
    inputs_outputs,
    keys,
    stacked,
)
from agentcpm_jax.hf.shape import check_stored, stored_shape
from agentcpm_jax.model.config import DTYPES, ModelConfig
from agentcpm_jax.model.params import Params, ParamSpec, param_specs
from agentcpm_jax.types import UserError

PIECE_BYTES = 256 << 20  # of a parameter, on its way to a device


def load_hf(
    directory: str | os.PathLike[str],
    cfg: ModelConfig | None = None,
    param_dtype: str | None = None,
    shardings: Mapping[str, Any] | None = None,
) -> tuple[Params, ModelConfig]:
    """Parameters and configuration of a Qwen3 checkpoint directory.

    Files are mapped, not read. On the CPU what is read becomes the parameters; for other devices
    some layers of one parameter, and of them this host's part, are in memory at a time.

    Args:
      directory: holds config.json and safetensors, in one file or sharded with an index; or the
        name of a model that comes with the package or is in the local Hub cache.
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
    with Checkpoint(find_model(directory)) as stored:
        if cfg is None:
            cfg = stored_shape(stored)
        else:
            param_dtype = param_dtype or cfg.param_dtype
        check_stored(stored, cfg)
        specs = param_specs(cfg)
        if param_dtype is None:
            param_dtype = _dtype(stored, specs["embed"].hf_key)
        cfg = dataclasses.replace(cfg, param_dtype=param_dtype)

        def leaf(_: str, spec: ParamSpec, sharding: Any = None) -> Any:
            some = _layers_at_once(spec, cfg)
            if stacked(spec) and some < spec.shape[0]:
                return _in_pieces(stored, spec, cfg, sharding, some)
            return _layers(stored, spec, cfg, sharding, range(spec.shape[0]))

        return tree.map_with_path(leaf, specs, *([shardings] if shardings else [])), cfg


def _dtype(stored: Checkpoint, key: str) -> str:
    """The stored dtype of a tensor; raises `UserError` when parameters cannot have it."""
    dtype = stored.tensors[key].dtype
    if dtype not in DTYPES:
        raise UserError(
            f"{stored.places[key]}: tensor {key} is stored as {dtype}; give param_dtype "
            + " or ".join(DTYPES)
        )
    return dtype


def _layers_at_once(spec: ParamSpec, cfg: ModelConfig) -> int:
    """How many layers of a parameter are on their way at a time: all on the CPU."""
    if jax.default_backend() == "cpu":
        return spec.shape[0]
    layer = math.prod(spec.shape[1:]) * jnp.dtype(cfg.param_dtype).itemsize
    return max(1, PIECE_BYTES // layer)


def _in_pieces(
    stored: Checkpoint, spec: ParamSpec, cfg: ModelConfig, sharding: Any, some: int
) -> jax.Array:
    """A stacked parameter, made on its devices from `some` layers at a time."""
    zeros = jax.jit(partial(jnp.zeros, spec.shape, cfg.param_dtype), out_shardings=sharding)
    put = jax.jit(jax.lax.dynamic_update_slice_in_dim, static_argnums=3, donate_argnums=0)
    out = zeros()
    for first in range(0, spec.shape[0], some):
        first = min(first, spec.shape[0] - some)  # the last piece overlaps: one shape, one program
        piece = _layers(stored, spec, cfg, sharding, range(first, first + some))
        out = put(out, piece, first, 0).block_until_ready()  # and the host's part is free
    return out


def _layers(
    stored: Checkpoint, spec: ParamSpec, cfg: ModelConfig, sharding: Any, rows: range
) -> jax.Array:
    """The part `rows` of a parameter along its first axis."""
    shape = (len(rows), *spec.shape[1:])

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None, "arrays, no other elements"
        own = rows[index[0]]
        return _slice(stored, spec, (slice(own.start, own.stop), *index[1:]), cfg)

    if sharding is None:
        # Not jnp.asarray, which copies what device_put takes over.
        return jax.device_put(part((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, sharding, part)


def _slice(stored: Checkpoint, spec: ParamSpec, index: tuple[slice, ...], cfg: ModelConfig) -> Any:
    """The part `index` of a stacked parameter, in `cfg.param_dtype`, from the files."""
    ranges = [range(*part.indices(size)) for part, size in zip(index, spec.shape, strict=True)]
    out = _aligned_empty(tuple(len(r) for r in ranges), jnp.dtype(cfg.param_dtype))
    names, layered = keys(spec), stacked(spec)
    inputs, outputs = inputs_outputs(spec)
    inner = index[1:] if layered else index
    for place, number in enumerate(ranges[0] if layered else (0,)):
        found = stored.read(names[number])
        target = out[place] if layered else out
        if inputs:
            cut = len(inputs)
            part = found.reshape(*outputs, *inputs)[(*inner[cut:], *inner[:cut])]
            transpose_into(target.reshape(math.prod(target.shape[:cut]), -1), part)
        else:
            target[...] = found[inner]
        stored.release(names[number])
    return out


def _aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised array on a 64-byte boundary: XLA takes it over without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)
