"""Whether a file is still the one that was listed: a mixture of two contents is no corpus."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from mas_batch.errors import CorpusChangedError, JobError
from mas_batch.filesystems import is_absent

VERSION_KEYS = (
    *("ETag", "etag", "LastModified", "last_modified", "Last-Modified"),
    *("updated", "mtime", "created"),
)
"""What filesystems call that which changes when the content does, the best first."""

Facts = Mapping[str, Any]


def facts_of(filesystem: Any, info: Facts) -> Facts:
    """Return size and version of a file, as far as its filesystem says.

    Raises:
        JobError: it is not a regular file: a pipe, for example, cannot be read twice.
    """
    if not isinstance(filesystem, LocalFileSystem):
        return {key: info[key] for key in ("size", *VERSION_KEYS) if info.get(key) is not None}
    status = Path(info["name"]).stat()
    if not stat.S_ISREG(status.st_mode):
        raise JobError(f"{info['name']!r} is not a regular file", key="corpus.path")
    place = (status.st_dev, status.st_ino)
    return {"size": status.st_size, "mtime": status.st_mtime_ns, "place": place}


def version_of(facts: Facts) -> str:
    """Return the best version that there is, empty if there is none."""
    return next((str(facts[key]) for key in VERSION_KEYS if facts.get(key)), "").strip('"')


def check_unchanged(filesystem: Any, path: str, url: str, before: Facts) -> None:
    """Look at a file again after it was read.

    Raises:
        CorpusChangedError: its size or version has changed since it was listed.
        OSError, or what else the filesystem raises: it cannot be looked at.
    """
    filesystem.invalidate_cache()
    try:
        now = facts_of(filesystem, {**filesystem.info(path), "name": path})
    except FileNotFoundError as error:
        if not is_absent(error):
            raise
        raise CorpusChangedError(f"{url} was removed while the corpus was read") from None
    # A listing may say other things of a file than a look at it.
    best = next((key for key in VERSION_KEYS if key in before and key in now), "size")
    for key in ("size", best):
        if key in before and key in now and _differ(before[key], now[key]):
            raise CorpusChangedError(
                f"{url} was changed while the corpus was read ({key} was {before[key]}, is "
                f"{now[key]}): its records may be of both; the same command reads it anew"
            )


def _differ(listed: Any, seen: Any) -> bool:
    """Compare what a listing and a look say, which some filesystems give in unlike forms."""
    listed, seen = (v.timestamp() if isinstance(v, datetime) else v for v in (listed, seen))
    if isinstance(listed, float) and isinstance(seen, float):
        return abs(listed - seen) >= 1.0  # seconds; HTTP's times have no fractions
    return type(listed) is type(seen) and bool(listed != seen)
