"""What happened to one partition, step by step: a pure function of a run's events."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from typing import Any

from mas_batch.errors import RunError
from mas_batch.monitor.event_log import LoggedEvent
from mas_batch.routing.policies import POLICIES


class OutcomeKind(StrEnum):
    """How a try ended."""

    ANSWERED = "answered"
    FAILED = "failed"
    PUT_OFF = "put off"
    """Its agent's server was away; the agent is asked again, and the try does not count."""
    LOST = "lost"
    """Its worker was lost, left or was restarted first."""
    OVERTAKEN = "overtaken"
    """Others answered first; the router no longer waits for it."""
    OPEN = "open"
    """No event tells: the worker is at work, or the run's process ended first."""


@dataclass(frozen=True, slots=True)
class TryOutcome:
    """What came of asking a worker."""

    kind: OutcomeKind
    after_s: float | None = None
    """From the decision to the event that ended the try; None where there is no such event."""
    message: str = ""
    given_up: bool = False
    """After this failure the router does not ask the agent about the partition again."""
    num_answers: int = 0
    num_failed: int = 0
    """Records that the agent was asked about and has no answer to."""
    compute_s: float = 0.0
    """Seconds that the model took."""


@dataclass(frozen=True, slots=True)
class CandidateWorker:
    """A worker that the router could have chosen, and which of its agents it would have asked."""

    worker: str
    agent_id: str
    chosen: bool
    figures: dict[str, float]
    """What the policy saw of them; see `monitor.events.PartitionAsked`."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The router asked a worker."""

    time: datetime
    agent_id: str
    worker: str
    attempt: int
    """Tries of the agent on the partition, with this one, since a breaker of its last closed."""
    purpose: str
    policy: str
    why: str
    """The rule by which the policy chose the worker, in words."""
    candidates: tuple[CandidateWorker, ...]
    num_busy: int
    """Capable workers that the router could not choose: their windows were full."""
    outcome: TryOutcome = field(default_factory=lambda: TryOutcome(OutcomeKind.OPEN))


@dataclass(frozen=True, slots=True)
class News:
    """Something else that happened to the partition, or to a worker that was asked about it."""

    time: datetime
    event: str
    """Class of the event in `events`."""
    message: str


Step = Decision | News


class Story:
    """Gathers what one execution's events say about one partition.

    Args:
        execution: its name.
        started: time of its first event.
        answered: agents whose answers earlier executions' events tell of.
    """

    def __init__(
        self, partition: int, execution: str, started: datetime, answered: Iterable[str] = ()
    ) -> None:
        self.execution = execution
        self.started = started
        self.steps: list[Step] = []
        self.answered = list(answered)
        self.is_merged = False
        self._partition = partition
        self._tries: dict[tuple[str, str], int] = {}  # agent, worker → its last step

    def take(self, event: LoggedEvent) -> None:
        """Take note of the execution's next event.

        Raises:
            RunError: an event lacks a field: an older version wrote it.
        """
        try:
            if event.name in ("HostLost", "HostDraining", "BreakerChanged"):
                self._worker_news(event)
            elif event.facts.get("partition") == self._partition:
                self._partition_news(event)
        except KeyError as error:
            raise RunError(
                f"execution {event.execution}: {event.name} has no {error}; an older version "
                "wrote these events, which cannot be explained"
            ) from error

    def end(self) -> None:
        """Close the tries that are open in a merged partition: no further event comes."""
        if self.is_merged:
            for index in self._open():
                why = "the answers of others were enough"
                self._end_try(index, None, OutcomeKind.OVERTAKEN, message=why)

    def _partition_news(self, event: LoggedEvent) -> None:
        facts = event.facts
        match event.name:
            case "PartitionAsked":
                self._tries[facts["agent_id"], facts["worker"]] = len(self.steps)
                self.steps.append(_decision(event))
            case "PartitionAnswered":
                self._answered(event)
            case "AnswerFailed":
                index = self._tries.get((facts["agent_id"], facts["worker"]))
                if index is not None:
                    why = {key: facts[key] for key in ("message", "given_up")}
                    self._end_try(index, event.time, OutcomeKind.FAILED, **why)
            case "ServerAway":
                index = self._tries.get((facts["agent_id"], facts["worker"]))
                if index is not None:
                    why = facts["message"]
                    self._end_try(index, event.time, OutcomeKind.PUT_OFF, message=why)
            case "PartitionUndecided":
                count = f"{facts['num_undecided']:,} of {facts['num_records']:,} records"
                self._add(event, f"{count} are undecided: one more agent is asked about them")
            case "PartitionMerged":
                self.is_merged = True
                whose = f" from the answers of {', '.join(self.answered)}" if self.answered else ""
                counts = f"{facts['num_results']:,} answered, {facts['num_failures']:,} failed"
                self._add(event, f"merged{whose}: {counts}")

    def _answered(self, event: LoggedEvent) -> None:
        facts = event.facts
        agent_id, worker = facts["agent_id"], facts["worker"]
        index = self._tries.get((agent_id, worker))
        if index is None:  # the log has lost the decision, or an earlier version made none
            self._add(
                event,
                f"{agent_id} on {worker} gave {facts['num_answers']:,} answers, "
                f"{facts['num_failed']:,} failed; why it was asked is not in the log",
            )
        else:
            before = self._decision(index).outcome
            late = before.kind is OutcomeKind.LOST
            message = f"after it was taken for lost: {before.message}" if late else ""
            counts = {key: facts[key] for key in ("num_answers", "num_failed", "compute_s")}
            self._end_try(index, event.time, OutcomeKind.ANSWERED, message=message, **counts)
        for other in self._open():
            if self._decision(other).agent_id == agent_id:
                why = f"{worker} answered first"
                self._end_try(other, None, OutcomeKind.OVERTAKEN, message=why)
        if agent_id not in self.answered:
            self.answered.append(agent_id)

    def _worker_news(self, event: LoggedEvent) -> None:
        worker = event.facts["worker"]
        if self.is_merged or worker not in {asked for _, asked in self._tries}:
            return
        is_breaker = event.name == "BreakerChanged"
        whose = event.facts["agent_id"] if is_breaker else ", ".join(event.facts["agents"])
        message, who = event.facts["message"], f"{whose} on {worker}"
        at_work = [i for i in self._open() if self._decision(i).worker == worker]
        if event.name == "HostLost" and at_work:
            for index in at_work:
                self._end_try(index, event.time, OutcomeKind.LOST, message=message)
            return
        match event.name:
            case "HostDraining":
                who += " is asked nothing further"
            case "BreakerChanged":
                who += f", breaker {event.facts['state']}"
        self._add(event, f"{who}: {message}")

    def _add(self, event: LoggedEvent, message: str) -> None:
        self.steps.append(News(event.time, event.name, message))

    def _open(self) -> list[int]:
        return [
            index
            for index in self._tries.values()
            if self._decision(index).outcome.kind is OutcomeKind.OPEN
        ]

    def _decision(self, index: int) -> Decision:
        step = self.steps[index]
        assert isinstance(step, Decision)
        return step

    def _end_try(self, index: int, time: datetime | None, kind: OutcomeKind, **facts: Any) -> None:
        """Note how a try ended, and when, if an event tells."""
        step = self._decision(index)
        after_s = None if time is None else (time - step.time).total_seconds()
        self.steps[index] = replace(step, outcome=TryOutcome(kind, after_s, **facts))


def _decision(event: LoggedEvent) -> Decision:
    facts = event.facts
    chosen = (facts["agent_id"], facts["worker"])
    if any(not isinstance(f, dict) for seen in facts["candidates"].values() for f in seen.values()):
        raise KeyError("candidates by agent")
    candidates = tuple(
        CandidateWorker(worker, agent_id, (agent_id, worker) == chosen, figures)
        for agent_id, workers in facts["candidates"].items()
        for worker, figures in workers.items()
    )
    same = ("agent_id", "worker", "attempt", "purpose", "policy", "num_busy")
    kept = {key: facts[key] for key in same}
    return Decision(time=event.time, why=_why(facts), candidates=candidates, **kept)


def _why(facts: dict[str, Any]) -> str:
    if facts["purpose"] == "copy":  # speculation chooses, not the policy
        return "it was idle and should finish clearly before the slow one"
    name: str = facts["policy"]
    return POLICIES[name].rule if name in POLICIES else name
