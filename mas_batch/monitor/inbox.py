"""The scheduler's side: the last snapshot of every run that sends it some."""

from __future__ import annotations

from dataclasses import dataclass

from mas_batch.monitor.live import LiveRun
from mas_batch.monitor.snapshot import VERSION, Snapshot

MAX_RUNS = 20
"""Runs that are kept; the one that was heard of longest ago goes first, if it has ended."""
MAX_JOBS = 200
"""Jobs whose last success is kept."""
SILENT_S = 30.0
"""A submitting process says something every few seconds; after so long it is taken for dead."""


@dataclass(frozen=True, slots=True)
class HeardRun:
    """A run and when it was heard of."""

    run: LiveRun
    number: int
    """Of its last snapshot."""
    heard: float
    """Unix time on the scheduler's clock."""
    clock_ahead_s: float
    """The scheduler's clock minus the submitting process's, as the last snapshot had it."""

    def status(self, now: float) -> str:
        """Return the run's stage; `silent` if its process has said nothing for long."""
        is_silent = self.run.ended is None and now - self.heard > SILENT_S
        return "silent" if is_silent else self.run.stage


class Inbox:
    """All runs that send snapshots to this scheduler."""

    def __init__(self) -> None:
        self.runs: dict[str, HeardRun] = {}
        """By name, the last heard of last; an execution takes the place of the one before it."""
        self.last_success: dict[str, float] = {}
        """Job name → Unix time, on the scheduler's clock, of its last finished run."""

    def receive(self, version: str, data: bytes, now: float) -> None:
        """Take a snapshot; one that comes after a later one of its execution changes nothing.

        Raises:
            ValueError: it is of another version, or no snapshot.
        """
        if version != VERSION:
            raise ValueError(f"snapshot version {version}; allowed: {VERSION}")
        snapshot = Snapshot.from_json(data)
        run = snapshot.run
        before = self.runs.get(run.name)
        if before is not None and before.run.execution != run.execution:
            before = None
        if before is not None and before.number >= snapshot.number:
            return
        self.runs.pop(run.name, None)  # the last heard of comes last
        self.runs[run.name] = HeardRun(run, snapshot.number, now, now - snapshot.sent_at)
        if run.stage == "finished" and (before is None or before.run.stage != "finished"):
            self._remember_success(run.job_name, now)
        while len(self.runs) > MAX_RUNS:
            self._forget_oldest()

    def _remember_success(self, job_name: str, now: float) -> None:
        self.last_success.pop(job_name, None)
        self.last_success[job_name] = now
        while len(self.last_success) > MAX_JOBS:
            del self.last_success[next(iter(self.last_success))]

    def _forget_oldest(self) -> None:
        ended = (name for name, heard in self.runs.items() if heard.run.ended is not None)
        del self.runs[next(ended, next(iter(self.runs)))]
