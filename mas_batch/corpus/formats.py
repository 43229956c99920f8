"""Rows of each format: JSON lines, CSV, plain text and Parquet.

A row that cannot be read is yielded with its problem; what makes its whole file doubtful raises.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, count
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from mas_batch import job
from mas_batch.corpus.columns import ArrowRow, Columns, as_text
from mas_batch.corpus.files import BUFFER_BYTES, FORMATS, Source, data_name, open_source
from mas_batch.errors import JobError

_BOM = b"\xef\xbb\xbf"
_BATCH_ROWS = 1024
_MAX_FIELD_CHARACTERS = 2**31 - 1  # the most that csv takes on every platform
_MAX_DEPTH = 200  # Python writes JSON recursively: what is read must be writable again


class Row(NamedTuple):
    """A row as read: `values` by column, or None and the problem that hides them."""

    position: int
    """In its file, from 0, skipped blank lines included; messages count from 1."""
    values: Mapping[str, Any] | None
    problem: str = ""
    passthrough: Mapping[str, Any] | None = None
    """Set where the format has typed columns of its own."""


def one_format(spec: job.Corpus, sources: Sequence[Source]) -> str:
    """Return the format that the job sets or all files share.

    Raises:
        JobError: unknown or mixed formats, or columns asked of plain text.
    """
    if spec.format != "auto":
        found = {str(spec.format): sources[0]}
    else:
        found = {_format_of(source): source for source in sources}
    if len(found) > 1:
        files = " and ".join(source.file.url for source in found.values())
        raise JobError(f"one format per corpus: {files} differ", key="corpus.format")
    (chosen,) = found
    if chosen == "text":
        given = [key for key in ("id", "reference", "context", "keep") if getattr(spec, key)]
        if given:
            raise JobError("plain text has no columns", key=f"corpus.{given[0]}")
    return chosen


def _format_of(source: Source) -> str:
    name = data_name(source.path)
    for kind, suffixes in FORMATS.items():
        if name.endswith(suffixes):
            return kind
    raise JobError(
        f"the extension of {source.file.url} says nothing about its format; set one of: "
        f"{', '.join(FORMATS)}",
        key="corpus.format",
    )


# --- Rows of each format -------------------------------------------------------------------


def _jsonl_rows(source: Source, spec: job.Corpus, columns: Columns) -> Iterator[Row]:
    # Only .json is ambiguous: it may be one document over many lines, or one big list.
    doubtful = data_name(source.path).endswith(".json")
    with open_source(source, spec) as stream:
        lines = chain([stream.readline().removeprefix(_BOM)], stream)
        for index, line in enumerate(lines):
            if not line or line.isspace():
                continue
            row = _json_row(index, line)
            if doubtful and row.values is None:
                raise JobError(
                    f"{source.file.url}, row {index + 1}: {row.problem}; a .json file must hold "
                    "one object a line",
                    key="corpus.format",
                )
            doubtful = False
            yield row


def _json_row(index: int, line: bytes) -> Row:
    try:
        value = _decode_json(line.decode("utf-8", "surrogateescape"))
    except json.JSONDecodeError as error:
        return Row(index, None, f"not JSON: {error.msg} at character {error.pos + 1}")
    except (ValueError, RecursionError) as error:
        return Row(index, None, f"not usable JSON: {error}")
    if not isinstance(value, dict):
        return Row(index, None, f"not a JSON object but a {type(value).__name__}")
    brackets = line.count(b"[") + line.count(b"{")
    if brackets > _MAX_DEPTH and _is_deeper(value, _MAX_DEPTH):
        return Row(index, None, f"not usable JSON: nested more than {_MAX_DEPTH} deep")
    return Row(index, value)


def _is_deeper(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        nested = [item for item in level if isinstance(item, (dict, list))]
        level = [v for n in nested for v in (n.values() if isinstance(n, dict) else n)]
    return any(isinstance(item, (dict, list)) for item in level)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        doubled, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {doubled!r} occurs twice")
    return value


_decode_json = json.JSONDecoder(object_pairs_hook=_object).decode


def _csv_rows(source: Source, spec: job.Corpus, columns: Columns) -> Iterator[Row]:
    csv.field_size_limit(_MAX_FIELD_CHARACTERS)
    is_tsv = spec.delimiter == "," and data_name(source.path).endswith(".tsv")
    with open_source(source, spec) as stream:
        lines = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
        rows = csv.reader(lines, delimiter="\t" if is_tsv else spec.delimiter, strict=True)
        header = next(rows, None)
        if header is None:
            return
        _declare_header(source, spec, columns, header)
        nullable = {spec.reference, spec.context} & set(header)
        for index in count():
            try:
                fields = next(rows, None)
            except csv.Error as error:
                yield Row(index, None, f"not CSV: {error}, up to line {rows.line_num}")
                continue
            if fields is None:
                return
            if not fields:
                continue  # a blank line
            if len(fields) != len(header):
                problem = f"{len(fields)} fields where the header has {len(header)}"
                yield Row(index, None, problem)
                continue
            values: dict[str, str | None] = dict(zip(header, fields, strict=True))
            # CSV has no null; an empty reference would count as a human's answer.
            values.update({name: values[name] or None for name in nullable if name is not None})
            yield Row(index, values)


def _declare_header(
    source: Source, spec: job.Corpus, columns: Columns, header: Sequence[str]
) -> None:
    _require_distinct(source, header)
    require(spec, header, source.file.url)
    names = [name for name in map(columns.name, header) if name is not None]
    columns.declare(pa.schema([(name, pa.string()) for name in names]), source.file.url)


def _text_rows(source: Source, spec: job.Corpus, columns: Columns) -> Iterator[Row]:
    with open_source(source, spec) as stream:
        if spec.record == "file":
            whole = stream.read().removeprefix(_BOM)
            if whole:
                yield _text_row(0, whole, spec)
            return
        lines = chain([stream.readline().removeprefix(_BOM)], stream)
        for index, line in enumerate(lines):
            if line and not line.isspace():
                yield _text_row(index, line.removesuffix(b"\n").removesuffix(b"\r"), spec)


def _text_row(index: int, text: bytes, spec: job.Corpus) -> Row:
    return Row(index, {spec.text: text.decode("utf-8", "surrogateescape")})


def _parquet_rows(source: Source, spec: job.Corpus, columns: Columns) -> Iterator[Row]:
    with open_source(source, spec) as stream:
        file = pq.ParquetFile(stream.raw, buffer_size=BUFFER_BYTES, pre_buffer=False)
        schema = file.schema_arrow
        _require_distinct(source, schema.names)
        require(spec, schema.names, source.file.url)
        _require_text(source, spec, schema)
        kept = {field.name: columns.name(field.name) for field in schema}
        kept = {column: name for column, name in kept.items() if name is not None}
        fields = [schema.field(column).with_name(name) for column, name in kept.items()]
        columns.declare(pa.schema(fields), source.file.url)
        roles = set(roles_of(spec).values())
        index = 0
        wanted = [*roles, *(column for column in kept if column not in roles)]
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=wanted):
            values = {name: _python_values(batch.column(name)) for name in roles}
            carried = _valid(batch.select(list(kept))).rename_columns(list(kept.values()))
            for i in range(batch.num_rows):
                row = {name: values[name][i] for name in roles}
                yield Row(index, row, passthrough=ArrowRow(carried, i))
                index += 1


def _require_text(source: Source, spec: job.Corpus, schema: pa.Schema) -> None:
    def holds_text(kind: pa.DataType) -> bool:
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        return kind == pa.null() or _binary_type(kind) is not None

    kind = schema.field(spec.text).type
    if not holds_text(kind):
        texts = [field.name for field in schema if holds_text(field.type)]
        raise JobError(
            f"column {spec.text!r} of {source.file.url} holds {kind}, not text; columns of text "
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
    """Return a column's values; text by our own decoding, because Arrow's raises at bad bytes."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    binary = _binary_type(column.type)
    if binary is None:
        values: list[Any] = column.to_pylist()
        return values
    pieces = column.cast(binary).to_pylist()
    return [None if p is None else p.decode("utf-8", "surrogateescape") for p in pieces]


def _valid(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Write bytes that are not UTF-8 as escapes in the columns of text."""
    for i, column in enumerate(batch.columns):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            name = batch.schema.names[i]
            if pa.types.is_nested(column.type):
                raise ValueError(
                    f"column {name!r} holds bytes that are not UTF-8 inside {column.type}; leave "
                    "it out with corpus.keep"
                ) from None
            texts = [None if v is None else as_text(v) for v in _python_values(column)]
            fixed = pa.array(texts, pa.string()).cast(column.type)
            batch = batch.set_column(i, batch.schema.field(i), fixed)
    return batch


READERS: Mapping[str, Callable[[Source, job.Corpus, Columns], Iterator[Row]]] = {
    "parquet": _parquet_rows,
    "jsonl": _jsonl_rows,
    "csv": _csv_rows,
    "text": _text_rows,
}


# --- Columns -------------------------------------------------------------------------------


def roles_of(spec: job.Corpus) -> dict[str, str]:
    """Return job key → column of the columns that mean something."""
    roles = {key: getattr(spec, key) for key in ("text", "id", "reference", "context")}
    return {key: column for key, column in roles.items() if column is not None}


def require(spec: job.Corpus, names: Sequence[str], where: str) -> None:
    """Raise JobError for the first column that the job names and `names` lacks."""
    wanted = [*roles_of(spec).items(), *(("keep", column) for column in spec.keep or ())]
    for key, column in wanted:
        if column not in names:
            there = ", ".join(map(repr, names))
            raise JobError(
                f"no column {column!r} in {where}; columns there: {there}", key=f"corpus.{key}"
            )


def _require_distinct(source: Source, names: Sequence[str]) -> None:
    doubled = [name for name, times in Counter(names).items() if times > 1]
    if doubled:
        raise JobError(
            f"{source.file.url} has more than one column {doubled[0]!r}", key="corpus.path"
        )
