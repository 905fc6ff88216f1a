"""Safetensors and JSON files of a Hugging Face directory: one reader, one writer; numpy only.

Reading maps the files into memory: a tensor is a view of the page cache, and `release` hands its
pages back. Writing streams: the header of a safetensors file says where every tensor lies, and
shapes are known before any value is, so a file is never held in memory and can be continued after
any of its tensors.

A transposing copy between two-byte numbers is bound by the cache: rows that lie a power of two
apart fall on the same few lines of it. `transpose_into` therefore copies blocks to rows that do
not, and writes a block's columns, four lines each, from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # registers bfloat16 with numpy
import numpy as np

from agentcpm_jax.hf.names import CONFIG, INDEX, SINGLE, embedding_names, text_config
from agentcpm_jax.types import UserError

FLOATS = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
CODES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
LONGEST_HEADER = 100_000_000  # bytes; what the format allows
HEADS = ("head", "output", "embed_out")  # in the names of matrices from states to tokens
# The bits of the exponent: all ones in NaN and infinities, and nowhere else. Comparing them takes a
# quarter of the time of np.isfinite, on half the bytes.
EXPONENT = {FLOATS["float16"]: np.uint16(0x7C00), FLOATS["bfloat16"]: np.uint16(0x7F80)}
IN_CACHE = 1 << 16  # numbers that are looked at together
BLOCK = (128, 1024)  # rows and columns of a transposing copy
APART = 32  # numbers between its rows


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype name (`float32`, `bfloat16`, or the file's own code if not a float)."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * FLOATS[self.dtype].itemsize


class Checkpoint:
    """A directory with config.json and safetensors files, opened lazily; use `with`.

    Raises UserError for a directory, file or index that is missing, truncated or inconsistent.
    """

    def __init__(self, directory: Path):
        self.directory = self.companions = directory  # tokenizer files lie in `companions`
        self.config = read_json(directory / CONFIG)
        self.files = _weight_files(directory)
        self.tensors: dict[str, TensorInfo] = {}
        self.places: dict[str, Path] = {}  # name -> file
        self._mapped: dict[str, tuple[mmap.mmap, int, int]] = {}  # name -> file, start, end

    def __enter__(self) -> Checkpoint:
        for path in self.files:
            mapped, tensors = open_safetensors(path)
            for name, (info, start, end) in tensors.items():
                if name in self.tensors:
                    raise UserError(f"{path} repeats tensor {name}; copy the checkpoint again")
                self.tensors[name], self.places[name] = info, path
                self._mapped[name] = (mapped, start, end)
        self._check_index()
        self._check_tied()
        return self

    def __exit__(self, *exc: object) -> None:
        self._mapped.clear()  # a map is closed when the last view of it goes

    def read(self, name: str) -> np.ndarray:
        """A read-only view of one tensor in its stored dtype."""
        mapped, start, end = self._mapped[name]
        named = f"{self.places[name]}: tensor {name}"
        return _view(named, mapped, self.tensors[name], start, end)

    def copies(self, name: str) -> bool:
        """Whether `read` makes a new array instead of a view."""
        return False

    def release(self, name: str) -> None:
        """Takes the tensor's pages out of this process; the next `read` finds them again."""
        mapped, start, end = self._mapped[name]
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = end // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0:
            mapped.madvise(mmap.MADV_DONTNEED, first, length)

    def _check_index(self) -> None:
        index = self.directory / INDEX
        if self.files != [self.directory / SINGLE] or SINGLE in _named(index):
            for name in sorted(read_json(index)["weight_map"].keys() - self.tensors.keys()):
                raise UserError(
                    f"tensor {name} of {index} is in none of its files; copy them again"
                )

    def _check_tied(self) -> None:
        """Leaves the copy of a tied embedding out; raises UserError if it is no copy."""
        if not text_config(self.config).get("tie_word_embeddings"):
            return
        names = embedding_names(self.config, self.tensors)
        heads = [name for name in names if any(word in name for word in HEADS)]
        for head in heads if len(names) == 2 and len(heads) == 1 else ():
            (embedding,) = {*names} - {head}
            ours, copy = (self.read(name).view(np.uint8) for name in (embedding, head))
            same = self.tensors[embedding] == self.tensors[head] and np.array_equal(ours, copy)
            self.release(embedding)
            if not same:
                raise UserError(
                    f"{self.places[head]}: tensor {head} differs from {embedding}, but {CONFIG} "
                    "has tie_word_embeddings true; set it to false, or remove the tensor"
                )
            self.release(head)
            del self.tensors[head]


def read_file(path: Path) -> dict[str, np.ndarray]:
    """Read-only views of the tensors of one file. Raises UserError."""
    mapped, tensors = open_safetensors(path)
    return {name: _view(f"{path}: tensor {name}", mapped, *at) for name, at in tensors.items()}


def open_safetensors(path: Path) -> tuple[mmap.mmap, dict[str, tuple[TensorInfo, int, int]]]:
    """The mapped file and {name: (info, first byte, last byte + 1)}.

    Raises UserError when the file is cut short or its header does not describe it.
    """
    try:
        with path.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or 8 + length > size or length > LONGEST_HEADER:
                raise ValueError(f"{size} bytes hold no header")
            header = json.loads(f.read(length))
            if not isinstance(header, dict):
                raise ValueError("its header is no object")
            header.pop("__metadata__", None)
            tensors = {n: _entry(n, e, 8 + length) for n, e in header.items()}
            end = 8 + length
            for start, stop in sorted((start, stop) for _, start, stop in tensors.values()):
                if start != end:
                    raise ValueError(f"its tensors leave a gap or overlap at byte {start}")
                end = stop
            if end != size:
                raise ValueError(f"its header promises {end} bytes, it has {size}")
            return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ), tensors
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"{path} is not a whole safetensors file ({e}); copy or convert it again"
        ) from None


def _entry(name: str, entry: dict[str, Any], data: int) -> tuple[TensorInfo, int, int]:
    start, end = entry["data_offsets"]
    info = TensorInfo(tuple(entry["shape"]), CODES.get(entry["dtype"]) or str(entry["dtype"]))
    if info.dtype in FLOATS and info.nbytes != end - start:
        raise ValueError(f"{name} of shape {info.shape} has {end - start} bytes")
    return info, data + start, data + end


def _view(name: str, mapped: mmap.mmap, info: TensorInfo, start: int, end: int) -> np.ndarray:
    if info.dtype not in FLOATS:
        raise UserError(f"{name} has dtype {info.dtype}, which is no float; convert it first")
    flat = np.frombuffer(mapped, np.uint8, end - start, start)
    return flat.view(FLOATS[info.dtype]).reshape(info.shape)


@dataclass(frozen=True)
class FileLayout:
    """One safetensors file to write: its name, header, and tensors in order with their offsets."""

    name: str
    header: bytes
    tensors: tuple[tuple[str, int], ...]


def plan_files(tensors: Mapping[str, TensorInfo], max_file_bytes: int) -> list[FileLayout]:
    """Which tensor goes where; depends on names, shapes and dtypes alone.

    A file is begun before one grows beyond `max_file_bytes`; a larger tensor has one of its own.
    """
    groups = list(_groups(tensors, max_file_bytes))
    files = []
    for i, names in enumerate(groups):
        name = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else SINGLE
        files.append(_layout(name, {n: tensors[n] for n in names}))
    return files


def write_files(
    directory: Path,
    files: list[FileLayout],
    values: Callable[[str], Iterable[np.ndarray]],
    done: int = 0,
    wrote: Callable[[int, int], None] = lambda file, count: None,
) -> None:
    """Writes `values(name)`, pieces of the tensor in order, for every tensor in order.

    Args:
      done: so many tensors are in the files already; they are kept and not asked for.
      wrote: called with (file descriptor, tensors written so far) after each tensor.
    """
    count = 0
    for file in files:
        kept = min(max(done - count, 0), len(file.tensors))
        count += kept
        if kept == len(file.tensors):
            continue
        path = directory / file.name
        with path.open("r+b" if kept else "wb") as f:
            if kept:
                f.truncate(file.tensors[kept][1])
                f.seek(0, os.SEEK_END)
            else:
                f.write(file.header)
            for name, _ in file.tensors[kept:]:
                for piece in values(name):
                    f.write(as_bytes(piece))
                f.flush()
                count += 1
                wrote(f.fileno(), count)
            os.fsync(f.fileno())


def write_file(path: Path, pieces: Iterable[Any]) -> str:
    """A file of bytes-like pieces; returns its sha256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
    return digest.hexdigest()


def index_text(files: Sequence[FileLayout], tensors: Mapping[str, TensorInfo]) -> str:
    """The content of INDEX, which says in which of several files a tensor is."""
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
        "weight_map": dict(sorted((n, f.name) for f in files for n, _ in f.tensors)),
    }
    return json_text(index)


def as_bytes(array: np.ndarray) -> memoryview:
    """The numbers as they go into a file; bfloat16 has no buffer protocol of its own."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def not_finite(x: np.ndarray) -> int:
    """How many numbers are NaN or infinite."""
    flat = x.reshape(-1)
    pieces = (flat[at : at + IN_CACHE] for at in range(0, flat.size, IN_CACHE))
    broken = (piece for piece in pieces if not all_finite(piece))
    return sum(int(piece.size - np.count_nonzero(np.isfinite(piece))) for piece in broken)


def check_finite(checkpoint: Checkpoint) -> None:
    """Raises UserError that names the first tensor with a number that is not."""
    for name in checkpoint.tensors:
        if count := not_finite(checkpoint.read(name)):
            raise UserError(
                f"{checkpoint.places[name]}: tensor {name} has {count} values that are not finite; "
                "the checkpoint is damaged, use another"
            )
        checkpoint.release(name)


def all_finite(x: np.ndarray) -> bool:
    """Whether none is."""
    exponent = EXPONENT.get(x.dtype)
    if exponent is None:
        return bool(np.isfinite(x).all())
    return not x.size or bool((x.view(np.uint16) & exponent).max() < exponent)


def transpose_into(target: np.ndarray, source: np.ndarray) -> None:
    """target [I,O] = source^T, whose axes [*O,*I] multiply to them; casts when dtypes differ."""
    source = source.reshape(target.shape[1], target.shape[0])
    plain = np.dtype(f"u{target.dtype.itemsize}")
    if target.dtype == source.dtype:  # plain integers: numpy copies bfloat16 one call at a time
        target, source = target.view(plain), source.view(plain)
    rows, columns = BLOCK
    staged = np.empty((rows, columns + APART), target.dtype)
    for row in range(0, source.shape[0], rows):
        for column in range(0, source.shape[1], columns):
            part = source[row : row + rows, column : column + columns]
            block = staged[: part.shape[0], : part.shape[1]]
            block[...] = part
            place = target[column : column + columns, row : row + rows]
            place.view(plain)[...] = block.view(plain).T


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; UserError names the file when it is missing or something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; name a Hugging Face directory") from None
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read: {e}; copy the directory again") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} is not a JSON object; copy the directory again")
    return data


def json_text(value: Any) -> str:
    """As JSON files of a directory are written."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def sha256_of(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _layout(name: str, tensors: Mapping[str, TensorInfo]) -> FileLayout:
    codes = {v: k for k, v in CODES.items()}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # wide dtypes first keeps every tensor aligned to its own width
    order = sorted(tensors, key=lambda n: (-FLOATS[tensors[n].dtype].itemsize, n))
    offset = 0
    for tensor in order:
        info = tensors[tensor]
        entries[tensor] = {
            "dtype": codes[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offset += info.nbytes
    head = json.dumps(entries, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    head = len(head).to_bytes(8, "little") + head
    starts = [len(head) + entries[tensor]["data_offsets"][0] for tensor in order]
    return FileLayout(name, head, tuple(zip(order, starts, strict=True)))


def _groups(tensors: Mapping[str, TensorInfo], max_file_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name in sorted(tensors):
        if names and size + tensors[name].nbytes > max_file_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensors[name].nbytes
    yield names


def _weight_files(directory: Path) -> list[Path]:
    """The one file, as transformers reads first, or those of the index.

    An index may be left from an earlier save; when its files are too, which are meant is unknown.
    """
    if (directory / SINGLE).is_file():
        shards = _named(directory / INDEX)
        for name in shards if SINGLE not in shards else ():
            if (directory / name).is_file():
                raise UserError(
                    f"{directory} has two sets of weights, {SINGLE} and those of {INDEX} ({name}); "
                    "remove one of them"
                )
        shards = shards if SINGLE in shards else []
    else:
        shards = _shards(directory / INDEX)
        others = {p.name for p in directory.glob("model-*-of-*.safetensors")} - {*shards}
        if shards and others:
            raise UserError(
                f"{directory} has {min(others)}, which {INDEX} does not name: two sets of weights; "
                "remove one of them"
            )
    for name in shards or [SINGLE]:
        if not (directory / name).is_file():
            raise UserError(
                f"{directory / name} is missing{_instead(directory)}; copy or convert the "
                "directory again"
            )
    return [directory / name for name in shards or [SINGLE]]


def _shards(index: Path) -> list[str]:
    """The files that an index names; none where there is no index."""
    if not index.exists():
        return []
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index} has no weight_map; copy or convert the directory again")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{index} names {name!r}, which is no file beside it; copy it again")
    return sorted(set(names.values()))


def _named(index: Path) -> list[str]:
    """The same of an index that nothing depends on, whatever is wrong with it."""
    with contextlib.suppress(UserError):
        return _shards(index)
    return []


def _instead(directory: Path) -> str:
    """What lies there that is not read, for a message."""
    if pickled := sorted(p.name for p in directory.glob("*.bin")):
        return f" ({pickled[0]} is not read: it may run code)"
    found = sorted(p.name for p in directory.glob("*.safetensors"))
    return f" ({found[0]} is there, but no {INDEX})" if found else ""
