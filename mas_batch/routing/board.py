"""The partitions that are open: who has answered them, who is at it, who may still be asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from mas_batch.routing.instructions import Rules, Work
from mas_batch.routing.policies import Ordered, Policy, order_of

_COUNTED = 256
"""Partitions by which it is estimated how often an ordered policy asks an agent."""


@dataclass(slots=True)
class OpenPartition:
    """One partition between its first question and its merge."""

    work: Work
    samples: Mapping[str, int]
    """Agent → answers per record it gives when asked."""
    needed: int
    """Answers per record before it is merged, or looked at."""
    order: tuple[str, ...] | None = None
    """Agents in the order in which they are asked; None: whoever is free."""
    answered: set[str] = field(default_factory=set)
    asked: dict[str, list[str]] = field(default_factory=dict)
    """Agent → hosts that are at it, the original before its copy."""
    copied: set[str] = field(default_factory=set)
    """Agents of whose task another host has a copy."""
    overtaken: bool = False
    """Such a copy is another agent's: the first of the two answers is enough."""
    failures: Counter[str] = field(default_factory=Counter)
    deaths: Counter[str] = field(default_factory=Counter)
    """Agent → hosts that died while they worked on it."""
    readers: set[str] = field(default_factory=set)
    """Hosts that were sent it, for any agent: they have read it."""
    failed_on: dict[str, set[str]] = field(default_factory=dict)
    """Agent → hosts at which it has failed."""
    given_up: set[str] = field(default_factory=set)
    pardoned: set[str] = field(default_factory=set)
    num_asks: int = 0
    num_undecided: int | None = None
    """Records that a look at the answers found undecided; None before it."""
    merging: bool = False

    @property
    def index(self) -> int:
        """The partition's number."""
        return self.work.index

    @property
    def num_answers(self) -> int:
        """Answers per record that are committed."""
        return self.samples_of(self.answered)

    @property
    def lacks(self) -> int:
        """Answers per record that are needed and neither there nor under way."""
        if self.merging:
            return 0
        if self.order is not None:  # all who have their turn: a later one may give enough alone
            return self.samples_of(self.wanted)
        return self.needed - self.samples_of((*self.answered, *self.asked))

    @property
    def untried(self) -> set[str]:
        """Agents that may still be asked."""
        return self.samples.keys() - self.answered - self.asked.keys() - self.given_up

    @property
    def wanted(self) -> set[str]:
        """Agents that may be asked now: any, or the first of the order that are enough.

        One that is given up is passed over, and so the next one has its turn.
        """
        if self.order is None:
            return self.untried
        wanted, num_answers = self.untried, 0
        for agent_id in self.order:
            if num_answers >= self.needed:
                wanted.discard(agent_id)
            elif agent_id in self.answered or agent_id not in self.given_up:
                num_answers += self.samples[agent_id]
        return wanted

    @property
    def tokens(self) -> int:
        """Estimated tokens of the records that are asked about, for one answer to each."""
        if self.num_undecided is None:
            return self.work.estimated_tokens
        return max(1, self.work.estimated_tokens * self.num_undecided // self.work.num_records)

    def samples_of(self, agents: Iterable[str]) -> int:
        """Return how many answers per record the agents give together."""
        return sum(self.samples[agent_id] for agent_id in agents)

    def take_back(self, agent_id: str, host_id: str) -> bool:
        """Note that a host's try is over; False if it had none or a copy is under way."""
        hosts = self.asked.get(agent_id, [])
        if host_id not in hosts:
            return False
        hosts.remove(host_id)
        self.copied.discard(agent_id)
        self.overtaken = False
        if not hosts:
            del self.asked[agent_id]
        return not hosts


class Board:
    """All open partitions. The plan is pulled lazily, and a merged partition is forgotten."""

    def __init__(
        self,
        samples: Mapping[str, int],
        rules: Rules,
        policy: Policy,
        plan: Iterable[Work],
        num_partitions: int,
    ) -> None:
        self._samples = samples
        self._agents = tuple(samples)
        self._rules = rules
        self._policy = policy
        self._has_order = rules.ordered and isinstance(policy, Ordered)  # slow: asked once
        self._plan = iter(plan)
        self.open: dict[int, OpenPartition] = {}
        self.is_exhausted = False
        """No further partition will come."""
        self.num_unpulled = num_partitions

    def __iter__(self) -> Iterator[OpenPartition]:
        return iter(self.open.values())

    @property
    def num_left(self) -> int | None:
        """Partitions that are not merged; None: it is not known how many there will be."""
        if self.num_unpulled == 0 and not self.is_exhausted:
            return None
        return self.num_unpulled + len(self.open)

    def get(self, index: int) -> OpenPartition | None:
        """Return the partition if it is open."""
        return self.open.get(index)

    def pull(self) -> OpenPartition | None:
        """Open the next partition of the plan; None when there is none."""
        work = next(self._plan, None)
        if work is None:
            self.is_exhausted = True
            self.num_unpulled = 0
            return None
        self.num_unpulled = max(0, self.num_unpulled - 1)
        most = self._rules.answers_per_record
        first = min(most, self._rules.first or most)
        order = self._order(work.index)
        state = OpenPartition(work, self._samples, first, order, set(work.answered))
        self.open[work.index] = state
        return state

    def _order(self, index: int) -> tuple[str, ...] | None:
        if not self._has_order:
            return None
        return order_of(self._policy, index, self._agents, self._rules.weights)

    def shares(self) -> dict[str, float]:
        """Agent → share of the plan's partitions that it is asked about at most, estimated."""
        most = self._rules.answers_per_record
        if self._order(0) is None:
            equal = min(1.0, most / sum(self._samples.values()))
            return dict.fromkeys(self._agents, equal)
        some = (
            OpenPartition(Work(index, 1), self._samples, most, self._order(index)).wanted
            for index in range(_COUNTED)
        )
        counts = Counter(agent_id for wanted in some for agent_id in wanted)
        return {agent_id: counts[agent_id] / _COUNTED for agent_id in self._agents}

    def close(self, index: int) -> OpenPartition | None:
        """Forget a merged partition; returns what it was."""
        return self.open.pop(index, None)
