"""The agents' life on a cluster: load models, notice workers that come, pause, leave or hang."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import dask
from distributed import Client, Future

from mas_batch.agents.spec import AgentSpec, WorkerInfo, match_workers, place_newcomer
from mas_batch.agents.work import load_agents
from mas_batch.dask_compat import left_on_purpose, restart_process, workers_of
from mas_batch.errors import ModelError, RunError, VersionError
from mas_batch.events import AgentDraining, AgentLoading, AgentLost, AgentReady, Emit
from mas_batch.job import Job
from mas_batch.run_folder.ref import RunRef
from mas_batch.task_call import TaskCall

logger = logging.getLogger(__name__)

Failure = Exception | None
_RESTART_TIMEOUT_S = 30.0
_LOAD_AGAIN_S = 60.0
_HEARTBEAT_S = 15.0
"""Workers of a small cluster send one every half second, of a large one every few seconds."""


class Listener(Protocol):
    """An object that is notified which workers can be asked."""

    def joined(self, address: str, agent_id: str) -> None:
        """The worker holds the agent's model."""
        ...

    def paused(self, address: str, paused: bool) -> None:
        """The worker takes nothing further, or again."""
        ...

    def left(self, address: str, *, blamed: bool) -> None:
        """The worker is gone; not blamed: it was taken away on purpose."""
        ...


@dataclass(frozen=True, slots=True)
class _Load:
    """A worker that is loading its agent's model."""

    future: Future
    since: float


@dataclass(frozen=True, slots=True)
class _Refusal:
    """A worker that could not load an agent's model."""

    agent_id: str
    error: Exception
    since: float


def watch(
    future: Future, handle: Callable[[Failure], None], post: Callable[[Callable[[], None]], None]
) -> None:
    """Post a call of `handle` when the task has ended, with its exception if it failed.

    Args:
        post: takes the call to the thread that may make it; Dask's own calls here.
    """

    def on_done(done: Future) -> None:
        failure: Failure = None
        if done.status == "error":
            failure = done.exception()
        elif done.status != "finished":
            failure = RunError(f"the task was {done.status}")
        post(lambda: handle(failure))

    future.add_done_callback(on_done)


class Hosting:
    """Which worker serves which agent. All methods run in the caller's one thread.

    Args:
        client: connected; never closed here.
        job: says which worker may serve which agent, and how long one may be without any
            (`cluster.wait_s`).
        emit: called with every event.
        watch: calls back, in the same thread, when a future has ended.
    """

    def __init__(
        self,
        client: Client,
        job: Job,
        run: RunRef,
        specs: Mapping[str, AgentSpec],
        emit: Emit,
        watch: Callable[[Future, Callable[[Failure], None]], None],
    ) -> None:
        self._client = client
        self._job = job
        self._run = run
        self._specs = specs
        self._emit = emit
        self._watch = watch
        self._wait_s = job.cluster.wait_s
        self._load_timeout_s = job.routing.load_timeout_s
        self._names: dict[str, str] = {}  # worker address → worker name
        self._hosts: dict[str, str] = {}  # worker address → agent, loading or ready
        self._loading: dict[str, _Load] = {}
        self._refused: dict[str, _Refusal] = {}  # by address
        self._paused: set[str] = set()  # addresses
        self._retiring: set[str] = set()  # addresses of workers that the router lets go
        self._hung: set[str] = set()  # addresses of workers that it has restarted
        self._seen: dict[str, float] = {}  # address → last heartbeat, on the scheduler's clock
        self._missing: dict[str, float] = {}  # agent → since when
        self.ready: dict[str, str] = {}
        """Worker address → agent whose model it holds."""
        self.listener: Listener | None = None
        self.engine_facts: dict[str, dict[str, Any]] = {}
        """Agent → what its engine says of itself, for the manifest."""

    def name(self, address: str) -> str:
        """Return the worker's name."""
        return self._names.get(address, address)

    def close(self) -> None:
        """Forget what is still loading."""
        for load in self._loading.values():
            load.future.release()

    # Loading

    def start(self) -> None:
        """Begin to load every agent's model on its workers.

        Raises:
            JobError: an agent has no capable worker.
        """
        for address, agent_id in match_workers(self._workers(), self._job).items():
            self._load(address, agent_id)

    @property
    def unserved(self) -> set[str]:
        """Agents that no worker can answer for now."""
        return self._specs.keys() - set(self.ready.values())

    def check_loaded(self, unserved: set[str]) -> None:
        """Give up on agents whose model no worker can load; wait for those whose worker left.

        Raises:
            ModelError: no worker of such an agent could load its model.
            RunError: its workers left and none came back.
        """
        for agent_id, refusal in self._refusals().items():
            if agent_id in unserved and agent_id not in self._hosts.values():
                model = self._specs[agent_id].agent.model
                message = f"agents.{agent_id}: no worker could load {model}: {refusal.error}"
                raise ModelError(message) from refusal.error
        self.give_up_waiting(unserved)

    def give_up_waiting(self, unserved: set[str]) -> None:
        """Note which agents have no worker now; one whose model is being loaded has.

        Raises:
            RunError: an agent has had none for too long.
        """
        missing = unserved - {self._hosts[address] for address in self._loading}
        now = time.monotonic()
        self._missing = {agent: self._missing.get(agent, now) for agent in missing}
        for agent_id, since in sorted(self._missing.items()):
            if now - since > self._wait_s:
                refusal = self._refusals().get(agent_id)
                why = f" (its model could not be loaded: {refusal.error})" if refusal else ""
                raise RunError(
                    f"no worker serves agent {agent_id!r} for {self._wait_s:g} s{why}; "
                    "what is answered is kept: start a worker and run the same command again"
                )

    def _refusals(self) -> dict[str, _Refusal]:
        return {refusal.agent_id: refusal for refusal in self._refused.values()}

    def _load(self, address: str, agent_id: str) -> None:
        self._hosts[address] = agent_id
        self._emit(AgentLoading(agent_id, self.name(address)))
        with dask.annotate(executor=self._run.topic):
            call = TaskCall(self._run.code, load_agents, self._run, [self._specs[agent_id]])
            future = self._client.submit(call, workers=[address], pure=False)
        self._loading[address] = _Load(future, time.monotonic())
        self._watch(future, lambda failure: self._load_ended(address, future, failure))

    def loaded(self, address: str, facts: dict[str, Any]) -> None:
        """Take the report of a load."""
        load = self._loading.pop(address, None)
        if load is None:
            return
        load.future.release()
        agent_id = self._hosts[address]
        self.ready[address] = agent_id
        own = facts["agents"][agent_id]
        self.engine_facts[agent_id] = {"family_id": own["family_id"], **own["engine"]}
        self._emit(AgentReady(agent_id, self.name(address), facts["load_s"], own["engine"]))
        if self.listener is not None:
            self.listener.joined(address, agent_id)

    def is_paused(self, address: str) -> bool:
        """Whether the worker is to be asked nothing further."""
        return address in self._paused

    def _load_ended(self, address: str, future: Future, failure: Failure) -> None:
        load = self._loading.get(address)
        if load is None or load.future is not future:
            return  # it has reported, or its worker left
        self._load_failed(address, failure or RunError("the task ended without a report"))

    def _load_failed(self, address: str, error: Exception) -> None:
        self._loading.pop(address).future.release()
        agent_id = self._hosts.pop(address)
        missing = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
        if missing.startswith("mas_batch."):  # a version that does not even know what it is asked
            error = VersionError(address, self.name(address), "another", self._run.code)
        self._refused[address] = _Refusal(agent_id, error, time.monotonic())
        if isinstance(error, VersionError):
            self._emit(AgentLost(agent_id, self.name(address), str(error)))
            self.refresh()  # at once: another worker may do in its place
        else:
            message = f"could not load the model: {error}"
            self._emit(AgentLost(agent_id, self.name(address), message))

    def refuse(self, failure: VersionError) -> None:
        """A worker that was asked something has other code: ask it nothing further."""
        if failure.address not in self._refused:
            logger.warning("%s", failure)
        self._refused[failure.address] = _Refusal("", failure, time.monotonic())

    def merging_workers(self) -> list[str] | None:
        """Return the workers that may merge; None: all of them.

        Raises:
            VersionError: there are none but with other code.
        """
        errors = {address: refusal.error for address, refusal in self._refused.items()}
        refused = {a: error for a, error in errors.items() if isinstance(error, VersionError)}
        allowed = sorted(self._seen.keys() - refused.keys())
        if refused and not allowed:
            raise next(iter(refused.values()))
        return allowed if refused else None

    def _give_up_late_loads(self) -> None:
        """Refuse the workers that are loading for too long, and end what hangs there."""
        before = time.monotonic() - self._load_timeout_s
        for address in [a for a, load in self._loading.items() if load.since < before]:
            limit = f"{self._load_timeout_s:g} s (routing.load_timeout_s)"
            self._load_failed(address, ModelError(f"it was not loaded within {limit}"))
            self._end_process(address)

    # Workers that come, pause, leave or hang

    def refresh(self) -> None:
        """Compare the scheduler's workers with ours.

        Raises:
            RunError: the scheduler is lost.
        """
        try:
            workers = self._workers()
        except OSError:  # no news this time; a scheduler that is lost shows in the client's status
            return
        self._give_up_late_loads()
        present = {worker.address for worker in workers}
        for address in sorted(self._hosts.keys() - present):
            self._drop(address)
        for address, refusal in list(self._refused.items()):
            is_old = time.monotonic() - refusal.since > _LOAD_AGAIN_S
            if address not in present or (is_old and not isinstance(refusal.error, VersionError)):
                del self._refused[address]  # a download that failed may succeed now
        for worker in workers:
            self._note_status(worker)
            if worker.address not in self._hosts and worker.address not in self._refused:
                agent_id = place_newcomer(worker, self._job, self._hosts.values())
                if agent_id is not None:
                    self._load(worker.address, agent_id)

    def restart(self, address: str, message: str) -> None:
        """End the process of a worker that hangs; its nanny, if it has one, starts another.

        Without a nanny it is only cut off from the cluster, and its place stays empty until
        the user or scheduler that started it starts it again.
        """
        self._pause(address, message)
        self._hung.add(address)
        self._end_process(address)

    def _end_process(self, address: str) -> None:
        # In a thread: a process that does not heed SIGTERM is waited for before it is killed.
        threading.Thread(
            target=self._restart, args=(address,), daemon=True, name="mas-batch-restart"
        ).start()

    def _restart(self, address: str) -> None:
        try:
            restart_process(self._client, address, _RESTART_TIMEOUT_S)
        except Exception as error:  # it is tried again when the worker stays silent
            logger.warning("worker %s could not be restarted: %s", address, error)

    def retire(self, addresses: Iterable[str]) -> list[str]:
        """Ask these idle workers nothing further; returns their names, for the scaler."""
        names = []
        for address in addresses:
            self._retiring.add(address)
            self._pause(address, "no work is left for it")
            names.append(self.name(address))
        return names

    def responsive(self) -> list[str]:
        """Workers with a model whose heartbeat is not much older than the freshest one."""
        seen = {address: self._seen.get(address, 0.0) for address in self.ready}
        newest = max(seen.values(), default=0.0)
        return [address for address, when in seen.items() if newest - when < _HEARTBEAT_S]

    def counts(self) -> Counter[str]:
        """Agent → workers that serve it or will soon, without those that are let go."""
        return Counter(
            agent_id for address, agent_id in self._hosts.items() if address not in self._retiring
        )

    def _workers(self) -> list[WorkerInfo]:
        if self._client.status != "running":
            raise RunError("the scheduler is lost; run the same command again to resume")
        workers = cluster_workers(self._client)
        self._names.update({worker.address: worker.name for worker in workers})
        self._seen = {worker.address: worker.last_seen for worker in workers}
        return [worker for worker in workers if worker.address not in self._retiring]

    def _note_status(self, worker: WorkerInfo) -> None:
        if worker.address not in self._hosts:
            return
        if worker.status != "running":
            self._pause(worker.address, f"the worker's status is {worker.status!r}")
        elif worker.address in self._paused:
            self._paused.discard(worker.address)
            if self.listener is not None:
                self.listener.paused(worker.address, False)

    def _pause(self, address: str, why: str) -> None:
        if address in self._paused:
            return
        self._paused.add(address)
        self._emit(AgentDraining(self._hosts[address], self.name(address), why))
        if self.listener is not None:
            self.listener.paused(address, True)

    def _drop(self, address: str) -> None:
        agent_id = self._hosts.pop(address)
        # One that hung says goodbye too when it is ended for that; what it hung on is to blame.
        hung = address in self._hung
        expected = address in self._retiring or (
            not hung and left_on_purpose(self._client, address)
        )
        self._hung.discard(address)
        how = "left" if expected else "was lost"
        self._emit(AgentLost(agent_id, self.name(address), f"the worker {how}"))
        self._paused.discard(address)
        load = self._loading.pop(address, None)
        if load is not None:
            load.future.release()
        self.ready.pop(address, None)
        if self.listener is not None:
            self.listener.left(address, blamed=not expected)


def cluster_workers(client: Client) -> list[WorkerInfo]:
    """List the workers of the cluster with what they declare.

    Raises:
        OSError: the scheduler did not answer.
    """
    return [
        WorkerInfo(address, str(info["name"]), info["resources"], info["status"], info["last_seen"])
        for address, info in workers_of(client).items()
    ]
