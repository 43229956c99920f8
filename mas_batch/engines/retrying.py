"""When a request to a server is tried again, and for how long the server wants to be left alone."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

AWAY = frozenset({408, 429, 502, 503, 504, *range(520, 525), 529})
"""Statuses that speak of the server's state, not of the request: busy, starting, behind a proxy."""
RATE_LIMITED = frozenset({429, 529})
MAX_PAUSE_S = 8.0
"""Longest pause between two tries; whoever wants to be left alone for longer is waited for."""


def is_retried(status: int) -> bool:
    """Whether another try may end otherwise; the same as the openai library's own choice."""
    return status in (408, 409, 429) or status >= 500


def pause_s(attempt: int, retry_after_s: float) -> float:
    """Return the seconds before the next try; `attempt` counts from 0."""
    return retry_after_s or min(MAX_PAUSE_S, 0.5 * 2.0**attempt)


def retry_after_s(headers: Mapping[str, str]) -> float:
    """Return what a reply's `Retry-After` asks for; 0 without one, or with one that says nothing.

    In milliseconds, seconds, or as a date (RFC 9110, section 10.2.3).
    """
    if milliseconds := _number(headers.get("retry-after-ms", "")):
        return milliseconds / 1000
    text = headers.get("retry-after", "")
    if seconds := _number(text):
        return seconds
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        return 0.0
    return number if math.isfinite(number) and number > 0 else 0.0
