"""Which replica takes what waits for its agent, and what happens when it fails. Knows no Dask.

One queue per agent, and a replica takes a batch of it when it is free: nothing is bound to a
replica before, so nothing waits at a slow one while another is idle, and what waits can be
withdrawn. Everything runs on one event loop.
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

from mas_batch.errors import MasBatchError, Reason
from mas_batch.job import Agent
from mas_batch.records import Answer, Record
from mas_batch.routing.instructions import Rules
from mas_batch.routing.policies import PartitionView, ReplicaView, Throughput
from mas_batch.routing.pool import Pool
from mas_batch.routing.replica import BreakerState, Replica
from mas_batch.serving.backlog import Backlog
from mas_batch.serving.measure import AgentMeter, AgentStats
from mas_batch.serving.parts import AgentPart, Outcome, outcome_of

if TYPE_CHECKING:
    from mas_batch.agents.texts import Answered

_MAX_DEATHS = 2
"""Workers that die at the same text before it is to blame; the first may have died by chance."""

_ANY = PartitionView(0, 1)  # replicas of one agent are compared by how fast they are

Call = Callable[[str, str, Sequence[Record]], Awaitable["Answered"]]
"""(replica, agent, records) → their answers. OSError: the replica is dead or out of reach."""


class AgentQueues:
    """The agents' replicas and what waits for them.

    Args:
        agents: who may be asked.
        rules: the job's, with a window of 1: what a replica has been sent, it has begun.
        call: asks a replica.
        suspect: called with a replica that did not answer as it should and whether it hangs;
            it gets nothing further until it has `joined` again.
        max_batch, max_wait_s: see `MicroBatcher`.
    """

    def __init__(
        self,
        agents: Sequence[Agent],
        rules: Rules,
        call: Call,
        suspect: Callable[[str, bool], None],
        *,
        max_batch: int,
        max_wait_s: float,
    ) -> None:
        self._rules = rules
        self._call = call
        self._suspect = suspect
        names = [agent.name for agent in agents]
        self._pool = Pool({agent.name: agent.samples for agent in agents}, rules)
        self._backlogs = {name: Backlog(max_batch, max_wait_s) for name in names}
        self._meters = {name: AgentMeter() for name in names}
        self._sends: dict[str, asyncio.Task[None]] = {}  # by replica
        self._at_work: dict[str, list[AgentPart]] = {}  # by replica
        self._timers: dict[str, asyncio.TimerHandle] = {}  # by agent
        self._fastest = Throughput()
        self._numbers = count()

    # Replicas, as the cluster tells

    def joined(self, address: str, agent_id: str, *, paused: bool) -> None:
        """A worker holds the agent's model."""
        self._pool.add(address, agent_id, self._now(), paused=paused)
        self._serve(agent_id)

    def paused(self, address: str, paused: bool) -> None:
        """A worker is to be asked nothing further, or again."""
        replica = self._pool.get(address)
        if replica is not None:
            replica.paused = paused
            self._pool.update(replica, self._now())
            self._serve(replica.agent_id)

    def left(self, address: str) -> None:
        """A worker is gone, and with it whatever it was at."""
        replica = self._pool.remove(address)
        if replica is not None:
            if send := self._sends.get(address):
                send.cancel()
            self._serve(replica.agent_id)

    def tick(self) -> None:
        """Look whether replicas that failed may be tried again; call it every second."""
        self._pool.update_broken(self._now())
        for agent_id in self._backlogs:
            self._serve(agent_id)

    def is_served(self, agent_id: str) -> bool:
        """Whether a replica of the agent is at work or can be asked."""
        return bool(self._pool.free(agent_id)) or any(
            replica.sent for replica in self._pool.of(agent_id).values()
        )

    def views(self, agent_id: str) -> Iterator[ReplicaView]:
        """Yield what a policy may know of the agent's replicas: questions, not partitions."""
        replicas = self._pool.of(agent_id)
        waiting = len(self._backlogs[agent_id]) / max(1, len(replicas))
        for replica in replicas.values():
            if not replica.paused and replica.breaker.state is BreakerState.CLOSED:
                in_flight = math.ceil(self._num_at(replica) + waiting)
                yield replace(self._pool.view(replica), in_flight=in_flight)

    # Parts of questions

    def submit(self, part: AgentPart) -> None:
        """Let the part wait for a replica; `on_settled` is called when something has come of it."""
        self._backlogs[part.agent_id].add(part, self._now())
        self._serve(part.agent_id)

    def hedge(self, part: AgentPart) -> bool:
        """Ask another replica too, if one that works is there; returns whether it will be."""
        others = self._pool.has_healthy(part.agent_id, besides=part.tried)
        if not (others and part.at and self._backlogs[part.agent_id].add_again(part)):
            return False
        self._serve(part.agent_id)
        return True

    def withdraw(self, part: AgentPart) -> None:
        """The part is not needed any more; whoever is at it finishes, and nobody hears."""
        self._settle(part, Outcome(), counts=False)

    def late_s(self, agent_id: str) -> float | None:
        """Return after how long the agent's answer is late; None: too few are known."""
        return self._meters[agent_id].latency.late_s

    def stats(self) -> dict[str, AgentStats]:
        """Return the state and the measurements of every agent."""
        return {
            name: meter.stats(
                num_replicas=sum(1 for _ in self.views(name)),
                waiting=len(self._backlogs[name]),
                in_flight=sum(map(self._num_at, self._pool.of(name).values())),
            )
            for name, meter in self._meters.items()
        }

    def close(self) -> None:
        """Ask nobody any more."""
        for timer in self._timers.values():
            timer.cancel()
        for send in self._sends.values():
            send.cancel()

    def _num_at(self, replica: Replica) -> int:
        return len(self._at_work.get(replica.replica_id, ()))

    # Sending

    def _serve(self, agent_id: str) -> None:
        """Give the agent's free replicas what waits."""
        self._give_up(agent_id)
        backlog, free = self._backlogs[agent_id], dict(self._pool.free(agent_id))
        while free:
            views = tuple(map(self._pool.view, free.values()))
            replica = free.pop(self._fastest.choose(_ANY, views).replica_id)
            if batch := backlog.take(replica.replica_id, self._now()):
                self._start(replica, batch)
            elif not backlog.is_for_some_only:
                break
        self._wake_when_due(agent_id)

    def _wake_when_due(self, agent_id: str) -> None:
        due = self._backlogs[agent_id].due
        if timer := self._timers.pop(agent_id, None):
            timer.cancel()
        if self._now() < due < math.inf:
            loop = asyncio.get_running_loop()
            self._timers[agent_id] = loop.call_at(due, self._serve, agent_id)

    def _start(self, replica: Replica, parts: list[AgentPart]) -> None:
        address = replica.replica_id
        number = next(self._numbers)
        replica.send(number, sum(part.tokens for part in parts), self._now())
        self._pool.update(replica, self._now())
        self._meters[replica.agent_id].batch_sizes[len(parts)] += 1
        self._at_work[address] = parts
        for part in parts:
            part.tried.add(address)
            part.at.add(address)
        self._sends[address] = asyncio.create_task(self._send(replica, number, parts))

    async def _send(self, replica: Replica, number: int, parts: Sequence[AgentPart]) -> None:
        """Ask the replica and settle the parts, or see to it that somebody else does."""
        sent, address = self._now(), replica.replica_id
        # A text that several ask about at the same time is read once.
        records = {part.record.record_id: part.record for part in parts}
        works = False
        limit = asyncio.timeout(replica.max_silent_s(self._rules.timeout_s))
        try:
            async with limit:
                answered = await self._call(address, replica.agent_id, [*records.values()])
            works = self._answered(address, parts, answered, sent)
        except OSError as error:
            self._suspect(address, limit.expired())
            self._pool.remove(address)
            why = "hung" if limit.expired() else "was lost"
            self._died(address, parts, f"its worker {why}: {error}" if str(error) else why)
        except asyncio.CancelledError:
            if self._pool.get(address) is replica:
                raise  # it is we who leave
            self._died(address, parts, "its worker left the cluster")
        except Exception as error:
            message = str(error) if isinstance(error, MasBatchError) else repr(error)
            self._failed(address, parts, Reason.AGENT_FAILED, message)
        finally:
            self._sends.pop(address, None)
            self._at_work.pop(address, None)
        if works:
            replica.answered(number, self._now())
        else:
            replica.failed(number, self._now())
        if self._pool.get(address) is replica:
            self._pool.update(replica, self._now())
        self._serve(replica.agent_id)

    # What comes of it

    def _answered(
        self, address: str, parts: Sequence[AgentPart], answered: Answered, sent: float
    ) -> bool:
        """Settle the parts by their answers; returns whether the engine seems to work."""
        heard, works = self._now(), False
        by_record: defaultdict[str, list[Answer]] = defaultdict(list)
        for answer in answered.answers:
            by_record[answer.record_id].append(answer)
        for part in parts:
            outcome = outcome_of(part, by_record[part.record.record_id], answered, sent, heard)
            if (reason := outcome.engine_failure) is not None and outcome.failure is not None:
                self._failed(address, [part], reason, outcome.failure.message)
                continue
            works = True
            part.leave(address)
            self._settle(part, outcome)
        return works

    def _failed(
        self, address: str, parts: Sequence[AgentPart], reason: Reason, message: str
    ) -> None:
        """Ask a replica that has not failed at it, if there is one, else settle."""
        for part in parts:
            if not part.leave(address):
                continue  # a copy is still under way, or nobody waits
            if self._pool.has_healthy(part.agent_id, besides=part.tried):
                self._backlogs[part.agent_id].add_again(part)
            else:
                self._fail(part, reason, message)

    def _died(self, address: str, parts: Sequence[AgentPart], message: str) -> None:
        """Ask again, each part alone: if one of them is to blame, not with its neighbours."""
        for part in parts:
            part.num_deaths += 1
            part.tried.discard(address)  # it may only be the connection that is lost
            if not part.leave(address):
                continue
            if part.num_deaths < _MAX_DEATHS:
                self._backlogs[part.agent_id].add_again(part)
            else:
                self._fail(part, Reason.WORKER_DIED, f"twice: {message}")

    def _give_up(self, agent_id: str) -> None:
        """Settle what has failed at every replica that is left, or waits where all are failing."""
        backlog = self._backlogs[agent_id]
        for part in backlog.take_hopeless(self._pool.of(agent_id).keys()):
            if not part.at:  # else it was a copy, and there is nobody for it
                self._fail(part, Reason.AGENT_FAILED, "it failed at every worker of the agent")
        if self._pool.is_failing(agent_id) and not self.is_served(agent_id):
            for part in backlog:
                self._fail(part, Reason.AGENT_FAILED, "every worker of the agent is failing")

    def _fail(self, part: AgentPart, reason: Reason, message: str) -> None:
        self._settle(part, Outcome(failure=part.failure(reason, message), heard=self._now()))

    def _settle(self, part: AgentPart, outcome: Outcome, *, counts: bool = True) -> None:
        if part.outcome is not None:
            return  # its copy was faster, or the question is answered without it
        part.outcome = outcome
        self._backlogs[part.agent_id].discard(part)
        if counts:
            meter = self._meters[part.agent_id]
            meter.num_answered += bool(outcome.answers)
            meter.num_failed += not outcome.answers
            if outcome.answers:
                meter.latency.note(outcome.heard - part.asked)
            part.on_settled(part)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
