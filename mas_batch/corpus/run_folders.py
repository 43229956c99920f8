"""Runs and corpora side by side: what a run writes is never read as its corpus."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from glob import has_magic
from itertools import takewhile
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from mas_batch import job
from mas_batch.errors import JobError
from mas_batch.filesystems import filesystem_of

HIDDEN = re.compile(r"(^|/)[._]")
"""Names that a corpus leaves out."""

_RUN = re.compile(r".+-[0-9a-f]{16}(-retry-[0-9]+)?")
"""What the name of a run folder is like: it ends with a hash, and a retry with its number."""

Info = Mapping[str, Any]


def without_run_folders(
    filesystem: Any, root: str, found: Iterable[tuple[Info, str]]
) -> Iterator[tuple[Info, str]]:
    """Leave out the files of run folders below the root; the root itself may lie in one.

    Args:
        found: a file, and its path relative to the root.
    """
    known: dict[str, bool] = {}
    for info, relative in found:
        for match in _ancestors(relative):
            if match not in known:
                known[match] = filesystem.exists(f"{root}/{match}/job.yaml")
            if known[match]:
                break
        else:
            yield info, relative


def _ancestors(relative: str) -> Iterator[str]:
    """Yield the folders above a file that are named like a run."""
    parts = relative.split("/")[:-1]
    return ("/".join(parts[: i + 1]) for i, part in enumerate(parts) if _RUN.fullmatch(part))


def check_outside(corpus: job.Corpus, folder: str, options: Mapping[str, Any], key: str) -> None:
    """Check that the corpus cannot have the files of runs in that folder.

    Args:
        folder: path or URL of the folder.
        key: the job's key that names it.

    Raises:
        JobError: it lies where the corpus is looked for.
    """
    for pattern in corpus.path:
        try:
            filesystem, path = filesystem_of(pattern, corpus.storage_options)
            other, output = filesystem_of(folder, options)
        except Exception:  # listing the corpus or opening the output says it better
            continue
        is_local = isinstance(filesystem, LocalFileSystem) and isinstance(other, LocalFileSystem)
        if (is_local or filesystem == other) and _may_hold(path, output, is_local):
            raise JobError(
                f"{folder!r} lies in the corpus {pattern!r}: the files of the run would be read as "
                "records; choose a folder outside of the corpus, or a pattern that leaves it out",
                key=key,
            )


def _may_hold(pattern: str, folder: str, is_local: bool) -> bool:
    """Say whether files below a folder may match a pattern, or lie below what matches it."""
    parts = pattern.rstrip("/").split("/")
    root = list(takewhile(lambda part: not has_magic(part), parts))
    if is_local:  # links may lead into the corpus
        folder = str(Path(folder).resolve())
        resolved = str(Path("/".join(root) or "/").resolve()).rstrip("/").split("/")
        parts, root = [*resolved, *parts[len(root) :]], resolved
    # A run's name stands for its files: where it fits, a pattern of more parts may fit them too.
    below = [*folder.rstrip("/").split("/"), "run-0123456789abcdef"]
    if HIDDEN.search("/".join(below[len(root) :])):
        return False
    if below[: len(parts)] == parts:
        return True  # a folder, whatever signs its name has
    for part, name in zip(parts, below, strict=False):
        if "**" in part:
            return True
        if not fnmatchcase(name, part):
            return False
    return True
