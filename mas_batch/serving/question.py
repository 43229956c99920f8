"""A question on its way to a reply: how it is asked, by whom it is answered, what that takes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from mas_batch.aggregate.stopping import StoppingRule
from mas_batch.errors import Reason
from mas_batch.records import Answer, Record
from mas_batch.serving.k_of_n import Quorum
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
    """When fewer are enough; `wanted` then is where to look first."""
    timeout_s: float
    hedge: bool
    new_tokens: int
    """Of an answer, at most."""


@dataclass(slots=True, eq=False)
class Question:
    """A text that somebody waits for the answer to."""

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
        """Take what came of a part."""
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
        """Who gave no answer that counts: who failed, and who is too late where all count."""
        outcomes = (part.outcome for part in self.parts.values())
        known = [each.failure for each in outcomes if each is not None]
        late = self.quorum.open if not self.quorum.is_complete else ()
        return [failure for failure in known if failure is not None] + [
            self.parts[agent].failure(Reason.AGENT_FAILED, "no answer in time") for agent in late
        ]

    def latency(self, last: str, heard: float, now: float) -> ReplyTimes:
        """Share the time since asking out along the part that was heard of last.

        Args:
            last: the agent that was.
            heard: when; after it came the merge, which has ended now.
        """
        outcome = self.parts[last].outcome
        assert outcome is not None
        times = outcome.times
        away_s = outcome.heard - outcome.sent
        transfer_s = max(0.0, away_s - outcome.waited_s - times.own_s)
        processing_s = times.process_s + now - heard
        waited_s = now - self.asked - times.compute_s - transfer_s - processing_s
        return ReplyTimes(max(0.0, waited_s), times.compute_s, transfer_s, processing_s)
