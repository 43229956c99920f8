"""What other programs take of this machine while something is measured."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil


@dataclass(slots=True)
class Others:
    """All programs but this one and its children."""

    num_cores: float = 0.0
    """Cores that they kept busy on average, known at the end."""


@contextmanager
def others() -> Iterator[Others]:
    """Measure them meanwhile; children count as this program's when they have ended by the end."""
    found, start, before = Others(), time.perf_counter(), _busy_s()
    yield found
    found.num_cores = max(0.0, _busy_s() - before) / (time.perf_counter() - start)


def _busy_s() -> float:
    every = psutil.cpu_times()
    own = sum(os.times()[:4])  # user and system time of this process and of ended children
    return float(every.user + every.nice + every.system - own)
