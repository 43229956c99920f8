"""The agents of a run and the hosts that answer for them, as `live.LiveRun` keeps them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from mas_batch.monitor.rings import Recent


class HostState(StrEnum):
    """What a host is at."""

    LOADING = "loading"
    READY = "ready"
    BUSY = "busy"
    DRAINING = "draining"
    OPEN = "breaker open"
    PROBING = "probing"
    AWAY = "server away"
    """The server behind its engine is waited for."""
    LOST = "lost"
    RELEASED = "released"
    """The run has ended."""


@dataclass(slots=True)
class LiveHost:
    """What holds one engine; its figures are those of all agents that it answers for."""

    worker: str
    """Name of its leading worker."""
    agents: list[str]
    state: HostState = HostState.LOADING
    """`READY` also while it is at work."""
    since: float = 0.0
    """Unix time of its last change of state."""
    window: int = 0
    """Partitions that it may have in flight; 0 until it is ready."""
    in_flight: int = 0
    """Partitions that it was asked about and has not answered."""
    num_asked: int = 0
    num_answered: int = 0
    """Partitions."""
    num_failed: int = 0
    """Tries that came to nothing."""
    ready: float = 0.0
    """Unix time since which it holds its engine."""
    served_s: float = 0.0
    """From then to its last answers."""
    idle_s: float = 0.0
    """Of that, how long its engine had nothing to do."""
    peak_memory_bytes: int = 0
    """Of its process; 0: not known."""
    message: str = ""
    """Why it is in this state, if that needs saying."""

    @property
    def shown_state(self) -> HostState:
        """Its state, with `BUSY` told from `READY`."""
        at_work = self.state is HostState.READY and self.in_flight > 0
        return HostState.BUSY if at_work else self.state

    def become(self, state: HostState, at: float, message: str = "") -> None:
        """Change the state."""
        self.state, self.since, self.message = state, at, message


@dataclass(slots=True)
class LivePost:
    """Hosts of one engine that the job asks for."""

    name: str
    agents: list[str]
    """Those that share them."""
    num_wanted: int
    """Hosts that the job asks for; more may be there."""


@dataclass(slots=True)
class LiveAgent:
    """One agent of the job."""

    agent_id: str
    model: str = ""
    capabilities: list[str] = field(default_factory=list)
    engine: str = ""
    device: str = ""
    in_flight: int = 0
    """Partitions that a host was asked about for it and has not answered."""
    num_records: int = 0
    """Records that it was asked about and has replied to, well or not."""
    num_answers: int = 0
    num_failed: int = 0
    """Answers with a reason instead of a text."""
    num_failed_tries: int = 0
    """Partitions that came to nothing; they are tried again, elsewhere if possible."""
    num_given_up: int = 0
    """Partitions that it is not asked about again."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    compute_s: float = 0.0
    transfer_s: float = 0.0
    processing_s: float = 0.0
    waiting_s: float = 0.0
    """Part of `processing_s`: for a worker, or for an engine that worked for others."""
    asked: dict[str, int] = field(default_factory=dict)
    """Purpose (see `events.PartitionAsked`) → partitions."""
    num_agreed: int = 0
    num_compared: int = 0
    """Answers that say what was merged, of those that could be compared."""
    last_failure: str = ""
    recent: Recent = field(default_factory=Recent)
