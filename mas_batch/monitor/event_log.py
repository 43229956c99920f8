"""Keeps every event of an execution in the run folder, and reads the events of all of them."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from mas_batch.errors import RunError
from mas_batch.events import Event
from mas_batch.run_folder.storage import Store

logger = logging.getLogger(__name__)

FOLDER = "events"
"""Folder of a run that holds its event files."""

FLUSH_EVENTS = 1000
FLUSH_CHARS = 4_000_000
FLUSH_S = 10.0
"""A file is written after so many events or characters, or with the first event so long after the
last file: a killed process loses no more than that, and never an answer."""

_FILE = re.compile(r"(?P<execution>.+)-(?P<number>\d+)\.jsonl")


class EventLog:
    """Writes events as JSON lines, some to a file: object stores cannot append.

    Args:
        clock: seconds that never fall.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._lines: list[str] = []
        self._num_chars = 0
        self._last_flush = clock()
        self.execution = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
        self._num_files = 0

    def __call__(self, event: Event) -> None:
        """Keep an event."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, **event.to_dict()}, ensure_ascii=False)
        self._lines.append(line)
        self._num_chars += len(line)
        if (
            len(self._lines) >= FLUSH_EVENTS
            or self._num_chars >= FLUSH_CHARS  # with a thousand candidates, a long line
            or self._clock() - self._last_flush >= FLUSH_S
        ):
            self.flush()

    def flush(self) -> None:
        """Write what is kept so far."""
        if self._lines:
            content = "\n".join(self._lines) + "\n"
            name = f"{FOLDER}/{self.execution}-{self._num_files:04d}.jsonl"
            # A lone surrogate (out of a file's name) becomes its JSON escape.
            self._store.commit(name, content.encode(errors="backslashreplace"))
            self._num_files += 1
            self._lines.clear()
            self._num_chars = 0
        self._last_flush = self._clock()


@dataclass(frozen=True, slots=True)
class LoggedEvent:
    """An event as a run keeps it."""

    time: datetime
    """When the submitting process saw it, in UTC."""
    execution: str
    """Which process: its start, as the event files are named after it."""
    name: str
    """Class of the event in `events`; a later version may know others."""
    facts: dict[str, Any]
    """The event's fields."""


def read_events(
    store: Store, report: Callable[[str], None] = logger.warning
) -> Iterator[LoggedEvent]:
    """Yield the events of a run's executions in the order in which they happened.

    One file is held at a time; nothing is yielded for a run without event files.

    Args:
        store: the run's folder.
        report: called with a message for a file whose last line is cut short, which is skipped.

    Raises:
        RunError: another line cannot be read; the message names file and line.
    """
    for name, execution in _files(store):
        lines = store.read_bytes(name).removesuffix(b"\n").split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                event = _parsed(line, execution)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                message = f"{store.path(name)}, line {number}: not an event: {error}"
                if number < len(lines):
                    raise RunError(message) from error
                report(f"{message}; skipped, it is the file's last")
            else:
                yield event


def _parsed(line: bytes, execution: str) -> LoggedEvent:
    facts = json.loads(line)
    time_text, name = facts.pop("time"), facts.pop("event")
    return LoggedEvent(datetime.fromisoformat(time_text), execution, name, facts)


def _files(store: Store) -> list[tuple[str, str]]:
    """List (file, execution), in order; the files' numbers may outgrow their four digits."""
    found = [match for name in store.list(FOLDER) if (match := _FILE.fullmatch(name))]
    found.sort(key=lambda match: (match["execution"], int(match["number"])))
    return [(f"{FOLDER}/{match[0]}", match["execution"]) for match in found]
