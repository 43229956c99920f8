"""What the submitting process sends the scheduler: all that is to be shown of a run, each time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter

from mas_batch.monitor.live import LiveRun


@dataclass(frozen=True, slots=True)
class Snapshot:
    """How a run is at one moment; it needs none of those before it."""

    number: int
    """Of the execution's snapshots, from 1; a lower one that comes later is out of date."""
    sent_at: float
    """Unix time on the submitting process's clock, as all times in it."""
    run: LiveRun

    def to_json(self) -> bytes:
        """Encode it."""
        return _SNAPSHOT.dump_json(self)

    @classmethod
    def from_json(cls, data: bytes) -> Snapshot:
        """Decode it.

        Raises:
            ValueError: these are not the bytes of a snapshot.
        """
        return _SNAPSHOT.validate_json(data)


_SNAPSHOT = TypeAdapter(Snapshot)


def layout_version(kind: type) -> str:
    """Return a hash of the names and types of all that values of a class hold."""
    return hashlib.sha256("\n".join(_layout(kind)).encode()).hexdigest()[:12]


def _layout(kind: Any) -> Iterator[str]:
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        for each in fields(kind):
            yield f"{each.name}: {each.type}"
            yield from _layout(hints[each.name])
    elif isinstance(kind, type) and issubclass(kind, Enum):
        yield from (str(member.value) for member in kind)
    else:
        for argument in get_args(kind):
            yield from _layout(argument)


VERSION = layout_version(Snapshot)
"""A scheduler takes only snapshots of its own version. It changes with the layout by itself; but a
field that changes its meaning and keeps its type must change its name."""
