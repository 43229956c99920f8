"""A question on its way to a reply: which agents are asked, when their answers are enough, and what
the reply took.

Agents are asked in one of two ways. *As few as needed*: so many agents that their answers are
enough, and one more for each agent that fails or is late, as a batch run does. *A race*: all agents
are asked at once, the first answers that are enough win, and the other agents need not begin. A
race is faster by as much as the agents' speeds vary, and costs all the work that is thrown away.

To ask again for a late answer is the hedged request of Dean and Barroso, "The tail at scale", CACM
2013: after the 95th percentile it costs about 5 % more work.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from mas_batch.aggregate.stopping import StoppingRule
from mas_batch.errors import Reason
from mas_batch.records import Answer, Record
from mas_batch.serving.parts import AgentPart
from mas_batch.serving.reply import Failure, ReplyTimes


@dataclass(frozen=True, slots=True)
class AskingRules:
    """How questions are asked; see `AgentPool`."""

    samples: Mapping[str, int]
    """Agents that may be asked → answers that each gives."""
    wanted: int
    """Answers that are enough."""
    race: bool
    stopping: StoppingRule | None
    """When fewer answers are enough; it is first applied after `wanted` answers. None: never."""
    timeout_s: float
    hedge: bool
    new_tokens: int
    """The most tokens of an answer."""


@dataclass(slots=True)
class Quorum:
    """Which agents have been asked about a question, and how many answers they gave. Pure.

    Raises:
        ValueError: an agent is asked twice, or settles without having been asked.
    """

    samples: Mapping[str, int]
    """Agents that may be asked → answers that each gives if all goes well."""
    wanted: int
    """Answers that are enough."""
    race: bool = False
    """Ask all at once."""
    settled: dict[str, int] = field(default_factory=dict)
    """Agents that are done → number of their valid answers, in the order in which they came."""
    _asked: dict[str, None] = field(default_factory=dict)

    @property
    def num_answers(self) -> int:
        """Valid answers so far."""
        return sum(self.settled.values())

    @property
    def open(self) -> tuple[str, ...]:
        """Agents that have been asked and are not done."""
        return tuple(agent for agent in self._asked if agent not in self.settled)

    @property
    def unasked(self) -> tuple[str, ...]:
        """Agents that may still be asked."""
        return tuple(agent for agent in self.samples if agent not in self._asked)

    @property
    def is_complete(self) -> bool:
        """Whether there are answers enough."""
        return self.num_answers >= self.wanted

    @property
    def is_over(self) -> bool:
        """Whether there is nothing to wait for: complete, or all have been asked and are done."""
        return self.is_complete or not (self.open or self.unasked)

    def wants_more(self, stalled: Collection[str] = ()) -> bool:
        """Whether one more agent is to be asked now.

        Args:
            stalled: open agents from which no answer can be expected for now.
        """
        if self.is_complete or not self.unasked:
            return False
        expected = sum(self.samples[agent] for agent in self.open if agent not in stalled)
        return self.race or self.num_answers + expected < self.wanted

    def ask(self, agent: str) -> None:
        """Note that the agent is asked."""
        if agent not in self.unasked:
            raise ValueError(f"{agent!r} cannot be asked; allowed: {', '.join(self.unasked)}")
        self._asked[agent] = None

    def settle(self, agent: str, num_answers: int) -> None:
        """Note that the agent is done, with so many valid answers."""
        if agent not in self.open:
            raise ValueError(f"{agent!r} is not open; open: {', '.join(self.open)}")
        self.settled[agent] = num_answers


@dataclass(slots=True, eq=False)
class Question:
    """A text whose answer a caller waits for."""

    record: Record
    quorum: Quorum
    tokens: int
    """Estimated, with the answer's."""
    number: int
    asked: float
    """When, by the loop's clock."""
    news: asyncio.Event = field(default_factory=asyncio.Event)
    parts: dict[str, AgentPart] = field(default_factory=dict)
    """By agent."""

    def hear(self, part: AgentPart) -> None:
        """Count a part whose outcome is known, and wake the task that answers the question."""
        assert part.outcome is not None
        self.quorum.settle(part.agent_id, len(part.outcome.answers))
        self.news.set()

    @property
    def answers(self) -> list[Answer]:
        """The valid answers, in the order in which their agents settled."""
        outcomes = (self.parts[agent].outcome for agent in self.quorum.settled)
        return [answer for outcome in outcomes if outcome for answer in outcome.answers]

    @property
    def failures(self) -> list[Failure]:
        """Agents without a valid answer: those that failed and, unless the answers are enough,
        those that are too late."""
        outcomes = (part.outcome for part in self.parts.values())
        known = [each.failure for each in outcomes if each is not None]
        late = self.quorum.open if not self.quorum.is_complete else ()
        return [failure for failure in known if failure is not None] + [
            self.parts[agent].failure(Reason.AGENT_FAILED, "no answer in time") for agent in late
        ]

    def latency(self, last: str, heard: float, now: float) -> ReplyTimes:
        """Divide the time since the question was asked, along the part whose answer came last.

        Args:
            last: the agent of that part.
            heard: when the merge began; it has ended `now`.
        """
        outcome = self.parts[last].outcome
        assert outcome is not None
        times = outcome.times
        away_s = outcome.heard - outcome.sent
        transfer_s = max(0.0, away_s - outcome.waited_s - times.own_s)
        processing_s = times.process_s + now - heard
        waited_s = now - self.asked - times.compute_s - transfer_s - processing_s
        return ReplyTimes(max(0.0, waited_s), times.compute_s, transfer_s, processing_s)
