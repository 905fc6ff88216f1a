"""Parquet files written row by row or column by column, with documented schemas."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from agentcpm_jax.run.inspect.columns import CALLS, RESULTS, TEXTS, TableDoc
from agentcpm_jax.types import UserError

FLUSH_ROWS = 1 << 16


def require_pyarrow() -> None:
    """Raises `UserError` when the extra is not installed."""
    try:
        import pyarrow  # noqa: F401
    except ModuleNotFoundError:
        raise UserError(
            "pyarrow is not installed; pip install 'agentcpm_jax[export]' to write parquet"
        ) from None


class TableWriter:
    """One table; rows are buffered and written in groups of about `FLUSH_ROWS`."""

    def __init__(self, path: Path, doc: TableDoc, about: Mapping[str, Any]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._names = [c.name for c in doc.columns]
        fields = [
            pa.field(c.name, _arrow_type(c.type), metadata={"description": c.doc})
            for c in doc.columns
        ]
        info = {"agentcpm_jax": json.dumps({"row": doc.row, **about})}
        self._schema = pa.schema(fields, metadata=info)
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")
        self._rows: list[Mapping[str, Any]] = []
        self._parts: list[Any] = []
        self._waiting = self._written = 0
        self._open = True

    def row(self, values: Mapping[str, Any]) -> None:
        """One row: a value for every column."""
        self._rows.append(values)
        self._waiting += 1
        if self._waiting >= FLUSH_ROWS:
            self._flush()

    def columns(self, values: Mapping[str, Any]) -> None:
        """Many rows: an array for every column; a masked one is null where its mask is set."""
        import pyarrow as pa

        arrays = []
        for field in self._schema:
            found = values[field.name]
            mask = np.ma.getmaskarray(found) if isinstance(found, np.ma.MaskedArray) else None
            arrays.append(pa.array(np.asarray(found), type=field.type, mask=mask))
        self._parts.append(pa.record_batch(arrays, schema=self._schema))
        self._waiting += len(arrays[0])
        if self._waiting >= FLUSH_ROWS:
            self._flush()

    def close(self) -> int:
        """Writes buffered rows; returns the number of rows in all. May be called again."""
        if self._open:
            self._open = False
            try:
                self._flush()
            finally:
                self._writer.close()
        return self._written

    def _flush(self) -> None:
        import pyarrow as pa

        if self._rows:
            columns = {n: [_storable(row[n]) for row in self._rows] for n in self._names}
            self._writer.write_table(pa.Table.from_pydict(columns, schema=self._schema))
        if self._parts:
            self._writer.write_table(pa.Table.from_batches(self._parts, schema=self._schema))
        self._written += self._waiting
        self._rows, self._parts, self._waiting = [], [], 0


def _arrow_type(name: str) -> Any:
    import pyarrow as pa

    if name == TEXTS:
        return pa.list_(pa.string())
    if name == CALLS:
        texts = [(n, pa.string()) for n in ("name", "arguments", "error", "message")]
        return pa.list_(pa.struct([*texts, ("start", pa.int32()), ("end", pa.int32())]))
    if name == RESULTS:
        fields = [("status", pa.string()), ("content", pa.string()), ("seconds", pa.float64())]
        return pa.list_(pa.struct(fields))
    return pa.type_for_alias(name)


def _storable(value: Any) -> Any:
    """Text without lone surrogates, which models can sample and UTF-8 lacks."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_storable(v) for v in value]
    if isinstance(value, dict):
        return {k: _storable(v) for k, v in value.items()}
    return value
