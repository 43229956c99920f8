"""Who is asked about which partition, when: a pure state machine.

Events go in (`host_joined`, `answered`, `failed`, …), instructions come out (`Ask`,
`Merge`, `Restart`, …). No network, no Dask, and no clock but the `now` that comes with an
event: `routing.dask` is the thin shell. State is O(window): see `board`.

Dask assigns tasks with restrictions all at once and never queues them on the scheduler, so
the bounded window that a policy needs lives here: a host never has more than its window of
partitions in flight, and the choice is made as late as possible.

Words: an *agent* is a voter of the job; a *host* holds an engine and answers for every agent of
it, several partitions at once. The same partition is never asked twice of one agent once it has
answered; at which host does not matter. After a host's death each partition that it worked on is
asked *carefully*: record by record, with a journal, and alone at its host, so that the next death
has one suspect.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice

from mas_batch.routing.board import Board, OpenPartition
from mas_batch.routing.host import BreakerState, Host, Task
from mas_batch.routing.hosts import Hosts
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
from mas_batch.routing.policies import HostView, PartitionView, Policy
from mas_batch.routing.speculation import Late, is_worth_it, latest_first
from mas_batch.routing.waiting import Candidate, Waiting

_MAX_GIVEN_UP = 3
"""Partitions that an untrusted agent is given up on before the run stops."""
_RESTART_AGAIN_S = 120.0
_MAX_OPEN_WHILE_AWAY = 50_000
"""Partitions that may be open while an agent's server is away; each takes about a kilobyte."""
_COPIES_CONSIDERED = 8
"""Of the latest tasks, per idle host: with a thousand of each the rest is not worth a look."""
_MANY = 256
"""Tasks in flight, from which on a look for late ones takes time:"""
_LOOK_S = 1e-4
"""times as much passes between two, per task, so that a hundredth of the time goes into them."""


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
        self._hosts = Hosts(agents, rules)
        self._waiting = Waiting(self._board, self._hosts, tuple(agents))
        self._proven: set[str] = set()  # agents that have answered in this execution
        self._withheld: set[int] = set()  # complete, but for an agent that is not trusted
        self._num_asks = 0
        self._count_again_at = 0  # of them
        self._next_look = 0.0  # for tasks that are worth a copy

    # Events

    def trust(self, agent_id: str) -> None:
        """The agent has answered before, in an earlier execution."""
        self._proven.add(agent_id)

    def expect(self, num_hosts: Mapping[str, int]) -> None:
        """Note agent → hosts that answer for it or will soon, such as are loading.

        Where little is left they are left their share of it.
        """
        self._hosts.expect(num_hosts)

    def host_joined(
        self,
        host_id: str,
        agents: Sequence[str],
        now: float,
        *,
        concurrent: int = 1,
        max_in_flight: int | None = None,
        paused: bool = False,
    ) -> list[Instruction]:
        """A host that holds these agents' engine is ready for work, or will be (`paused`).

        Args:
            concurrent: how many partitions it works on at once.
            max_in_flight: how many its worker has room for; None: no fewer than the window's.
        """
        self._hosts.add(
            host_id,
            agents,
            now,
            concurrent=concurrent,
            max_in_flight=max_in_flight,
            paused=paused,
        )
        return self._advance([], now)

    def host_paused(self, host_id: str, paused: bool, now: float) -> list[Instruction]:
        """A host shall be asked nothing further (it is leaving, or out of memory), or again."""
        host = self._hosts.get(host_id)
        if host is None or host.paused == paused:
            return []
        host.paused = paused
        self._update(host, now)
        return self._advance([], now)

    def host_left(
        self, host_id: str, now: float, *, blamed: bool = True, committed: Collection[Task] = ()
    ) -> list[Instruction]:
        """A host is gone. What it had in flight goes back.

        Those that it had begun can have to do with its death: of what is not `committed` (partition
        and agent), the first `concurrent`. These are asked carefully from now on. The others are
        innocent, and so is every one if the host left on purpose (not `blamed`).
        """
        host = self._hosts.remove(host_id)
        if host is None:
            return []
        out: list[Instruction] = []
        left = [task for task in host.sent if task not in committed]
        suspects = left[: host.concurrent] if blamed else []
        self._waiting.leave(host_id, gone=True)
        for task in host.sent:
            index, agent_id = task
            out.append(Abandon(index, agent_id, host_id))
            state = self._board.get(index)
            if state is None or not state.take_back(agent_id, host_id):
                continue
            if task in suspects:
                self._died(state, agent_id)
            self._settle(state, out)
        return self._advance(out, now)

    def answered(
        self, partition: int, agent_id: str, host_id: str, now: float
    ) -> list[Instruction]:
        """The agent's answers to the partition are committed."""
        out: list[Instruction] = []
        host = self._hosts.get(host_id)
        if host is not None:
            changed = host.answered((partition, agent_id), now)
            self._update(host, now)
            self._breakers_changed(host, changed, out)
        if self.awaits(partition, agent_id):
            state = self._board.open[partition]
            state.asked.pop(agent_id, None)
            state.answered.add(agent_id)
            state.given_up.discard(agent_id)
            self._proven.add(agent_id)
            self._settle(state, out)
        return self._advance(out, now)

    def failed(self, partition: int, agent_id: str, host_id: str, now: float) -> list[Instruction]:
        """A try came to nothing. Late news of a try that was abandoned changes nothing."""
        out: list[Instruction] = []
        host = self._hosts.get(host_id)
        if host is not None:
            changed = host.failed((partition, agent_id), now)
            self._update(host, now)
            self._breakers_changed(host, changed, out)
        state = self._board.get(partition)
        if state is not None and state.take_back(agent_id, host_id):
            failed_on = state.failed_on.setdefault(agent_id, set())
            failed_on.add(host_id)
            state.failures[agent_id] += 1
            tried = state.failures[agent_id] >= self._rules.max_attempts
            # Several hosts of an agent may share a fault that one more does not have.
            if tried and not self._hosts.has_healthy(agent_id, besides=failed_on):
                state.given_up.add(agent_id)
            self._settle(state, out)
        return self._advance(out, now)

    def away(
        self,
        partition: int,
        agent_id: str,
        host_id: str,
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
        host = self._hosts.get(host_id)
        if host is not None and host.away((partition, agent_id), now, retry_after_s, wait_s):
            self._update(host, now)
            assert host.away_since is not None
            away_s, breaker = now - host.away_since, host.breakers[agent_id]
            left_s = max(0.0, breaker.opened + breaker.cool_down_s - now)
            out.append(AwayNews(host_id, agent_id, partition, away_s, left_s, wait_s))
        state = self._board.get(partition)
        if state is not None and state.take_back(agent_id, host_id):
            self._settle(state, out)
        return self._advance(out, now)

    def heard(self, host_id: str, now: float) -> None:
        """A host has made progress on something that it works on."""
        host = self._hosts.get(host_id)
        if host is not None:
            host.heard(now)

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
        state = self._board.close(partition)
        if state is not None:
            self._waiting.closed(state)
        self._hosts.compare(agreement or {})
        return self._advance([], now)

    def tick(self, now: float) -> list[Instruction]:
        """Time has passed: who has been silent for too long, who may be probed, who copied."""
        out: list[Instruction] = []
        for host in self._hosts:
            if not host.sent:
                continue
            if host.hung and now - host.hung_since < _RESTART_AGAIN_S:
                continue
            silent_s = host.silent_s(now)
            if silent_s <= host.max_silent_s(self._rules.timeout_s):
                continue
            host.hung, host.hung_since = True, now
            self._update(host, now)
            index, agent_id = next(host.begun)
            out.append(Restart(host.host_id, agent_id, index, silent_s))
        return self._advance(out, now)

    # Questions

    @property
    def done(self) -> bool:
        """Every partition of the plan is merged."""
        return self._board.is_exhausted and not self._board.open

    def in_flight(self, host_id: str) -> int:
        """Partitions sent to the host that it has not answered, each agent's counted."""
        host = self._hosts.get(host_id)
        return len(host.sent) if host else 0

    def given_up(self, partition: int, agent_id: str) -> bool:
        """Whether the agent will not be asked about the partition any more."""
        state = self._board.get(partition)
        return state is not None and agent_id in state.given_up

    def awaits(self, partition: int, agent_id: str) -> bool:
        """Whether the agent's answers to the partition would be news."""
        if agent_id not in self._samples:
            return False  # late: it was asked in an earlier pass of the run
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
        """Agents without a host, where an open partition cannot do without them."""
        served = self._hosts.served()
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
        away = {agent_id for agent_id in self._samples if self._hosts.is_away(agent_id)}
        waited = {agent_id: self._hosts.overdue_s(agent_id, now) for agent_id in sorted(away)}
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
            and not self._hosts.is_away(agent_id)  # its time is `overdue`'s
            and (count >= _MAX_GIVEN_UP or self._is_idle(agent_id))
        }

    # Trust: is an agent's failure on a partition the partition's fault?

    def _is_trusted(self, agent_id: str) -> bool:
        """Whether the agent has answered, and does not fail at every host now."""
        return agent_id in self._proven and not self._hosts.is_failing(agent_id)

    def _is_in_doubt(self, agent_id: str) -> bool:
        """Whether what the agent is asked next will tell more about its failures."""
        if not self._is_trusted(agent_id):
            return True
        return self._hosts.is_in_streak(agent_id) and not self._is_idle(agent_id)

    def _is_idle(self, agent_id: str) -> bool:
        """Whether the agent has hosts, and nothing is left that they could be asked for it."""
        hosts = self._hosts.of(agent_id).values()
        if not hosts or any(task[1] == agent_id for host in hosts for task in host.sent):
            return False
        return not self._waiting.has(agent_id)

    def _settle_withheld(self, out: list[Instruction]) -> None:
        """See whether partitions that only an agent's trouble held up can be merged by now."""
        withheld, self._withheld = sorted(self._withheld), set()
        for index in withheld:
            state = self._board.get(index)
            if state is not None:
                self._settle(state, out)

    def _breakers_changed(self, host: Host, agents: Iterable[str], out: list[Instruction]) -> None:
        for agent_id in agents:
            breaker = host.breakers[agent_id]
            news = (str(breaker.state), breaker.num_failures, breaker.cool_down_s)
            out.append(BreakerNews(host.host_id, agent_id, *news))
            if breaker.state is BreakerState.CLOSED:
                self._pardon(agent_id, out)

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
                self._waiting.add(state)
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
        """A host died at the partition. Asked carefully, a record can be at fault for two."""
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
        self._hosts.share_out(self._board.num_left, now)
        self._hosts.update_broken(now)
        self._set_aside(now)
        self._place(out, now)
        while self._set_aside(now):
            self._place(out, now)
        self._settle_withheld(out)
        if self._rules.speculate and self._board.is_exhausted:
            self._place_copies(out, now)
        return out

    def _place(self, out: list[Instruction], now: float) -> None:
        waits: set[int] = set()  # for a better host that is busy
        while (found := self._waiting.first(waits)) is not None:
            state, candidates = found
            if not self._ask(state, candidates, out, now):
                waits.add(state.index)

    def _set_aside(self, now: float) -> bool:
        return self._hosts.set_aside(self._waiting.alone(), now)

    def _update(self, host: Host, now: float) -> None:
        self._hosts.update(host, now)
        if host.paused or host.hung or not all(map(host.is_closed, host.agents)):
            self._waiting.leave(host.host_id)

    def _open_more(self, out: list[Instruction]) -> None:
        while not self._board.is_exhausted and (
            len(self._board.open) < self._hosts.max_open or self._is_held_up()
        ):
            state = self._board.pull()
            if state is not None:
                self._settle(state, out)

    def _is_held_up(self) -> bool:
        """Whether what is open waits for an agent whose server is away, and others are idle."""
        away = {agent_id for agent_id in self._samples if self._hosts.is_away(agent_id)}
        if not away or len(self._board.open) >= _MAX_OPEN_WHILE_AWAY:
            return False
        return any(
            self._hosts.free(agent_id) and not self._waiting.has(agent_id)
            for agent_id in self._samples.keys() - away
        )

    def _see_the_end(self, now: float) -> None:
        """Let nothing wait at a host that is busy once as few wait as hosts work on at once."""
        if not self._board.is_exhausted or self._num_asks < self._count_again_at:
            return
        num_waiting = sum(state.lacks > 0 for state in self._board)
        too_many = num_waiting - self._hosts.concurrent
        self._hosts.allow_waiting(too_many > 0, now)
        # With each ask at most one partition fewer waits: before, there is nothing to count anew.
        self._count_again_at = self._num_asks + max(1, abs(too_many))

    def _ask(
        self,
        state: OpenPartition,
        candidates: Sequence[Candidate],
        out: list[Instruction],
        now: float,
        purpose: str | None = None,
    ) -> bool:
        """Let the policy choose, and send; False if it would rather wait."""
        views = tuple(self._hosts.view(host, agent_id) for host, agent_id in candidates)
        busy = self._busy(state) if purpose is None else ()
        partition = PartitionView(state.index, state.tokens, state.num_asks, busy)
        choice = self._policy.choose(partition, views)
        if choice is None and busy:
            return False
        chosen = choice or views[0]
        host, agent_id = self._hosts.get(chosen.host_id), chosen.agent_id
        assert host is not None
        num_capable = sum(len(self._hosts.of(a)) for a in state.wanted | {agent_id})
        looked = state.num_undecided is not None
        purpose = purpose or _purpose(state, host, agent_id)
        ask = Ask(
            partition=state.index,
            agent_id=agent_id,
            host_id=host.host_id,
            attempt=state.failures[agent_id] + state.deaths[agent_id] + 1,
            purpose=purpose,
            earlier=self._by_rank(state.answered) if looked else (),
            candidates=views,
            num_busy=max(0, num_capable - len(views)),
        )
        state.asked.setdefault(agent_id, []).append(host.host_id)
        state.num_asks += 1
        self._num_asks += 1
        tokens = state.tokens * self._samples[agent_id]
        host.send((state.index, agent_id), tokens, now, alone=purpose == "careful")
        self._hosts.update(host, now)
        self._waiting.sent(state, host)
        out.append(ask)
        return True

    def _busy(self, state: OpenPartition) -> tuple[HostView, ...]:
        """Hosts that are not free now and can be expected to be: something is in flight."""
        if not self._policy_waits:
            return ()
        return tuple(
            self._hosts.view(host, agent_id)
            for agent_id in self._by_rank(state.wanted)
            for host in self._hosts.of(agent_id).values()
            if host.sent
            and host.host_id not in self._hosts.free(agent_id)
            and host.is_closed(agent_id)
            and not (host.paused or host.hung)
        )

    def _place_copies(self, out: list[Instruction], now: float) -> None:
        """Nothing is left to place: let who is idle overtake who is slow."""
        idle = [
            (host, agent_id)
            for agent_id in self._samples
            for host in self._hosts.free(agent_id).values()
            if host.has_idle_slot and host.is_closed(agent_id) and not host.set_aside
        ]
        if not idle or now < self._next_look:
            return
        rates = self._hosts.mean_rates()
        late = latest_first(self._in_flight(), rates, now)
        if len(late) > _MANY:
            self._next_look = now + _LOOK_S * len(late)
        for host, agent_id in idle:
            allowed = (task for task in late if self._may_copy(host, agent_id, task))
            for task in islice(allowed, _COPIES_CONSIDERED):
                if not host.has_idle_slot or host.host_id not in self._hosts.free(agent_id):
                    break  # it has been given enough
                if is_worth_it(host, agent_id, task, rates, self._samples):
                    state = self._board.open[task.partition]
                    state.copied.add(task.agent_id)
                    state.overtaken |= agent_id != task.agent_id
                    self._ask(state, [(host, agent_id)], out, now, purpose="copy")

    def _in_flight(self) -> Iterator[tuple[Task, Host]]:
        for state in self._board:
            for agent_id, host_ids in state.asked.items():
                host = self._hosts.get(host_ids[0])
                if host is not None:
                    yield (state.index, agent_id), host

    def _may_copy(self, free: Host, agent_id: str, task: Late) -> bool:
        """Whether the agent's answers would do: one copy of a task, careful ones never.

        Of the same agent; and where not every agent has to answer, and the partition has no
        order of agents, of another that gives no more answers.
        """
        state = self._board.open[task.partition]
        if task.agent_id in state.copied or state.deaths[task.agent_id] or task.busy is free:
            return False
        if agent_id == task.agent_id:
            return True
        return (
            self._rules.first is None
            and state.order is None
            and agent_id in state.untried
            and not state.deaths[agent_id]
            and self._samples[agent_id] >= self._samples[task.agent_id]
        )


def _purpose(state: OpenPartition, host: Host, agent_id: str) -> str:
    if state.deaths[agent_id]:
        return "careful"
    if host.breakers[agent_id].state is BreakerState.OPEN:
        return "probe"
    return "retry" if state.failures[agent_id] else "answer"
