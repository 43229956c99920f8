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
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import dask
from distributed import Client, Future

from mas_batch.agents.spec import AgentSpec, WorkerInfo, match_workers, place_newcomer
from mas_batch.agents.work import RunRef, answer_partition, load_agent, merge_partition
from mas_batch.errors import ModelError, RunError
from mas_batch.job import Job
from mas_batch.monitor.events import (
    AgentLost,
    AgentReady,
    AnswerFailed,
    Event,
    PartitionAnswered,
    PartitionAsked,
    PartitionMerged,
)
from mas_batch.routing.dispatcher import Abandon, Ask, Dispatcher, Instruction, Merge

_CHECK_EVERY_S = 1.0
_MAX_MERGE_ATTEMPTS = 3

Failure = Exception | None


class DaskRouter:
    """Hosts a run's agents on a cluster and runs one dispatcher to its end; a context manager.

    Args:
        client: connected; never closed here.
        job: says which worker may serve which agent.
        emit: called with every event, from the thread that calls `host` and `run`.
        wait_s: how long an agent may be without any worker before the run fails.
    """

    def __init__(
        self,
        client: Client,
        job: Job,
        run: RunRef,
        specs: dict[str, AgentSpec],
        emit: Callable[[Event], None],
        *,
        wait_s: float = 120.0,
    ) -> None:
        self._client = client
        self._job = job
        self._run = run
        self._specs = specs
        self._emit = emit
        self._wait_s = wait_s
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._names: dict[str, str] = {}  # worker address → worker name
        self._hosts: dict[str, str] = {}  # worker address → agent, loading or ready
        self._loading: dict[str, Future] = {}
        self._ready: set[str] = set()
        self._refused: dict[str, tuple[str, Exception]] = {}  # address → agent, why not loaded
        self._asked: dict[tuple[int, str], tuple[Ask, Future]] = {}
        self._merges: dict[int, tuple[Merge, Future, int]] = {}  # partition → …, attempt
        self._dispatcher: Dispatcher | None = None
        self._last_check = 0.0
        self._last_failure = ""
        self._unserved_since: float | None = None
        self.engine_facts: dict[str, dict[str, Any]] = {}
        """Agent → what its engine says of itself, for the manifest."""

    def __enter__(self) -> DaskRouter:
        self._client.subscribe_topic(self._run.topic, self._on_report)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._client.status == "running":
            self._client.unsubscribe_topic(self._run.topic)
        futures = [*self._loading.values(), *(f for _, f in self._asked.values())]
        for future in (*futures, *(f for _, f, _ in self._merges.values())):
            future.release()

    # The caller's side

    def host(self) -> None:
        """Load every agent's model on its workers; then each agent has one that is ready.

        Raises:
            JobError: an agent has no capable worker.
            ModelError: no worker of an agent could load its model.
            RunError: an agent's workers left and none came back.
        """
        for address, agent_id in match_workers(self._workers(), self._job).items():
            self._load(address, agent_id)
        while self._loading or self._unserved():
            self._handle_next()
            if not self._loading:
                self._check_loaded()

    def _unserved(self) -> set[str]:
        return self._specs.keys() - {self._hosts[address] for address in self._ready}

    def _check_loaded(self) -> None:
        """Wait for an agent whose worker left while it was loading; give up on a refused one."""
        unserved = self._unserved()
        for agent_id, error in self._refused.values():
            if agent_id in unserved:
                model = self._specs[agent_id].agent.model
                message = f"agents.{agent_id}: no worker could load {model}: {error}"
                raise ModelError(message) from error
        self._give_up_waiting(unserved)

    def run(self, dispatcher: Dispatcher) -> None:
        """Feed the dispatcher until every partition of its plan is merged.

        Raises:
            RunError: the scheduler is lost, an agent stays without workers, or a merge fails.
        """
        self._dispatcher = dispatcher
        for address in sorted(self._ready):
            self._act(dispatcher.replica_joined(address, self._hosts[address]))
        while not dispatcher.done:
            self._handle_next()
            self._check_served(dispatcher)

    def _handle_next(self) -> None:
        """Handle one piece of news, and every now and then look at the workers."""
        with suppress(queue.Empty):
            self._inbox.get(timeout=_CHECK_EVERY_S)()
        if time.monotonic() - self._last_check > _CHECK_EVERY_S:
            self._last_check = time.monotonic()
            self._refresh_workers()

    def _check_served(self, dispatcher: Dispatcher) -> None:
        for agent_id in dispatcher.distrusted_agents():
            raise RunError(
                f"agent {agent_id!r} has failed on all that it was asked: {self._last_failure}; "
                "mend it and run the same command again: what is answered is kept"
            )
        no_workers = set() if self._ready or dispatcher.done else set(self._specs)
        self._give_up_waiting(dispatcher.missing_agents() | no_workers)

    def _give_up_waiting(self, unserved: set[str]) -> None:
        if not unserved:
            self._unserved_since = None
            return
        self._unserved_since = self._unserved_since or time.monotonic()
        if time.monotonic() - self._unserved_since > self._wait_s:
            raise RunError(
                f"no worker serves agent {min(unserved)!r} for {self._wait_s:g} s; "
                "what is answered is kept: start a worker and run the same command again"
            )

    # News, from Dask's threads: only posts to the inbox

    def _on_report(self, event: Any) -> None:
        """Take a task's own report; see `agents.host.report`."""
        message = event[1]
        facts = json.loads(message["facts"])
        match message["task"]:
            case "load_agent":
                self._inbox.put(lambda: self._loaded(message["worker"], facts))
            case "answer_partition":
                self._inbox.put(lambda: self._answered(message["worker"], facts))
            case "merge_partition":
                self._inbox.put(lambda: self._merged(facts))

    def _watch(self, future: Future, handle: Callable[[Failure], None]) -> None:
        """Call `handle` from the inbox when the task has ended, with its exception if it failed."""

        def on_done(done: Future) -> None:
            failure: Failure = None
            if done.status == "error":
                failure = done.exception()
            elif done.status != "finished":
                failure = RunError(f"the task was {done.status}")
            self._inbox.put(lambda: handle(failure))

        future.add_done_callback(on_done)

    # Hosting

    def _workers(self) -> list[WorkerInfo]:
        if self._client.status != "running":
            raise RunError("the scheduler is lost; run the same command again to resume")
        workers = cluster_workers(self._client)
        self._names.update({worker.address: worker.name for worker in workers})
        return workers

    def _load(self, address: str, agent_id: str) -> None:
        self._hosts[address] = agent_id
        with dask.annotate(executor=self._run.topic):
            future = self._client.submit(
                load_agent, self._run, self._specs[agent_id], workers=[address], pure=False
            )
        self._loading[address] = future
        self._watch(future, lambda failure: self._load_ended(address, failure))

    def _loaded(self, address: str, facts: dict[str, Any]) -> None:
        if self._loading.pop(address, None) is None:
            return
        agent_id = self._hosts[address]
        self._ready.add(address)
        self.engine_facts[agent_id] = {"family_id": facts["family_id"], **facts["engine"]}
        self._emit(AgentReady(agent_id, self._names[address], facts["load_s"], facts["engine"]))
        if self._dispatcher is not None:
            self._act(self._dispatcher.replica_joined(address, agent_id))

    def _load_ended(self, address: str, failure: Failure) -> None:
        if self._loading.pop(address, None) is None:
            return  # it has reported, or its worker left
        agent_id = self._hosts.pop(address)
        failure = failure or RunError("the task ended without a report")
        self._refused[address] = (agent_id, failure)
        message = f"could not load the model: {failure}"
        self._emit(AgentLost(agent_id, self._names[address], message))

    def _refresh_workers(self) -> None:
        """Compare the scheduler's workers with ours: load on the new ones, drop the gone."""
        workers = self._workers()
        present = {worker.address for worker in workers}
        for address in set(self._hosts) - present:
            self._drop(address)
        for worker in workers:
            if worker.address in self._hosts or worker.address in self._refused:
                continue
            agent_id = place_newcomer(worker, self._job, self._hosts.values())
            if agent_id is not None:
                self._load(worker.address, agent_id)

    def _drop(self, address: str) -> None:
        agent_id = self._hosts.pop(address)
        self._emit(AgentLost(agent_id, self._names[address], "the worker left the cluster"))
        loading = self._loading.pop(address, None)
        if loading is not None:
            loading.release()
        self._ready.discard(address)
        if self._dispatcher is not None:
            self._act(self._dispatcher.replica_left(address))

    # Instructions

    def _act(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Ask():
                    self._ask(instruction)
                case Merge():
                    self._merge(instruction, attempt=1)
                case Abandon():
                    self._abandon(instruction)

    def _ask(self, ask: Ask) -> None:
        with dask.annotate(executor=self._run.topic):
            future = self._client.submit(
                answer_partition,
                self._run,
                self._specs[ask.agent_id],
                ask.partition,
                ask.attempt,
                # Pinned by address: the dispatcher takes it back when the worker leaves.
                workers=[ask.replica_id],
                pure=False,
            )
        self._asked[ask.partition, ask.agent_id] = (ask, future)
        candidates = {self._names[replica]: load for replica, load in ask.candidates}
        self._emit(
            PartitionAsked(
                ask.partition,
                ask.agent_id,
                self._names[ask.replica_id],
                ask.attempt,
                self._job.routing.policy,
                candidates,
            )
        )
        self._watch(future, lambda failure: self._answer_ended(ask, failure))

    def _answered(self, address: str, facts: dict[str, Any]) -> None:
        partition, agent_id = facts["partition"], facts["agent_id"]
        current = self._asked.get((partition, agent_id))
        if current is not None and current[0].replica_id == address:
            self._forget(current[0])
        # News also when the task had been abandoned: what is committed counts.
        if self._dispatcher is not None and self._dispatcher.awaits(partition, agent_id):
            self._emit(PartitionAnswered(worker=self._names.get(address, address), **facts))
            self._act(self._dispatcher.answered(partition, agent_id, address))

    def _answer_ended(self, ask: Ask, failure: Failure) -> None:
        assert self._dispatcher is not None
        if not self._forget(ask):
            return  # it has reported, or it was abandoned
        failure = failure or RunError("the task ended without a report")
        self._last_failure = f"{type(failure).__name__}: {failure}"
        instructions = self._dispatcher.failed(ask.partition, ask.agent_id, ask.replica_id)
        self._emit(
            AnswerFailed(
                ask.partition,
                ask.agent_id,
                self._names[ask.replica_id],
                ask.attempt,
                self._last_failure,
                self._dispatcher.given_up(ask.partition, ask.agent_id),
            )
        )
        self._act(instructions)

    def _abandon(self, abandon: Abandon) -> None:
        current = self._asked.get((abandon.partition, abandon.agent_id))
        if current is not None and current[0].replica_id == abandon.replica_id:
            self._forget(current[0])

    def _forget(self, ask: Ask) -> bool:
        """Release the task, if it is still the current one of its partition and agent."""
        current = self._asked.get((ask.partition, ask.agent_id))
        if current is None or current[0] is not ask:
            return False
        del self._asked[ask.partition, ask.agent_id]
        current[1].release()
        return True

    def _merge(self, merge: Merge, attempt: int) -> None:
        future = self._client.submit(
            merge_partition, self._run, merge.partition, merge.agents, pure=False, priority=10
        )
        self._merges[merge.partition] = (merge, future, attempt)
        self._watch(future, lambda failure: self._merge_ended(merge, attempt, failure))

    def _merged(self, facts: dict[str, Any]) -> None:
        assert self._dispatcher is not None
        current = self._merges.pop(facts["partition"], None)
        if current is None:
            return  # a second copy of the task
        current[1].release()
        self._emit(PartitionMerged(**facts))
        self._act(self._dispatcher.merged(facts["partition"]))

    def _merge_ended(self, merge: Merge, attempt: int, failure: Failure) -> None:
        current = self._merges.get(merge.partition)
        if current is None or current[2] != attempt:
            return
        current[1].release()
        if attempt >= _MAX_MERGE_ATTEMPTS:
            raise RunError(f"partition {merge.partition} could not be merged: {failure}")
        self._merge(merge, attempt + 1)


def cluster_workers(client: Client) -> list[WorkerInfo]:
    """List the workers of the cluster with what they declare."""
    workers = client.scheduler_info(n_workers=-1)["workers"]
    return [
        WorkerInfo(address, str(info["name"]), info["resources"])
        for address, info in workers.items()
    ]
