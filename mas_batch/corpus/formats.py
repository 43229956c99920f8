"""Rows of each format: JSON lines, CSV and plain text; Parquet has a file of its own.

A row that cannot be read is yielded with its problem; a problem that makes the whole file doubtful
is raised.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, count
from typing import Any

import pyarrow as pa

from mas_batch import job
from mas_batch.corpus.columns import Columns
from mas_batch.corpus.files import FORMATS, Source, data_name
from mas_batch.corpus.opening import open_source
from mas_batch.corpus.parquet import parquet_rows
from mas_batch.corpus.rows import Row, require_columns, require_distinct_columns
from mas_batch.errors import JobError

_BOM = b"\xef\xbb\xbf"
_MAX_FIELD_CHARACTERS = 2**31 - 1  # the most that csv takes on every platform
_MAX_DEPTH = 200  # Python writes JSON recursively: what is read must be writable again


def common_format(spec: job.Corpus, sources: Sequence[Source]) -> str:
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
    if chosen == "csv" and spec.delimiter in '"\r\n':
        raise JobError(
            f"{spec.delimiter!r} is not allowed: CSV gives it another meaning",
            key="corpus.delimiter",
        )
    if chosen == "text":
        given = [key for key in ("id", "reference", "context", "keep") if getattr(spec, key)]
        if given:
            raise JobError("plain text has no columns", key=f"corpus.{given[0]}")
    return chosen


def _format_of(source: Source) -> str:
    name = data_name(source.name)
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
    doubtful = data_name(source.name).endswith(".json")
    with open_source(source, spec) as stream:
        lines = chain([stream.readline().removeprefix(_BOM)], stream)
        for index, line in enumerate(lines):
            if not line or line.isspace():
                continue
            row = _json_row(index, line)
            if doubtful and row.problem:
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
        return Row(index, {}, f"not JSON: {error.msg} at character {error.pos + 1}")
    except (ValueError, RecursionError) as error:
        return Row(index, {}, f"not usable JSON: {error}")
    if not isinstance(value, dict):
        return Row(index, {}, f"not a JSON object but a {type(value).__name__}")
    brackets = line.count(b"[") + line.count(b"{")
    if brackets > _MAX_DEPTH and _is_deeper(value, _MAX_DEPTH):
        return Row(index, {}, f"not usable JSON: nested more than {_MAX_DEPTH} deep")
    return Row(index, value)


def _is_deeper(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        nested = [item for item in level if isinstance(item, (dict, list))]
        level = [v for n in nested for v in (n.values() if isinstance(n, dict) else n)]
    return any(isinstance(item, (dict, list)) for item in level)


def _object_of_distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        doubled, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {doubled!r} occurs twice")
    return value


_decode_json = json.JSONDecoder(object_pairs_hook=_object_of_distinct_keys).decode


def _csv_rows(source: Source, spec: job.Corpus, columns: Columns) -> Iterator[Row]:
    csv.field_size_limit(_MAX_FIELD_CHARACTERS)
    is_tsv = spec.delimiter == "," and data_name(source.name).endswith(".tsv")
    with open_source(source, spec) as stream:
        lines = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
        rows = csv.reader(lines, delimiter="\t" if is_tsv else spec.delimiter, strict=True)
        header = next(filter(None, rows), None)  # blank lines may come first
        if header is None:
            return
        _declare_header(source, spec, columns, header)
        nullable = {spec.reference, spec.context} & set(header)
        for index in count():
            line = rows.line_num + 1
            try:
                fields = next(rows, None)
            except csv.Error as error:
                _refuse_hidden_rows(source, index, line, rows.line_num, error)
                yield Row(index, {}, f"not CSV: {error}, in line {line}")
                continue
            if fields is None:
                return
            if not fields:
                continue  # a blank line
            if len(fields) != len(header):
                problem = f"{len(fields)} fields where the header has {len(header)}"
                yield Row(index, {}, problem)
                continue
            values: dict[str, str | None] = dict(zip(header, fields, strict=True))
            # CSV has no null; an empty reference would count as a human's answer.
            values.update({name: values[name] or None for name in nullable if name is not None})
            yield Row(index, values)


def _refuse_hidden_rows(
    source: Source, index: int, line: int, last_line: int, error: csv.Error
) -> None:
    """Raise JobError where an unreadable row spans lines: it may hide any number of rows."""
    if last_line > line:
        raise JobError(
            f"{source.file.url}, row {index + 1}: a quote that opens in line {line} makes one row "
            f"of all up to line {last_line} ({error}), and may hide rows; close that quote, or "
            "double it where it belongs to the text",
            key="corpus.path",
        )


def _declare_header(
    source: Source, spec: job.Corpus, columns: Columns, header: Sequence[str]
) -> None:
    require_distinct_columns(header, source.file.url)
    require_columns(spec, header, source.file.url)
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


READERS: Mapping[str, Callable[[Source, job.Corpus, Columns], Iterator[Row]]] = {
    "parquet": parquet_rows,
    "jsonl": _jsonl_rows,
    "csv": _csv_rows,
    "text": _text_rows,
}
