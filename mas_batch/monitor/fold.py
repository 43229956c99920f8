"""Brings a `LiveRun` up to date, event by event; on the submitting process.

What is kept beside it is O(partitions in flight); nothing is kept of a partition that is merged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from mas_batch.events import (
    AnswerFailed,
    BreakerChanged,
    Escalated,
    EscalationSampled,
    Event,
    HostDraining,
    HostLoading,
    HostLost,
    HostReady,
    PartitionAnswered,
    PartitionAsked,
    PartitionMerged,
    PartitionUndecided,
    PhaseEnded,
    RunFinished,
    RunStarted,
    ServerAway,
)
from mas_batch.monitor.fleet import HostState, LiveAgent, LiveHost
from mas_batch.monitor.live import LiveRun
from mas_batch.safe_text import printable, without_credentials

MAX_LOST = 20
"""Hosts that are gone and still shown; their work stays counted with their agents."""
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
            case HostLoading() | HostReady() | HostLost() | HostDraining() | BreakerChanged():
                self._change_host(at, event)
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
        for host in self.run.hosts.values():
            if host.state is not HostState.LOST:
                host.become(HostState.RELEASED, at)

    def _start(self, event: RunStarted) -> None:
        run = self.run
        run.url, run.stage = event.run, "answering"
        run.num_partitions, run.num_records = event.num_partitions, event.num_records
        run.num_merged, run.records_before = event.partitions_done, event.records_done

    # Hosts

    def _change_host(
        self,
        at: float,
        event: HostLoading | HostReady | HostLost | HostDraining | BreakerChanged,
    ) -> None:
        if isinstance(event, BreakerChanged):
            host = self._host(event.worker, event.agent_id)
        else:
            host = self._host(event.worker, *event.agents)
        match event:
            case HostLoading():
                host.become(HostState.LOADING, at)
            case HostReady():
                host.become(HostState.READY, at)
                window = self.run.window or event.concurrent + 1
                host.window = min(window, event.max_in_flight or window)
                host.ready, host.served_s, host.idle_s = at, 0.0, 0.0
                host.peak_memory_bytes = 0
                for agent in map(self._agent, event.agents):
                    agent.engine = public_text(str(event.engine.get("engine", "")))
                    agent.device = public_text(str(event.engine.get("device", "")))
                    agent.recent.begin(at)
                self.run.recent.begin(at)
            case HostDraining():
                host.become(HostState.DRAINING, at, event.message)
            case HostLost():
                self._lose(at, host, event.message)
            case BreakerChanged():
                states = {"open": HostState.OPEN, "probing": HostState.PROBING}
                state = states.get(event.state, HostState.READY)
                host.become(state, at, "" if state is HostState.READY else event.message)

    def _lose(self, at: float, host: LiveHost, message: str) -> None:
        host.become(HostState.LOST, at, message)
        for partition in list(self._open):
            self._end_tries(partition, lambda attempt: attempt[1] == host.worker)
        gone = [r for r in self.run.hosts.values() if r.state is HostState.LOST]
        for each in sorted(gone, key=lambda r: r.since)[: max(0, len(gone) - MAX_LOST)]:
            del self.run.hosts[each.worker]

    def _agent(self, agent_id: str) -> LiveAgent:
        return self.run.agents.setdefault(agent_id, LiveAgent(agent_id))

    def _host(self, worker: str, *agents: str) -> LiveHost:
        """Return the host; one that answers for other agents than before is another one."""
        host = self.run.hosts.get(worker)
        if host is None or not set(agents) <= set(host.agents):
            host = self.run.hosts[worker] = LiveHost(worker, list(agents))
        return host

    # Partitions

    def _ask(self, at: float, event: PartitionAsked) -> None:
        agent, host = self._agent(event.agent_id), self._host(event.worker, event.agent_id)
        agent.asked[event.purpose] = agent.asked.get(event.purpose, 0) + 1
        host.num_asked += 1
        # No event tells that a worker has room in its memory again; that it is asked does.
        if event.purpose != "probe" and host.state is not HostState.READY:
            host.become(HostState.READY, at)
        tries = self._open.setdefault(event.partition, [])
        if (event.agent_id, event.worker) not in tries:
            self.run.num_answering += not tries
            tries.append((event.agent_id, event.worker))
            host.in_flight += 1
            agent.in_flight += 1

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
        agent.waiting_s += event.queue_s + event.wait_s
        agent.recent.add(at, event.num_records, event.completion_tokens)
        # A host that was lost and is forgotten stays so, whatever is heard of it late.
        if (host := self.run.hosts.get(event.worker)) is not None:
            host.num_answered += 1
            host.served_s = at - host.ready
            host.idle_s += event.idle_s
            host.peak_memory_bytes = max(host.peak_memory_bytes, event.peak_memory_bytes or 0)
        # The agent's copies of the task are no longer needed.
        self._end_tries(event.partition, lambda attempt: attempt[0] == event.agent_id)
        return event.completion_tokens

    def _fail(self, event: AnswerFailed) -> None:
        agent = self._agent(event.agent_id)
        agent.num_failed_tries += 1
        agent.num_given_up += event.given_up
        agent.last_failure = event.message
        if (host := self.run.hosts.get(event.worker)) is not None:
            host.num_failed += 1
        failed = (event.agent_id, event.worker)
        self._end_tries(event.partition, lambda attempt: attempt == failed)

    def _wait(self, at: float, event: ServerAway) -> None:
        agent, host = self._agent(event.agent_id), self._host(event.worker, event.agent_id)
        agent.last_failure = event.message
        since = host.since if host.state is HostState.AWAY else at
        why = f"waits up to {event.wait_s:g} s for its server: {event.message}"
        host.become(HostState.AWAY, since, why)
        put_off = (event.agent_id, event.worker)
        self._end_tries(event.partition, lambda attempt: attempt == put_off)

    def _end_tries(self, partition: int, ended: Callable[[tuple[str, str]], bool]) -> None:
        tries = self._open.get(partition, [])
        left = [attempt for attempt in tries if not ended(attempt)]
        for agent_id, worker in (attempt for attempt in tries if ended(attempt)):
            self._agent(agent_id).in_flight -= 1
            if worker in self.run.hosts:
                self.run.hosts[worker].in_flight -= 1
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
