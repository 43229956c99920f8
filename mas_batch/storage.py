"""Files of a run on any filesystem, each written at most once.

Dask executes a task at least once: a killed or paused worker's task runs again, and both
copies may finish. Exactly-once therefore comes from here: `commit` creates a name only if
it is absent, the first copy wins, and every later one learns that it lost.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from mas_batch.errors import JobError, RunError

_TEMPORARY = ".tmp-"


@dataclass(frozen=True)
class Store:
    """A folder on a filesystem; names inside it are relative, with `/`. Cheap to pickle."""

    url: str
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Not in `repr`: Dask logs the arguments of failed tasks, and these may be secrets."""

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "options": dict(self.options)}

    @cached_property
    def _filesystem(self) -> tuple[Any, str]:
        try:
            filesystem, root = fsspec.core.url_to_fs(self.url, **self.options)
        except ImportError as error:
            raise JobError(f"{self.url!r}: {error}", key="output.path") from error
        except ValueError as error:
            raise JobError(
                f"{self.url!r} is not a path or URL that fsspec knows: {error}", key="output.path"
            ) from error
        return filesystem, root.rstrip("/")

    @property
    def is_local(self) -> bool:
        """True for a plain folder of this machine (or of a shared mount)."""
        return isinstance(self._filesystem[0], LocalFileSystem)

    def child(self, name: str) -> Store:
        """Return the store of a folder below this one."""
        return Store(f"{self.url.rstrip('/')}/{name}", self.options)

    def path(self, name: str) -> str:
        """Return the filesystem's own path of `name`."""
        root = self._filesystem[1]
        return f"{root}/{name}" if name else root

    def exists(self, name: str) -> bool:
        """Say whether `name` is committed."""
        filesystem, _ = self._filesystem
        filesystem.invalidate_cache()
        return bool(filesystem.exists(self.path(name)))

    def read_bytes(self, name: str) -> bytes:
        """Return the whole content of `name`.

        Raises:
            FileNotFoundError: it is not there.
        """
        content: bytes = self._filesystem[0].cat_file(self.path(name))
        return content

    def read_table(self, name: str) -> pa.Table:
        """Read the Parquet file `name`."""
        return pq.read_table(pa.BufferReader(self.read_bytes(name)))

    def read_schema(self, name: str) -> pa.Schema:
        """Read only the footer of the Parquet file `name`."""
        with self._filesystem[0].open(self.path(name), "rb") as file:
            return pq.read_schema(file)

    def list(self, folder: str) -> set[str]:
        """List the committed names directly below `folder`, without the folder; empty if absent."""
        filesystem, _ = self._filesystem
        filesystem.invalidate_cache()
        try:
            entries = filesystem.ls(self.path(folder), detail=False)
        except FileNotFoundError:
            return set()
        except NotADirectoryError as error:
            raise RunError(f"{self.path(folder)} is in the way: a folder must be there") from error
        names = {entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries}
        return {name for name in names if not name.startswith(_TEMPORARY)}

    def commit(self, name: str, content: bytes) -> bool:
        """Create `name` with `content` if it is absent; the first writer wins.

        Returns:
            True if this call created it, False if it was there already.

        Raises:
            RunError: the filesystem refused to write (read-only, full, forbidden).
        """
        try:
            return (
                self._commit_local(name, content)
                if self.is_local
                else self._commit_object(name, content)
            )
        except OSError as error:
            raise RunError(f"{self.path(name)} cannot be written: {error}") from error

    def commit_table(self, name: str, table: pa.Table) -> bool:
        """Commit a table as one Parquet file; equal tables give equal bytes."""
        return self.commit(name, parquet_bytes(table))

    def replace(self, name: str, content: bytes) -> None:
        """Write `name` whether or not it exists; readers see the old or the new, never a part.

        Raises:
            RunError: the filesystem refused to write.
        """
        try:
            if self.is_local:
                temporary = self._write_temporary(name, content)
                temporary.replace(self.path(name))
            else:
                self._filesystem[0].pipe_file(self.path(name), content)
        except OSError as error:
            raise RunError(f"{self.path(name)} cannot be written: {error}") from error

    def remove_folder(self, folder: str) -> None:
        """Remove a folder and all below it, if it is there."""
        filesystem, _ = self._filesystem
        if filesystem.exists(self.path(folder)):
            filesystem.rm(self.path(folder), recursive=True)

    def remove_orphans(self) -> int:
        """Remove temporary files that killed writers left behind; returns how many.

        Call it when all is committed: a writer that is still at work loses its file, and its
        commit, which could only come too late, fails.
        """
        if not self.is_local:
            return 0  # object stores write whole objects or nothing
        orphans = list(self._orphans())
        for orphan in orphans:
            orphan.unlink(missing_ok=True)
        return len(orphans)

    def _orphans(self) -> Iterator[Path]:
        yield from Path(self.path("")).rglob(f"{_TEMPORARY}*")

    def _write_temporary(self, name: str, content: bytes) -> Path:
        final = Path(self.path(name))
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.parent / f"{_TEMPORARY}{uuid.uuid4().hex}"
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return temporary

    def _commit_local(self, name: str, content: bytes) -> bool:
        temporary = self._write_temporary(name, content)
        try:
            os.link(temporary, self.path(name))
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
        return True

    def _commit_object(self, name: str, content: bytes) -> bool:
        filesystem, _ = self._filesystem
        try:
            filesystem.pipe_file(self.path(name), content, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            # S3 says "precondition failed" where a local disk says "file exists".
            if "PreconditionFailed" in str(error) or "ConditionalRequestConflict" in str(error):
                return False
            raise
        return True


def parquet_bytes(table: pa.Table) -> bytes:
    """Serialise a table to Parquet in memory."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    content: bytes = sink.getvalue().to_pybytes()
    return content
