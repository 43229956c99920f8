"""Whom to ask about one question, and when the answers are enough: pure.

Two ways. *As few as needed*: so many agents that their answers are enough, and one more for each
that fails or is late, as a batch run does. *A race*: all are asked at once, the first answers that
are enough win, and the others need not begin. A race is faster by as much as the agents vary and
costs all the work that is thrown away.

Asking once more what is late is the hedged request of Dean and Barroso, "The tail at scale",
CACM 2013: after the 95th percentile it costs about 5 % more work.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field


@dataclass(slots=True)
class Quorum:
    """Who has been asked about a question and what came of it.

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
    """Agents that are done → valid answers that they gave, in the order in which they came."""
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
            stalled: open agents that no answer can be expected of for now.
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
