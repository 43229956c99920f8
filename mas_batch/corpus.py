"""List a corpus' files on any filesystem and stream their records, each with a stable id.

Rows that cannot be asked about become records with a `reason`; only what makes the whole
corpus doubtful (a missing column, a doubled id, a corrupt file) stops the stream.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import chain, count, islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import fsspec.compression
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from mas_batch import job
from mas_batch.columns import ArrowRow, Columns, as_text, conform, records_table, valid_text
from mas_batch.errors import JobError, MasBatchError, Reason, RunError
from mas_batch.records import Record

__all__ = ["CorpusFile", "CorpusReader", "conform", "records_table"]

_FORMATS = {
    "parquet": (".parquet", ".parq", ".pq"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "csv": (".csv", ".tsv"),
    "text": (".txt", ".text"),
}
_CODECS = {
    ".gz": "gzip",
    ".bz2": "bz2",
    ".xz": "xz",
    ".zst": "zstd",
    ".zip": "zip",
    ".lz4": "lz4",
}
_CODEC_PACKAGES = {
    "zstd": "pip install 'mas_batch[zstd]'",
    "lz4": "pip install lz4",
    "snappy": "pip install python-snappy",
}
_BACKEND_PACKAGES = {"s3": "pip install 'mas_batch[s3]'", "s3a": "pip install 'mas_batch[s3]'"}
_VERSION_KEYS = ("ETag", "etag", "LastModified", "last_modified", "updated", "mtime", "created")

_BOM = b"\xef\xbb\xbf"
_MAGIC = re.compile(r"[*?\[]")
_HIDDEN = re.compile(r"(^|/)[._]")
# White space by Unicode, plus what has no width: joiners, marks of direction, soft hyphen.
_VISIBLE = re.compile(r"[^\s\u00ad\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]")

_BUFFER_BYTES = 1 << 20
_ZSTD_BYTES = 1 << 14  # a text of repeats grows a thousandfold: small bites bound the memory
_BATCH_ROWS = 1024
_MAX_FIELD_CHARACTERS = 2**31 - 1  # the most that csv takes on every platform
_MAX_DEPTH = 200  # Python writes JSON recursively: what is read must be writable again
_MAX_SUSPECTS = 1 << 16  # bounds the memory of one look for doubled ids


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """One file of the corpus, as listed before reading."""

    url: str
    """A plain path for local files."""
    size_bytes: int | None
    """As stored, so compressed; None where the filesystem does not say."""
    version: str
    """ETag, modification time in nanoseconds, or empty: changes when the content does."""
    relative: str
    """Path below the corpus root; it names the file in ids, so it survives a move."""


@dataclass(frozen=True, slots=True)
class _Source:
    file: CorpusFile
    filesystem: Any
    path: str


class _Row(NamedTuple):
    """A row as read: `values` by column, or None and the problem that hides them."""

    position: int
    """In its file, from 0, skipped blank lines included; messages count from 1."""
    values: Mapping[str, Any] | None
    problem: str = ""
    passthrough: Mapping[str, Any] | None = None
    """Set where the format has typed columns of its own."""


class CorpusReader:
    """The records of a corpus, in the order of its files' relative paths.

    Creating it lists the files; every iteration reads them anew, a bounded part at a time.

    Raises:
        JobError: here, for paths, formats and codecs that cannot be read; while iterating,
            for missing columns, missing or doubled ids and a corpus without records.
        RunError: while iterating, for a corrupt file, with the row that was reached.
    """

    def __init__(self, spec: job.Corpus) -> None:
        self._spec = spec
        sources = _list_sources(spec)
        self._format = _one_format(spec, sources)
        for source in sources:
            _check_codec(source, _codec(spec, source), self._format)
        self._sources = sources
        self._columns = Columns(tuple(_roles(spec).values()), spec.keep)

    @property
    def files(self) -> tuple[CorpusFile, ...]:
        """The files, sorted by relative path."""
        return tuple(source.file for source in self._sources)

    @property
    def fingerprint(self) -> str:
        """Changes when a file is added, removed, renamed or rewritten; not when all move."""
        facts = [(file.relative, file.size_bytes, file.version) for file in self.files]
        return job.fingerprint(facts)

    @property
    def has_schema(self) -> bool:
        """Whether a file's column types are known before its rows, unlike JSON's."""
        return self._format != "jsonl"

    def passthrough_schema(self) -> pa.Schema:
        """Types of the carried columns: of the rows read so far, final after the last one."""
        return self._columns.schema()

    def __iter__(self) -> Iterator[Record]:
        digests = bytearray()
        num_records = 0
        for source, row in islice(self._rows(), self._spec.limit):
            record = self._record(source.file, row)
            if self._spec.id is not None:
                digests += _digest(record.record_id)
            num_records += 1
            yield record
        if num_records == 0:
            raise JobError(f"{self._spec.path!r} holds no records", key="corpus.path")
        self._check_columns(num_records)
        if self._spec.id is not None:
            self._check_ids(digests)

    def _rows(self) -> Iterator[tuple[_Source, _Row]]:
        read = _READERS[self._format]
        for source in self._sources:
            num_rows = 0
            try:
                for row in read(source, self._spec, self._columns):
                    num_rows = row.position + 1
                    yield source, row
            except MasBatchError:
                raise
            except Exception as error:  # codecs and remote filesystems raise anything
                raise RunError(
                    f"{source.file.url} cannot be read after row {num_rows}: "
                    f"{type(error).__name__}: {error}"
                ) from error

    def _record(self, file: CorpusFile, row: _Row) -> Record:
        if row.values is None:
            return Record(
                _positional_id(file, row),
                None,
                reason=Reason.MALFORMED_ROW,
                message=f"{_where(file, row)}: {row.problem}",
            )
        spec, values = self._spec, row.values
        passthrough = row.passthrough
        if passthrough is None:
            passthrough = self._columns.take(values)
        text = values.get(spec.text)
        problem = _problem(text)
        return Record(
            self._identity(file, row, values),
            text if problem is None else None,
            _optional_text(values, spec.context),
            _optional_text(values, spec.reference),
            None if problem is None else problem[0],
            "" if problem is None else f"{_where(file, row)}: {spec.text!r} {problem[1]}",
            passthrough,
        )

    def _identity(self, file: CorpusFile, row: _Row, values: Mapping[str, Any]) -> str:
        column = self._spec.id
        if column is None:
            return _positional_id(file, row)
        value = values.get(column)
        identity = "" if value is None else as_text(value)
        if not identity.strip():
            what = "null or missing" if value is None else "empty"
            raise JobError(
                f"{file.url}, row {row.position + 1}: column {column!r} is {what}; every row needs "
                "an id (without corpus.id, ids are made from file and position)",
                key="corpus.id",
            )
        return identity

    def _check_columns(self, num_records: int) -> None:
        """Find configured JSON columns that no row had; other formats checked each file."""
        seen = self._columns.seen
        if self._format == "jsonl" and seen:
            _require(self._spec, seen, f"any of the {num_records} rows of {self._spec.path!r}")

    def _check_ids(self, digests: bytearray) -> None:
        """Find doubled ids: sort their 64-bit hashes in place, then look at equals again."""
        hashes = np.frombuffer(digests, dtype="<u8")
        hashes.sort()
        suspects = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
        for start in range(0, len(suspects), _MAX_SUSPECTS):
            self._look_again(set(suspects[start : start + _MAX_SUSPECTS].tolist()))

    def _look_again(self, suspects: set[int]) -> None:
        first: dict[str, str] = {}
        for source, row in islice(self._rows(), self._spec.limit):
            if row.values is None:
                continue
            identity = self._identity(source.file, row, row.values)
            if int.from_bytes(_digest(identity), "little") not in suspects:
                continue
            here = f"{source.file.url}, row {row.position + 1}"
            if identity in first:
                raise JobError(
                    f"id {identity!r} occurs twice: {first[identity]} and {here}", key="corpus.id"
                )
            first[identity] = here


# --- Listing -------------------------------------------------------------------------------


def _list_sources(spec: job.Corpus) -> tuple[_Source, ...]:
    patterns = spec.path if isinstance(spec.path, tuple) else (spec.path,)
    found: dict[str, _Source] = {}
    for pattern in patterns:
        for source in _list_pattern(pattern, spec):
            # A file that two patterns match is one, named from the wider root in any order.
            known = found.setdefault(source.file.url, source)
            if len(source.file.relative) > len(known.file.relative):
                found[source.file.url] = source
    return tuple(sorted(_distinct(list(found.values())), key=lambda s: s.file.relative))


def _list_pattern(pattern: str, spec: job.Corpus) -> list[_Source]:
    filesystem, path = _filesystem(pattern, spec.storage_options)
    suffixes = _FORMATS.get(spec.format) or tuple(chain(*_FORMATS.values()))
    try:
        found = _find(filesystem, path.rstrip("/"), suffixes)
        sources = [_source(filesystem, info, relative) for info, relative in found]
    except FileNotFoundError as error:
        missing = error.filename or pattern  # a broken link, or the whole path
        raise JobError(f"{missing!r}: no such file or folder", key="corpus.path") from None
    except Exception as error:  # remote filesystems raise anything
        raise JobError(
            f"{pattern!r} cannot be listed: {type(error).__name__}: {error}", key="corpus.path"
        ) from error
    if not sources:
        raise JobError(
            f"{pattern!r} matches no data file (in folders: {', '.join(suffixes)}, also "
            "compressed; names that start with '.' or '_' are skipped)",
            key="corpus.path",
        )
    return sources


def _filesystem(pattern: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    try:
        filesystem, path = fsspec.core.url_to_fs(pattern, **options)
        filesystem.invalidate_cache()
    except ImportError as error:
        protocol = pattern.split("://")[0].rsplit("::", 1)[-1]
        hint = _BACKEND_PACKAGES.get(protocol, str(error))
        raise JobError(f"{pattern!r} needs a package: {hint}", key="corpus.path") from error
    except Exception as error:  # an unknown protocol, or options that the backend rejects
        raise JobError(f"{pattern!r} cannot be opened: {error}", key="corpus.path") from error
    return filesystem, path


def _find(
    filesystem: Any, path: str, suffixes: Sequence[str]
) -> list[tuple[Mapping[str, Any], str]]:
    """Return the files that `path` means, each with its path relative to the corpus root."""
    try:
        info = filesystem.info(path)
    except FileNotFoundError:
        if not _MAGIC.search(path):
            raise
        root = "/".join(takewhile(lambda part: not _MAGIC.search(part), path.split("/")))
        matches = filesystem.glob(path, detail=True).values()
        files = [info for info in matches if info["type"] != "directory"]
        folders = [info["name"] for info in matches if info["type"] == "directory"]
    else:
        if info["type"] != "directory":
            return [(info, path.rsplit("/", 1)[-1])]
        root, files, folders = path, [], [path]
    # Local walks leave out unreadable folders unless told; lost files must not go unnoticed.
    strict = {"on_error": "raise"} if isinstance(filesystem, LocalFileSystem) else {}
    for folder in folders:
        inside = filesystem.find(folder, detail=True, **strict).values()
        files += [info for info in inside if _data_name(info["name"]).endswith(tuple(suffixes))]
    named = [(info, info["name"][len(root) :].lstrip("/")) for info in files]
    return [(info, relative) for info, relative in named if not _HIDDEN.search(relative)]


def _source(filesystem: Any, info: Mapping[str, Any], relative: str) -> _Source:
    path = info["name"]
    if isinstance(filesystem, LocalFileSystem):
        url, version = path, str(Path(path).stat().st_mtime_ns)
    else:
        url = filesystem.unstrip_protocol(path)
        version = next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), "").strip('"')
    file = CorpusFile(valid_text(url), info.get("size"), version, valid_text(relative))
    return _Source(file, filesystem, path)


def _distinct(sources: Sequence[_Source]) -> list[_Source]:
    """Tell files of one relative path apart, by as many parent folders as that takes."""
    names = [source.file.relative for source in sources]
    for depth in count(1):
        doubled = {name for name, times in Counter(names).items() if times > 1}
        if not doubled:
            break
        for i, source in enumerate(sources):
            if names[i] in doubled:
                parts = source.path.split("/")
                num_parts = source.file.relative.count("/") + 1 + depth
                longer = "/".join(parts[-num_parts:])
                names[i] = longer if num_parts <= len(parts) else source.file.url
    return [
        replace(source, file=replace(source.file, relative=name))
        for source, name in zip(sources, names, strict=True)
    ]


def _data_name(path: str) -> str:
    """Return the file name in lower case, without the suffix of its compression."""
    name = path.rsplit("/", 1)[-1].lower()
    stem, dot, codec = name.rpartition(".")
    return stem if dot + codec in _CODECS else name


def _one_format(spec: job.Corpus, sources: Sequence[_Source]) -> str:
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


def _format_of(source: _Source) -> str:
    name = _data_name(source.path)
    for kind, suffixes in _FORMATS.items():
        if name.endswith(suffixes):
            return kind
    raise JobError(
        f"the extension of {source.file.url} says nothing about its format; set one of: "
        f"{', '.join(_FORMATS)}",
        key="corpus.format",
    )


# --- Opening -------------------------------------------------------------------------------


def _codec(spec: job.Corpus, source: _Source) -> str | None:
    if spec.compression != "infer":
        return spec.compression
    return _CODECS.get(Path(source.path).suffix.lower())


def _check_codec(source: _Source, codec: str | None, kind: str) -> None:
    if codec is None:
        return
    key, url = "corpus.compression", source.file.url
    if kind == "parquet":
        raise JobError(f"{url}: Parquet is compressed inside, not around, the file", key=key)
    known = fsspec.compression.compr.keys() - {"zstd"}
    if codec not in known and not (codec == "zstd" and find_spec("zstandard")):
        if codec in _CODEC_PACKAGES:
            raise JobError(f"{url} is {codec}: {_CODEC_PACKAGES[codec]}", key=key)
        allowed = ", ".join(["infer", "null", *_CODECS.values()])
        raise JobError(f"{codec!r} is not allowed; allowed: {allowed}", key=key)


@contextmanager
def _open(source: _Source, spec: job.Corpus) -> Iterator[io.BufferedReader]:
    codec = _codec(spec, source)
    with ExitStack() as stack:
        try:
            stream = stack.enter_context(source.filesystem.open(source.path, "rb"))
        except OSError as error:
            raise JobError(
                f"{source.file.url} cannot be opened: {error}", key="corpus.path"
            ) from error
        if codec is not None:
            stream = stack.enter_context(_decompressed(stream, codec))
        # Iterating lines is slow in fsspec's own buffered files.
        yield io.BufferedReader(stream, _BUFFER_BYTES)


def _decompressed(stream: Any, codec: str) -> Any:
    if codec == "zstd":
        return _ZstdReader(stream)
    if codec != "zip":
        return fsspec.compression.compr[codec](stream, mode="rb")
    archive = zipfile.ZipFile(stream)
    names = [m.filename for m in archive.infolist() if not m.is_dir()]
    members = [name for name in names if not _HIDDEN.search(name)]
    if len(members) != 1:
        raise ValueError(f"the archive holds {len(members)} files, not one: {', '.join(members)}")
    return archive.open(members[0])


class _ZstdReader(io.RawIOBase):
    """Zstandard frames as one stream; unlike zstandard's own reader it reports a cut file."""

    def __init__(self, compressed: Any) -> None:
        import zstandard

        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._compressed = compressed
        self._frame: Any = None
        self._waiting = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._ready:
            bite = self._waiting or self._compressed.read(_ZSTD_BYTES)
            if not bite:
                break
            if self._frame is None or self._frame.eof:
                self._frame = self._new_frame()
            self._ready = memoryview(self._frame.decompress(bite))
            self._waiting = self._frame.unused_data
        if not self._ready and self._frame is not None and not self._frame.eof:
            raise EOFError("the file ends inside a compressed frame")
        size = min(len(target), len(self._ready))
        target[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


# --- Rows of each format -------------------------------------------------------------------


def _jsonl_rows(source: _Source, spec: job.Corpus, columns: Columns) -> Iterator[_Row]:
    # Only .json is ambiguous: it may be one document over many lines, or one big list.
    doubtful = _data_name(source.path).endswith(".json")
    with _open(source, spec) as stream:
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


def _json_row(index: int, line: bytes) -> _Row:
    try:
        value = _decode_json(line.decode("utf-8", "surrogateescape"))
    except json.JSONDecodeError as error:
        return _Row(index, None, f"not JSON: {error.msg} at character {error.pos + 1}")
    except (ValueError, RecursionError) as error:
        return _Row(index, None, f"not usable JSON: {error}")
    if not isinstance(value, dict):
        return _Row(index, None, f"not a JSON object but a {type(value).__name__}")
    brackets = line.count(b"[") + line.count(b"{")
    if brackets > _MAX_DEPTH and _is_deeper(value, _MAX_DEPTH):
        return _Row(index, None, f"not usable JSON: nested more than {_MAX_DEPTH} deep")
    return _Row(index, value)


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


def _csv_rows(source: _Source, spec: job.Corpus, columns: Columns) -> Iterator[_Row]:
    csv.field_size_limit(_MAX_FIELD_CHARACTERS)
    is_tsv = spec.delimiter == "," and _data_name(source.path).endswith(".tsv")
    with _open(source, spec) as stream:
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
                yield _Row(index, None, f"not CSV: {error}, up to line {rows.line_num}")
                continue
            if fields is None:
                return
            if not fields:
                continue  # a blank line
            if len(fields) != len(header):
                problem = f"{len(fields)} fields where the header has {len(header)}"
                yield _Row(index, None, problem)
                continue
            values: dict[str, str | None] = dict(zip(header, fields, strict=True))
            # CSV has no null; an empty reference would count as a human's answer.
            values.update({name: values[name] or None for name in nullable if name is not None})
            yield _Row(index, values)


def _declare_header(
    source: _Source, spec: job.Corpus, columns: Columns, header: Sequence[str]
) -> None:
    _require_distinct(source, header)
    _require(spec, header, source.file.url)
    names = [name for name in map(columns.name, header) if name is not None]
    columns.declare(pa.schema([(name, pa.string()) for name in names]), source.file.url)


def _text_rows(source: _Source, spec: job.Corpus, columns: Columns) -> Iterator[_Row]:
    with _open(source, spec) as stream:
        if spec.record == "file":
            whole = stream.read().removeprefix(_BOM)
            if whole:
                yield _text_row(0, whole, spec)
            return
        lines = chain([stream.readline().removeprefix(_BOM)], stream)
        for index, line in enumerate(lines):
            if line and not line.isspace():
                yield _text_row(index, line.removesuffix(b"\n").removesuffix(b"\r"), spec)


def _text_row(index: int, text: bytes, spec: job.Corpus) -> _Row:
    return _Row(index, {spec.text: text.decode("utf-8", "surrogateescape")})


def _parquet_rows(source: _Source, spec: job.Corpus, columns: Columns) -> Iterator[_Row]:
    with _open(source, spec) as stream:
        file = pq.ParquetFile(stream.raw, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        schema = file.schema_arrow
        _require_distinct(source, schema.names)
        _require(spec, schema.names, source.file.url)
        _require_text(source, spec, schema)
        kept = {field.name: columns.name(field.name) for field in schema}
        kept = {column: name for column, name in kept.items() if name is not None}
        fields = [schema.field(column).with_name(name) for column, name in kept.items()]
        columns.declare(pa.schema(fields), source.file.url)
        roles = set(_roles(spec).values())
        index = 0
        wanted = [*roles, *(column for column in kept if column not in roles)]
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=wanted):
            values = {name: _python_values(batch.column(name)) for name in roles}
            carried = _valid(batch.select(list(kept))).rename_columns(list(kept.values()))
            for i in range(batch.num_rows):
                row = {name: values[name][i] for name in roles}
                yield _Row(index, row, passthrough=ArrowRow(carried, i))
                index += 1


def _require_text(source: _Source, spec: job.Corpus, schema: pa.Schema) -> None:
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


_READERS: Mapping[str, Callable[[_Source, job.Corpus, Columns], Iterator[_Row]]] = {
    "parquet": _parquet_rows,
    "jsonl": _jsonl_rows,
    "csv": _csv_rows,
    "text": _text_rows,
}


# --- Columns and values --------------------------------------------------------------------


def _roles(spec: job.Corpus) -> dict[str, str]:
    """Return job key → column of the columns that mean something."""
    roles = {key: getattr(spec, key) for key in ("text", "id", "reference", "context")}
    return {key: column for key, column in roles.items() if column is not None}


def _require(spec: job.Corpus, names: Sequence[str], where: str) -> None:
    wanted = [*_roles(spec).items(), *(("keep", column) for column in spec.keep or ())]
    for key, column in wanted:
        if column not in names:
            there = ", ".join(map(repr, names))
            raise JobError(
                f"no column {column!r} in {where}; columns there: {there}", key=f"corpus.{key}"
            )


def _require_distinct(source: _Source, names: Sequence[str]) -> None:
    doubled = [name for name, times in Counter(names).items() if times > 1]
    if doubled:
        raise JobError(
            f"{source.file.url} has more than one column {doubled[0]!r}", key="corpus.path"
        )


def _problem(text: Any) -> tuple[Reason, str] | None:
    """Return why a value cannot be asked about, None if it can."""
    if text is None:
        return Reason.MISSING_TEXT, "is null or missing"
    if not isinstance(text, str):
        return Reason.NOT_TEXT, f"is {as_text(text)[:60]}, not a string"
    if not text:
        return Reason.EMPTY, "is empty"
    if "\0" in text:
        return Reason.NUL_CHARACTER, f"has a NUL character at position {text.index(chr(0)) + 1}"
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return Reason.INVALID_UTF8, f"is not UTF-8 at character {error.start + 1}"
    if _VISIBLE.search(text) is None:
        return Reason.WHITESPACE, f"is {len(text)} characters of white space"
    return None


def _optional_text(values: Mapping[str, Any], column: str | None) -> str | None:
    value = None if column is None else values.get(column)
    return None if value is None else as_text(value)


def _positional_id(file: CorpusFile, row: _Row) -> str:
    place = f"{file.relative}\0{row.position}".encode()
    return hashlib.blake2b(place, digest_size=12).hexdigest()


def _digest(identity: str) -> bytes:
    return hashlib.blake2b(identity.encode(), digest_size=8).digest()


def _where(file: CorpusFile, row: _Row) -> str:
    return f"{file.relative}, row {row.position + 1}"
