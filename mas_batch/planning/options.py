"""The command line's words for times and numbers of replicas."""

from __future__ import annotations

import re

from dask.utils import parse_timedelta

from mas_batch.errors import JobError


def parse_deadline(text: str) -> float:
    """Return seconds.

    Raises:
        JobError: it is not a time above 0.
    """
    try:
        seconds = float(parse_timedelta(text, default="s"))
    except (ValueError, KeyError):
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise JobError(f"{text!r} is not a time; allowed: such as 2h, 90m, 3600", key="--deadline")
    return seconds


def parse_replicas(text: str) -> tuple[int, int]:
    """Return the fewest and the most.

    Raises:
        JobError: it is not one number or two, at least 1, the smaller first.
    """
    match = re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", text)
    fewest, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= fewest <= most <= 4096:
        raise JobError(
            f"{text!r} is not allowed; allowed: such as 4 or 1-8, at most 4096", key="--replicas"
        )
    return fewest, most
