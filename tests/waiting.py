"""Waiting for a state: no test says how long something takes, only that it comes about."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

PATIENCE_S = 240.0
"""For whatever a test waits for; ends one that waits in vain, long after the busiest machine."""

T = TypeVar("T")


def wait_until(condition: Callable[[], T], explain: Callable[[], object] = lambda: "") -> T:
    """Wait until the condition is true and return what it returned.

    Args:
        explain: what the failure says when it never becomes true, such as a log's text.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, explain() or "it never became true"
        time.sleep(0.02)
    return found
