"""Rows of Parquet files, row group by row group.

The footer says how many rows a row group has, so it is known which rows a damaged group loses:
each becomes a row with a problem, and the next row group is read. No row of a damaged group is
used: where Arrow skips a page, the texts that follow would get other rows' ids. Arrow verifies the
checksums of pages that have them. In a page without checksum and compression, a changed byte is a
changed text and cannot be detected.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mas_batch import job
from mas_batch.corpus.carried_types import plain_type
from mas_batch.corpus.columns import ArrowRow, Columns, as_text
from mas_batch.corpus.files import Source
from mas_batch.corpus.opening import BUFFER_BYTES, open_stored
from mas_batch.corpus.rows import Row, require_columns, require_distinct_columns, roles_of
from mas_batch.errors import JobError

_BATCH_ROWS = 1024
_MAX_HELD_BYTES = 1 << 27  # a larger row group is read twice instead of held

# What Arrow raises at damaged pages. `open_stored` has made RunErrors of failing disks or networks.
_DAMAGE = (OSError, pa.ArrowInvalid, pa.ArrowIndexError)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Which columns of a file are read, and as what."""

    url: str
    id: str | None
    roles: tuple[str, ...]
    """Columns that mean something, each once."""
    kept: dict[str, str]
    """Column → the name under which it is carried."""
    carried: pa.Schema
    """Types that the carried columns get, by their new names."""
    columns: Columns
    """Sees what is carried."""

    @property
    def wanted(self) -> list[str]:
        """Every column to read."""
        return [*self.roles, *(column for column in self.kept if column not in self.roles)]


def parquet_rows(source: Source, spec: job.Corpus, columns: Columns) -> Iterator[Row]:
    """Yield the rows of a file; see the module for those of a damaged row group.

    Raises:
        JobError: a column is missing, doubled or of the wrong type; the footer contradicts itself.
        RunError: the disk or the network fails.
    """
    with open_stored(source) as stream:
        file = pq.ParquetFile(
            stream, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
        )
        layout = _layout(source, spec, columns, file.schema_arrow)
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        if sum(sizes) != file.metadata.num_rows:
            raise JobError(
                f"{layout.url} is damaged: its footer counts {file.metadata.num_rows} rows in "
                f"all, but {sum(sizes)} in its row groups",
                key="corpus.path",
            )
        first = 0
        for group, num_rows in enumerate(sizes):
            yield from _group_rows(file, layout, group, first, num_rows)
            first += num_rows


def _layout(source: Source, spec: job.Corpus, columns: Columns, schema: pa.Schema) -> _Layout:
    url = source.file.url
    require_distinct_columns(schema.names, url)
    require_columns(spec, schema.names, url)
    _require_text(url, spec, schema)
    named = {field.name: columns.name(field.name) for field in schema}
    kept = {column: name for column, name in named.items() if name is not None}
    fields = [_carried_field(url, schema.field(c)).with_name(n) for c, n in kept.items()]
    columns.declare(pa.schema(fields), url)
    roles = tuple(dict.fromkeys(roles_of(spec).values()))
    return _Layout(url, spec.id, roles, kept, pa.schema(fields), columns)


def _carried_field(url: str, field: pa.Field) -> pa.Field:
    try:
        return pa.field(field.name, plain_type(field.type))
    except TypeError as error:
        raise JobError(
            f"column {field.name!r} of {url} holds {error}; rewrite it, or leave it out",
            key="corpus.keep",
        ) from error


def _group_rows(
    file: pq.ParquetFile, layout: _Layout, group: int, first: int, num_rows: int
) -> Iterator[Row]:
    try:
        batches = _sound_batches(file, layout, group, num_rows)
    except _DAMAGE as error:
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        yield from _lost_rows(file, layout, group, range(first, first + num_rows), problem)
        return
    for batch in batches:
        yield from _batch_rows(batch, layout, first)
        first += batch.num_rows


def _sound_batches(
    file: pq.ParquetFile, layout: _Layout, group: int, num_rows: int
) -> Iterable[pa.RecordBatch]:
    """Read a row group to its end, to know that it can be read, then return its batches.

    Raises:
        one of `_DAMAGE`: the group cannot be read, or has fewer rows than the footer says.
    """
    held: list[pa.RecordBatch] = []
    num_read = num_bytes = 0
    for batch in file.iter_batches(_BATCH_ROWS, [group], layout.wanted):
        for column in batch.columns:
            if pa.types.is_dictionary(column.type):
                column.dictionary_decode()  # only this checks the indices
        num_read += batch.num_rows
        num_bytes += batch.nbytes
        if num_bytes <= _MAX_HELD_BYTES:
            held.append(batch)
    if num_read < num_rows:  # Arrow skips a page whose type it does not know
        raise pa.ArrowInvalid(f"its pages hold {num_read} rows")
    if num_bytes <= _MAX_HELD_BYTES:
        return held
    held.clear()
    again: Iterable[pa.RecordBatch] = file.iter_batches(_BATCH_ROWS, [group], layout.wanted)
    return again


def _batch_rows(batch: pa.RecordBatch, layout: _Layout, first: int) -> Iterator[Row]:
    values = {name: _python_values(batch.column(name)) for name in layout.roles}
    carried = _escaped_text(batch.select(list(layout.kept)), layout.url)
    carried = _in_carried_types(carried, layout)
    layout.columns.note(carried, layout.url)
    for i in range(batch.num_rows):
        row = {name: values[name][i] for name in layout.roles}
        yield Row(first + i, row, passthrough=ArrowRow(carried, i))


def _in_carried_types(batch: pa.RecordBatch, layout: _Layout) -> pa.RecordBatch:
    columns = [
        column if column.type == kind else column.cast(kind)
        for column, kind in zip(batch.columns, layout.carried.types, strict=True)
    ]
    return pa.RecordBatch.from_arrays(columns, schema=layout.carried)


def _lost_rows(
    file: pq.ParquetFile, layout: _Layout, group: int, positions: range, problem: str
) -> Iterator[Row]:
    """Yield the rows that damage hides, with their ids where that column can still be read."""
    ids = chain(_read_ids(file, layout.id, group, len(positions)), repeat(None))
    # Typed nulls: one untyped row would cost its partition the exact types of all others.
    blank = pa.RecordBatch.from_arrays(
        [pa.nulls(_BATCH_ROWS, kind) for kind in layout.carried.types], schema=layout.carried
    )
    words = (
        f"row group {group} (the first is 0), rows {positions.start + 1} to {positions.stop}, "
        f"cannot be read: {problem}"
    )
    for position, identity in zip(positions, ids, strict=False):
        values = {} if layout.id is None or identity is None else {layout.id: identity}
        yield Row(position, values, words, ArrowRow(blank, position % _BATCH_ROWS))


def _read_ids(file: pq.ParquetFile, column: str | None, group: int, num_rows: int) -> list[Any]:
    """Return the row group's ids if all of them can be read, else none."""
    if column is None:
        return []
    ids: list[Any] = []
    with suppress(*_DAMAGE):
        for batch in file.iter_batches(_BATCH_ROWS, [group], [column]):
            ids += _python_values(batch.column(column))
    return ids if len(ids) == num_rows else []


def _require_text(url: str, spec: job.Corpus, schema: pa.Schema) -> None:
    def holds_text(kind: pa.DataType) -> bool:
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        return kind == pa.null() or _binary_type(kind) is not None

    kind = schema.field(spec.text).type
    if not holds_text(kind):
        texts = [field.name for field in schema if holds_text(field.type)]
        raise JobError(
            f"column {spec.text!r} of {url} holds {kind}, not text; columns of text "
            f"there: {', '.join(texts) or 'none'}",
            key="corpus.text",
        )


def _binary_type(kind: pa.DataType) -> pa.DataType | None:
    """Return the type under which text is read as bytes, None for what is not text."""
    if kind in (pa.string(), pa.string_view(), pa.binary(), pa.binary_view()):
        return pa.binary()
    if kind in (pa.large_string(), pa.large_binary()):
        return pa.large_binary()
    return None


def _python_values(column: pa.Array) -> list[Any]:
    """Return a column's values. Text is decoded here, because Arrow raises at bad bytes."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    binary = _binary_type(column.type)
    if binary is None:
        values: list[Any] = column.to_pylist()
        return values
    pieces = column.cast(binary).to_pylist()
    return [None if p is None else p.decode("utf-8", "surrogateescape") for p in pieces]


def _escaped_text(batch: pa.RecordBatch, url: str) -> pa.RecordBatch:
    """Return the batch with bytes that are not UTF-8 written as escapes in text columns."""
    for i, column in enumerate(batch.columns):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            name = batch.schema.names[i]
            if pa.types.is_nested(column.type):
                raise JobError(
                    f"column {name!r} of {url} holds bytes that are not UTF-8 inside "
                    f"{column.type}; rewrite it, or leave it out",
                    key="corpus.keep",
                ) from None
            texts = [None if v is None else as_text(v) for v in _python_values(column)]
            fixed = pa.array(texts, pa.string()).cast(column.type)
            batch = batch.set_column(i, batch.schema.field(i), fixed)
    return batch
