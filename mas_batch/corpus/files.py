"""List a corpus' files on any filesystem."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from glob import escape, has_magic
from itertools import chain
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from mas_batch import job
from mas_batch.corpus.changes import facts_of, version_of
from mas_batch.corpus.columns import valid_text
from mas_batch.corpus.names import HTTP, last_part, stable_path, with_distinct_names
from mas_batch.corpus.run_folders import HIDDEN, without_run_folders
from mas_batch.errors import JobError, MasBatchError, RunError
from mas_batch.filesystems import answered_by_http, filesystem_of, is_absent, is_for_good
from mas_batch.safe_text import has_credentials, without_credentials, without_pieces

logger = logging.getLogger(__name__)

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
    name: str
    """The path without a query, which says format and compression."""
    facts: Mapping[str, Any]
    """Size and version as listed; see `changes.facts_of`."""

    @property
    def key(self) -> tuple[str, str]:
        """Tells files apart that have the same path on unlike filesystems."""
        return str(self.filesystem.protocol), self.path


# --- Listing -------------------------------------------------------------------------------


def list_sources(spec: job.Corpus) -> tuple[Source, ...]:
    """Return the files that the job names, sorted by relative path, each of them once.

    Raises:
        JobError: a path that matches no data file, or that its filesystem refuses to list.
        RunError: the filesystem is down, or cannot be reached; trying again may help.
    """
    patterns = spec.path if isinstance(spec.path, tuple) else (spec.path,)
    found: dict[Any, Source] = {}
    for pattern in patterns:
        if not pattern.strip():
            raise JobError("is empty; '.' is the working directory", key="corpus.path")
        for source in _list_pattern(pattern, spec):
            # A file that two patterns match counts once. Its name is relative to the wider root,
            # whatever the order of the patterns.
            known = found.setdefault(source.key, source)
            if len(source.file.relative) > len(known.file.relative):
                found[source.key] = source
    sources = _without_links(list(found.values()))
    names = with_distinct_names(
        [source.file.relative for source in sources],
        [valid_text(stable_path(source.path)) for source in sources],
        [s.file.url if s.name == s.path else valid_text(stable_path(s.path)) for s in sources],
    )
    named = [
        replace(source, file=replace(source.file, relative=name))
        for source, name in zip(sources, names, strict=True)
    ]
    return tuple(sorted(named, key=lambda source: source.file.relative))


def store_error(done: str, error: Exception, url: str) -> MasBatchError:
    """Return the error for a filesystem's own, as wrong job or as a store that may come back.

    Args:
        done: which URL could not be what, in words that may be shown.
        url: with the credentials that the filesystem's words may quote.
    """
    origin = answered_by_http(error) or error
    said = " ".join(f"{type(origin).__name__}: {origin}".split())
    message = f"{done}: {without_pieces(said, url)}"
    if is_for_good(error):
        return JobError(message, key="corpus.path")
    return RunError(f"corpus.path: {message}; the same command tries again")


def safe_cause(error: Exception, url: str) -> Exception | None:
    """Return the error to chain; None if its traceback would show the URL's credentials."""
    return None if has_credentials(url) else error


def _list_pattern(pattern: str, spec: job.Corpus) -> list[Source]:
    filesystem, path = _filesystem(pattern, spec.storage_options)
    suffixes = FORMATS.get(spec.format) or tuple(chain(*FORMATS.values()))
    try:
        found, num_left_out = _find_files(filesystem, path, suffixes)
        sources = [_source(filesystem, info, relative) for info, relative in found]
    except JobError:
        raise
    except Exception as error:  # remote filesystems raise anything
        cause = safe_cause(error, pattern)
        if isinstance(error, FileNotFoundError) and is_absent(error):
            missing = error.filename or pattern  # a broken link, or the whole path
            message = f"{missing!r}: no such file or folder"
            raise JobError(without_pieces(message, pattern), key="corpus.path") from cause
        raise store_error(f"{pattern!r} cannot be listed", error, pattern) from cause
    if not sources:
        also = f"; {num_left_out} files of runs are left out" if num_left_out else ""
        raise JobError(
            f"{pattern!r} matches no data file (in folders: {', '.join(suffixes)}, also "
            f"compressed; names that start with '.' or '_' are skipped{also})",
            key="corpus.path",
        )
    return sources


def _filesystem(pattern: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    try:
        filesystem, path = filesystem_of(pattern, options)
        filesystem.invalidate_cache()
    except ImportError as error:
        protocol = pattern.split("://")[0].rsplit("::", 1)[-1]
        hint = _BACKEND_PACKAGES.get(protocol, str(error))
        message = f"{pattern!r} needs a package: {hint}"
        raise JobError(message, key="corpus.path") from safe_cause(error, pattern)
    except Exception as error:  # an unknown protocol, options that it rejects, or no connection
        cause = safe_cause(error, pattern)
        raise store_error(f"{pattern!r} cannot be opened", error, pattern) from cause
    # The last character of a signed URL may be a slash that belongs to the signature.
    return filesystem, path if HTTP.match(path) and "?" in path else path.rstrip("/")


def _find_files(
    filesystem: Any, path: str, suffixes: Sequence[str]
) -> tuple[list[tuple[Mapping[str, Any], str]], int]:
    """Find the files that `path` means, literally or else as a pattern.

    Returns:
        The files, each with its path relative to the corpus root, and the number of those that
        are left out because they are files of runs.
    """
    try:
        info = filesystem.info(path)
    except FileNotFoundError as error:
        is_pattern = has_magic(path.partition("?")[0] if HTTP.match(path) else path)
        if not is_pattern or not is_absent(error):
            raise
        root, pattern = _literal_root(filesystem, path)
        matches = filesystem.glob(pattern, detail=True).values()
        files = [info for info in matches if info["type"] != "directory"]
        folders = [info["name"] for info in matches if info["type"] == "directory"]
    else:
        if info["type"] != "directory":
            return [(info, last_part(stable_path(path)))], 0
        root, files, folders = path, [], [path]
    # By default a local walk skips unreadable folders; lost files must not go unnoticed.
    strict = {"on_error": "raise"} if isinstance(filesystem, LocalFileSystem) else {}
    for folder in folders:
        inside = filesystem.find(folder, detail=True, **strict).values()
        files += [info for info in inside if data_name(info["name"]).endswith(tuple(suffixes))]
    named = [(info, stable_path(info["name"])[len(root) :].lstrip("/")) for info in files]
    visible = [(info, relative) for info, relative in named if not HIDDEN.search(relative)]
    kept = list(without_run_folders(filesystem, root, visible))
    return kept, len(visible) - len(kept)


def _literal_root(filesystem: Any, pattern: str) -> tuple[str, str]:
    """Return the folder that a pattern begins with, and the pattern with that folder escaped.

    A folder that is there under just that name is meant, though its name could be a pattern.
    """
    parts = pattern.split("/")
    num_literal = 0
    for num_literal, part in enumerate(parts):
        if has_magic(part) and not filesystem.isdir("/".join(parts[: num_literal + 1])):
            break
    root = parts[:num_literal]
    escaped = [escape(part) if has_magic(part) else part for part in root]
    return "/".join(root), "/".join([*escaped, *parts[num_literal:]])


def _source(filesystem: Any, info: Mapping[str, Any], relative: str) -> Source:
    path = info["name"]
    facts = facts_of(filesystem, info)
    is_local = isinstance(filesystem, LocalFileSystem)
    # No file is opened by this URL: it is for messages.
    url = path if is_local else without_credentials(filesystem.unstrip_protocol(path))
    version = version_of(facts)
    file = CorpusFile(valid_text(url), facts.get("size"), version, valid_text(relative))
    name = path.partition("?")[0] if HTTP.match(path) else path
    return Source(file, filesystem, path, name, facts)


def _without_links(sources: Sequence[Source]) -> list[Source]:
    """Leave out names that lead, through a symbolic link, to a file of another name."""
    alike: defaultdict[Any, list[Source]] = defaultdict(list)
    for source in sources:
        alike[source.facts.get("place", source.key)].append(source)
    kept: list[Source] = []
    for group in alike.values():
        best: dict[str, Source] = {}  # hard links are files of their own: their real paths differ
        for source in sorted(group, key=lambda each: each.file.relative):
            real = os.path.realpath(source.path) if len(group) > 1 else source.path
            if real not in best or source.path == real:
                best[real] = source
        kept += best.values()
    if len(kept) < len(sources):
        num_links = len(sources) - len(kept)
        logger.info("%d links to other files of the corpus are not read again", num_links)
    return kept


def data_name(path: str) -> str:
    """Return the file name in lower case, without the suffix of its compression."""
    name = path.rsplit("/", 1)[-1].lower()
    stem, dot, codec = name.rpartition(".")
    return stem if dot + codec in CODECS else name
