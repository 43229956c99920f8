"""A part in answering a question: what one agent is asked, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mas_batch.errors import Reason
from mas_batch.latency.times import TaskTimes
from mas_batch.records import Answer, Record
from mas_batch.serving.reply import Failure

if TYPE_CHECKING:
    from mas_batch.agents.texts import Answered

_WORTH_ANOTHER_REPLICA = (Reason.ENGINE_ERROR, Reason.OUT_OF_MEMORY)  # a death is counted apart


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a part: answers, or why there are none; times by the loop's clock."""

    answers: tuple[Answer, ...] = ()
    failure: Failure | None = None
    sent: float = 0.0
    heard: float = 0.0
    waited_s: float = 0.0
    """At the worker, for the model's thread."""
    times: TaskTimes = field(default_factory=TaskTimes)
    """Of the batch that it was in."""

    @property
    def engine_failure(self) -> Reason | None:
        """The reason, if it says that the engine is broken: worth another replica."""
        if self.answers or self.failure is None:
            return None
        reason = Reason(self.failure.reason)
        return reason if reason in _WORTH_ANOTHER_REPLICA else None


@dataclass(slots=True, eq=False)
class AgentPart:
    """One agent's part in answering a question."""

    record: Record
    agent_id: str
    tokens: int
    """Estimated, with the answer's."""
    asked: float
    """When, by the loop's clock."""
    on_settled: Callable[[AgentPart], None]
    outcome: Outcome | None = None
    hedged: bool = False
    """Somebody else has been asked because it was late."""
    patience: float = 1.0
    """In units of what is late for its agent; grows while there is nobody else to ask."""
    tried: set[str] = field(default_factory=set)
    """Replicas that it was sent to."""
    at: set[str] = field(default_factory=set)
    """Replicas that are at it now."""
    num_deaths: int = 0

    def leave(self, replica_id: str) -> bool:
        """Note that the replica is not at it any more; returns whether it needs another."""
        self.at.discard(replica_id)
        return not self.at and self.outcome is None

    def failure(self, reason: Reason, message: str) -> Failure:
        """Return the failure of the agent at this part."""
        return Failure(self.agent_id, reason, message)


def outcome_of(
    part: AgentPart, answers: Sequence[Answer], answered: Answered, sent: float, heard: float
) -> Outcome:
    """Return the part's outcome by its agent's answers, one per sample, in what was answered."""
    valid = tuple(answer for answer in answers if answer.reason is None)
    failures = (part.failure(a.reason, a.message) for a in answers if a.reason is not None)
    failure = next(failures, None)
    return Outcome(valid, failure, sent, heard, answered.waited_s, answered.times)
