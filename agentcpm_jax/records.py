"""Records of files that others made: JSON lines, a JSON array or object, parquet, arrow; gzipped.

What a file is, its first bytes say and not its name. Text is kept as it stands (the tokenizer alone
normalises it), with one rule for all of it: half a surrogate pair and NUL are no text, and the
line and the key that hold one are named.
"""

from __future__ import annotations

import datetime
import decimal
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from agentcpm_jax.types import UserError

_HEAD = 512  # bytes that tell a format
_ARCHIVES = {
    b"PK\3\4": "zip",
    b"BZh": "bzip2",
    b"\xfd7zX": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x1f\x8b": "gzip (twice)",
}
#: A file of a folder: [folder/]split[-00000-of-00002].format. `cache-` are results of `map`.
_SHARD = re.compile(
    r"(?!(?:.*/)?cache-)(?P<split>.+?)(?:-\d{5}-of-(?P<of>\d{5})\S*)?"
    r"\.(?:arrow|parquet|jsonl(?:\.gz)?)\Z"
)
_BOM = b"\xef\xbb\xbf"


class Flaw(ValueError):
    """What is wrong with one record: its kind in a word, and the key that shows it."""

    def __init__(self, kind: str, key: str | None, message: str) -> None:
        super().__init__(f"{key}: {message}" if key else message)
        self.kind, self.key = kind, key


class FileRefused(UserError):
    """A file that is not read at all; `kind` says why in a word."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Record:
    """One object of a file. `line` counts lines in JSON lines, else records, from 1.

    Of a `flaw`ed record there is no value. `arrow`: from columns, where null means absent.
    """

    line: int
    value: Mapping[str, Any]
    flaw: Flaw | None = None
    arrow: bool = False


def read_records(path: str | Path) -> Iterator[Record]:
    """The records of a file, or of a folder of shards that are counted on from one to the next.

    Raises:
      UserError: there is no such file.
      FileRefused: it is empty, cut, a pickle or in no format that is read.
    """
    place = Path(path)
    line = 0
    for part in _parts(place):
        before = line
        try:
            for record in _read(part):
                line = before + record.line
                yield replace(record, line=line)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise FileRefused(
                "cut_gzip",
                f"{part} is a gzip stream that was cut or damaged ({error}); fetch it again",
            ) from None
        except FileNotFoundError:
            raise UserError(f"no such file: '{part}'; check the path") from None
        except OSError as error:
            raise FileRefused(
                "unreadable", f"cannot read {part}: {error.strerror or error}; check the path"
            ) from None
    if not line:
        raise FileRefused("empty_file", f"{place} is empty: it holds no usable record")


def no_text(value: Any, key: str = "") -> Flaw | None:
    """The flaw of the first text in `value` that holds half a surrogate pair or NUL, or None."""
    if isinstance(value, str):
        if "\0" in value:
            return Flaw("nul", key, "holds a NUL character (\\u0000); take it out")
        try:
            value.encode()
        except UnicodeEncodeError:
            said = "holds a lone surrogate, half of a pair; take it out or write U+FFFD"
            return Flaw("lone_surrogate", key, said)
        return None
    if isinstance(value, Mapping):
        inner = [(f"{key}.{name}" if key else str(name), v) for name, v in value.items()]
        inner += [(key or "a key", name) for name in value]
    elif isinstance(value, list):
        inner = [(f"{key}[{i}]", v) for i, v in enumerate(value)]
    else:
        return None
    return next((flaw for name, v in inner if (flaw := no_text(v, name))), None)


def finite(value: Any) -> bool:
    """Whether no number in `value` is NaN or infinite, which JSON does not have."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(map(finite, value.values()))
    return not isinstance(value, list) or all(map(finite, value))


def parse_json(text: str | bytes) -> Any:
    """JSON (with NaN, which `finite` finds); `Flaw` for whatever is wrong with the text.

    A key twice in one object is a flaw: which of the two counts, readers do not agree on.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        return json.loads(text, object_pairs_hook=_each_key_once)
    except UnicodeDecodeError as error:
        raise Flaw("not_utf8", None, f"not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        said = f"{error.msg.removesuffix(' at')} at {line}column {error.colno}"
        raise Flaw("not_json", None, f"not JSON ({said})") from None
    except Flaw:
        raise
    except (RecursionError, ValueError) as error:  # too deep; an integer of thousands of digits
        raise Flaw("not_json", None, f"not JSON ({type(error).__name__})") from None


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise Flaw("ambiguous", twice, "the key is there twice; take one out")


def _parts(place: Path) -> list[Path]:
    """The files to read: the one, or those of a folder; of its splits one, named FOLDER:SPLIT."""
    folder, _, split = str(place).rpartition(":")
    if place.is_dir():
        return _of_folder(place, "")
    if folder and not place.exists() and Path(folder).is_dir():
        return _of_folder(Path(folder), split)
    return [place]


def _of_folder(folder: Path, split: str) -> list[Path]:
    """The files of one split of a folder, in the order of their numbers."""
    state = folder / "state.json"
    if state.is_file() and "_data_files" in (saved := json.loads(state.read_text())):
        return [folder / file["filename"] for file in saved["_data_files"]]
    found: dict[str, list[tuple[Path, int]]] = {}
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        if (file := _SHARD.match(str(path.relative_to(folder)))) and path.is_file():
            found.setdefault(file["split"], []).append((path, int(file["of"] or 1)))
    fits = [n for n in found if split in ("", n) or split in re.split("[/-]", n)]
    if len(fits) != 1:
        names = ", ".join(found) or "no arrow, parquet or JSON lines file"
        example = f"; name one split, e.g. {folder}:{list(found)[-1]}" if found else ""
        raise FileRefused("unreadable", f"{folder} is a folder with {names}{example}")
    paths = [path for path, _ in found[fits[0]]]
    if len(paths) != (of := found[fits[0]][0][1]):
        said = f"{folder} has {len(paths)} of the {of} files of {fits[0]}; fetch the others"
        raise FileRefused("unreadable", said)
    return paths


def _read(path: Path) -> Iterator[Record]:
    with open(path, "rb") as raw:
        head = raw.read(2)
        raw.seek(0)
        file: Any = gzip.GzipFile(fileobj=raw) if head == b"\x1f\x8b" else raw
        head = file.read(_HEAD)
        file.seek(0)
        if head[:4] == b"PAR1":
            yield from _parquet(file, path)
        elif head[:6] == b"ARROW1" or head[:4] == b"\xff\xff\xff\xff":
            yield from _arrow(file, path, stream=head[:6] != b"ARROW1")
        else:
            _refuse_other_formats(file, head, path)
            yield from _json(file, path)


def _refuse_other_formats(file: IO[bytes], head: bytes, path: Path) -> None:
    """Raises for pickles, which may lie in archives, for archives and for UTF-16."""
    is_pickle = head[:1] == b"\x80" and head[1:2] in b"\0\1\2\3\4\5"
    if head and head[:1] in b"(]})cl":  # protocols 0 and 1; no JSON begins so
        is_pickle = file.read().rstrip().endswith(b".")
        file.seek(0)
    is_zip = head.startswith(b"PK\3\4")
    torch, numpy = is_zip and b".pkl" in head, is_zip and b".npy" in head
    if is_pickle or torch or numpy or head.startswith(b"\x93NUMPY"):
        name, load = "a pickle", "import pickle; rows = pickle.load(open('IN', 'rb'))"
        if not is_pickle:
            name, load = "a NumPy array", "import numpy; rows = numpy.load('IN', allow_pickle=True)"
        if torch:
            name, load = "a pickle of PyTorch", "import torch; rows = torch.load('IN')"
        raise FileRefused(
            "pickle",
            f"{path} is {name}, which may run code when it is read: refused; where it comes from "
            f'somebody you trust, convert it: python -c "import json; {load}; '
            "print(*(r if isinstance(r, str) else json.dumps(r) for r in rows),"
            " sep='\\n', file=open('OUT.jsonl', 'w'))\"",
        )
    name = next((name for magic, name in _ARCHIVES.items() if head.startswith(magic)), "")
    if name or head[257:262] == b"ustar":
        raise FileRefused("unreadable", f"{path} is a {name or 'tar'} archive; unpack it first")
    if head.startswith(b"version https://git-lfs"):
        raise FileRefused("unreadable", f"{path} points to a file of Git LFS; run: git lfs pull")
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or (0 in head[:2] and len(head) > 1):
        raise FileRefused("not_utf8", f"{path} is UTF-16; convert it: iconv -f utf-16 -t utf-8")


def _json(file: IO[bytes], path: Path) -> Iterator[Record]:
    """JSON lines, unless the first line that is not blank is no object of its own."""
    first = b""
    while not first.strip() and (line := file.readline()):
        first = line.removeprefix(_BOM)
    try:
        whole = not isinstance(parse_json(first), dict) if first.strip() else False
    except ValueError:
        whole = first.lstrip()[:1] in (b"[", b"{")
    file.seek(0)
    if whole and (records := _document(file.read(), path, first)) is not None:
        yield from records
        return
    file.seek(0)
    for number, line in enumerate(file, 1):
        line = line.removeprefix(_BOM)  # of each file that was joined
        if line.strip():
            yield _json_record(line.strip(), number)


def _document(content: bytes, path: Path, first: bytes) -> list[Record] | None:
    """The records of a file that is one JSON array or object; None: it is JSON lines after all."""
    try:
        found = parse_json(content.removeprefix(_BOM))
    except ValueError as error:
        if _is_lines(content, first.strip()):
            return None
        kind = error.kind if isinstance(error, Flaw) else "not_json"
        raise FileRefused(kind, f"{path}: {error}; it begins as one JSON document") from None
    values = found if isinstance(found, list) else [found]
    return [_checked(value, number) for number, value in enumerate(values, 1)]


def _is_lines(content: bytes, first: bytes) -> bool:
    """Whether content that is no JSON as a whole is meant as JSON lines."""
    rest = [line for line in content.split(b"\n") if line.strip()][1:]
    if first in (b"[", b"{"):
        return not rest
    if first.startswith(b"{"):
        return not rest or any(line.startswith(b"{") for line in rest)
    try:
        parse_json(first)
    except ValueError:
        return not rest
    return True


def _json_record(line: bytes, number: int) -> Record:
    try:
        return _checked(parse_json(line), number)
    except Flaw as flaw:
        return Record(number, {}, flaw)


def _checked(value: Any, number: int) -> Record:
    if not isinstance(value, dict):
        said = f"not a JSON object but {type(value).__name__}"
        return Record(number, {}, Flaw("not_json", None, said))
    return Record(number, value, no_text(value))


def _parquet(file: IO[bytes], path: Path) -> Iterator[Record]:
    _require_pyarrow(path)
    import pyarrow as pa
    import pyarrow.parquet as pq

    # A gzip stream cannot be read from its end, where parquet keeps its schema.
    seekable = io.BytesIO(file.read()) if isinstance(file, gzip.GzipFile) else file
    try:
        batches = pq.ParquetFile(seekable).iter_batches()
        yield from _rows(row for batch in batches for row in batch.to_pylist())
    except pa.ArrowException as error:
        raise FileRefused("unreadable", f"{path} is no whole parquet file: {error}") from None


def _arrow(file: IO[bytes], path: Path, stream: bool) -> Iterator[Record]:
    """The files of the cache of `datasets`."""
    _require_pyarrow(path)
    import pyarrow as pa

    source = io.BytesIO(file.read())
    try:
        if stream:
            batches: Any = pa.ipc.open_stream(source)
        else:
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        yield from _rows(row for batch in batches for row in batch.to_pylist())
    except pa.ArrowException as error:
        raise FileRefused("unreadable", f"{path} is no whole arrow file: {error}") from None


def _require_pyarrow(path: Path) -> None:
    try:
        import pyarrow  # noqa: F401
    except ModuleNotFoundError:
        raise FileRefused(
            "unreadable", f"{path} needs pyarrow; pip install 'agentcpm_jax[data]' to read it"
        ) from None


def _rows(rows: Iterator[Mapping[str, Any]]) -> Iterator[Record]:
    for number, row in enumerate(rows, 1):
        value = _plain(row)
        yield Record(number, value, no_text(value), arrow=True)


def _plain(value: Any) -> Any:
    """Columns as JSON has them. A struct has the keys of every row: those that are null go."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, list) and value and all(isinstance(v, tuple) for v in value):
        return {str(k): _plain(v) for k, v in value if v is not None}  # a map
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, decimal.Decimal):
        return int(value) if value == value.to_integral_value() else str(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return {"bytes": len(value)}  # an image, a sound: what holds one is refused by its key
    return value


def accepted(name: str, found: Mapping[str, Any], forms: Mapping[str, str]) -> Flaw:
    """The flaw of a record in no schema: says which are read, and the keys that it has."""
    keys = ", ".join(map(str, list(found)[:12])) or "none"
    known = "; ".join(f"{form} ({keys_})" for form, keys_ in forms.items())
    return Flaw("unknown_schema", None, f"{name}; found keys: {keys}; read: {known}")


def is_set(value: Any) -> bool:
    """Whether a key has a value: null, "", [] and {} are none."""
    return value is not None and value not in ("", [], {})
