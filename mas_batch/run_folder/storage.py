"""Files of a run on any filesystem, each written at most once.

Dask executes a task at least once: a killed or paused worker's task runs again, and both
copies may finish. `commit` makes that exactly once: it creates a name only if it is absent, the
first copy wins, and every later copy learns that it lost.
"""

from __future__ import annotations

import errno
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from glob import has_magic
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from mas_batch.errors import JobError, MasBatchError, OutputError, RunError
from mas_batch.filesystems import filesystem_of
from mas_batch.safe_text import has_credentials, without_credentials, without_pieces

_TEMPORARY = ".tmp-"
_NO_HARD_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class Store:
    """A folder on a filesystem; names inside it are relative, with `/`. Cheap to pickle."""

    url: str
    """May hold credentials: show people `location` instead."""
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Not in `repr`: Dask logs the arguments of failed tasks, and these may be secrets."""

    def __repr__(self) -> str:
        return f"Store({without_credentials(self.url)!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "options": dict(self.options)}

    @cached_property
    def _filesystem(self) -> tuple[Any, str]:
        try:
            filesystem, root = filesystem_of(self.url, self.options)
        except ImportError as error:
            message = f"{without_credentials(self.url)!r}: {self._error_text(error)}"
            raise JobError(message, key="output.path") from self._safe_cause(error)
        except ValueError as error:
            message = f"{without_credentials(self.url)!r} is not a path or URL that fsspec knows"
            raise JobError(
                f"{message}: {self._error_text(error)}", key="output.path"
            ) from self._safe_cause(error)
        except OSError as error:  # some filesystems connect at once
            message = (
                f"{without_credentials(self.url)} cannot be reached: {self._error_text(error)}"
            )
            raise RunError(message) from self._safe_cause(error)
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

    def location(self, name: str) -> str:
        """Return the path or URL of `name` for people and for logs: without credentials."""
        if self.is_local:
            return self.path(name)
        url = without_credentials(self.url).rstrip("/")
        return f"{url}/{name}" if name else url

    def exists(self, name: str) -> bool:
        """Say whether `name` is committed.

        Raises:
            RunError: the filesystem cannot tell (forbidden, unreachable).
        """
        filesystem, _ = self._filesystem
        filesystem.invalidate_cache()
        with self._translated_errors(name, "looked up"):
            try:
                # Not fsspec's `exists`: on some filesystems any error at all means "no" to it.
                filesystem.info(self.path(name))
            except (FileNotFoundError, NotADirectoryError):
                return False
        return True

    def read_bytes(self, name: str) -> bytes:
        """Return the whole content of `name`.

        Raises:
            FileNotFoundError: it is not there.
            RunError: it cannot be read (forbidden, damaged, unreachable).
        """
        with self._translated_errors(name, "read"):
            content: bytes = self._filesystem[0].cat_file(self.path(name))
        return content

    def read_facts(self, name: str, parse: Callable[[bytes], Any] = json.loads) -> dict[str, Any]:
        """Return the mapping in the JSON file `name`; raises what `read_bytes` raises.

        Args:
            parse: reads another format; raises a ValueError for what is damaged.

        Raises:
            RunError: it is cut or damaged; the message names it.
        """
        content = self.read_bytes(name)
        try:
            facts, problem = parse(content), "it holds no mapping"
        except ValueError as error:
            facts, problem = None, str(error)
        if isinstance(facts, dict):
            return facts
        raise self._damaged(name, problem)

    def read_json(self, name: str) -> str:
        """Return the text of the JSON file `name`; raises what `read_bytes` raises.

        Raises:
            RunError: it is cut or damaged; the message names it.
        """
        content = self.read_bytes(name)
        try:
            json.loads(content)
            return content.decode()
        except ValueError as error:
            raise self._damaged(name, str(error)) from error

    def _damaged(self, name: str, problem: str) -> RunError:
        return RunError(
            f"{self.location(name)} is damaged: {problem}; restore it, or remove the run's folder "
            "and run the job again"
        )

    def read_table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Read the Parquet file `name`, or some of its columns; raises what `read_bytes` raises."""
        content = self.read_bytes(name)
        # Half the time of `pq.read_table`, whose datasets and threads help with large files only.
        with (
            self._translated_errors(name, "read"),
            pq.ParquetFile(pa.BufferReader(content)) as file,
        ):
            return file.read(columns=columns, use_threads=False)

    def read_schema(self, name: str) -> pa.Schema:
        """Read only the footer of the Parquet file `name`; raises what `read_bytes` raises."""
        with (
            self._translated_errors(name, "read"),
            self._filesystem[0].open(self.path(name), "rb") as file,
        ):
            return pq.read_schema(file)

    def read_column(self, name: str, column: str) -> pa.ChunkedArray:
        """Read one column of the Parquet file `name`, and no more of the file than that takes.

        Raises:
            FileNotFoundError, RunError: as `read_bytes`.
        """
        with (
            self._translated_errors(name, "read"),
            self._filesystem[0].open(self.path(name), "rb") as file,
        ):
            return pq.read_table(file, columns=[column])[column]

    def list(self, folder: str) -> set[str]:
        """List the committed names directly below `folder`, without the folder; empty if absent.

        Raises:
            RunError: it cannot be listed (forbidden, unreachable, not a folder).
        """
        filesystem, _ = self._filesystem
        filesystem.invalidate_cache()
        path = self.path(folder)
        with self._translated_errors(folder, "listed"):
            try:
                entries = filesystem.ls(path, detail=False)
            except FileNotFoundError:
                return set()
        if entries == [path]:  # what fsspec lists of a file
            raise RunError(f"{self.location(folder)} is in the way: a folder must be there")
        names = {entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries}
        return {name for name in names if not name.startswith(_TEMPORARY)}

    def commit(self, name: str, content: bytes) -> bool:
        """Create `name` with `content` if it is absent; the first writer wins.

        Returns:
            True if this call created it, False if it was there already.

        Raises:
            OutputError: the filesystem refused to write (read-only, full, forbidden).
        """
        with self._translated_errors(name, "written", OutputError):
            if self.is_local:
                return self._commit_local(name, content)
            return self._commit_object(name, content)

    def commit_table(self, name: str, table: pa.Table) -> bool:
        """Commit a table as one Parquet file; equal tables give equal bytes."""
        return self.commit(name, parquet_bytes(table))

    def replace(self, name: str, content: bytes) -> None:
        """Write `name` whether or not it exists; readers see the old or the new, never a part.

        Raises:
            OutputError: the filesystem refused to write (read-only, full, forbidden).
        """
        with self._translated_errors(name, "written", OutputError):
            if self.is_local:
                self._replace_local(name, content)
            else:
                self._filesystem[0].pipe_file(self.path(name), content)

    def remove(self, name: str) -> None:
        """Remove the file `name`, if it is there.

        Raises:
            OutputError: the filesystem refused to remove it.
        """
        with self._translated_errors(name, "removed", OutputError), suppress(FileNotFoundError):
            self._filesystem[0].rm_file(self.path(name))

    def remove_folder(self, folder: str) -> None:
        """Remove a folder and all below it, if it is there.

        Raises:
            RunError: the filesystem cannot tell whether it is there, or refused to remove it.
        """
        if not self.exists(folder):
            return
        filesystem, path = self._filesystem[0], self.path(folder)
        with self._translated_errors(folder, "removed", OutputError), suppress(FileNotFoundError):
            if has_magic(path) and not self.is_local:
                _remove_literally(filesystem, path)
            else:
                filesystem.rm(path, recursive=True)

    def remove_orphans(self) -> int:
        """Remove temporary files that killed writers left behind; returns how many.

        Call it when everything is committed: a writer that still works loses its temporary file,
        and its commit, which would lose anyway, fails.
        """
        if not self.is_local:
            return 0  # object stores write whole objects or nothing
        orphans = list(self._orphans())
        for orphan in orphans:
            orphan.unlink(missing_ok=True)
        return len(orphans)

    def has_orphans(self) -> bool:
        """Whether a killed writer has left a temporary file here or in a folder directly below."""
        places = (Path(self.path("")).glob(f"{depth}{_TEMPORARY}*") for depth in ("", "*/"))
        return self.is_local and any(True for place in places for _ in place)

    @contextmanager
    def _translated_errors(
        self, name: str, done: str, kind: type[RunError] = RunError
    ) -> Iterator[None]:
        """Turn a filesystem's errors into errors that name the file and what failed.

        Args:
            done: what was to be done to the file, as a participle for the message.

        Raises:
            FileNotFoundError: the file to be read is not there.
        """
        try:
            yield
        except MasBatchError:
            raise
        except Exception as error:  # botocore's, aiohttp's, pyarrow's: there is no common base
            location = self.location(name)
            if isinstance(error, FileNotFoundError) and kind is not OutputError:
                absent = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), location)
                raise absent from self._safe_cause(error)
            message = f"{location} cannot be {done}: {self._error_text(error)}"
            raise kind(message) from self._safe_cause(error)

    def _error_text(self, error: Exception) -> str:
        """Return an error's message in one line and without pieces of the URL's credentials."""
        known = isinstance(error, OSError) and error.strerror
        words = " ".join((known or f"{type(error).__name__}: {error}").split())
        return without_pieces(words, self.url)

    def _safe_cause(self, error: Exception) -> Exception | None:
        """Return the error to chain; None if its traceback would show the URL's credentials."""
        return None if has_credentials(self.url) else error

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

    def _replace_local(self, name: str, content: bytes) -> None:
        temporary = self._write_temporary(name, content)
        try:
            temporary.replace(self.path(name))
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _commit_local(self, name: str, content: bytes) -> bool:
        temporary = self._write_temporary(name, content)
        try:
            os.link(temporary, self.path(name))
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            raise OutputError(
                f"{self.location(name)} cannot be written: the filesystem makes no hard link "
                f"({error.strerror}), by which a file is created only if it is absent; choose "
                "another output.path, a local disk or an object store"
            ) from error
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


def _remove_literally(filesystem: Any, path: str) -> None:
    """Remove what is below a path that fsspec's `rm` would take for a pattern of other paths."""
    below = filesystem.find(path, withdirs=True, detail=True)
    folders = {name for name, info in below.items() if info["type"] == "directory"}
    for name in below.keys() - folders:
        filesystem.rm_file(name)
    for name in sorted({path, *folders}, key=len, reverse=True):
        with suppress(OSError, NotImplementedError):  # object stores have no folders
            filesystem.rmdir(name)


def parquet_bytes(table: pa.Table) -> bytes:
    """Serialise a table to Parquet in memory."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    content: bytes = sink.getvalue().to_pybytes()
    return content
