"""How a run is now, as plain values: what its process sends and the scheduler keeps.

The size is O(agents + hosts): of partitions there are only counts, the history is of bounded
length (`rings`), and so is every text (`fold.public_text`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mas_batch.monitor.fleet import LiveAgent, LiveHost, LivePost
from mas_batch.monitor.rings import Recent, Timeline


@dataclass(slots=True)
class LiveRun:
    """One execution of a run.

    A partition is `waiting` (the router has asked no agent about it yet), `answering` (an agent
    is at work on it), `answered` (no agent is: it waits for its merge, or for room at another
    agent) or `merged`.
    """

    name: str
    execution: str
    job_name: str
    task: str
    policy: str
    window: int
    """Partitions that a host may have in flight, by the job; 0: that goes by its engine."""
    started: float
    """Unix time, on the submitting process's clock as all times here."""
    posts: dict[str, LivePost]
    agents: dict[str, LiveAgent]
    hosts: dict[str, LiveHost]
    """By the name of their leading worker."""
    history: Timeline
    url: str = ""
    stage: str = "starting"
    """`starting`, `answering`, `escalating`, `finished`, `failed`."""
    message: str = ""
    """Why it has failed."""
    ended: float | None = None
    num_partitions: int = 0
    num_records: int = 0
    num_open: int = 0
    """Partitions that an agent was asked about and that are not merged."""
    num_answering: int = 0
    """Of the open ones, those that an agent is at work on."""
    num_merged: int = 0
    """Partitions of this pass, with those of earlier executions."""
    records_before: int = 0
    """Merged by earlier executions."""
    num_results: int = 0
    num_failures: int = 0
    """Records, of this execution."""
    num_undecided: int = 0
    """Times that one more agent was asked about a record."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Reason → records without an answer, of this execution."""
    phases: dict[str, float] = field(default_factory=dict)
    """Phase of the submitting process → seconds; those that have ended."""
    recent: Recent = field(default_factory=Recent)

    @property
    def states(self) -> tuple[int, int, int, int]:
        """Partitions waiting, answering, answered, merged."""
        num_waiting = max(0, self.num_partitions - self.num_merged - self.num_open)
        num_answered = self.num_open - self.num_answering
        return (num_waiting, self.num_answering, num_answered, self.num_merged)
