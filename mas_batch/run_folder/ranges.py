"""Sets of partitions: a bitmap in memory, ranges in a manifest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Bitmap: TypeAlias = npt.NDArray[np.bool_]
"""One bool per partition of the run."""


Ranges: TypeAlias = Sequence[Sequence[int]]
"""Partition numbers as ascending pairs `[first, stop)`."""


def join_ranges(parts: Iterable[Ranges]) -> list[list[int]]:
    """Return the union of non-overlapping ranges `[first, stop)`, ascending, neighbours joined."""
    joined: list[list[int]] = []
    for first, stop in sorted(map(tuple, chain.from_iterable(parts))):
        if joined and joined[-1][1] == first:
            joined[-1][1] = stop
        else:
            joined.append([first, stop])
    return joined


def to_ranges(members: Bitmap) -> list[list[int]]:
    """Return the members of a bitmap as ascending ranges `[first, stop)` that do not touch."""
    edges = np.flatnonzero(np.diff(members, prepend=False, append=False))
    ranges: list[list[int]] = edges.reshape(-1, 2).tolist()
    return ranges


def from_ranges(ranges: Ranges) -> Iterator[int]:
    """Yield the members of ranges `[first, stop)`."""
    for first, stop in ranges:
        yield from range(first, stop)
