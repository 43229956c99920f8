"""An agent's part in answering a question: what the agent is asked, and the outcome."""

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

_WORTH_ANOTHER_HOST = (Reason.ENGINE_ERROR, Reason.OUT_OF_MEMORY)
"""Without WORKER_DIED: deaths are counted in `AgentPart.num_deaths`."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a part: answers, or why there are none; times by the loop's clock."""

    answers: tuple[Answer, ...] = ()
    failure: Failure | None = None
    sent: float = 0.0
    heard: float = 0.0
    waited_s: float = 0.0
    """Waiting at the worker for the model's thread."""
    times: TaskTimes = field(default_factory=TaskTimes)
    """Times of the batch that the part was in."""

    @property
    def engine_failure(self) -> Reason | None:
        """The reason of a failure of the engine, for which another host is worth a try."""
        if self.answers or self.failure is None:
            return None
        reason = Reason(self.failure.reason)
        return reason if reason in _WORTH_ANOTHER_HOST else None


@dataclass(slots=True, eq=False)
class AgentPart:
    """One agent's part in answering a question."""

    record: Record
    agent_id: str
    tokens: int
    """Estimated, with the answer's tokens."""
    asked: float
    """When the agent was asked, by the loop's clock."""
    on_settled: Callable[[AgentPart], None]
    outcome: Outcome | None = None
    hedged: bool = False
    """Whether another agent or host has been asked because this answer was late."""
    patience: float = 1.0
    """How often the agent's `late_s` must pass until the answer is late; it doubles each time."""
    tried: set[str] = field(default_factory=set)
    """Hosts to which the part was sent."""
    at: set[str] = field(default_factory=set)
    """Hosts that work on the part now."""
    num_deaths: int = 0
    """Hosts that died while they worked on the part."""

    def leave(self, host_id: str) -> bool:
        """Note that the host works on it no longer; returns whether it needs another one."""
        self.at.discard(host_id)
        return not self.at and self.outcome is None

    def failure(self, reason: Reason, message: str) -> Failure:
        """Return the agent's failure to answer this part."""
        return Failure(self.agent_id, reason, message)


def outcome_of(
    part: AgentPart, answers: Sequence[Answer], answered: Answered, sent: float, heard: float
) -> Outcome:
    """Return the part's outcome.

    Args:
        answers: the agent's answers to the part, one per sample.
        answered: what the worker said of the batch that the part was in.
        sent, heard: when the batch was sent and its answers came, by the loop's clock.
    """
    valid = tuple(answer for answer in answers if answer.reason is None)
    failures = (part.failure(a.reason, a.message) for a in answers if a.reason is not None)
    failure = next(failures, None)
    return Outcome(valid, failure, sent, heard, answered.waited_s, answered.times)
