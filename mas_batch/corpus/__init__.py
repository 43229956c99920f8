"""List a corpus' files on any filesystem and stream their records, each with a stable id.

Rows that cannot be asked about become records with a `reason`; only what makes the whole
corpus doubtful (a missing column, a doubled id, a file that is cut) stops the stream.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from mas_batch import job
from mas_batch.corpus.changes import check_unchanged
from mas_batch.corpus.columns import Columns, as_text, conform, records_table
from mas_batch.corpus.files import CorpusFile, Source, list_sources, safe_cause, store_error
from mas_batch.corpus.formats import READERS, common_format
from mas_batch.corpus.opening import check_codec, codec_of
from mas_batch.corpus.rows import Row, require_columns, roles_of
from mas_batch.corpus.run_folders import check_outside
from mas_batch.errors import CorpusChangedError, JobError, MasBatchError, Reason, RunError
from mas_batch.records import Record

__all__ = ["CorpusFile", "CorpusReader", "conform", "open_corpus", "records_table"]

# White space by Unicode, plus what has no width: joiners, marks of direction, soft hyphen.
_VISIBLE = re.compile(r"[^\s\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]")

_MAX_SUSPECTS = 1 << 16  # bounds the memory of one search for doubled ids


def open_corpus(whole: job.Job) -> CorpusReader:
    """List a job's corpus.

    Raises:
        JobError: what the job writes lies in the corpus; or as `CorpusReader`.
        RunError: as `CorpusReader`.
    """
    options = whole.output.storage_options
    check_outside(whole.corpus, whole.output.path, options, "output.path")
    if whole.merge.history is not None:
        check_outside(whole.corpus, whole.merge.history, options, "merge.history")
    return CorpusReader(whole.corpus)


class CorpusReader:
    """The records of a corpus, in the order of its files' relative paths.

    Creating it lists the files; every iteration reads them anew, a bounded part at a time.

    Raises:
        JobError: on creation, for paths, formats and codecs that cannot be read; while iterating,
            for missing columns, missing or doubled ids, a corpus without records, and a file
            that is damaged so that its rows cannot be counted (the message names the last row
            that was read).
        RunError: when the store, the disk or the network fails; trying again may help.
        CorpusChangedError: while iterating, a file has changed since it was listed.
    """

    def __init__(self, spec: job.Corpus) -> None:
        self._spec = spec
        sources = list_sources(spec)
        self._format = common_format(spec, sources)
        for source in sources:
            check_codec(source, codec_of(spec, source), self._format)
        self._sources = sources
        self._columns = Columns(tuple(roles_of(spec).values()), spec.keep)

    @property
    def files(self) -> tuple[CorpusFile, ...]:
        """The files, sorted by relative path."""
        return tuple(source.file for source in self._sources)

    @property
    def fingerprint(self) -> str:
        """Changes when a file is added, removed, renamed or rewritten, not when all files move."""
        facts = [(file.relative, file.size_bytes, file.version) for file in self.files]
        return job.fingerprint(facts)

    @property
    def has_schema(self) -> bool:
        """Whether a file's column types are known before its rows, unlike JSON's."""
        return self._format != "jsonl"

    def passthrough_schema(self) -> pa.Schema:
        """Types of the carried columns in the rows read so far; final after the last row."""
        return self._columns.schema()

    @property
    def _quoted_paths(self) -> str:
        return ", ".join(map(repr, self._spec.path))

    def __iter__(self) -> Iterator[Record]:
        digests = bytearray()
        num_records = 0
        for source, row in self._rows():
            record = self._record_of(source.file, row)
            if self._spec.id is not None:
                digests += _id_hash(record.record_id)
            num_records += 1
            yield record
        if num_records == 0:
            raise JobError(f"{self._quoted_paths} holds no records", key="corpus.path")
        self._check_columns(num_records)
        if self._spec.id is not None:
            self._check_ids(digests)

    def _rows(self) -> Iterator[tuple[Source, Row]]:
        """Yield the first `limit` rows, each with its file."""
        read, left = READERS[self._format], self._spec.limit
        for source in self._sources:
            num_rows = num_read = 0
            try:
                for row in islice(read(source, self._spec, self._columns), left):
                    num_rows, num_read = row.position + 1, num_read + 1
                    yield source, row
            except (RunError, MemoryError):
                raise
            except Exception as error:  # codecs raise anything
                with suppress(JobError):  # where it cannot be looked at, the first error says more
                    _check_unchanged(source)  # a file that is written just now looks damaged
                if isinstance(error, MasBatchError):
                    raise
                raise JobError(
                    f"{source.file.url} cannot be read after row {num_rows}: "
                    f"{type(error).__name__}: {error}; it is damaged or not {self._format}: "
                    "restore it, or leave it out",
                    key="corpus.path",
                ) from error
            _check_unchanged(source)
            if left is not None and (left := left - num_read) == 0:
                return

    def _record_of(self, file: CorpusFile, row: Row) -> Record:
        if row.problem:
            return Record(
                self._identity(file, row),
                None,
                reason=Reason.MALFORMED_ROW,
                message=f"{_row_location(file, row)}: {row.problem}",
                passthrough=row.passthrough or {},
            )
        spec, values = self._spec, row.values
        passthrough = row.passthrough
        if passthrough is None:
            passthrough = self._columns.take(values)
        text = values.get(spec.text)
        problem = problem_of(text)
        return Record(
            self._identity(file, row),
            text if problem is None else None,
            _optional_text(values, spec.context),
            _optional_text(values, spec.reference),
            None if problem is None else problem[0],
            "" if problem is None else f"{_row_location(file, row)}: {spec.text!r} {problem[1]}",
            passthrough,
        )

    def _identity(self, file: CorpusFile, row: Row) -> str:
        column = self._spec.id
        value = None if column is None else row.values.get(column)
        identity = "" if value is None else as_text(value)
        if identity.strip():
            return identity
        if column is None or row.problem:
            return _positional_id(file, row)
        what = "null or missing" if value is None else "empty"
        raise JobError(
            f"{file.url}, row {row.position + 1}: column {column!r} is {what}; every row needs "
            "an id (without corpus.id, ids are made from file and position)",
            key="corpus.id",
        )

    def _check_columns(self, num_records: int) -> None:
        """Raise JobError for a column that no JSON row had; other formats check each file."""
        seen = self._columns.seen
        if self._format == "jsonl" and seen:
            require_columns(
                self._spec, seen, f"any of the {num_records} rows of {self._quoted_paths}"
            )

    def _check_ids(self, digests: bytearray) -> None:
        """Raise JobError for a doubled id.

        The ids' 64-bit hashes are sorted in place; ids of equal hashes are then read again.
        """
        hashes = np.frombuffer(digests, dtype="<u8")
        hashes.sort()
        suspects = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
        for start in range(0, len(suspects), _MAX_SUSPECTS):
            self._compare_ids(set(suspects[start : start + _MAX_SUSPECTS].tolist()))

    def _compare_ids(self, suspects: set[int]) -> None:
        first: dict[str, str] = {}
        for source, row in self._rows():
            identity = self._identity(source.file, row)
            if int.from_bytes(_id_hash(identity), "little") not in suspects:
                continue
            here = f"{source.file.url}, row {row.position + 1}"
            if identity in first:
                raise JobError(
                    f"id {identity!r} occurs twice: {first[identity]} and {here}", key="corpus.id"
                )
            first[identity] = here


def _check_unchanged(source: Source) -> None:
    url = source.file.url
    try:
        check_unchanged(source.filesystem, source.path, url, source.facts)
    except CorpusChangedError:
        raise
    except Exception as error:  # remote filesystems raise anything
        cause = safe_cause(error, source.path)
        raise store_error(f"{url} cannot be looked at again", error, source.path) from cause


def problem_of(text: Any) -> tuple[Reason, str] | None:
    """Return why no agent can be asked about a value, None if one can."""
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


def _positional_id(file: CorpusFile, row: Row) -> str:
    place = f"{file.relative}\0{row.position}".encode()
    return hashlib.blake2b(place, digest_size=12).hexdigest()


def _id_hash(identity: str) -> bytes:
    return hashlib.blake2b(identity.encode(), digest_size=8).digest()


def _row_location(file: CorpusFile, row: Row) -> str:
    return f"{file.relative}, row {row.position + 1}"
