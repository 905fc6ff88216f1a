"""Parameters on their way back to the engines, and back from disk: Hugging Face directories.

One format for every reader: SGLang, our server and `load_version` take the same files (`store` has
the layout and the rules of publication). Conversion streams: a piece of one layer's tensor goes
from the devices to the host, into the file and away; no host ever holds the model.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from agentcpm_jax import tree
from agentcpm_jax.merge.shards import INDEX, FileLayout, TensorInfo, plan_files
from agentcpm_jax.model import lora
from agentcpm_jax.model.config import ModelConfig, to_hf_config
from agentcpm_jax.model.hf import TOKENIZER_FILES, hf_shapes, load_hf
from agentcpm_jax.model.params import ParamSpec, param_specs
from agentcpm_jax.types import UserError
from agentcpm_jax.weights.store import (
    VersionWriter,
    check_file,
    manifest,
    open_root,
    versions,
)

MAX_FILE_BYTES = 4 << 30
PIECE_BYTES = 32 << 20  # of a tensor, on its way through the host
TILE = (128, 1024)  # rows and columns
AHEAD = 3  # pieces that are ready before they are written


def publish_version(
    root: str | Path,
    version: int,
    params: Mapping[str, Any],
    cfg: ModelConfig,
    *,
    dtype: str = "",
    tokenizer_from: str | Path | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    describe: Callable[[], Mapping[str, str]] = dict,
) -> bool:
    """Writes one version of the weights; False when it exists or was collected already.

    Args:
      root: a directory or an fsspec URL; only one process publishes there.
      version: completed RL batches of the stage, 0 to 999,999.
      params: the tree of `model.params.init`, on any mesh of this process; adapters beside it are
        added to it.
      dtype: 'float32' or 'bfloat16'; empty: as the parameters are, bit for bit.
      tokenizer_from: a directory whose tokenizer, chat template and generation config go along.
      max_file_bytes: a new file is begun before one grows beyond this; a larger tensor has a file
        of its own.
      describe: {file: text} of what else goes along, such as a model card.

    Raises:
      UserError: the place cannot be used. ValueError: `params` are not the parameters of `cfg`.
    """
    stable = versions(root)
    if stable and (version in stable or version < stable[0]):
        return False
    if "adapters" in params:  # engines know nothing of them
        base = {name: leaf for name, leaf in params.items() if name != "adapters"}
        params = lora.merge(base, params["adapters"], cfg)
    saved = dtype or str(np.dtype(params["embed"].dtype))
    sources = dict(_sources(cfg))
    flat = tree.flatten(params)
    _check_shapes(flat, cfg)
    shapes = hf_shapes(cfg)
    layouts = plan_files({k: TensorInfo(shapes[k], saved) for k in sources}, max_file_bytes)
    writer = VersionWriter(root, version)
    try:
        for layout in layouts:
            writer.write(layout.name, _file(layout, flat, sources, saved))
        if len(layouts) > 1:
            writer.write(INDEX, [_index(layouts, shapes, saved)])
        config = to_hf_config(dataclasses.replace(cfg, param_dtype=saved))
        writer.write("config.json", [json.dumps(config, indent=2).encode()])
        for name in TOKENIZER_FILES if tokenizer_from is not None else ():
            if (file := Path(tokenizer_from or "") / name).is_file():
                writer.write(name, [file.read_bytes()])
        for name, text in describe().items():
            writer.write(name, [text.encode()])
        writer.commit({"model": dataclasses.asdict(cfg), "dtype": saved})
    except BaseException as error:
        writer.discard()
        if isinstance(error, OSError):
            fix = "free some space or name another pool.weights_dir"
            raise UserError(f"weights cannot be written to {root}: {error}; {fix}") from None
        raise
    return True


def load_version(root: str | Path, version: int) -> dict[str, Any]:
    """The parameters of a stable version, bit for bit, as arrays on the default device.

    Raises:
      UserError: the version is not there, or not on a disk of this machine, or a file's size or
        checksum is not the manifest's.
    """
    place = open_root(root)
    if not place.local:
        raise UserError(f"weights at {root} cannot be read in place; copy them to a local disk")
    directory = Path(place.version(version))
    for name, expected in manifest(root, version)["files"].items():
        check_file(directory / name, expected)
    return load_hf(directory)[0]


def _sources(cfg: ModelConfig) -> Iterator[tuple[str, tuple[str, int | None, ParamSpec]]]:
    """(file key, (path of the parameter, its layer or None, what it is))."""
    for path, spec in tree.flatten(param_specs(cfg)).items():
        if spec.axes[0] != "layers":
            yield spec.hf_key, (path, None, spec)
            continue
        for layer in range(spec.shape[0]):
            yield spec.hf_key.format(layer), (path, layer, spec)


def _check_shapes(flat: Mapping[str, Any], cfg: ModelConfig) -> None:
    specs = tree.flatten(param_specs(cfg))
    if flat.keys() != specs.keys():
        wrong = sorted(flat.keys() ^ specs.keys())
        raise ValueError(f"parameters {wrong} are missing or too many")
    for path, spec in specs.items():
        if tuple(flat[path].shape) != spec.shape:
            raise ValueError(f"{path} has shape {tuple(flat[path].shape)}, expected {spec.shape}")


def _file(
    layout: FileLayout,
    flat: Mapping[str, Any],
    sources: Mapping[str, tuple[str, int | None, ParamSpec]],
    dtype: str,
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
        yield _bytes(piece.result())
        free.append(memory)

    with ThreadPoolExecutor(2) as converters:
        for key, _ in layout.tensors:
            path, layer, spec = sources[key]
            for work in _pieces(flat[path], layer, spec, dtype):
                memory = free.pop()
                waiting.append((converters.submit(work, memory), memory))
                if not free:
                    yield from oldest()
        while waiting:
            yield from oldest()


def _pieces(
    leaf: Any, layer: int | None, spec: ParamSpec, dtype: str
) -> Iterator[Callable[[np.ndarray], np.ndarray]]:
    """How to make the rows of the tensor as files hold it, [outputs, inputs] for a matrix.

    Each takes memory that it may use.
    """
    shape = spec.shape if layer is None else spec.shape[1:]
    inputs = math.prod(shape[: spec.hf_inputs])
    rows = math.prod(shape) // inputs if spec.hf_inputs else shape[0]
    width = math.prod(shape) // rows * np.dtype(jnp.dtype(dtype)).itemsize
    step = max(1, PIECE_BYTES // width)
    turned = inputs if spec.hf_inputs else 0
    convert = _host_rows
    if isinstance(leaf, jax.Array):
        if _in_host_memory(leaf):
            leaf = np.asarray(leaf)  # a view
        else:
            convert = partial(_device_rows, _on_device(leaf.sharding))
    for start in range(0, rows, step):
        size = min(step, rows - start)
        yield partial(convert, leaf, layer, start, size, turned, dtype)


def _bytes(piece: np.ndarray) -> Any:
    # bfloat16 has no buffer protocol of its own.
    return piece.reshape(-1).view(np.uint8).data


def _in_host_memory(leaf: jax.Array) -> bool:
    (first, *others) = leaf.devices()
    return not others and first.platform == "cpu"


def _device_rows(compiled: Callable[..., Any], *what: Any) -> np.ndarray:
    return np.ascontiguousarray(compiled(*what[:-1]))  # its memory is its own


def _rows(x: Any, layer: Any, start: Any, size: int, turned: int, dtype: str) -> Any:
    if layer is not None:
        x = x[layer]
    if turned:
        x = x.reshape(turned, -1)
    x = jax.lax.dynamic_slice_in_dim(x, start, size, axis=1 if turned else 0)
    return (x.T if turned else x).astype(dtype)


def _host_rows(
    x: np.ndarray,
    layer: int | None,
    start: int,
    size: int,
    turned: int,
    dtype: str,
    out: np.ndarray,
) -> np.ndarray:
    if layer is not None:
        x = x[layer]
    if turned:
        x = _turn(x.reshape(turned, -1)[:, start : start + size], out)
    else:
        x = x[start : start + size]
    return np.ascontiguousarray(x.astype(jnp.dtype(dtype), copy=False))


def _turn(x: np.ndarray, out: np.ndarray) -> np.ndarray:
    """The transposed matrix in the memory `out`, u8[bytes], where that is large enough.

    By tiles that stay in the cache: five times as fast. They are copied into longer rows first:
    widths are powers of two, of which a cache holds few rows at a time.
    """
    plain = x.view(f"u{x.dtype.itemsize}")  # numpy copies its own types faster than bfloat16
    there = out[: x.nbytes] if x.nbytes <= len(out) else np.empty(x.nbytes, np.uint8)
    turned = there.view(plain.dtype).reshape(plain.shape[::-1])
    rows, columns = TILE
    longer = np.empty((rows, columns + 32), plain.dtype)
    for i in range(0, plain.shape[0], rows):
        for j in range(0, plain.shape[1], columns):
            part = plain[i : i + rows, j : j + columns]
            tile = longer[: part.shape[0], : part.shape[1]]
            tile[:] = part
            turned[j : j + columns, i : i + rows] = tile.T
    return turned.view(x.dtype)


def _on_device(sharding: Any) -> Any:
    """`_rows` compiled; what is spread over a mesh is gathered, a piece at a time."""
    spread = isinstance(sharding, NamedSharding) and sharding.mesh.size > 1
    return _compiled(NamedSharding(sharding.mesh, PartitionSpec()) if spread else None)


@lru_cache
def _compiled(gathered: NamedSharding | None) -> Any:
    return jax.jit(_rows, static_argnums=(3, 4, 5), out_shardings=gathered)


def _index(layouts: list[FileLayout], shapes: Mapping[str, tuple[int, ...]], dtype: str) -> bytes:
    total = sum(TensorInfo(shape, dtype).nbytes for shape in shapes.values())
    where = dict(sorted((key, file.name) for file in layouts for key, _ in file.tensors))
    content = {"metadata": {"total_size": total}, "weight_map": where}
    return json.dumps(content, indent=2).encode()
