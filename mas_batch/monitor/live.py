"""What a run is doing now: its events, folded into a state of bounded size.

The submitting process and the scheduler fold the same events with this code, so that a copy of
the state (see `feed`) is worth as much as all the events before it. The size is O(agents +
replicas + partitions in flight); nothing is kept of a partition that is merged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from mas_batch.monitor.events import (
    AgentDraining,
    AgentLoading,
    AgentLost,
    AgentReady,
    AnswerFailed,
    BreakerChanged,
    Escalated,
    Event,
    PartitionAnswered,
    PartitionAsked,
    PartitionMerged,
    PartitionUndecided,
    PhaseEnded,
    RunFinished,
    RunStarted,
)
from mas_batch.monitor.fleet import LiveAgent, LiveReplica, ReplicaState
from mas_batch.monitor.rings import History, Recent

MAX_LOST = 20
"""Replicas that are gone and still shown; their work stays counted with their agents."""


@dataclass(slots=True)
class LiveRun:
    """One execution of a run.

    A partition is `waiting` (nobody has been asked yet), `answering` (somebody is at it),
    `answered` (nobody is: it waits for its merge, or for room at another agent) or `merged`.
    """

    name: str
    execution: str
    job_name: str
    task: str
    policy: str
    window: int
    """Partitions that a replica may have in flight."""
    started: float
    """Unix time."""
    agents: dict[str, LiveAgent]
    replicas: dict[str, LiveReplica]
    """By worker."""
    history: History
    url: str = ""
    stage: str = "starting"
    """`starting`, `answering`, `escalating`, `finished`, `failed`."""
    message: str = ""
    """Why it has failed."""
    ended: float | None = None
    num_events: int = 0
    """Folded so far: whoever has another number has missed some."""
    num_partitions: int = 0
    num_records: int = 0
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
    open: dict[int, list[tuple[str, str]]] = field(default_factory=dict)
    """Partition that is asked and not merged → the (agent, worker) that are at it."""
    num_answering: int = 0
    """Of the open ones, those that somebody is at."""
    recent: Recent = field(default_factory=Recent)

    @property
    def num_waiting(self) -> int:
        """Partitions that nobody has been asked about."""
        return max(0, self.num_partitions - self.num_merged - len(self.open))

    @property
    def num_answered(self) -> int:
        """Partitions that wait for their merge or for another agent."""
        return len(self.open) - self.num_answering

    @property
    def states(self) -> tuple[int, int, int, int]:
        """Partitions waiting, answering, answered, merged."""
        return (self.num_waiting, self.num_answering, self.num_answered, self.num_merged)

    def fold(self, at: float, event: Event) -> None:
        """Take in one event of the run, at a Unix time."""
        self.num_events += 1
        num_records = num_tokens = 0
        match event:
            case RunStarted():
                self._start(event)
            case AgentLoading() | AgentReady() | AgentLost() | AgentDraining() | BreakerChanged():
                self._hear_of(at, event)
            case PartitionAsked():
                self._ask(at, event)
            case PartitionAnswered():
                num_tokens = self._answer(at, event)
            case AnswerFailed():
                self._fail(event)
            case PartitionUndecided():
                self.num_undecided += event.num_undecided
            case PartitionMerged():
                num_records = self._merge(at, event)
            case PhaseEnded(phase=phase, wall_s=wall_s):
                self.phases[phase] = self.phases.get(phase, 0.0) + wall_s
            case Escalated():
                # Every partition is looked at again; what is merged for good comes at the end.
                self.stage, self.num_merged = "escalating", 0
            case RunFinished():
                # Where an earlier run has answered everything nobody told of single partitions.
                self.num_merged = self.num_partitions
                self.num_results, self.num_failures = event.num_results, event.num_failures
                self._end(at, "finished")
        self.history.note(at, self.states, num_records, num_tokens)

    def close(self, at: float, message: str) -> None:
        """The submitting process has stopped for an error."""
        if self.ended is None:
            self.message = message
            self._end(at, "failed")

    def _end(self, at: float, stage: str) -> None:
        self.stage, self.ended = stage, at
        for partition in list(self.open):
            self._end_tries(partition, lambda attempt: True)
        for replica in self.replicas.values():
            if replica.state is not ReplicaState.LOST:
                replica.become(ReplicaState.RELEASED, at)

    def _start(self, event: RunStarted) -> None:
        self.url, self.stage = event.run, "answering"
        self.num_partitions, self.num_records = event.num_partitions, event.num_records
        self.num_merged, self.records_before = event.partitions_done, event.records_done

    # Replicas

    def _hear_of(
        self,
        at: float,
        event: AgentLoading | AgentReady | AgentLost | AgentDraining | BreakerChanged,
    ) -> None:
        replica = self._replica(event.agent_id, event.worker)
        match event:
            case AgentLoading():
                replica.become(ReplicaState.LOADING, at)
            case AgentReady():
                replica.become(ReplicaState.READY, at)
                agent = self._agent(event.agent_id)
                agent.engine = str(event.engine.get("engine", ""))
                agent.device = str(event.engine.get("device", ""))
                agent.recent.begin(at)
                self.recent.begin(at)
            case AgentDraining():
                replica.become(ReplicaState.DRAINING, at, event.message)
            case AgentLost():
                self._lose(at, replica, event.message)
            case BreakerChanged():
                states = {"open": ReplicaState.OPEN, "probing": ReplicaState.PROBING}
                state = states.get(event.state, ReplicaState.READY)
                replica.become(state, at, "" if state is ReplicaState.READY else event.message)

    def _lose(self, at: float, replica: LiveReplica, message: str) -> None:
        replica.become(ReplicaState.LOST, at, message)
        lost = (replica.agent_id, replica.worker)
        for partition in list(self.open):
            self._end_tries(partition, lambda attempt: attempt == lost)
        gone = [r for r in self.replicas.values() if r.state is ReplicaState.LOST]
        for each in sorted(gone, key=lambda r: r.since)[: max(0, len(gone) - MAX_LOST)]:
            del self.replicas[each.worker]

    def _agent(self, agent_id: str) -> LiveAgent:
        return self.agents.setdefault(agent_id, LiveAgent(agent_id))

    def _replica(self, agent_id: str, worker: str) -> LiveReplica:
        replica = self.replicas.get(worker)
        if replica is None or replica.agent_id != agent_id:
            replica = self.replicas[worker] = LiveReplica(agent_id, worker)
        return replica

    # Partitions

    def _ask(self, at: float, event: PartitionAsked) -> None:
        agent, replica = self._agent(event.agent_id), self._replica(event.agent_id, event.worker)
        agent.asked[event.purpose] = agent.asked.get(event.purpose, 0) + 1
        replica.num_asked += 1
        # That a worker has room in its memory again is not an event; that it is asked says so.
        if event.purpose != "probe" and replica.state is not ReplicaState.READY:
            replica.become(ReplicaState.READY, at)
        tries = self.open.setdefault(event.partition, [])
        if (event.agent_id, event.worker) not in tries:
            self.num_answering += not tries
            tries.append((event.agent_id, event.worker))
            replica.in_flight += 1

    def _answer(self, at: float, event: PartitionAnswered) -> int:
        agent, replica = self._agent(event.agent_id), self._replica(event.agent_id, event.worker)
        agent.num_records += event.num_records
        agent.num_answers += event.num_answers
        agent.num_failed += event.num_failed
        agent.prompt_tokens += event.prompt_tokens
        agent.completion_tokens += event.completion_tokens
        agent.compute_s += event.compute_s
        agent.transfer_s += event.transfer_s
        agent.processing_s += event.processing_s
        agent.recent.add(at, event.num_records, event.completion_tokens)
        replica.num_answered += 1
        # Copies of the task are no longer needed.
        self._end_tries(event.partition, lambda attempt: attempt[0] == event.agent_id)
        return event.completion_tokens

    def _fail(self, event: AnswerFailed) -> None:
        agent, replica = self._agent(event.agent_id), self._replica(event.agent_id, event.worker)
        agent.num_failed_tries += 1
        agent.num_given_up += event.given_up
        agent.last_failure = event.message
        replica.num_failed += 1
        failed = (event.agent_id, event.worker)
        self._end_tries(event.partition, lambda attempt: attempt == failed)

    def _end_tries(self, partition: int, ended: Callable[[tuple[str, str]], bool]) -> None:
        tries = self.open.get(partition, [])
        left = [attempt for attempt in tries if not ended(attempt)]
        for _, worker in (attempt for attempt in tries if ended(attempt)):
            if worker in self.replicas:
                self.replicas[worker].in_flight -= 1
        self.num_answering -= bool(tries) and not left
        if partition in self.open:
            self.open[partition] = left

    def _merge(self, at: float, event: PartitionMerged) -> int:
        self._end_tries(event.partition, lambda attempt: True)
        self.open.pop(event.partition, None)
        self.num_merged = min(self.num_merged + 1, self.num_partitions)
        for agent_id, (agreed, compared) in event.agreement.items():
            self._agent(agent_id).num_agreed += agreed
            self._agent(agent_id).num_compared += compared
        if self.stage == "escalating":
            return 0  # these records have been counted
        for reason, count in event.reasons.items():
            self.reasons[reason] = self.reasons.get(reason, 0) + count
        self.num_results += event.num_results
        self.num_failures += event.num_failures
        num_records = event.num_results + event.num_failures
        self.recent.add(at, num_records, 0)
        return num_records
