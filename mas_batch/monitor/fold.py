"""Brings a `LiveRun` up to date, event by event; on the submitting process.

What is kept beside it is O(partitions in flight); nothing is kept of a partition that is merged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from mas_batch.events import (
    AgentDraining,
    AgentLoading,
    AgentLost,
    AgentReady,
    AnswerFailed,
    BreakerChanged,
    Escalated,
    EscalationSampled,
    Event,
    PartitionAnswered,
    PartitionAsked,
    PartitionMerged,
    PartitionUndecided,
    PhaseEnded,
    RunFinished,
    RunStarted,
    ServerAway,
)
from mas_batch.monitor.fleet import LiveAgent, LiveReplica, ReplicaState
from mas_batch.monitor.live import LiveRun
from mas_batch.safe_text import printable, without_credentials

MAX_LOST = 20
"""Replicas that are gone and still shown; their work stays counted with their agents."""
MAX_TEXT = 500
"""Characters of an error's message that are shown."""


def public_text(text: str) -> str:
    """Return a text as anyone may see it on the dashboard: short, and without credentials."""
    shown = printable(without_credentials(text))[:MAX_TEXT]
    return shown.encode(errors="replace").decode()  # a lone surrogate, out of a file's name


def _with_public_texts(event: Event) -> Event:
    values = {each.name: getattr(event, each.name) for each in fields(event)}
    texts: Any = {name: public_text(v) for name, v in values.items() if isinstance(v, str)}
    return replace(event, **texts)


class Fold:
    """Takes the events of one execution in their order."""

    def __init__(self, run: LiveRun) -> None:
        self.run = run
        """Changed in place."""
        self._open: dict[int, list[tuple[str, str]]] = {}
        """Partition that is asked and not merged → the (agent, worker) that are at work on it."""

    def take(self, at: float, event: Event) -> None:
        """Take in one event of the run, at a Unix time."""
        run, event = self.run, _with_public_texts(event)
        num_records = num_tokens = 0
        match event:
            case RunStarted():
                self._start(event)
            case AgentLoading() | AgentReady() | AgentLost() | AgentDraining() | BreakerChanged():
                self._change_replica(at, event)
            case PartitionAsked():
                self._ask(at, event)
            case PartitionAnswered():
                num_tokens = self._answer(at, event)
            case AnswerFailed():
                self._fail(event)
            case ServerAway():
                self._wait(at, event)
            case PartitionUndecided():
                run.num_undecided += event.num_undecided
            case PartitionMerged():
                num_records = self._merge(at, event)
            case PhaseEnded(phase=phase, wall_s=wall_s):
                run.phases[phase] = run.phases.get(phase, 0.0) + wall_s
            case Escalated() | EscalationSampled():
                # The second pass merges every partition again: their count begins anew.
                run.stage, run.num_merged = "escalating", 0
            case RunFinished():
                # A partition whose answers are all an earlier run's is merged without an event.
                run.num_merged = run.num_partitions
                run.num_results, run.num_failures = event.num_results, event.num_failures
                self._end(at, "finished")
        run.num_open = len(self._open)
        run.history.note(at, run.states, num_records, num_tokens)

    def close(self, at: float, message: str) -> None:
        """Note that the submitting process has stopped for an error, unless the run had ended."""
        if self.run.ended is None:
            self.run.message = message
            self._end(at, "failed")

    def _end(self, at: float, stage: str) -> None:
        self.run.stage, self.run.ended = stage, at
        for partition in list(self._open):
            self._end_tries(partition, lambda attempt: True)
        for replica in self.run.replicas.values():
            if replica.state is not ReplicaState.LOST:
                replica.become(ReplicaState.RELEASED, at)

    def _start(self, event: RunStarted) -> None:
        run = self.run
        run.url, run.stage = event.run, "answering"
        run.num_partitions, run.num_records = event.num_partitions, event.num_records
        run.num_merged, run.records_before = event.partitions_done, event.records_done

    # Replicas

    def _change_replica(
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
                agent.engine = public_text(str(event.engine.get("engine", "")))
                agent.device = public_text(str(event.engine.get("device", "")))
                agent.recent.begin(at)
                self.run.recent.begin(at)
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
        for partition in list(self._open):
            self._end_tries(partition, lambda attempt: attempt == lost)
        gone = [r for r in self.run.replicas.values() if r.state is ReplicaState.LOST]
        for each in sorted(gone, key=lambda r: r.since)[: max(0, len(gone) - MAX_LOST)]:
            del self.run.replicas[each.worker]

    def _agent(self, agent_id: str) -> LiveAgent:
        return self.run.agents.setdefault(agent_id, LiveAgent(agent_id))

    def _replica(self, agent_id: str, worker: str) -> LiveReplica:
        replica = self.run.replicas.get(worker)
        if replica is None or replica.agent_id != agent_id:
            replica = self.run.replicas[worker] = LiveReplica(agent_id, worker)
        return replica

    # Partitions

    def _ask(self, at: float, event: PartitionAsked) -> None:
        agent, replica = self._agent(event.agent_id), self._replica(event.agent_id, event.worker)
        agent.asked[event.purpose] = agent.asked.get(event.purpose, 0) + 1
        replica.num_asked += 1
        # No event tells that a worker has room in its memory again; that it is asked does.
        if event.purpose != "probe" and replica.state is not ReplicaState.READY:
            replica.become(ReplicaState.READY, at)
        tries = self._open.setdefault(event.partition, [])
        if (event.agent_id, event.worker) not in tries:
            self.run.num_answering += not tries
            tries.append((event.agent_id, event.worker))
            replica.in_flight += 1

    def _answer(self, at: float, event: PartitionAnswered) -> int:
        agent = self._agent(event.agent_id)
        agent.num_records += event.num_records
        agent.num_answers += event.num_answers
        agent.num_failed += event.num_failed
        agent.prompt_tokens += event.prompt_tokens
        agent.completion_tokens += event.completion_tokens
        agent.compute_s += event.compute_s
        agent.transfer_s += event.transfer_s
        agent.processing_s += event.processing_s
        agent.recent.add(at, event.num_records, event.completion_tokens)
        # A replica that was lost and is forgotten stays so, whatever is heard of it late.
        if (replica := self.run.replicas.get(event.worker)) is not None:
            replica.num_answered += 1
        # The agent's copies of the task are no longer needed.
        self._end_tries(event.partition, lambda attempt: attempt[0] == event.agent_id)
        return event.completion_tokens

    def _fail(self, event: AnswerFailed) -> None:
        agent = self._agent(event.agent_id)
        agent.num_failed_tries += 1
        agent.num_given_up += event.given_up
        agent.last_failure = event.message
        if (replica := self.run.replicas.get(event.worker)) is not None:
            replica.num_failed += 1
        failed = (event.agent_id, event.worker)
        self._end_tries(event.partition, lambda attempt: attempt == failed)

    def _wait(self, at: float, event: ServerAway) -> None:
        agent, replica = self._agent(event.agent_id), self._replica(event.agent_id, event.worker)
        agent.last_failure = event.message
        since = replica.since if replica.state is ReplicaState.AWAY else at
        why = f"waits up to {event.wait_s:g} s for its server: {event.message}"
        replica.become(ReplicaState.AWAY, since, why)
        put_off = (event.agent_id, event.worker)
        self._end_tries(event.partition, lambda attempt: attempt == put_off)

    def _end_tries(self, partition: int, ended: Callable[[tuple[str, str]], bool]) -> None:
        tries = self._open.get(partition, [])
        left = [attempt for attempt in tries if not ended(attempt)]
        for _, worker in (attempt for attempt in tries if ended(attempt)):
            if worker in self.run.replicas:
                self.run.replicas[worker].in_flight -= 1
        self.run.num_answering -= bool(tries) and not left
        if partition in self._open:
            self._open[partition] = left

    def _merge(self, at: float, event: PartitionMerged) -> int:
        run = self.run
        self._end_tries(event.partition, lambda attempt: True)
        self._open.pop(event.partition, None)
        run.num_merged = min(run.num_merged + 1, run.num_partitions)
        for agent_id, (agreed, compared) in event.agreement.items():
            self._agent(agent_id).num_agreed += agreed
            self._agent(agent_id).num_compared += compared
        if run.stage == "escalating":
            return 0  # the first pass has counted these records
        for reason, count in event.reasons.items():
            run.reasons[reason] = run.reasons.get(reason, 0) + count
        run.num_results += event.num_results
        run.num_failures += event.num_failures
        num_records = event.num_results + event.num_failures
        run.recent.add(at, num_records, 0)
        return num_records
