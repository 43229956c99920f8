"""A run of mas_batch, timed from the moment when its last host holds its engine to the manifest."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import mas_batch
from mas_batch.events import Event, HostReady, RunFinished


@dataclass(frozen=True, slots=True)
class TimedRun:
    """What a run took and what came of it."""

    load_s: float
    seconds: float
    answers: dict[str, str]
    """By record."""
    devices: list[str]
    """Of each host."""


def timed_run(job: Any, client: Any = None) -> TimedRun:
    times: dict[type, float] = {}
    devices: list[str] = []

    def note(event: Event) -> None:
        if isinstance(event, HostReady | RunFinished):
            times[type(event)] = time.perf_counter()
        if isinstance(event, HostReady):
            devices.append(str(event.engine.get("device")))

    begun = time.perf_counter()
    summary = mas_batch.run(job, emit=note, client=client)
    rows = mas_batch.open_run(summary.run).arrow()
    answers = zip(rows["record_id"].to_pylist(), rows["answer"].to_pylist(), strict=True)
    ready = times[HostReady]
    return TimedRun(ready - begun, times[RunFinished] - ready, dict(answers), devices)
