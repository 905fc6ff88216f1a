"""What a file is, its first bytes say; what cannot be read is refused with the reason."""

from __future__ import annotations

import gzip
import json
import pickle
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agentcpm_jax.records import FileRefused, Flaw, no_text, read_records

ROWS = [{"n": 1, "text": "a\u2028b"}, {"n": 2, "text": "ü"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def written(folder: Path, content: bytes) -> Path:
    path = folder / "data.bin"  # the name says nothing
    path.write_bytes(content)
    return path


def parquet(rows: list[dict]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def arrow(rows: list[dict], stream: bool) -> bytes:
    sink, table = pa.BufferOutputStream(), pa.Table.from_pylist(rows)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


CONTAINERS = {
    "lines": LINES,
    "no last newline": LINES.rstrip(),
    "bom and crlf": b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n"),
    "array": json.dumps(ROWS).encode(),
    "pretty array": json.dumps(ROWS, indent=1).encode(),
    "parquet": parquet(ROWS),
    "arrow stream": arrow(ROWS, stream=True),
    "arrow file": arrow(ROWS, stream=False),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("container", CONTAINERS)
def test_containers_are_told_by_their_bytes(tmp_path, container: str, zipped: bool) -> None:
    content = CONTAINERS[container]
    records = list(read_records(written(tmp_path, gzip.compress(content) if zipped else content)))
    assert [r.value for r in records] == ROWS and [r.line for r in records] == [1, 2]


def test_one_object_is_one_record_and_blank_lines_count(tmp_path) -> None:
    whole = written(tmp_path, json.dumps(ROWS[0], indent=2).encode())
    assert [r.value for r in read_records(whole)] == ROWS[:1]
    spaced = written(tmp_path, b"\n\n" + LINES.replace(b"\n", b"\n\n"))
    assert [r.line for r in read_records(spaced)] == [3, 5]


def test_a_folder_that_datasets_saved_is_read(tmp_path) -> None:
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, row in zip(names, ROWS, strict=True):
        (tmp_path / name).write_bytes(arrow([row], stream=True))
    (tmp_path / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": n} for n in names]})
    )
    assert [r.value for r in read_records(tmp_path)] == ROWS


@pytest.mark.parametrize("form", ["data/{}-0000{}-of-00002", "web-{}-0000{}-of-00002"])
def test_of_the_splits_of_a_folder_one_is_named(tmp_path, form: str) -> None:
    """As a dataset's own repository and the cache of `datasets` have them."""
    for number, row in enumerate(ROWS):
        path = tmp_path / (form.format("train", number) + ".arrow")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(arrow([row], stream=True))
    found = list(read_records(tmp_path))
    assert [r.value for r in found] == ROWS and [r.line for r in found] == [1, 2]
    other = tmp_path / (form.format("test", 0).replace("00002", "00001") + ".arrow")
    other.write_bytes(arrow(ROWS[:1], stream=True))
    with pytest.raises(FileRefused, match=r"train.*name one split, e\.g\. .*:"):
        list(read_records(tmp_path))
    assert len(list(read_records(f"{tmp_path}:train"))) == 2
    assert len(list(read_records(f"{tmp_path}:test"))) == 1
    with pytest.raises(FileRefused, match="name one split"):
        list(read_records(f"{tmp_path}:validation"))
    path.unlink()
    with pytest.raises(FileRefused, match=r"1 of the 2 files of .*train"):
        list(read_records(f"{tmp_path}:train"))


def test_files_with_marks_are_joined(tmp_path) -> None:
    joined = b"\xef\xbb\xbf" + LINES + b"\xef\xbb\xbf" + LINES
    assert [r.value for r in read_records(written(tmp_path, joined))] == ROWS * 2
    members = gzip.compress(LINES) + gzip.compress(LINES)
    assert [r.line for r in read_records(written(tmp_path, members))] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("content", "kind", "says"),
    [
        (b"", "empty_file", "is empty"),
        (b"\n \n", "empty_file", "is empty"),
        (b"[]", "empty_file", "is empty"),
        *((pickle.dumps(["{}"], p), "pickle", "json.dumps") for p in range(6)),
        (gzip.compress(pickle.dumps([])), "pickle", "convert"),
        (gzip.compress(LINES * 1000)[:-20], "cut_gzip", "was cut"),
        (gzip.compress(LINES)[:-8] + b"12345678", "cut_gzip", "damaged"),
        (gzip.compress(gzip.compress(LINES)), "unreadable", "twice"),
        (b"PK\3\4" + b"\0" * 26 + b"archive/data.pkl", "pickle", r"torch\.load"),
        (b"PK\3\4" + b"\0" * 26 + b"rows.npy", "pickle", r"numpy\.load"),
        (b"\x93NUMPY\1\0", "pickle", r"numpy\.load"),
        (b"rows.jsonl".ljust(257, b"\0") + b"ustar", "unreadable", "tar archive"),
        (b"version https://git-lfs.github.com/spec/v1\n", "unreadable", "git lfs pull"),
        (LINES.decode().encode("utf-16-le"), "not_utf8", "UTF-16"),
        (b'[\n{"a": 1},\n]', "not_json", "line 3"),
        (parquet(ROWS)[:-9], "unreadable", "no whole parquet"),
        (b"PK\3\4rest", "unreadable", "zip"),
        (LINES.decode().encode("utf-16"), "not_utf8", "UTF-16"),
        (b'[\n{"a": 1},\n{"b"', "not_json", "one JSON document"),
        (b'{\n "a": 1,\n "b"', "not_json", "one JSON document"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, content: bytes, kind: str, says: str) -> None:
    with pytest.raises(FileRefused, match=says) as refused:
        list(read_records(written(tmp_path, content)))
    assert refused.value.kind == kind


@pytest.mark.parametrize(
    ("line", "kind", "key"),
    [
        (b'{"a": "', "not_json", None),
        (b"[1]", "not_json", None),
        (b"\xff\xfe", "not_utf8", None),
        (b'{"a": [{"b": "x\\ud83d"}]}', "lone_surrogate", "a[0].b"),
        (b'{"a": "x\\u0000"}', "nul", "a"),
        (b'{"a": 1, "a": 2}', "ambiguous", "a"),
        (b'{"b": [{"a": 1, "a": 1}]}', "ambiguous", "a"),
        (b'{"a": 1},', "not_json", None),
        (b"[" * 100_000, "not_json", None),
        (b'{"a": ' + b"9" * 5000 + b"}", "not_json", None),
    ],
)
def test_a_line_that_is_no_record_has_a_flaw(tmp_path, line, kind: str, key: str | None) -> None:
    first, flawed = read_records(written(tmp_path, LINES.split(b"\n")[0] + b"\n\n" + line))
    assert first.flaw is None and isinstance(flawed.flaw, Flaw) and flawed.line == 3
    assert (flawed.flaw.kind, flawed.flaw.key) == (kind, key)


def test_pairs_and_unnormalised_text_are_kept() -> None:
    assert no_text({"a": "\U0001f600 e\u0301"}) is None


def test_nulls_of_columns_go_and_maps_are_objects(tmp_path) -> None:
    kind = pa.map_(pa.string(), pa.int64())
    table = pa.table({"m": pa.array([[("x", 1)]], kind), "s": [{"a": None, "b": [None]}]})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    (record,) = read_records(written(tmp_path, sink.getvalue().to_pybytes()))
    assert record.value == {"m": {"x": 1}, "s": {"b": [None]}} and record.arrow


def test_a_missing_library_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(FileRefused, match=r"pip install 'agentcpm_jax\[data\]'"):
        list(read_records(written(tmp_path, CONTAINERS["parquet"])))
