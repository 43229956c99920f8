"""List a corpus' files on any filesystem."""

from __future__ import annotations

import re
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, takewhile
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from mas_batch import job
from mas_batch.corpus.columns import valid_text
from mas_batch.errors import JobError
from mas_batch.safe_text import has_credentials, without_credentials, without_pieces

FORMATS = {
    "parquet": (".parquet", ".parq", ".pq"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "csv": (".csv", ".tsv"),
    "text": (".txt", ".text"),
}
CODECS = {
    ".gz": "gzip",
    ".bz2": "bz2",
    ".xz": "xz",
    ".zst": "zstd",
    ".zip": "zip",
    ".lz4": "lz4",
}
_BACKEND_PACKAGES = {"s3": "pip install 'mas_batch[s3]'", "s3a": "pip install 'mas_batch[s3]'"}
_VERSION_KEYS = ("ETag", "etag", "LastModified", "last_modified", "updated", "mtime", "created")

_MAGIC = re.compile(r"[*?\[]")
HIDDEN = re.compile(r"(^|/)[._]")


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """One file of the corpus, as listed before reading."""

    url: str
    """A plain path for local files; without credentials."""
    size_bytes: int | None
    """As stored, so compressed; None where the filesystem does not say."""
    version: str
    """ETag, modification time in nanoseconds, or empty: changes when the content does."""
    relative: str
    """Path below the corpus root; it names the file in ids, so it survives a move."""


@dataclass(frozen=True, slots=True)
class Source:
    """A file and the filesystem that opens it under `path`."""

    file: CorpusFile
    filesystem: Any
    path: str


# --- Listing -------------------------------------------------------------------------------


def list_sources(spec: job.Corpus) -> tuple[Source, ...]:
    """Return the files that the job names, sorted by relative path, each of them once.

    Raises:
        JobError: a path that cannot be listed, or matches no data file.
    """
    patterns = spec.path if isinstance(spec.path, tuple) else (spec.path,)
    found: dict[str, Source] = {}
    for pattern in patterns:
        if not pattern.strip():
            raise JobError("is empty; '.' is the working directory", key="corpus.path")
        for source in _list_pattern(pattern, spec):
            # A file that two patterns match counts once. Its name is relative to the wider root,
            # whatever the order of the patterns.
            known = found.setdefault(source.file.url, source)
            if len(source.file.relative) > len(known.file.relative):
                found[source.file.url] = source
    return tuple(sorted(_with_distinct_names(list(found.values())), key=lambda s: s.file.relative))


def _list_pattern(pattern: str, spec: job.Corpus) -> list[Source]:
    filesystem, path = _filesystem(pattern, spec.storage_options)
    suffixes = FORMATS.get(spec.format) or tuple(chain(*FORMATS.values()))
    try:
        found = _find_files(filesystem, path.rstrip("/"), suffixes)
        sources = [_source(filesystem, info, relative) for info, relative in found]
    except FileNotFoundError as error:
        missing = error.filename or pattern  # a broken link, or the whole path
        # fsspec calls an HTTP server that does not answer "not found" too; the cause says more.
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise JobError(f"{missing!r}: no such file or folder{cause}", key="corpus.path") from None
    except JobError:
        raise
    except Exception as error:  # remote filesystems raise anything
        said = without_pieces(f"{type(error).__name__}: {error}", pattern)
        raise JobError(f"{pattern!r} cannot be listed: {said}", key="corpus.path") from _safe_cause(
            error, pattern
        )
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
        message = f"{pattern!r} needs a package: {hint}"
        raise JobError(message, key="corpus.path") from _safe_cause(error, pattern)
    except Exception as error:  # an unknown protocol, or options that the backend rejects
        message = f"{pattern!r} cannot be opened: {without_pieces(str(error), pattern)}"
        raise JobError(message, key="corpus.path") from _safe_cause(error, pattern)
    return filesystem, path


def _safe_cause(error: Exception, url: str) -> Exception | None:
    """Return the error to chain; None if its traceback would show the URL's credentials."""
    return None if has_credentials(url) else error


def _find_files(
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
    # By default a local walk skips unreadable folders; lost files must not go unnoticed.
    strict = {"on_error": "raise"} if isinstance(filesystem, LocalFileSystem) else {}
    for folder in folders:
        inside = filesystem.find(folder, detail=True, **strict).values()
        files += [info for info in inside if data_name(info["name"]).endswith(tuple(suffixes))]
    named = [(info, info["name"][len(root) :].lstrip("/")) for info in files]
    return [(info, relative) for info, relative in named if not HIDDEN.search(relative)]


def _source(filesystem: Any, info: Mapping[str, Any], relative: str) -> Source:
    path = info["name"]
    if isinstance(filesystem, LocalFileSystem):
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe, for example, cannot be read twice
            raise JobError(f"{path!r} is not a regular file", key="corpus.path")
        url, version = path, str(status.st_mtime_ns)
    else:
        # No file is opened by this URL: it is for messages, and may become a part of record ids.
        url = without_credentials(filesystem.unstrip_protocol(path))
        version = next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), "").strip('"')
    file = CorpusFile(valid_text(url), info.get("size"), version, valid_text(relative))
    return Source(file, filesystem, path)


def _with_distinct_names(sources: Sequence[Source]) -> list[Source]:
    """Give files of equal relative paths distinct ones, by as many parent folders as needed."""
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


def data_name(path: str) -> str:
    """Return the file name in lower case, without the suffix of its compression."""
    name = path.rsplit("/", 1)[-1].lower()
    stem, dot, codec = name.rpartition(".")
    return stem if dot + codec in CODECS else name
