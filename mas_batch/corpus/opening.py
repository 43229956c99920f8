"""Open a corpus' files, decompressed; tell a failing disk or network from damaged content."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec.compression

from mas_batch import job
from mas_batch.corpus.files import CODECS, Source, safe_cause, store_error
from mas_batch.corpus.run_folders import HIDDEN
from mas_batch.errors import JobError, RunError

BUFFER_BYTES = 1 << 20
_ZSTD_BYTES = 1 << 14  # a repetitive text grows a thousandfold: small reads bound the memory

_CODEC_PACKAGES = {
    "zstd": "pip install 'mas_batch[zstd]'",
    "lz4": "pip install lz4",
    "snappy": "pip install python-snappy",
}

_COMPRESSED = "set corpus.compression, or give the file the extension of its compression"
_UTF16 = "rewrite it as UTF-8, for example with: iconv -f UTF-16 -t UTF-8"
# No JSON, CSV or text in UTF-8 begins like this: it would not have these control characters.
_SIGNATURES = (
    (b"\x1f\x8b", "gzip", _COMPRESSED),
    (b"\x28\xb5\x2f\xfd", "zstd", _COMPRESSED),
    (b"\xfd7zXZ\x00", "xz", _COMPRESSED),
    (b"PK\x03\x04", "a zip archive or a spreadsheet", _COMPRESSED + ", or save it as CSV"),
    (b"PAR1\x15", "Parquet", "set corpus.format to parquet, or name the file .parquet"),
    (b"\xff\xfe", "UTF-16", _UTF16),
    (b"\xfe\xff", "UTF-16", _UTF16),
)


def codec_of(spec: job.Corpus, source: Source) -> str | None:
    """Return the codec that the job sets or the file's name implies, None for no codec."""
    if spec.compression != "infer":
        return spec.compression
    return CODECS.get(Path(source.name).suffix.lower())


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
        allowed = ", ".join(["infer", "null", *CODECS.values()])
        raise JobError(f"{codec!r} is not allowed; allowed: {allowed}", key=key)


@contextmanager
def open_stored(source: Source) -> Iterator[Any]:
    """Open a file for reading, as stored.

    Raises:
        JobError: the filesystem refuses to open it.
        RunError: the filesystem may open it later; from the stream, it fails to read what it has
            opened.
    """
    with ExitStack() as stack:
        try:
            stream = stack.enter_context(source.filesystem.open(source.path, "rb"))
        except Exception as error:  # remote filesystems raise anything
            done = f"{source.file.url} cannot be opened"
            raise store_error(done, error, source.path) from safe_cause(error, source.path)
        yield _StoredStream(stream, source.file.url)


@contextmanager
def open_source(source: Source, spec: job.Corpus) -> Iterator[io.BufferedReader]:
    """Open a file of text for reading, decompressed.

    Raises:
        JobError: the filesystem refuses to open it, or it holds something else by its first bytes.
        RunError: as `open_stored`.
    """
    codec = codec_of(spec, source)
    with open_stored(source) as stored, ExitStack() as stack:
        stream = stored
        if codec is not None:
            stream = stack.enter_context(_decompressed(stored, codec))
        # Iterating lines is slow in fsspec's own buffered files.
        reader = io.BufferedReader(stream, BUFFER_BYTES)
        _refuse_other_content(reader, source)
        yield reader


def _refuse_other_content(reader: io.BufferedReader, source: Source) -> None:
    """Raise JobError for content of another format: else each of its lines would be malformed."""
    beginning = reader.peek(16)
    for signature, name, advice in _SIGNATURES:
        if beginning.startswith(signature):
            raise JobError(f"{source.file.url} holds {name}, not text: {advice}", key="corpus.path")


class _StoredStream(io.RawIOBase):
    """A filesystem's stream whose failures are `RunError`s.

    Decoders report damage by the same exceptions as disks and networks do. Where this class is
    read, any exception but a `RunError` means damage, which trying again does not mend.
    """

    def __init__(self, stream: Any, url: str) -> None:
        self._stream = stream
        self._url = url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._stream.seekable())

    def tell(self) -> int:
        return int(self._stream.tell())

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return int(self._stream.seek(offset, whence))

    def read(self, size: int = -1, /) -> bytes:
        try:
            content: bytes = self._stream.read(size)
        except Exception as error:  # remote filesystems raise anything
            raise RunError(
                f"{self._url}: reading failed: {type(error).__name__}: {error}"
            ) from error
        return content

    def readinto(self, target: Any, /) -> int:
        content = self.read(len(target))
        target[: len(content)] = content
        return len(content)


def _decompressed(stream: Any, codec: str) -> Any:
    if codec == "zstd":
        return _ZstdReader(stream)
    if codec != "zip":
        return fsspec.compression.compr[codec](stream, mode="rb")
    archive = zipfile.ZipFile(stream)
    names = [m.filename for m in archive.infolist() if not m.is_dir()]
    members = [name for name in names if not HIDDEN.search(name)]
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
            compressed = self._waiting or self._compressed.read(_ZSTD_BYTES)
            if not compressed:
                break
            if self._frame is None or self._frame.eof:
                self._frame = self._new_frame()
            self._ready = memoryview(self._frame.decompress(compressed))
            self._waiting = self._frame.unused_data
        if not self._ready and self._frame is not None and not self._frame.eof:
            raise EOFError("the file ends inside a compressed frame")
        size = min(len(target), len(self._ready))
        target[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size
