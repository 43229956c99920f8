"""List a corpus' files on any filesystem and open them, decompressed."""

from __future__ import annotations

import io
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import chain, count, takewhile
from pathlib import Path
from typing import Any

import fsspec
import fsspec.compression
from fsspec.implementations.local import LocalFileSystem

from mas_batch import job
from mas_batch.corpus.columns import valid_text
from mas_batch.errors import JobError

FORMATS = {
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

_MAGIC = re.compile(r"[*?\[]")
_HIDDEN = re.compile(r"(^|/)[._]")

BUFFER_BYTES = 1 << 20
_ZSTD_BYTES = 1 << 14  # a text of repeats grows a thousandfold: small bites bound the memory


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
        for source in _list_pattern(pattern, spec):
            # A file that two patterns match is one, named from the wider root in any order.
            known = found.setdefault(source.file.url, source)
            if len(source.file.relative) > len(known.file.relative):
                found[source.file.url] = source
    return tuple(sorted(_distinct(list(found.values())), key=lambda s: s.file.relative))


def _list_pattern(pattern: str, spec: job.Corpus) -> list[Source]:
    filesystem, path = _filesystem(pattern, spec.storage_options)
    suffixes = FORMATS.get(spec.format) or tuple(chain(*FORMATS.values()))
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
        files += [info for info in inside if data_name(info["name"]).endswith(tuple(suffixes))]
    named = [(info, info["name"][len(root) :].lstrip("/")) for info in files]
    return [(info, relative) for info, relative in named if not _HIDDEN.search(relative)]


def _source(filesystem: Any, info: Mapping[str, Any], relative: str) -> Source:
    path = info["name"]
    if isinstance(filesystem, LocalFileSystem):
        url, version = path, str(Path(path).stat().st_mtime_ns)
    else:
        url = filesystem.unstrip_protocol(path)
        version = next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), "").strip('"')
    file = CorpusFile(valid_text(url), info.get("size"), version, valid_text(relative))
    return Source(file, filesystem, path)


def _distinct(sources: Sequence[Source]) -> list[Source]:
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


def data_name(path: str) -> str:
    """Return the file name in lower case, without the suffix of its compression."""
    name = path.rsplit("/", 1)[-1].lower()
    stem, dot, codec = name.rpartition(".")
    return stem if dot + codec in _CODECS else name


# --- Opening -------------------------------------------------------------------------------


def codec_of(spec: job.Corpus, source: Source) -> str | None:
    """Return the codec that the job sets or the name implies, None for none."""
    if spec.compression != "infer":
        return spec.compression
    return _CODECS.get(Path(source.path).suffix.lower())


def check_codec(source: Source, codec: str | None, kind: str) -> None:
    """Raise JobError for a codec that is unknown, not installed or wrong for the format."""
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
def open_source(source: Source, spec: job.Corpus) -> Iterator[io.BufferedReader]:
    """Open a file for reading, decompressed.

    Raises:
        JobError: the filesystem refuses to open it.
    """
    codec = codec_of(spec, source)
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
        yield io.BufferedReader(stream, BUFFER_BYTES)


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
