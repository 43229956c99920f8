"""The dispatcher's thin shell: instructions become Dask tasks, Dask's news becomes events.

A task reports its facts by `Worker.log_event`, not by its result. Gathering even a small
result from a worker that is dying or paused can hang, and such a gather takes the innocent
ones of its batch with it; an event needs no answer. Futures only tell of failure. All news
is posted to one inbox, and one thread (the caller's) owns the dispatcher.
"""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import dask
from distributed import Client, Future

from mas_batch.agents.host import Report
from mas_batch.agents.spec import AgentSpec
from mas_batch.agents.work import answer_partition, merge_partition
from mas_batch.errors import JobError, OutputError, RunError, VersionError
from mas_batch.events import (
    AnswerFailed,
    BreakerChanged,
    Emit,
    HostsScaled,
    PartitionAnswered,
    PartitionAsked,
    PartitionMerged,
    PartitionUndecided,
    ServerAway,
)
from mas_batch.job import Job
from mas_batch.latency.times import TaskTimes
from mas_batch.routing.dispatcher import Dispatcher
from mas_batch.routing.hosting import Failure, Hosting, Loaded, watch
from mas_batch.routing.instructions import (
    Abandon,
    Ask,
    AwayNews,
    BreakerNews,
    Instruction,
    Merge,
    Restart,
)
from mas_batch.routing.policies import HostView
from mas_batch.routing.scaling import Bounds, Scaler, wanted_hosts
from mas_batch.routing.upkeep import Upkeep
from mas_batch.run_folder.names import answers_name
from mas_batch.run_folder.ref import RunRef
from mas_batch.task_call import TaskCall

_CHECK_EVERY_S = 1.0
_MAX_MERGE_ATTEMPTS = 3
_KEPT_CANDIDATES = 16
_MERGE_PATIENCE_S = 60.0
"""After so long a merge may be at a worker that hangs: it is sent again, next time after twice."""


@dataclass(frozen=True, slots=True)
class _Asked:
    ask: Ask
    future: Future
    sent: float
    """By `time.monotonic`."""


@dataclass(frozen=True, slots=True)
class _Merging:
    merge: Merge
    future: Future
    attempt: int
    sent: float
    patience_s: float = _MERGE_PATIENCE_S


class DaskRouter:
    """Hosts a run's agents on a cluster and runs one dispatcher to its end; a context manager.

    Args:
        client: connected; never closed here.
        job: says which worker may serve which agent.
        emit: called with every event, from the thread that calls `host` and `run`.
        check: called every second from the same thread; an error that it raises ends the run.
        scaler: starts and ends workers within the job's bounds; None: those there are.
    """

    def __init__(
        self,
        client: Client,
        job: Job,
        run: RunRef,
        specs: Mapping[str, AgentSpec],
        emit: Emit,
        *,
        check: Callable[[], None] = lambda: None,
        scaler: Scaler | None = None,
    ) -> None:
        self._client = client
        self._job = job
        self._run = run
        self._specs = specs
        self._emit = emit
        self._check = check
        self._scaler = scaler
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._hosting = Hosting(client, job, run, specs, emit, self._watch)
        self._asked: dict[tuple[int, str, str], _Asked] = {}  # …, worker address
        self._merges: dict[int, _Merging] = {}  # by partition
        self._dispatcher: Dispatcher | None = None
        self._last_check = 0.0
        self._upkeep = Upkeep(client)
        self._last_failure: dict[str, str] = {}
        self._wanted = {post.name: post.wanted for post in self._hosting.posts}

    def __enter__(self) -> DaskRouter:
        self._client.subscribe_topic(self._run.topic, self._on_report)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._client.status == "running":
            self._client.unsubscribe_topic(self._run.topic)
        self._hosting.close()
        for asked in self._asked.values():
            asked.future.release()
        for merging in self._merges.values():
            merging.future.release()

    @property
    def engine_facts(self) -> dict[str, dict[str, Any]]:
        """Agent → what its engine says of itself, for the manifest."""
        return self._hosting.engine_facts

    # The caller's side

    def host(self) -> None:
        """Load the agents' models; then enough agents are ready to answer every record.

        Raises:
            JobError: an agent has no capable worker.
            ModelError: no worker of an agent that is needed could load its model.
            RunError: an agent's workers left and none came back.
        """
        self._hosting.start()
        while self._needed_agents():
            self._handle_next()
            self._hosting.check_loaded(self._needed_agents())

    def _needed_agents(self) -> set[str]:
        """Agents without a worker, unless the others give answers enough."""
        unserved = self._hosting.unserved
        others = sum(a.samples for a in self._job.agents if a.name not in unserved)
        return unserved if others < self._job.answers_per_record else set()

    def run(self, dispatcher: Dispatcher) -> None:
        """Feed the dispatcher until every partition of its plan is merged.

        Raises:
            RunError: the scheduler is lost, an agent stays without workers or only fails, its
                server is away for too long, the output cannot be written, or a merge fails.
        """
        self._dispatcher = dispatcher
        self._hosting.listener = self
        dispatcher.expect(self._hosting.expected())
        for host_id in sorted(self._hosting.ready):
            self.joined(host_id, self._hosting.ready[host_id])
        while not dispatcher.done:
            self._handle_next()

    def _handle_next(self) -> None:
        """Handle one piece of news, and every now and then look around."""
        with suppress(queue.Empty):
            self._inbox.get(timeout=_CHECK_EVERY_S)()
        if time.monotonic() - self._last_check > _CHECK_EVERY_S:
            self._last_check = time.monotonic()
            self._look_around()

    def _look_around(self) -> None:
        self._check()
        # First what the workers still had to say: a death is blamed on what they were at last.
        with suppress(queue.Empty):
            while True:
                self._inbox.get_nowait()()
        self._hosting.refresh()
        self._upkeep()
        if self._dispatcher is None or self._dispatcher.done:
            self._keep_started()
            return
        self._dispatcher.expect(self._hosting.expected())
        self._act(self._dispatcher.tick(time.monotonic()))
        self._hurry_merges()
        self._scale(self._dispatcher)
        for agent_id, away_s in self._dispatcher.overdue(time.monotonic()).items():
            raise RunError(
                f"agent {agent_id!r} has waited {away_s:.0f} s for its server "
                f"(agents.options.wait_s): {self._last_failure[agent_id]}; "
                "start it and run the same command again: what is answered is kept"
            )
        for agent_id in sorted(self._dispatcher.distrusted_agents()):
            raise RunError(
                f"agent {agent_id!r} has failed on all that it was asked lately: "
                f"{self._last_failure.get(agent_id, 'its workers died')}; "
                "mend it and run the same command again: what is answered is kept"
            )
        no_workers = set() if self._hosting.ready or self._dispatcher.done else set(self._specs)
        missing = self._dispatcher.missing_agents() | no_workers
        self._hosting.give_up_waiting(missing)

    def _keep_started(self) -> None:
        """Have the hosts that the job starts with, also while engines are being loaded."""
        least = {post.name: post.wanted for post in self._hosting.posts}
        current = self._hosting.counts()
        if self._scaler is not None and any(current[post] < n for post, n in least.items()):
            self._scaler.scale(least, [])

    def _scale(self, dispatcher: Dispatcher) -> None:
        if self._scaler is None:
            return
        posts, of_agents = self._hosting.posts, dispatcher.backlog()
        bounds = {post.name: Bounds(post.wanted, post.most) for post in posts}
        backlog = {p.name: sum(of_agents.get(agent, 0) for agent in p.agents) for p in posts}
        current = self._hosting.counts()
        wanted = wanted_hosts(backlog, current, bounds)
        retired = self._hosting.retire(
            host_id
            for post, count in wanted.items()
            for host_id in self._idle(dispatcher, post)[: max(0, current[post] - count)]
        )
        changed = wanted != self._wanted
        if changed or retired:
            self._emit(HostsScaled(wanted, backlog))
        if changed or retired or any(current[post] < n for post, n in wanted.items()):
            self._scaler.scale(wanted, retired)  # also when one that was started is not there
        self._wanted = wanted

    def _idle(self, dispatcher: Dispatcher, post: str) -> list[str]:
        ready = self._hosting.ready_for(post)
        return [host_id for host_id in ready if dispatcher.in_flight(host_id) == 0]

    # News, from Dask's threads: only posts to the inbox

    def _on_report(self, event: Any) -> None:
        """Take a task's own report; see `agents.host.report`."""
        message = event[1]
        address, facts = message["worker"], json.loads(message["facts"])
        match message["task"]:
            case Report.LOADED:
                self._inbox.put(lambda: self._hosting.loaded(address, facts))
            case Report.ANSWERED:
                self._inbox.put(lambda: self._answered(address, facts))
            case Report.AWAY:
                self._inbox.put(lambda: self._away(address, **facts))
            case Report.ANSWERING:
                self._inbox.put(lambda: self._heard(address))
            case Report.MERGED:
                self._inbox.put(lambda: self._merged(address, facts))

    def _watch(self, future: Future, handle: Callable[[Failure], None]) -> None:
        """Call `handle` from the inbox when the task has ended, with its exception if it failed."""
        watch(future, handle, self._inbox.put)

    # What hosting tells

    def joined(self, host_id: str, loaded: Loaded) -> None:
        """A host can be asked."""
        if self._dispatcher is not None:
            self._act(
                self._dispatcher.host_joined(
                    host_id,
                    loaded.agents,
                    time.monotonic(),
                    concurrent=loaded.concurrent,
                    max_in_flight=loaded.max_in_flight,
                    paused=self._hosting.is_paused(host_id),
                )
            )

    def paused(self, host_id: str, paused: bool) -> None:
        """A host takes nothing further, or again."""
        if self._dispatcher is not None:
            self._act(self._dispatcher.host_paused(host_id, paused, time.monotonic()))

    def left(self, host_id: str, *, blamed: bool) -> None:
        """A host is gone."""
        if self._dispatcher is not None:
            # A worker that is killed may have committed answers and not got to report them.
            committed = {
                (partition, agent_id)
                for partition, agent_id, asked in self._asked
                if asked == host_id and self._run.answered.exists(answers_name(partition, agent_id))
            }
            left, now = self._dispatcher.host_left, time.monotonic()
            self._act(left(host_id, now, blamed=blamed, committed=committed))

    # Instructions

    def _act(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Ask():
                    self._ask(instruction)
                case Merge():
                    self._merge(instruction, attempt=1)
                case Abandon(partition, agent_id, host_id):
                    self._forget((partition, agent_id, host_id))
                case Restart():
                    self._restart(instruction)
                case BreakerNews():
                    self._emit(self._breaker_event(instruction))
                case AwayNews():
                    self._emit(self._away_event(instruction))

    def _restart(self, restart: Restart) -> None:
        message = (
            f"it has been silent about partition {restart.partition} for {restart.silent_s:.0f} s; "
            "its process is restarted (routing.timeout_s)"
        )
        self._hosting.restart(restart.host_id, message)

    def _breaker_event(self, news: BreakerNews) -> BreakerChanged:
        message = "it answers again"
        if news.state != "closed":
            last = self._last_failure.get(news.agent_id, "")
            message = (
                f"{news.num_failures} failures in a row; "
                f"left alone for {news.cool_down_s:g} s; {last}"
            )
        name = self._hosting.name(news.host_id)
        return BreakerChanged(news.agent_id, name, news.state, message)

    def _away_event(self, news: AwayNews) -> ServerAway:
        name, why = self._hosting.name(news.host_id), self._last_failure[news.agent_id]
        seconds = (news.away_s, news.cool_down_s, news.wait_s)
        return ServerAway(news.partition, news.agent_id, name, why, *seconds)

    def _ask(self, ask: Ask) -> None:
        with dask.annotate(executor=self._run.topic):
            call = TaskCall(
                self._run.code,
                answer_partition,
                self._run,
                self._specs[ask.agent_id],
                ask.partition,
                ask.attempt,
                careful=ask.purpose == "careful",
                earlier=ask.earlier,
            )
            # Pinned by address: the dispatcher takes it back when the worker leaves.
            future = self._client.submit(call, workers=[ask.host_id], pure=False)
        key = (ask.partition, ask.agent_id, ask.host_id)
        self._asked[key] = _Asked(ask, future, time.monotonic())
        self._emit(
            PartitionAsked(
                partition=ask.partition,
                agent_id=ask.agent_id,
                worker=self._hosting.name(ask.host_id),
                attempt=ask.attempt,
                purpose=ask.purpose,
                policy=self._job.routing.policy,
                candidates=self._seen(ask),
                num_busy=ask.num_busy,
            )
        )
        self._watch(future, lambda failure: self._answer_ended(ask, failure))

    def _seen(self, ask: Ask) -> dict[str, dict[str, dict[str, float]]]:
        """Return what the policy saw, for the event log: agent → worker → figures."""
        seen: dict[str, dict[str, dict[str, float]]] = {}
        for view in _kept_candidates(ask):
            name = self._hosting.name(view.host_id)
            seen.setdefault(view.agent_id, {})[name] = _figures(view)
        return seen

    def _answered(self, address: str, facts: dict[str, Any]) -> None:
        partition, agent_id = facts["partition"], facts["agent_id"]
        asked = self._forget((partition, agent_id, address))
        facts |= _seconds(facts.pop("times"), asked.sent if asked is not None else None)
        if self._dispatcher is None:
            return
        # News also when the task had been abandoned: what is committed counts.
        if self._dispatcher.awaits(partition, agent_id):
            self._emit(PartitionAnswered(worker=self._hosting.name(address), **facts))
        self._act(self._dispatcher.answered(partition, agent_id, address, time.monotonic()))

    def _away(
        self, address: str, partition: int, agent_id: str, message: str, **hints: float
    ) -> None:
        """Take note that a worker's server is away."""
        if self._forget((partition, agent_id, address)) is None or self._dispatcher is None:
            return  # it was abandoned
        self._last_failure[agent_id] = message
        now = time.monotonic()
        self._act(self._dispatcher.away(partition, agent_id, address, now, **hints))

    def _heard(self, address: str) -> None:
        if self._dispatcher is not None:
            self._dispatcher.heard(address, time.monotonic())

    def _answer_ended(self, ask: Ask, failure: Failure) -> None:
        assert self._dispatcher is not None
        key = (ask.partition, ask.agent_id, ask.host_id)
        asked = self._asked.get(key)
        if asked is None or asked.ask is not ask:
            return  # it has reported, or it was abandoned
        self._forget(key)
        if isinstance(failure, OutputError):
            raise failure  # no other worker could write it either
        now = time.monotonic()
        failure = failure or RunError("the task ended without a report")
        self._last_failure[ask.agent_id] = f"{type(failure).__name__}: {failure}"
        instructions = self._dispatcher.failed(ask.partition, ask.agent_id, ask.host_id, now)
        self._emit(
            AnswerFailed(
                ask.partition,
                ask.agent_id,
                self._hosting.name(ask.host_id),
                ask.attempt,
                self._last_failure[ask.agent_id],
                self._dispatcher.given_up(ask.partition, ask.agent_id),
                now - asked.sent,
            )
        )
        self._act(instructions)

    def _forget(self, key: tuple[int, str, str]) -> _Asked | None:
        asked = self._asked.pop(key, None)
        if asked is not None:
            asked.future.release()
        return asked

    def _merge(
        self,
        merge: Merge,
        attempt: int,
        workers: list[str] | None = None,
        patience_s: float = _MERGE_PATIENCE_S,
    ) -> None:
        call = TaskCall(
            self._run.code,
            merge_partition,
            self._run,
            merge.partition,
            merge.agents,
            final=merge.final,
        )
        workers = workers or self._hosting.merging_workers()
        future = self._client.submit(call, workers=workers, pure=False, priority=10)
        merging = _Merging(merge, future, attempt, time.monotonic(), patience_s)
        self._merges[merge.partition] = merging
        self._watch(future, lambda failure: self._merge_ended(merging, failure))

    def _hurry_merges(self) -> None:
        """Send merges again that are stuck at a worker which does not answer."""
        now = time.monotonic()
        for merging in list(self._merges.values()):
            workers = self._hosting.responsive()
            if now - merging.sent > merging.patience_s and workers:
                merging.future.release()
                self._merge(merging.merge, merging.attempt, workers, 2 * merging.patience_s)

    def _merged(self, address: str, facts: dict[str, Any]) -> None:
        partition, agents = facts.pop("partition"), tuple(facts.pop("agents"))
        times, agreement = facts.pop("times"), facts.pop("agreement", {})
        agreed = {agent: (yes, of) for agent, (yes, of) in agreement.items()}
        facts["worker"] = self._hosting.name(address)
        if self._dispatcher is None:
            return
        current = self._merges.get(partition)
        if current is None or current.merge.agents != agents:
            return  # a second copy of the task
        del self._merges[partition]
        current.future.release()
        now = time.monotonic()
        facts |= _seconds(times, current.sent)
        if facts.get("num_undecided"):
            self._emit(PartitionUndecided(partition, **facts))
            self._act(self._dispatcher.undecided(partition, facts["num_undecided"], now))
            return
        self._emit(PartitionMerged(partition, agreement=agreed, **facts))
        self._act(self._dispatcher.merged(partition, now, agreed))

    def _merge_ended(self, merging: _Merging, failure: Failure) -> None:
        partition = merging.merge.partition
        if self._merges.get(partition) is not merging:
            return  # it has reported, or it was sent again
        merging.future.release()
        if isinstance(failure, (OutputError, JobError)):
            raise failure
        if isinstance(failure, VersionError):
            self._hosting.refuse(failure)
            self._merge(merging.merge, merging.attempt)
            return
        if merging.attempt >= _MAX_MERGE_ATTEMPTS:
            raise RunError(f"partition {partition} could not be merged: {failure}")
        self._merge(merging.merge, merging.attempt + 1)


def _seconds(times: dict[str, Any], sent: float | None) -> dict[str, Any]:
    """Return the seconds of a task that has reported.

    Args:
        sent: by `time.monotonic`; None: of a task that was let go of.
    """
    known = TaskTimes(**times)
    return known.heard_after(known.own_s if sent is None else time.monotonic() - sent)


def _kept_candidates(ask: Ask) -> list[HostView]:
    """Return the chosen one and the first of the others: a thousand would drown the event log."""
    key = (ask.agent_id, ask.host_id)
    chosen = [view for view in ask.candidates if view.key == key]
    others = [view for view in ask.candidates if view.key != key]
    return [*chosen, *others[: _KEPT_CANDIDATES - 1]]


def _figures(view: HostView) -> dict[str, float]:
    return {
        "agent_rank": view.agent_rank,
        "in_flight": view.in_flight,
        "in_flight_tokens": view.in_flight_tokens,
        "num_answered": view.num_answered,
        "num_asked": view.num_asked,
        "tokens_per_s": round(view.tokens_per_s or 0.0, 2),
        "agreement": round(view.agreement, 4),
        "num_compared": view.num_compared,
        **({} if view.weight is None else {"weight": view.weight}),
    }
