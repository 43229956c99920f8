"""Who is asked about which partition, when: a pure state machine.

Events go in (`replica_joined`, `answered`, `failed`, …), instructions come out (`Ask`,
`Merge`, `Abandon`). No network, no clock, no Dask: `routing.dask` is the thin shell. State
is O(window): partitions are pulled from the plan one by one and forgotten once merged.

Dask assigns tasks with restrictions all at once and never queues them on the scheduler, so
the bounded window that a policy needs lives here: a replica never has more than `window`
partitions in flight, and the choice is made as late as possible.

Words: an *agent* is a voter of the job; a *replica* is one worker that serves it. The same
partition is never asked twice of one agent once it has answered; which replica of the agent
answers does not matter.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from mas_batch.routing.policies import PartitionView, Policy, ReplicaView


@dataclass(frozen=True, slots=True)
class Work:
    """A partition that still needs something."""

    index: int
    estimated_tokens: int
    answered: frozenset[str] = frozenset()
    """Agents whose answers an earlier execution committed."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Send the partition to the replica."""

    partition: int
    agent_id: str
    replica_id: str
    attempt: int
    candidates: tuple[tuple[str, int], ...]
    """(replica, partitions in flight) of everyone who could have been chosen."""


@dataclass(frozen=True, slots=True)
class Merge:
    """Every answer that can be had is committed by these agents: merge the partition."""

    partition: int
    agents: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Abandon:
    """Forget the task: its worker is gone or its answer is no longer needed."""

    partition: int
    agent_id: str
    replica_id: str


Instruction = Ask | Merge | Abandon


@dataclass(slots=True)
class _Replica:
    replica_id: str
    agent_id: str
    tokens: dict[int, int] = field(default_factory=dict)  # partition in flight → estimated tokens
    num_answered: int = 0

    def view(self, rank: int) -> ReplicaView:
        return ReplicaView(
            self.replica_id,
            self.agent_id,
            rank,
            len(self.tokens),
            sum(self.tokens.values()),
            self.num_answered,
        )


@dataclass(slots=True)
class _Partition:
    work: Work
    answered: set[str]  # agents
    asked: dict[str, str] = field(default_factory=dict)  # agent → replica
    attempts: dict[str, int] = field(default_factory=dict)
    failed_on: set[str] = field(default_factory=set)  # replicas
    given_up: set[str] = field(default_factory=set)
    merging: bool = False


class Dispatcher:
    """The state machine. Not thread-safe: one thread feeds it events.

    Args:
        agents: agent → answers per record it gives when asked, in the job's order.
        answers_per_record: how many answers each record shall get at least; an agent that is
            asked always gives all its samples.
        policy: chooses among the candidates.
        window: partitions in flight per replica.
        max_attempts: tries of one agent on one partition before it is given up there.
        plan: the partitions that need work, in order; pulled lazily.
    """

    def __init__(
        self,
        agents: dict[str, int],
        answers_per_record: int,
        policy: Policy,
        plan: Iterable[Work],
        *,
        window: int,
        max_attempts: int,
    ) -> None:
        self._samples = agents
        self._rank = {name: rank for rank, name in enumerate(agents)}
        self._needed = answers_per_record
        self._policy = policy
        self._plan: Iterator[Work] = iter(plan)
        self._plan_exhausted = False
        self._window = window
        self._max_attempts = max_attempts
        self._replicas: dict[str, _Replica] = {}
        self._open: dict[int, _Partition] = {}
        self._proven: set[str] = set()  # agents that have answered in this execution

    # Events

    def replica_joined(self, replica_id: str, agent_id: str) -> list[Instruction]:
        """A worker that holds the agent's model is ready for work."""
        self._replicas.setdefault(replica_id, _Replica(replica_id, agent_id))
        return self._advance()

    def replica_left(self, replica_id: str) -> list[Instruction]:
        """A worker is gone. What it had in flight goes back.

        A replica works on its partitions one after the other, so only the first in flight can
        have to do with its death: that one counts as a failed attempt, which bounds the harm
        of a record that kills its worker every time. The others are innocent.
        """
        replica = self._replicas.pop(replica_id, None)
        if replica is None:
            return []
        abandoned: list[Instruction] = []
        for place, index in enumerate(replica.tokens):
            self._put_back(self._open[index], replica.agent_id, blamed=place == 0)
            abandoned.append(Abandon(index, replica.agent_id, replica_id))
        return abandoned + self._advance()

    def answered(self, partition: int, agent_id: str, replica_id: str) -> list[Instruction]:
        """The agent's answers to the partition are committed."""
        state = self._open.get(partition)
        if state is None or agent_id in state.answered:
            return []  # a second copy of a task that had been given up for lost
        out: list[Instruction] = []
        current = state.asked.pop(agent_id, None)
        if current is not None:
            self._release(partition, current)
            if current != replica_id:
                out.append(Abandon(partition, agent_id, current))
        state.answered.add(agent_id)
        state.given_up.discard(agent_id)
        self._proven.add(agent_id)
        if replica_id in self._replicas:
            self._replicas[replica_id].num_answered += 1
        return out + self._advance()

    def failed(self, partition: int, agent_id: str, replica_id: str) -> list[Instruction]:
        """A try came to nothing. Late news of a try that was abandoned changes nothing."""
        state = self._open.get(partition)
        if state is None or state.asked.get(agent_id) != replica_id:
            return []
        self._release(partition, replica_id)
        state.failed_on.add(replica_id)
        self._put_back(state, agent_id, blamed=True)
        return self._advance()

    def merged(self, partition: int) -> list[Instruction]:
        """The partition's results are committed: forget it."""
        self._open.pop(partition, None)
        return self._advance()

    # Questions

    @property
    def done(self) -> bool:
        """Every partition of the plan is merged."""
        return self._plan_exhausted and not self._open

    def in_flight(self, replica_id: str) -> int:
        """Partitions sent to the replica and not yet answered."""
        replica = self._replicas.get(replica_id)
        return len(replica.tokens) if replica else 0

    def given_up(self, partition: int, agent_id: str) -> bool:
        """Whether the agent will not be asked about the partition any more."""
        state = self._open.get(partition)
        return state is not None and agent_id in state.given_up

    def awaits(self, partition: int, agent_id: str) -> bool:
        """Whether the agent's answers to the partition would be news."""
        state = self._open.get(partition)
        return state is not None and agent_id not in state.answered

    def missing_agents(self) -> set[str]:
        """Agents without a replica, where an open partition cannot do without them."""
        served = {replica.agent_id for replica in self._replicas.values()}
        missing: set[str] = set()
        for state in self._open.values():
            untried = self._untried(state)
            if sum(self._samples[a] for a in untried & served) < self._lacks(state):
                missing |= untried - served
        return missing

    def distrusted_agents(self) -> set[str]:
        """Agents that only ever failed: what is wrong is not their partitions.

        Partitions that such an agent was given up on are not merged, so that a wrong key or a
        broken worker does not become a result: the run must fail and be resumed.
        """
        given_up = Counter(a for state in self._open.values() for a in state.given_up)
        return {a for a in given_up.keys() - self._proven if given_up[a] >= 3 or self._idle(a)}

    def _idle(self, agent_id: str) -> bool:
        """Whether the agent has replicas, and nothing is left that they could be asked."""
        loads = [len(r.tokens) for r in self._replicas.values() if r.agent_id == agent_id]
        return bool(loads) and not any(loads)

    # Mechanism

    def _advance(self) -> list[Instruction]:
        """Merge what is complete, place what can be placed, open what there is room for."""
        out: list[Instruction] = []
        free = [r for r in self._replicas.values() if len(r.tokens) < self._window]
        waiting = deque(self._open.values())
        while True:
            while waiting:
                state = waiting.popleft()
                self._place(state, free, out)
                self._merge_if_complete(state, out)
            # Every agent may be behind by its window; more open partitions would only use memory.
            if (not free and self._replicas) or len(self._open) >= self._max_open():
                return out
            work = next(self._plan, None)
            if work is None:
                self._plan_exhausted = True
                return out
            state = _Partition(work, set(work.answered))
            self._open[work.index] = state
            waiting.append(state)

    def _max_open(self) -> int:
        return 16 + 4 * self._window * max(1, len(self._replicas))

    def _place(self, state: _Partition, free: list[_Replica], out: list[Instruction]) -> None:
        while self._lacks(state) > 0:
            untried = self._untried(state)
            candidates = {
                r.replica_id: r
                for r in free
                if r.agent_id in untried and not self._has_fresher(state, r)
            }
            if not candidates:
                return
            views = [r.view(self._rank[r.agent_id]) for r in candidates.values()]
            partition = PartitionView(state.work.index, state.work.estimated_tokens)
            choice = candidates[self._policy.choose(partition, views).replica_id]
            state.asked[choice.agent_id] = choice.replica_id
            tokens = state.work.estimated_tokens * self._samples[choice.agent_id]
            choice.tokens[state.work.index] = tokens
            if len(choice.tokens) >= self._window:
                free.remove(choice)
            attempt = state.attempts.get(choice.agent_id, 0) + 1
            loads = tuple((view.replica_id, view.in_flight) for view in views)
            out.append(Ask(state.work.index, choice.agent_id, choice.replica_id, attempt, loads))

    def _has_fresher(self, state: _Partition, replica: _Replica) -> bool:
        """Whether the replica failed on the partition and a sibling that did not is alive."""
        return replica.replica_id in state.failed_on and any(
            r.agent_id == replica.agent_id and r.replica_id not in state.failed_on
            for r in self._replicas.values()
        )

    def _merge_if_complete(self, state: _Partition, out: list[Instruction]) -> None:
        if state.merging or state.asked or state.given_up - self._proven:
            return
        if self._lacks(state) <= 0 or not self._untried(state):
            state.merging = True
            agents = sorted(state.answered, key=self._rank.__getitem__)
            out.append(Merge(state.work.index, tuple(agents)))

    def _lacks(self, state: _Partition) -> int:
        """Answers per record that are neither there nor under way."""
        if state.merging:
            return 0
        return self._needed - sum(self._samples[a] for a in (*state.answered, *state.asked))

    def _untried(self, state: _Partition) -> set[str]:
        return self._samples.keys() - state.answered - state.asked.keys() - state.given_up

    def _release(self, partition: int, replica_id: str) -> None:
        replica = self._replicas.get(replica_id)
        if replica is not None:
            replica.tokens.pop(partition, None)

    def _put_back(self, state: _Partition, agent_id: str, *, blamed: bool) -> None:
        state.asked.pop(agent_id, None)
        if not blamed:
            return
        state.attempts[agent_id] = state.attempts.get(agent_id, 0) + 1
        if state.attempts[agent_id] >= self._max_attempts:
            state.given_up.add(agent_id)
