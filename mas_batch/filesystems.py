"""fsspec's filesystems, given paths that mean themselves."""

from __future__ import annotations

import errno
import inspect
from collections.abc import Mapping
from typing import Any

import fsspec

_LOCAL = ("/", "./", "../", "~", "file://", "local://")
_FOR_GOOD = (
    *(FileNotFoundError, PermissionError, NotADirectoryError),
    *(ValueError, TypeError, AttributeError, LookupError, NotImplementedError),
)
_FOR_GOOD_NUMBERS = (errno.EINVAL, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOSYS)
_FOR_GOOD_NAMES = ("ParamValidationError",)
"""botocore's, of which there is no base: it is raised before anything is sent."""
_MAY_PASS = (408, 425, 429)
"""HTTP: time-out, too early, too many requests."""


def filesystem_of(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """Return the filesystem of a path or URL, and the path there.

    fsspec's `::` chains filesystems. In a local path it is a part of a name, which fsspec would cut
    off; in `s3://bucket/a::b` it would be cut off too, so that is refused.

    Raises:
        ImportError: the filesystem's package is not installed.
        ValueError: no filesystem has that name, or it rejects the options.
        OSError: the filesystem connects at once, and cannot.
    """
    if "::" in url and url.startswith(_LOCAL):
        filesystem = fsspec.filesystem("file", **options)
        return filesystem, filesystem._strip_protocol(url)
    protocol, is_url, _ = url.partition("::")[0].partition("://")
    if "::" in url and is_url:
        accepted = inspect.signature(fsspec.get_filesystem_class(protocol).__init__).parameters
        if accepted.keys().isdisjoint(("fo", "target_protocol")):
            raise ValueError(f"`::` chains filesystems, and {protocol} is none that takes another")
    found: tuple[Any, str] = fsspec.core.url_to_fs(url, **options)
    return found


def answered_by_http(error: Exception) -> BaseException | None:
    """Return why HTTP failed: fsspec calls whatever happens there "not found"."""
    cause = error.__cause__
    is_http = cause is not None and type(cause).__module__.partition(".")[0] == "aiohttp"
    return cause if is_http or isinstance(cause, TimeoutError) else None


def is_absent(error: FileNotFoundError) -> bool:
    """Say whether nothing is there: fsspec's HTTP raises the same for any failure."""
    http = answered_by_http(error)
    return http is None or getattr(http, "status", None) == 404


def is_for_good(error: BaseException) -> bool:
    """Say whether another try would fail too: nothing is there, it is forbidden, or ill-named.

    Anything else may pass: a store that is down, busy or unreachable raises what it likes.
    """
    if isinstance(error, FileNotFoundError) and (cause := answered_by_http(error)) is not None:
        return is_for_good(cause)
    if isinstance(status := getattr(error, "status", None), int):  # aiohttp's
        return 400 <= status < 500 and status not in _MAY_PASS
    is_known = isinstance(error, OSError) and error.errno in _FOR_GOOD_NUMBERS
    return is_known or isinstance(error, _FOR_GOOD) or type(error).__name__ in _FOR_GOOD_NAMES
