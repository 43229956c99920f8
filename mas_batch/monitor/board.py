"""The scheduler's side: the runs that feed it, and how they are."""

from __future__ import annotations

from dataclasses import dataclass

from mas_batch.monitor.live import LiveRun
from mas_batch.monitor.messages import VERSION, Message, decode

MAX_RUNS = 20
"""Runs that are kept; the one that was heard of longest ago goes first, if it has ended."""
MAX_JOBS = 200
"""Jobs whose last success is kept."""
SILENT_S = 30.0
"""A submitting process says something every few seconds; after so long it is taken for dead."""

TAKEN, WANTED = "taken", "state wanted"
"""Replies: the message is folded; it does not fit what is here, send the state."""


@dataclass(slots=True)
class Entry:
    """A run and when it was heard of."""

    run: LiveRun
    heard: float
    """Unix time on the scheduler's clock."""
    clock_ahead_s: float
    """The scheduler's clock minus the submitting process's, as the last message had it."""

    def status(self, now: float) -> str:
        """Return the run's stage; `silent` if its process has said nothing for long."""
        quiet = self.run.ended is None and now - self.heard > SILENT_S
        return "silent" if quiet else self.run.stage


class Board:
    """All runs that feed this scheduler."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        """By run; an execution takes the place of the one before it."""
        self.last_success: dict[str, float] = {}
        """Job name → Unix time, on the scheduler's clock, of its last finished run."""

    def receive(self, version: int, data: bytes, now: float) -> str:
        """Take a message; returns `TAKEN` or `WANTED`.

        Raises:
            ValueError: it is of another version, or no message.
        """
        if version != VERSION:
            raise ValueError(f"message version {version}; allowed: {VERSION}")
        message = Message.from_json(data)
        run = self._state(message)
        if run is None:
            return WANTED
        finished_before = run.stage == "finished"
        for at, event in decode(message.events):
            run.fold(at, event)
        if message.failed is not None:
            run.close(message.sent_at, message.failed)
        self.entries.pop(message.run, None)  # the newest comes last
        self.entries[message.run] = Entry(run, now, now - message.sent_at)
        if run.stage == "finished" and (message.state is not None or not finished_before):
            self._succeeded(run.job_name, now)
        self._forget_old()
        return TAKEN

    def _state(self, message: Message) -> LiveRun | None:
        """Return the state that the message's events go on from, if it is here."""
        if message.state is not None:
            return message.state
        entry = self.entries.get(message.run)
        if entry is None or entry.run.execution != message.execution:
            return None
        return entry.run if entry.run.num_events == message.num_before else None

    def _succeeded(self, job_name: str, now: float) -> None:
        self.last_success.pop(job_name, None)
        self.last_success[job_name] = now
        while len(self.last_success) > MAX_JOBS:
            del self.last_success[next(iter(self.last_success))]

    def _forget_old(self) -> None:
        while len(self.entries) > MAX_RUNS:
            ended = (name for name, entry in self.entries.items() if entry.run.ended is not None)
            del self.entries[next(ended, next(iter(self.entries)))]
