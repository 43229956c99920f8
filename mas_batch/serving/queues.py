"""The agents' queues: which replica takes which parts, and what follows a failure. Knows no Dask.

There is one queue per agent, and a replica takes a batch of it when it is free. A part is not bound
to a replica before, so it never waits at a slow replica while another is idle, and a waiting part
can be withdrawn. Everything runs on one event loop.
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

from mas_batch.errors import EngineUnavailableError, MasBatchError, Reason
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
"""Workers that must die at one text until the text is blamed; the first may die by chance."""

_ANY = PartitionView(0, 1)  # replicas of one agent are compared by their speed alone

Call = Callable[[str, str, Sequence[Record]], Awaitable["Answered"]]
"""(replica, agent, records) → the answers. OSError: the replica is dead or out of reach."""


class AgentQueues:
    """The agents' replicas and the parts that wait for them.

    Args:
        agents: the agents that may be asked.
        rules: the job's, with a window of 1: a replica has begun whatever it was sent.
        call: asks a replica.
        suspect: called with (replica, whether it hangs) when a replica did not answer as it
            should; the replica is asked nothing further until it has `joined` again.
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

    # News of replicas from the cluster

    def joined(self, address: str, agent_id: str, *, paused: bool) -> None:
        """Note that a worker holds the agent's model."""
        self._pool.add(address, agent_id, self._now(), paused=paused)
        self._send_waiting(agent_id)

    def paused(self, address: str, paused: bool) -> None:
        """Note that a worker is paused, and takes no further batch, or works again."""
        replica = self._pool.get(address)
        if replica is not None:
            replica.paused = paused
            self._pool.update(replica, self._now())
            self._send_waiting(replica.agent_id)

    def left(self, address: str) -> None:
        """Note that a worker is gone; its parts are asked again."""
        replica = self._pool.remove(address)
        if replica is not None:
            if send := self._sends.get(address):
                send.cancel()
            self._send_waiting(replica.agent_id)

    def tick(self) -> None:
        """Let replicas that failed be tried again when it is time; call it every second."""
        self._pool.update_broken(self._now())
        for agent_id in self._backlogs:
            self._send_waiting(agent_id)

    def is_served(self, agent_id: str) -> bool:
        """Whether a replica of the agent is at work or can be asked."""
        return bool(self._pool.free(agent_id)) or any(
            replica.sent for replica in self._pool.of(agent_id).values()
        )

    def awaited(self, agent_id: str) -> str:
        """Return what is known of the agent's server if it is away, else nothing."""
        if not self._pool.is_away(agent_id):
            return ""
        return next(replica.away_message for replica in self._pool.of(agent_id).values())

    def views(self, agent_id: str) -> Iterator[ReplicaView]:
        """Yield the agent's replicas as a policy sees them; `in_flight` counts questions here."""
        replicas = self._pool.of(agent_id)
        waiting = len(self._backlogs[agent_id]) / max(1, len(replicas))
        for replica in replicas.values():
            if not replica.paused and replica.breaker.state is BreakerState.CLOSED:
                in_flight = math.ceil(self._num_in_flight(replica) + waiting)
                yield replace(self._pool.view(replica), in_flight=in_flight)

    # Parts of questions

    def submit(self, part: AgentPart) -> None:
        """Let the part wait for a replica; its `on_settled` is called when it has an outcome."""
        self._backlogs[part.agent_id].add(part, self._now())
        self._send_waiting(part.agent_id)

    def hedge(self, part: AgentPart) -> bool:
        """Ask another replica too, if a healthy one is there; returns whether it will be asked."""
        others = self._pool.has_healthy(part.agent_id, besides=part.tried)
        if not (others and part.at and self._backlogs[part.agent_id].add_again(part)):
            return False
        self._send_waiting(part.agent_id)
        return True

    def withdraw(self, part: AgentPart) -> None:
        """Drop a part that is no longer needed; a replica that works on it finishes unheard."""
        self._settle(part, Outcome(), counts=False)

    def late_s(self, agent_id: str) -> float | None:
        """Return after how many seconds the agent's answer is late; None: too few are known."""
        return self._meters[agent_id].latency.late_s

    def stats(self) -> dict[str, AgentStats]:
        """Return the state and the measurements of every agent."""
        return {
            name: meter.stats(
                num_replicas=sum(1 for _ in self.views(name)),
                waiting=len(self._backlogs[name]),
                in_flight=sum(map(self._num_in_flight, self._pool.of(name).values())),
            )
            for name, meter in self._meters.items()
        }

    def close(self) -> None:
        """Ask no replica any more, and cancel the calls under way."""
        for timer in self._timers.values():
            timer.cancel()
        for send in self._sends.values():
            send.cancel()

    def _num_in_flight(self, replica: Replica) -> int:
        return len(self._at_work.get(replica.replica_id, ()))

    # Sending

    def _send_waiting(self, agent_id: str) -> None:
        """Send the agent's waiting parts to its free replicas."""
        self._settle_hopeless(agent_id)
        backlog, free = self._backlogs[agent_id], dict(self._pool.free(agent_id))
        while free:
            views = tuple(map(self._pool.view, free.values()))
            replica = free.pop(self._fastest.choose(_ANY, views).replica_id)
            if batch := backlog.take(replica.replica_id, self._now()):
                self._begin_send(replica, batch)
            elif not backlog.is_for_some_only:
                break
        self._wake_when_due(agent_id)

    def _wake_when_due(self, agent_id: str) -> None:
        due = self._backlogs[agent_id].due
        if timer := self._timers.pop(agent_id, None):
            timer.cancel()
        if self._now() < due < math.inf:
            loop = asyncio.get_running_loop()
            self._timers[agent_id] = loop.call_at(due, self._send_waiting, agent_id)

    def _begin_send(self, replica: Replica, parts: list[AgentPart]) -> None:
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
        """Ask the replica; settle the parts, or let them wait for another replica."""
        sent, address = self._now(), replica.replica_id
        # A text that several callers ask about at the same time is sent once.
        records = {part.record.record_id: part.record for part in parts}
        works = False
        away: EngineUnavailableError | None = None
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
                raise  # `close` has cancelled this call
            self._died(address, parts, "its worker left the cluster")
        except EngineUnavailableError as error:
            away = error
            self._put_off(address, parts)
        except Exception as error:
            message = str(error) if isinstance(error, MasBatchError) else repr(error)
            self._failed(address, parts, Reason.AGENT_FAILED, message)
        finally:
            self._sends.pop(address, None)
            self._at_work.pop(address, None)
        if works:
            replica.answered(number, self._now())
        elif away is not None:
            replica.away(number, self._now(), away.retry_after_s, math.inf)
            replica.away_message = away.message
        else:
            replica.failed(number, self._now())
        if self._pool.get(address) is replica:
            self._pool.update(replica, self._now())
        self._send_waiting(replica.agent_id)

    # Outcomes

    def _answered(
        self, address: str, parts: Sequence[AgentPart], answered: Answered, sent: float
    ) -> bool:
        """Settle the parts by their answers; returns whether the engine answered any of them."""
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
        """Let each part wait for a healthy replica that has not tried it, else settle it."""
        for part in parts:
            if not part.leave(address):
                continue  # another replica still works on it, or it is settled
            if self._pool.has_healthy(part.agent_id, besides=part.tried):
                self._backlogs[part.agent_id].add_again(part)
            else:
                self._fail(part, reason, message)

    def _put_off(self, address: str, parts: Sequence[AgentPart]) -> None:
        """Let each part wait for its agent's server; the question's timeout bounds that."""
        for part in parts:
            part.tried.discard(address)
            if part.leave(address):
                self._backlogs[part.agent_id].add_again(part)

    def _died(self, address: str, parts: Sequence[AgentPart], message: str) -> None:
        """Ask again, each part alone, in case one of them killed the worker."""
        for part in parts:
            part.num_deaths += 1
            part.tried.discard(address)  # perhaps only the connection was lost
            if not part.leave(address):
                continue
            if part.num_deaths < _MAX_DEATHS:
                self._backlogs[part.agent_id].add_again(part)
            else:
                self._fail(part, Reason.WORKER_DIED, f"twice: {message}")

    def _settle_hopeless(self, agent_id: str) -> None:
        """Settle parts that have failed at every replica, and all if every replica is failing."""
        backlog = self._backlogs[agent_id]
        for part in backlog.take_hopeless(self._pool.of(agent_id).keys()):
            if not part.at:  # else a replica still works on it, and only its copy is dropped
                self._fail(part, Reason.AGENT_FAILED, "it failed at every worker of the agent")
        is_failing = self._pool.is_failing(agent_id) and not self._pool.is_away(agent_id)
        if is_failing and not self.is_served(agent_id):
            for part in backlog:
                self._fail(part, Reason.AGENT_FAILED, "every worker of the agent is failing")

    def _fail(self, part: AgentPart, reason: Reason, message: str) -> None:
        self._settle(part, Outcome(failure=part.failure(reason, message), heard=self._now()))

    def _settle(self, part: AgentPart, outcome: Outcome, *, counts: bool = True) -> None:
        if part.outcome is not None:
            return  # a copy of the part was faster, or the question is answered without it
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
