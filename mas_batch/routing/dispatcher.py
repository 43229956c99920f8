"""Who is asked about which partition, when: a pure state machine.

Events go in (`replica_joined`, `answered`, `failed`, …), instructions come out (`Ask`,
`Merge`, `Restart`, …). No network, no Dask, and no clock but the `now` that comes with an
event: `routing.dask` is the thin shell. State is O(window): see `board`.

Dask assigns tasks with restrictions all at once and never queues them on the scheduler, so
the bounded window that a policy needs lives here: a replica never has more than `window`
partitions in flight, and the choice is made as late as possible.

Words: an *agent* is a voter of the job; a *replica* is one worker that serves it. The same
partition is never asked twice of one agent once it has answered; which replica of the agent
answers does not matter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice

from mas_batch.routing.board import Board, OpenPartition
from mas_batch.routing.instructions import (
    Abandon,
    Ask,
    AwayNews,
    BreakerNews,
    Instruction,
    Merge,
    Restart,
    Rules,
    Work,
)
from mas_batch.routing.policies import PartitionView, Policy, ReplicaView
from mas_batch.routing.pool import Pool
from mas_batch.routing.replica import BreakerState, Replica
from mas_batch.routing.speculation import Late, is_worth_it, latest_first

_MAX_GIVEN_UP = 3
"""Partitions that an untrusted agent is given up on before the run stops."""
_RESTART_AGAIN_S = 120.0
_MAX_OPEN_WHILE_AWAY = 50_000
"""Partitions that may be open while an agent's server is away; each takes about a kilobyte."""
_COPIES_CONSIDERED = 8
"""Of the latest tasks, per idle replica: with a thousand of each the rest is not worth a look."""


class Dispatcher:
    """The state machine. Not thread-safe: one thread feeds it events, with times that never fall.

    Args:
        agents: agent → answers per record it gives when asked, in the job's order.
        rules: what to keep to.
        policy: chooses among the candidates.
        plan: the partitions that need work, in order; pulled lazily.
        num_partitions: how many the plan will yield; only for `backlog`.
    """

    def __init__(
        self,
        agents: Mapping[str, int],
        rules: Rules,
        policy: Policy,
        plan: Iterable[Work],
        num_partitions: int = 0,
    ) -> None:
        self._samples = dict(agents)
        self._rank = {agent_id: rank for rank, agent_id in enumerate(agents)}
        self._rules = rules
        self._policy = policy
        self._policy_waits = getattr(policy, "waits", False)  # few do: spare the others the views
        self._board = Board(self._samples, rules, policy, plan, num_partitions)
        self._shares = self._board.shares()
        self._pool = Pool(agents, rules)
        self._proven: set[str] = set()  # agents that have answered in this execution
        self._withheld: set[int] = set()  # complete, but for an agent that is not trusted

    # Events

    def trust(self, agent_id: str) -> None:
        """The agent has answered before, in an earlier execution."""
        self._proven.add(agent_id)

    def replica_joined(
        self, replica_id: str, agent_id: str, now: float, *, paused: bool = False
    ) -> list[Instruction]:
        """A worker that holds the agent's model is ready for work, or will be (`paused`)."""
        self._pool.add(replica_id, agent_id, now, paused=paused)
        return self._advance([], now)

    def replica_paused(self, replica_id: str, paused: bool, now: float) -> list[Instruction]:
        """A worker shall be asked nothing further (it is leaving, or out of memory), or again."""
        replica = self._pool.get(replica_id)
        if replica is None or replica.paused == paused:
            return []
        replica.paused = paused
        self._pool.update(replica, now)
        return self._advance([], now)

    def replica_left(
        self,
        replica_id: str,
        now: float,
        *,
        blamed: bool = True,
        committed: Collection[int] = (),
    ) -> list[Instruction]:
        """A worker is gone. What it had in flight goes back.

        A replica works on its partitions one after the other, so only the first whose answers
        are not `committed` can have to do with its death: the agent is asked about that one
        carefully from now on. The others are innocent, and so is every one if the worker left
        on purpose (not `blamed`).
        """
        replica = self._pool.remove(replica_id)
        if replica is None:
            return []
        out: list[Instruction] = []
        suspect = next((index for index in replica.sent if index not in committed), None)
        for index in replica.sent:
            out.append(Abandon(index, replica.agent_id, replica_id))
            state = self._board.get(index)
            if state is None or not state.take_back(replica.agent_id, replica_id):
                continue
            if blamed and index == suspect:
                self._died(state, replica.agent_id)
            self._settle(state, out)
        return self._advance(out, now)

    def answered(
        self, partition: int, agent_id: str, replica_id: str, now: float
    ) -> list[Instruction]:
        """The agent's answers to the partition are committed."""
        out: list[Instruction] = []
        replica = self._pool.get(replica_id)
        if replica is not None:
            changed = replica.answered(partition, now)
            self._pool.update(replica, now)
            if changed:
                self._breaker_changed(replica, out)
        if self.awaits(partition, agent_id):
            state = self._board.open[partition]
            state.asked.pop(agent_id, None)
            state.answered.add(agent_id)
            state.given_up.discard(agent_id)
            self._proven.add(agent_id)
            self._settle(state, out)
        return self._advance(out, now)

    def failed(
        self, partition: int, agent_id: str, replica_id: str, now: float
    ) -> list[Instruction]:
        """A try came to nothing. Late news of a try that was abandoned changes nothing."""
        out: list[Instruction] = []
        replica = self._pool.get(replica_id)
        if replica is not None:
            changed = replica.failed(partition, now)
            self._pool.update(replica, now)
            if changed:
                self._breaker_changed(replica, out)
        state = self._board.get(partition)
        if state is not None and state.take_back(agent_id, replica_id):
            state.failed_on.add(replica_id)
            state.failures[agent_id] += 1
            tried = state.failures[agent_id] >= self._rules.max_attempts
            # Several workers of an agent may share a fault that one more does not have.
            if tried and not self._pool.has_healthy(agent_id, besides=state.failed_on):
                state.given_up.add(agent_id)
            self._settle(state, out)
        return self._advance(out, now)

    def away(
        self,
        partition: int,
        agent_id: str,
        replica_id: str,
        now: float,
        *,
        retry_after_s: float,
        wait_s: float,
    ) -> list[Instruction]:
        """A try met a server that is away. It blames nothing: the partition goes back.

        Args:
            retry_after_s: how long the server wants to be left alone; 0: it has not said.
            wait_s: how long it may be away, see `overdue`.
        """
        out: list[Instruction] = []
        replica = self._pool.get(replica_id)
        if replica is not None and replica.away(partition, now, retry_after_s, wait_s):
            self._pool.update(replica, now)
            assert replica.away_since is not None
            away_s, breaker = now - replica.away_since, replica.breaker
            left_s = max(0.0, breaker.opened + breaker.cool_down_s - now)
            out.append(AwayNews(replica_id, agent_id, partition, away_s, left_s, wait_s))
        state = self._board.get(partition)
        if state is not None and state.take_back(agent_id, replica_id):
            self._settle(state, out)
        return self._advance(out, now)

    def heard(self, replica_id: str, now: float) -> None:
        """A replica has made progress on what it is working on."""
        replica = self._pool.get(replica_id)
        if replica is not None:
            replica.heard(now)

    def undecided(self, partition: int, num_undecided: int, now: float) -> list[Instruction]:
        """A look at the answers found records undecided: one more agent is asked about these."""
        state = self._board.get(partition)
        if state is None or not state.merging:
            return []
        state.merging = False
        state.num_undecided = num_undecided
        state.needed = state.num_answers + 1
        out: list[Instruction] = []
        self._settle(state, out)
        return self._advance(out, now)

    def merged(
        self, partition: int, now: float, agreement: Mapping[str, tuple[int, int]] | None = None
    ) -> list[Instruction]:
        """The partition's results are committed: forget it.

        Args:
            agreement: agent → (answers that say what was published, valid answers).
        """
        self._board.close(partition)
        self._pool.compare(agreement or {})
        return self._advance([], now)

    def tick(self, now: float) -> list[Instruction]:
        """Time has passed: who has been silent for too long, who may be probed, who copied."""
        out: list[Instruction] = []
        for replica in self._pool:
            if not replica.sent:
                continue
            if replica.hung and now - replica.hung_since < _RESTART_AGAIN_S:
                continue
            silent_s = replica.silent_s(now)
            if silent_s <= replica.max_silent_s(self._rules.timeout_s):
                continue
            replica.hung, replica.hung_since = True, now
            self._pool.update(replica, now)
            first = next(iter(replica.sent))
            out.append(Restart(replica.replica_id, replica.agent_id, first, silent_s))
        return self._advance(out, now)

    # Questions

    @property
    def done(self) -> bool:
        """Every partition of the plan is merged."""
        return self._board.is_exhausted and not self._board.open

    def in_flight(self, replica_id: str) -> int:
        """Partitions sent to the replica that it has not answered."""
        replica = self._pool.get(replica_id)
        return len(replica.sent) if replica else 0

    def given_up(self, partition: int, agent_id: str) -> bool:
        """Whether the agent will not be asked about the partition any more."""
        state = self._board.get(partition)
        return state is not None and agent_id in state.given_up

    def awaits(self, partition: int, agent_id: str) -> bool:
        """Whether the agent's answers to the partition would be news."""
        state = self._board.get(partition)
        return state is not None and not state.merging and agent_id not in state.answered

    def backlog(self) -> dict[str, int]:
        """Agent → partitions that it has yet to answer, as far as can be known now.

        Where not all agents are asked, a partition that no agent has yet counts in proportion.
        """
        num_unpulled = self._board.num_unpulled
        backlog = {a: round(share * num_unpulled) for a, share in self._shares.items()}
        for state in self._board:
            wanted = state.wanted if state.lacks > 0 else set()
            for agent_id in wanted | state.asked.keys():
                backlog[agent_id] += 1
        return backlog

    def missing_agents(self) -> set[str]:
        """Agents without a replica, where an open partition cannot do without them."""
        served = self._pool.served()
        missing: set[str] = set()
        for state in self._board:
            if state.samples_of(state.wanted & served) < state.lacks:
                missing |= state.wanted - served
            if state.index in self._withheld:
                missing |= state.given_up - served
        return missing

    def overdue(self, now: float) -> dict[str, float]:
        """Return agent → seconds for which its servers have been away: longer than they may be.

        Only agents without which an open partition cannot do.
        """
        away = {agent_id for agent_id in self._samples if self._pool.is_away(agent_id)}
        waited = {agent_id: self._pool.overdue_s(agent_id, now) for agent_id in sorted(away)}
        if all(away_s is None for away_s in waited.values()):
            return {}
        needed: set[str] = set()
        for state in self._board:
            if state.samples_of(state.untried - away) < state.lacks:
                needed |= state.untried & away
        return {a: away_s for a, away_s in waited.items() if away_s is not None and a in needed}

    def distrusted_agents(self) -> set[str]:
        """Agents that only fail: what is wrong is not their partitions.

        Partitions that such an agent was given up on are not merged without it, so that a wrong
        key or a broken worker does not become a result: the run must fail and be resumed.
        """
        given_up = Counter(a for state in self._board for a in state.given_up)
        return {
            agent_id
            for agent_id, count in given_up.items()
            if not self._is_trusted(agent_id)
            and not self._pool.is_away(agent_id)  # its time is `overdue`'s
            and (count >= _MAX_GIVEN_UP or self._is_idle(agent_id))
        }

    # Trust: is an agent's failure on a partition the partition's fault?

    def _is_trusted(self, agent_id: str) -> bool:
        """Whether the agent has answered, and not every replica of it is failing now."""
        return agent_id in self._proven and not self._pool.is_failing(agent_id)

    def _is_in_doubt(self, agent_id: str) -> bool:
        """Whether what the agent is asked next will tell more about its failures."""
        if not self._is_trusted(agent_id):
            return True
        return self._pool.is_in_streak(agent_id) and not self._is_idle(agent_id)

    def _is_idle(self, agent_id: str) -> bool:
        """Whether the agent has replicas, and nothing is left that they could be asked."""
        replicas = self._pool.of(agent_id).values()
        if not replicas or any(replica.sent for replica in replicas):
            return False
        return next(self._board.waiting(agent_id), None) is None

    def _settle_withheld(self, out: list[Instruction]) -> None:
        """See whether partitions that only an agent's trouble held up can be merged by now."""
        withheld, self._withheld = sorted(self._withheld), set()
        for index in withheld:
            state = self._board.get(index)
            if state is not None:
                self._settle(state, out)

    def _breaker_changed(self, replica: Replica, out: list[Instruction]) -> None:
        breaker = replica.breaker
        out.append(
            BreakerNews(
                replica.replica_id,
                replica.agent_id,
                str(breaker.state),
                breaker.num_failures,
                breaker.cool_down_s,
            )
        )
        if breaker.state is BreakerState.CLOSED:
            self._pardon(replica.agent_id, out)

    def _pardon(self, agent_id: str, out: list[Instruction]) -> None:
        """The agent works again: what it was given up on meanwhile gets a second chance, once."""
        for state in self._board:
            if agent_id in state.given_up - state.pardoned and not state.merging:
                state.pardoned.add(agent_id)
                state.given_up.discard(agent_id)
                state.failures[agent_id] = 0
                self._withheld.discard(state.index)
                self._settle(state, out)

    # One partition's fate

    def _settle(self, state: OpenPartition, out: list[Instruction]) -> None:
        """Queue the partition with whom it wants, or merge it if all that can be had is there."""
        if state.merging:
            return
        if state.num_answers < state.needed or (state.order is not None and state.lacks):
            if state.asked or state.untried:
                self._board.queue(state)
                return
            if any(self._is_in_doubt(agent_id) for agent_id in state.given_up):
                self._withheld.add(state.index)
                return
        elif state.asked and not state.overtaken:
            return  # an agent that is asked gives its answers, also where fewer would do
        state.asked.clear()  # whatever is still under way is not needed
        may_ask_more = (
            self._rules.first is not None
            and state.num_answers < self._rules.answers_per_record
            and bool(state.untried)
        )
        state.merging = True
        out.append(Merge(state.index, self._by_rank(state.answered), final=not may_ask_more))

    def _died(self, state: OpenPartition, agent_id: str) -> None:
        """A worker died at the partition. Asked carefully, a record can be at fault for two."""
        state.deaths[agent_id] += 1
        if state.deaths[agent_id] > self._rules.max_attempts + 2 * state.work.num_records:
            state.given_up.add(agent_id)

    def _by_rank(self, agents: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(agents, key=self._rank.__getitem__))

    # Mechanism

    def _advance(self, out: list[Instruction], now: float) -> list[Instruction]:
        """Open what there is room for, place what can be placed, copy what is late."""
        self._open_more(out)
        self._see_the_end(now)
        self._pool.update_broken(now)
        waiting: set[int] = set()  # for a better replica that is busy
        while (state := self._next_to_place(waiting)) is not None:
            if not self._ask(state, self._candidates(state), out, now):
                waiting.add(state.index)
        self._settle_withheld(out)
        if self._rules.speculate and self._board.is_exhausted:
            self._place_copies(out, now)
        return out

    def _open_more(self, out: list[Instruction]) -> None:
        # Every agent may be behind by its window, and the plan's end must be seen before the
        # windows run dry; more open partitions would only use memory.
        max_open = 16 + 4 * self._rules.max_window * len(self._pool)
        while not self._board.is_exhausted and (
            len(self._board.open) < max_open or self._is_held_up()
        ):
            state = self._board.pull()
            if state is not None:
                self._settle(state, out)

    def _is_held_up(self) -> bool:
        """Whether what is open waits for an agent whose server is away, and others are idle."""
        away = {agent_id for agent_id in self._samples if self._pool.is_away(agent_id)}
        if not away or len(self._board.open) >= _MAX_OPEN_WHILE_AWAY:
            return False
        return any(
            self._pool.free(agent_id) and self._first_waiting(agent_id, set()) is None
            for agent_id in self._samples.keys() - away
        )

    def _see_the_end(self, now: float) -> None:
        if self._board.is_exhausted and self._rules.max_window > 1:
            num_waiting = sum(state.lacks > 0 for state in self._board)
            self._pool.set_ending(num_waiting <= len(self._pool), now)

    def _next_to_place(self, besides: set[int]) -> OpenPartition | None:
        """Return the first partition that a free replica may take."""
        firsts = [
            state
            for agent_id in self._samples
            if self._pool.free(agent_id)
            and (state := self._first_waiting(agent_id, besides)) is not None
        ]
        return min(firsts, key=lambda state: state.index, default=None)

    def _first_waiting(self, agent_id: str, besides: set[int]) -> OpenPartition | None:
        free = self._pool.free(agent_id).values()
        waiting = self._board.waiting(agent_id)
        for state in waiting:
            if state.index in besides:
                continue
            if any(self._may_take(state, replica) for replica in free):
                waiting.close()
                return state
        return None

    def _may_take(self, state: OpenPartition, replica: Replica) -> bool:
        """Whether it has not failed on the partition, or no sibling that has not is well."""
        return replica.replica_id not in state.failed_on or not self._pool.has_healthy(
            replica.agent_id, besides=state.failed_on
        )

    def _candidates(self, state: OpenPartition) -> list[Replica]:
        return [
            replica
            for agent_id in self._by_rank(state.wanted)
            for replica in self._pool.free(agent_id).values()
            if self._may_take(state, replica)
        ]

    def _ask(
        self,
        state: OpenPartition,
        candidates: Sequence[Replica],
        out: list[Instruction],
        now: float,
        purpose: str | None = None,
    ) -> bool:
        """Let the policy choose, and send; False if it would rather wait."""
        views = {replica.replica_id: self._pool.view(replica) for replica in candidates}
        busy = self._busy(state) if purpose is None else ()
        partition = PartitionView(state.index, state.tokens, state.num_asks, busy)
        choice = self._policy.choose(partition, tuple(views.values()))
        if choice is None and busy:
            return False
        replica = self._pool.get((choice or views[candidates[0].replica_id]).replica_id)
        assert replica is not None
        agent_id = replica.agent_id
        num_capable = sum(len(self._pool.of(a)) for a in state.wanted | {agent_id})
        looked = state.num_undecided is not None
        ask = Ask(
            partition=state.index,
            agent_id=agent_id,
            replica_id=replica.replica_id,
            attempt=state.failures[agent_id] + state.deaths[agent_id] + 1,
            purpose=purpose or _purpose(state, replica),
            earlier=self._by_rank(state.answered) if looked else (),
            candidates=tuple(views.values()),
            num_busy=max(0, num_capable - len(views)),
        )
        state.asked.setdefault(agent_id, []).append(replica.replica_id)
        state.num_asks += 1
        replica.send(state.index, state.tokens * self._samples[agent_id], now)
        self._pool.update(replica, now)
        out.append(ask)
        return True

    def _busy(self, state: OpenPartition) -> tuple[ReplicaView, ...]:
        """Replicas that are not free now and can be expected to be: something is in flight."""
        if not self._policy_waits:
            return ()
        return tuple(
            self._pool.view(replica)
            for agent_id in self._by_rank(state.wanted)
            for replica in self._pool.of(agent_id).values()
            if replica.sent
            and replica.replica_id not in self._pool.free(agent_id)
            and replica.breaker.state is BreakerState.CLOSED
            and not (replica.paused or replica.hung)
        )

    def _place_copies(self, out: list[Instruction], now: float) -> None:
        """Nothing is left to place: let who is idle overtake who is slow."""
        idle = [
            replica
            for agent_id in self._samples
            for replica in self._pool.free(agent_id).values()
            if not replica.sent and replica.breaker.state is BreakerState.CLOSED
        ]
        if not idle:
            return
        rates = self._pool.mean_rates()
        late = latest_first(self._in_flight(), rates, now)
        for replica in idle:
            allowed = (task for task in late if self._may_copy(replica, task))
            for task in islice(allowed, _COPIES_CONSIDERED):
                if is_worth_it(replica, task, rates, self._samples):
                    state = self._board.open[task.partition]
                    state.copied.add(task.agent_id)
                    state.overtaken |= replica.agent_id != task.agent_id
                    self._ask(state, [replica], out, now, purpose="copy")
                    break

    def _in_flight(self) -> Iterator[tuple[int, Replica]]:
        for state in self._board:
            for replicas in state.asked.values():
                replica = self._pool.get(replicas[0])
                if replica is not None:
                    yield state.index, replica

    def _may_copy(self, free: Replica, task: Late) -> bool:
        """Whether the replica's answers would do: one copy of a task, careful ones never.

        Of its own agent; and where not every agent has to answer, and the partition has no
        order of agents, of another that gives no more answers.
        """
        state = self._board.open[task.partition]
        if task.agent_id in state.copied or state.deaths[task.agent_id]:
            return False
        if free.agent_id == task.agent_id:
            return True
        return (
            self._rules.first is None
            and state.order is None
            and free.agent_id in state.untried
            and self._samples[free.agent_id] >= self._samples[task.agent_id]
        )


def _purpose(state: OpenPartition, replica: Replica) -> str:
    if state.deaths[replica.agent_id]:
        return "careful"
    if replica.breaker.state is BreakerState.OPEN:
        return "probe"
    return "retry" if state.failures[replica.agent_id] else "answer"
