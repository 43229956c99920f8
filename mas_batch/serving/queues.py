"""The agents' queues: which host takes which parts, and what follows a failure. Knows no Dask.

There is one queue per agent. A host takes a batch of one of its agents' queues when it is free: it
works on several batches at once. A part is not bound to a host before, so it never waits at a slow
host while another is idle, and a waiting part can be withdrawn. A part at which a host died is
asked alone, with nothing beside it at its host, so that the next death has one suspect. Everything
runs on one event loop.
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING

from mas_batch.errors import EngineUnavailableError, MasBatchError, Reason
from mas_batch.job import Agent
from mas_batch.records import Answer, Record
from mas_batch.routing.host import Host, Task
from mas_batch.routing.hosts import Hosts
from mas_batch.routing.instructions import Rules
from mas_batch.routing.policies import HostView, PartitionView, Throughput
from mas_batch.serving.backlog import Backlog
from mas_batch.serving.measure import AgentMeter, AgentStats
from mas_batch.serving.parts import AgentPart, Outcome, outcome_of

if TYPE_CHECKING:
    from mas_batch.agents.texts import Answered

_MAX_DEATHS = 2
"""Hosts that must die at one text until the text is blamed; the first may die of another one."""

_ANY = PartitionView(0, 1)  # hosts of one agent are compared by their speed alone

Call = Callable[[str, str, Sequence[Record]], Awaitable["Answered"]]
"""(host, agent, records) → the answers. OSError: the host is dead or out of reach."""


@dataclass(slots=True)
class _Send:
    """A batch that a host works on."""

    agent_id: str
    parts: list[AgentPart]
    call: asyncio.Task[None] | None = None
    limit: asyncio.Timeout | None = None
    """Until when the host must have answered something; None: the call has not begun."""


class AgentQueues:
    """The agents' hosts and the parts that wait for them.

    Args:
        agents: the agents that may be asked.
        rules: the job's; without a window: a host is sent what it begins at once.
        call: asks a host.
        suspect: called with (host, whether it hangs) when a host did not answer as it should; the
            host is asked nothing further until it has `joined` again.
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
        samples = {agent.name: agent.samples for agent in agents}
        # All that waits can be withdrawn, and of a dead host all that it was sent is suspect.
        self._hosts = Hosts(samples, rules, may_wait=False)
        self._backlogs = {name: Backlog(max_batch, max_wait_s) for name in names}
        self._meters = {name: AgentMeter() for name in names}
        self._sends: dict[str, dict[Task, _Send]] = defaultdict(dict)  # by host
        self._timers: dict[str, asyncio.TimerHandle] = {}  # by agent
        self._fastest = Throughput()
        self._numbers = count()
        self._submitted: dict[str, None] = {}  # agents that have new parts, in order
        self._flush: asyncio.Handle | None = None

    # News of hosts from the cluster

    def joined(self, host_id: str, agents: Sequence[str], concurrent: int, *, paused: bool) -> None:
        """Note that a host answers for these agents, so many batches at once."""
        self._hosts.add(host_id, agents, self._now(), concurrent=concurrent, paused=paused)
        self._send_waiting()

    def paused(self, host_id: str, paused: bool) -> None:
        """Note that a host is paused, and takes no further batch, or works again."""
        host = self._hosts.get(host_id)
        if host is not None:
            host.paused = paused
            self._hosts.update(host, self._now())
            self._send_waiting()

    def left(self, host_id: str) -> None:
        """Note that a host is gone; its parts are asked again."""
        if self._hosts.remove(host_id) is not None:
            self._cancel(host_id)
            self._send_waiting()

    def tick(self) -> None:
        """Let hosts that failed be tried again when it is time; call it every second."""
        self._hosts.update_broken(self._now())
        self._send_waiting()

    def is_served(self, agent_id: str) -> bool:
        """Whether a host of the agent is at work or can be asked."""
        return bool(self._hosts.free(agent_id)) or any(
            host.sent for host in self._hosts.of(agent_id).values()
        )

    def awaited(self, agent_id: str) -> str:
        """Return what is known of the agent's server if it is away, else nothing."""
        if not self._hosts.is_away(agent_id):
            return ""
        return next(host.away_message for host in self._hosts.of(agent_id).values())

    def views(self, agent_id: str) -> Iterator[HostView]:
        """Yield the agent's hosts as a policy sees them; `in_flight` counts questions here."""
        hosts = self._hosts.of(agent_id)
        waiting = len(self._backlogs[agent_id]) / max(1, len(hosts))
        for host in hosts.values():
            if not host.paused and host.is_closed(agent_id):
                at_work = sum(len(send.parts) for send in self._at(host.host_id))
                in_flight = math.ceil(at_work + waiting)
                yield replace(self._hosts.view(host, agent_id), in_flight=in_flight)

    # Parts of questions

    def submit(self, part: AgentPart) -> None:
        """Let the part wait for a host; its `on_settled` is called when it has an outcome."""
        self._backlogs[part.agent_id].add(part, self._now())
        # Not at once: what is asked in the same moment, as those do whose batch has just been
        # answered, makes one batch; else the first of them would go alone.
        if not self._submitted:
            self._flush = asyncio.get_running_loop().call_soon(self._send_submitted)
        self._submitted[part.agent_id] = None

    def _send_submitted(self) -> None:
        agents, self._submitted = [*self._submitted], {}
        self._send_waiting(agents)

    def hedge(self, part: AgentPart) -> bool:
        """Ask another host too, if a healthy one is there; returns whether it will be asked."""
        others = self._hosts.has_healthy(part.agent_id, besides=part.tried)
        if not (others and part.at and self._backlogs[part.agent_id].add_again(part)):
            return False
        self._send_waiting([part.agent_id])
        return True

    def withdraw(self, part: AgentPart) -> None:
        """Drop a part that is no longer needed; a host that works on it finishes unheard."""
        self._settle(part, Outcome(), counts=False)

    def late_s(self, agent_id: str) -> float | None:
        """Return after how many seconds the agent's answer is late; None: too few are known."""
        return self._meters[agent_id].latency.late_s

    def stats(self) -> dict[str, AgentStats]:
        """Return the state and the measurements of every agent."""
        return {
            name: meter.stats(
                num_hosts=sum(1 for _ in self.views(name)),
                waiting=len(self._backlogs[name]),
                in_flight=sum(
                    len(send.parts)
                    for host_id in self._hosts.of(name)
                    for send in self._at(host_id)
                    if send.agent_id == name
                ),
            )
            for name, meter in self._meters.items()
        }

    def close(self) -> None:
        """Ask no host any more, and cancel the calls under way."""
        for timer in self._timers.values():
            timer.cancel()
        if self._flush is not None:
            self._flush.cancel()
        for host_id in list(self._sends):
            self._cancel(host_id)

    def _at(self, host_id: str) -> Iterable[_Send]:
        return self._sends.get(host_id, {}).values()

    def _cancel(self, host_id: str, besides: Task | None = None) -> None:
        for task, send in self._sends.get(host_id, {}).items():
            if task != besides and send.call is not None:
                send.call.cancel()

    # Sending

    def _send_waiting(self, agents: Sequence[str] = ()) -> None:
        """Send waiting parts to free hosts: of these agents, in this order, or of all."""
        agents = agents or tuple(self._backlogs)
        for agent_id in agents:
            self._settle_hopeless(agent_id)
        while True:
            for agent_id in agents:
                self._send_waiting_of(agent_id)
            alone = [
                (part.agent_id, part.tried)
                for backlog in self._backlogs.values()
                for part in backlog.alone()
            ]
            if not self._hosts.set_aside(alone, self._now()):
                break
        for agent_id in agents:
            self._wake_when_due(agent_id)

    def _send_waiting_of(self, agent_id: str) -> None:
        backlog, free = self._backlogs[agent_id], dict(self._hosts.free(agent_id))
        while free:
            views = tuple(self._hosts.view(host, agent_id) for host in free.values())
            host_id = self._fastest.choose(_ANY, views).host_id
            host = free[host_id]
            batch = backlog.take(
                host_id,
                self._now(),
                num_free=len(free),
                idle=not host.sent,
                only_alone=host.set_aside,
            )
            if batch:
                self._begin_send(host, agent_id, batch)
            elif not (backlog.is_for_some_only or host.set_aside):
                break
            if not batch or host_id not in self._hosts.free(agent_id):
                del free[host_id]

    def _wake_when_due(self, agent_id: str) -> None:
        due = self._backlogs[agent_id].due
        if timer := self._timers.pop(agent_id, None):
            timer.cancel()
        if self._now() < due < math.inf:
            loop = asyncio.get_running_loop()
            self._timers[agent_id] = loop.call_at(due, self._send_waiting, [agent_id])

    def _begin_send(self, host: Host, agent_id: str, parts: list[AgentPart]) -> None:
        task = (next(self._numbers), agent_id)
        alone = any(part.num_deaths for part in parts)
        host.send(task, sum(part.tokens for part in parts), self._now(), alone=alone)
        self._hosts.update(host, self._now())
        self._meters[agent_id].batch_sizes[len(parts)] += 1
        for part in parts:
            part.tried.add(host.host_id)
            part.at.add(host.host_id)
        send = self._sends[host.host_id][task] = _Send(agent_id, parts)
        send.call = asyncio.create_task(self._send(host, task, parts))

    async def _send(self, host: Host, task: Task, parts: Sequence[AgentPart]) -> None:
        """Ask the host; settle the parts, or let them wait for another host."""
        sent, host_id, agent_id = self._now(), host.host_id, task[1]
        # A text that several callers ask about at the same time is sent once.
        records = {part.record.record_id: part.record for part in parts}
        works = False
        away: EngineUnavailableError | None = None
        limit = asyncio.timeout(host.max_silent_s(self._rules.timeout_s))
        try:
            async with limit:
                self._sends[host_id][task].limit = limit
                answered = await self._call(host_id, agent_id, [*records.values()])
            works = self._answered(host_id, parts, answered, sent)
        except OSError as error:
            if self._hosts.get(host_id) is host:
                self._suspect(host_id, limit.expired())
                self._hosts.remove(host_id)
                self._cancel(host_id, besides=task)  # all that it was at counts one death
            why = "hung" if limit.expired() else "was lost"
            self._died(host_id, parts, f"its worker {why}: {error}" if str(error) else why)
        except asyncio.CancelledError:
            if self._hosts.get(host_id) is host:
                raise  # `close` has cancelled this call
            self._died(host_id, parts, "its worker left the cluster")
        except EngineUnavailableError as error:
            away = error
            self._put_off(host_id, parts)
        except Exception as error:
            message = str(error) if isinstance(error, MasBatchError) else repr(error)
            self._failed(host_id, parts, Reason.AGENT_FAILED, message)
        finally:
            self._sends[host_id].pop(task, None)
            if not self._sends[host_id]:
                del self._sends[host_id]
        self._heard(host)
        if works:
            host.answered(task, self._now())
        elif away is not None:
            host.away(task, self._now(), away.retry_after_s, math.inf)
            host.away_message = away.message
        else:
            host.failed(task, self._now())
        if self._hosts.get(host_id) is host:
            self._hosts.update(host, self._now())
        # Each agent has its turn: the one that was served now comes last.
        turn = host.agents.index(agent_id) + 1
        self._send_waiting([*host.agents[turn:], *host.agents[:turn]])

    def _heard(self, host: Host) -> None:
        """Note a sign of life: what the host works on may take so much longer."""
        until = self._now() + host.max_silent_s(self._rules.timeout_s)
        for send in self._at(host.host_id):
            if send.limit is not None and not send.limit.expired():
                send.limit.reschedule(until)

    # Outcomes

    def _answered(
        self, host_id: str, parts: Sequence[AgentPart], answered: Answered, sent: float
    ) -> bool:
        """Settle the parts by their answers; returns whether the engine answered any of them."""
        heard, works = self._now(), False
        by_record: defaultdict[str, list[Answer]] = defaultdict(list)
        for answer in answered.answers:
            by_record[answer.record_id].append(answer)
        for part in parts:
            outcome = outcome_of(part, by_record[part.record.record_id], answered, sent, heard)
            if (reason := outcome.engine_failure) is not None and outcome.failure is not None:
                self._failed(host_id, [part], reason, outcome.failure.message)
                continue
            works = True
            part.leave(host_id)
            self._settle(part, outcome)
        return works

    def _failed(
        self, host_id: str, parts: Sequence[AgentPart], reason: Reason, message: str
    ) -> None:
        """Let each part wait for a healthy host that has not tried it, else settle it."""
        for part in parts:
            if not part.leave(host_id):
                continue  # another host still works on it, or it is settled
            if self._hosts.has_healthy(part.agent_id, besides=part.tried):
                self._backlogs[part.agent_id].add_again(part)
            else:
                self._fail(part, reason, message)

    def _put_off(self, host_id: str, parts: Sequence[AgentPart]) -> None:
        """Let each part wait for its agent's server; the question's timeout bounds that."""
        for part in parts:
            part.tried.discard(host_id)
            if part.leave(host_id):
                self._backlogs[part.agent_id].add_again(part)

    def _died(self, host_id: str, parts: Sequence[AgentPart], message: str) -> None:
        """Ask again, each part alone, in case one of them killed the worker."""
        for part in parts:
            part.num_deaths += 1
            part.tried.discard(host_id)  # perhaps only the connection was lost
            if not part.leave(host_id):
                continue
            if part.num_deaths < _MAX_DEATHS:
                self._backlogs[part.agent_id].add_again(part)
            else:
                self._fail(part, Reason.WORKER_DIED, f"twice: {message}")

    def _settle_hopeless(self, agent_id: str) -> None:
        """Settle parts that have failed at every host, and all if every host is failing."""
        backlog = self._backlogs[agent_id]
        for part in backlog.take_hopeless(self._hosts.of(agent_id).keys()):
            if not part.at:  # else a host still works on it, and only its copy is dropped
                self._fail(part, Reason.AGENT_FAILED, "it failed at every worker of the agent")
        is_failing = self._hosts.is_failing(agent_id) and not self._hosts.is_away(agent_id)
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
