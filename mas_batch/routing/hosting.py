"""The hosts' life on a cluster: load models, notice workers that come, pause, leave or hang."""

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

from mas_batch.agents.posts import Host, WorkerInfo, check_served, place, posts_of
from mas_batch.agents.spec import AgentSpec
from mas_batch.agents.work import load_agents
from mas_batch.dask_compat import left_on_purpose, restart_process, workers_of
from mas_batch.errors import ModelError, RunError, VersionError
from mas_batch.events import Emit, HostDraining, HostLoading, HostLost, HostReady
from mas_batch.job import Job
from mas_batch.run_folder.ref import RunRef
from mas_batch.task_call import TaskCall

logger = logging.getLogger(__name__)

Failure = Exception | None
_RESTART_TIMEOUT_S = 30.0
_LOAD_AGAIN_S = 60.0
_HEARTBEAT_S = 15.0
"""Workers of a small cluster send one every half second, of a large one every few seconds."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What is known of a host that holds its engine."""

    agents: tuple[str, ...]
    """Whom it answers for, in the job's order."""
    concurrent: int
    """How many partitions at once keep its engine busy."""
    max_in_flight: int
    """How many partitions may be there, so that its worker can merge."""
    joins: bool
    """Whether its engine takes up what comes while it works on something else."""


class Listener(Protocol):
    """An object that is notified which hosts can be asked, by their ids (`agents.posts.Host`)."""

    def joined(self, host_id: str, loaded: Loaded) -> None:
        """The host holds its engine."""
        ...

    def paused(self, host_id: str, paused: bool) -> None:
        """The host takes nothing further, or again."""
        ...

    def left(self, host_id: str, *, blamed: bool) -> None:
        """The host is gone; not blamed: it was taken away on purpose."""
        ...


@dataclass(frozen=True, slots=True)
class _Load:
    """A host that is loading its engine."""

    future: Future
    since: float


@dataclass(frozen=True, slots=True)
class _Refusal:
    """A worker of a host that could not load its engine."""

    agents: tuple[str, ...]
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
    """Which workers hold which engine. All methods run in the caller's one thread.

    A host is known by the address of its leading worker. It lives as long as all its workers.

    Args:
        client: connected; never closed here.
        job: says which hosts there are to be, and how long an agent may be without any
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
        self.posts = posts_of(job, {spec.agent_id: spec.post for spec in specs.values()})
        """Of the agents that are asked in this pass; named as in the whole job."""
        self._agents_of = {post.name: post.agents for post in self.posts}
        self._names: dict[str, str] = {}  # worker address → worker name
        self._hosts: dict[str, Host] = {}  # loading or ready
        self._loading: dict[str, _Load] = {}  # by host
        self._refused: dict[str, _Refusal] = {}  # by worker address
        self._unable: dict[str, dict[str, Exception]] = {}
        """Host → those of its agents that its engine cannot answer for, and why."""
        self._paused: set[str] = set()  # hosts
        self._retiring: set[str] = set()  # addresses of workers that the router lets go
        self._hung: set[str] = set()  # hosts that it has restarted
        self._seen: dict[str, float] = {}  # address → last heartbeat, on the scheduler's clock
        self._missing: dict[str, float] = {}  # agent → since when
        self.ready: dict[str, Loaded] = {}
        """Hosts that hold their engines."""
        self.listener: Listener | None = None
        self.engine_facts: dict[str, dict[str, Any]] = {}
        """Agent → what its engine says of itself, for the manifest."""

    def name(self, address: str) -> str:
        """Return the name of a worker; a host is called like its leading one."""
        return self._names.get(address, address)

    def ready_for(self, post: str) -> list[str]:
        """Return the post's hosts that can be asked."""
        return sorted(host_id for host_id in self.ready if self._hosts[host_id].post == post)

    def close(self) -> None:
        """Forget what is still loading."""
        for load in self._loading.values():
            load.future.release()

    # Loading

    def start(self) -> None:
        """Begin to load every post's engine on its hosts.

        Raises:
            JobError: an agent has no capable worker.
        """
        workers = self._workers()
        hosts = place(workers, self.posts)
        check_served(workers, self.posts, hosts, self._job)
        for host in hosts:
            self._load(host)

    @property
    def unserved(self) -> set[str]:
        """Agents that no host can answer for now."""
        return self._specs.keys() - {a for loaded in self.ready.values() for a in loaded.agents}

    def check_loaded(self, unserved: set[str]) -> None:
        """Give up on agents whose engine no worker can load; wait for those whose hosts left.

        Raises:
            ModelError: no worker could load the engine of such an agent.
            RunError: its hosts left and none came back.
        """
        hosted = {
            agent
            for host_id, host in self._hosts.items()
            for agent in self._agents(host)
            if agent not in self._unable.get(host_id, ())
        }
        for agent_id, error in self._refusals().items():
            if agent_id in unserved - hosted:
                model = self._specs[agent_id].agent.model
                message = f"agents.{agent_id}: no worker could load {model}: {error}"
                raise ModelError(message) from error
        self.give_up_waiting(unserved)

    def give_up_waiting(self, unserved: set[str]) -> None:
        """Note which agents have no host now; one whose engine is being loaded has.

        Raises:
            RunError: an agent has had none for too long.
        """
        loading = (self._agents(self._hosts[host_id]) for host_id in self._loading)
        missing = unserved - {agent for agents in loading for agent in agents}
        now = time.monotonic()
        self._missing = {agent: self._missing.get(agent, now) for agent in missing}
        for agent_id, since in sorted(self._missing.items()):
            if now - since > self._wait_s:
                refusal = self._refusals().get(agent_id)
                why = f" (its model could not be loaded: {refusal})" if refusal else ""
                raise RunError(
                    f"no worker serves agent {agent_id!r} for {self._wait_s:g} s{why}; "
                    "what is answered is kept: start a worker and run the same command again"
                )

    def _refusals(self) -> dict[str, Exception]:
        """Return agent → why it was refused last."""
        found = {agent: each.error for each in self._refused.values() for agent in each.agents}
        for errors in self._unable.values():
            found |= errors
        return found

    def _agents(self, host: Host) -> tuple[str, ...]:
        return self._agents_of[host.post]

    def _load(self, host: Host) -> None:
        self._hosts[host.host_id] = host
        self._emit(HostLoading(self.name(host.host_id), self._agents(host)))
        specs = [self._specs[agent] for agent in self._agents(host)]
        with dask.annotate(executor=self._run.topic):
            call = TaskCall(self._run.code, load_agents, self._run, specs)
            future = self._client.submit(call, workers=[host.host_id], pure=False)
        self._loading[host.host_id] = _Load(future, time.monotonic())
        self._watch(future, lambda failure: self._load_ended(host, future, failure))

    def loaded(self, address: str, facts: dict[str, Any]) -> None:
        """Take the report of a load, from a host's leading worker."""
        load, refused = self._loading.get(address), facts["refused"]
        if load is None:
            return
        wanted = self._agents(self._hosts[address])
        if {*facts["agents"], *refused} != set(wanted):
            return  # a late one of an earlier pass: the topic is the same
        del self._loading[address]
        load.future.release()
        if refused:
            self._unable[address] = {agent: ModelError(why) for agent, why in refused.items()}
            message = f"could not load the model: {'; '.join(dict.fromkeys(refused.values()))}"
            self._emit(HostLost(self.name(address), tuple(refused), message))
        agents = tuple(agent for agent in wanted if agent not in refused)
        concurrent, most = facts["concurrent"], facts["max_in_flight"]
        loaded = self.ready[address] = Loaded(agents, concurrent, most, facts["joins"])
        for agent, own in facts["agents"].items():
            self.engine_facts[agent] = {"family_id": own["family_id"], **own["engine"]}
        name, load_s = self.name(address), facts["load_s"]
        engine = facts["agents"][agents[0]]["engine"]
        self._emit(HostReady(name, agents, load_s, engine, concurrent, most))
        if self.listener is not None:
            self.listener.joined(address, loaded)

    def is_paused(self, host_id: str) -> bool:
        """Whether the host is to be asked nothing further."""
        return host_id in self._paused

    def _load_ended(self, host: Host, future: Future, failure: Failure) -> None:
        load = self._loading.get(host.host_id)
        if load is None or load.future is not future:
            return  # it has reported, or its worker left
        self._load_failed(host, failure or RunError("the task ended without a report"))

    def _load_failed(self, host: Host, error: Exception) -> None:
        address = host.host_id
        self._loading.pop(address).future.release()
        del self._hosts[address]
        agents = self._agents(host)
        missing = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
        if missing.startswith("mas_batch."):  # a version that does not even know what it is asked
            error = VersionError(address, self.name(address), "another", self._run.code)
        for member in host.members:
            self._refused[member] = _Refusal(agents, error, time.monotonic())
        if isinstance(error, VersionError):
            self._emit(HostLost(self.name(address), agents, str(error)))
            self.refresh()  # at once: another worker may do in its place
        else:
            message = f"could not load the model: {error}"
            self._emit(HostLost(self.name(address), agents, message))

    def refuse(self, failure: VersionError) -> None:
        """A worker that was asked something has other code: ask it nothing further."""
        if failure.address not in self._refused:
            logger.warning("%s", failure)
        self._refused[failure.address] = _Refusal((), failure, time.monotonic())

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
        """Refuse the hosts that are loading for too long, and end what hangs there."""
        before = time.monotonic() - self._load_timeout_s
        for host_id in [h for h, load in self._loading.items() if load.since < before]:
            host = self._hosts[host_id]
            limit = f"{self._load_timeout_s:g} s (routing.load_timeout_s)"
            self._load_failed(host, ModelError(f"it was not loaded within {limit}"))
            self._end_processes(host)

    # Workers that come, pause, leave or hang

    def refresh(self) -> None:
        """Compare the scheduler's workers with ours.

        Raises:
            RunError: the scheduler is lost.
        """
        try:
            workers = {worker.address: worker for worker in self._workers()}
        except OSError:  # no news this time; a scheduler that is lost shows in the client's status
            return
        self._give_up_late_loads()
        for host_id in sorted(self._hosts):
            if gone := [m for m in self._hosts[host_id].members if m not in workers]:
                self._drop(host_id, gone)
        for address, refusal in list(self._refused.items()):
            is_old = time.monotonic() - refusal.since > _LOAD_AGAIN_S
            if address not in workers or (is_old and not isinstance(refusal.error, VersionError)):
                del self._refused[address]  # a download that failed may succeed now
        for host in self._hosts.values():
            self._note_status(host, [workers[member] for member in host.members])
        usable = [worker for address, worker in workers.items() if address not in self._refused]
        for host in place(usable, self.posts, self._hosts.values()):
            self._load(host)

    def restart(self, host_id: str, message: str) -> None:
        """End the processes of a host that hangs; their nannies, if they have one, start others.

        Without a nanny a worker is only cut off from the cluster, and its place stays empty until
        the user or scheduler that started it starts it again.
        """
        self._pause(host_id, message)
        self._hung.add(host_id)
        self._end_processes(self._hosts[host_id])

    def _end_processes(self, host: Host) -> None:
        # In threads: a process that does not heed SIGTERM is waited for before it is killed.
        for address in host.members:
            threading.Thread(
                target=self._restart, args=(address,), daemon=True, name="mas-batch-restart"
            ).start()

    def _restart(self, address: str) -> None:
        try:
            restart_process(self._client, address, _RESTART_TIMEOUT_S)
        except Exception as error:  # it is tried again when the worker stays silent
            logger.warning("worker %s could not be restarted: %s", address, error)

    def retire(self, host_ids: Iterable[str]) -> list[str]:
        """Ask these idle hosts nothing further; returns their workers' names, for the scaler."""
        names: list[str] = []
        for host_id in host_ids:
            members = self._hosts[host_id].members
            self._retiring.update(members)
            self._pause(host_id, "no work is left for it")
            names.extend(map(self.name, members))
        return names

    def responsive(self) -> list[str]:
        """Workers of ready hosts whose heartbeat is not much older than the freshest one."""
        members = [member for host_id in self.ready for member in self._hosts[host_id].members]
        seen = {address: self._seen.get(address, 0.0) for address in members}
        newest = max(seen.values(), default=0.0)
        return [address for address, when in seen.items() if newest - when < _HEARTBEAT_S]

    def counts(self) -> Counter[str]:
        """Post → hosts that are ready or will be soon, without those that are let go."""
        return Counter(
            host.post for host_id, host in self._hosts.items() if host_id not in self._retiring
        )

    def expected(self) -> dict[str, int]:
        """Return agent → hosts that answer for it or will soon."""
        counts = self.counts()
        return {agent: counts[post] for post, own in self._agents_of.items() for agent in own}

    def _workers(self) -> list[WorkerInfo]:
        if self._client.status != "running":
            raise RunError("the scheduler is lost; run the same command again to resume")
        workers = cluster_workers(self._client)
        self._names.update({worker.address: worker.name for worker in workers})
        self._seen = {worker.address: worker.last_seen for worker in workers}
        return [worker for worker in workers if worker.address not in self._retiring]

    def _note_status(self, host: Host, workers: Iterable[WorkerInfo]) -> None:
        stopped = [worker.status for worker in workers if worker.status != "running"]
        if stopped:
            self._pause(host.host_id, f"the worker's status is {stopped[0]!r}")
        elif host.host_id in self._paused:
            self._paused.discard(host.host_id)
            if self.listener is not None:
                self.listener.paused(host.host_id, False)

    def _pause(self, host_id: str, why: str) -> None:
        if host_id in self._paused:
            return
        self._paused.add(host_id)
        self._emit(HostDraining(self.name(host_id), self._agents(self._hosts[host_id]), why))
        if self.listener is not None:
            self.listener.paused(host_id, True)

    def _drop(self, host_id: str, gone: Iterable[str]) -> None:
        """Forget a host that has lost workers."""
        host = self._hosts.pop(host_id)
        # One that hung says goodbye too when it is ended for that; what it hung on is to blame.
        hung = host_id in self._hung
        expected = host_id in self._retiring or (
            not hung and all(left_on_purpose(self._client, address) for address in gone)
        )
        self._hung.discard(host_id)
        how = "left" if expected else "was lost"
        self._emit(HostLost(self.name(host_id), self._agents(host), f"the worker {how}"))
        self._paused.discard(host_id)
        load = self._loading.pop(host_id, None)
        if load is not None:
            load.future.release()
        if self.listener is not None:
            self.listener.left(host_id, blamed=not expected)
        self.ready.pop(host_id, None)
        self._unable.pop(host_id, None)


def cluster_workers(client: Client) -> list[WorkerInfo]:
    """List the workers of the cluster with what they declare.

    Raises:
        OSError: the scheduler did not answer.
    """
    return [
        WorkerInfo(address, str(info["name"]), info["resources"], info["status"], info["last_seen"])
        for address, info in workers_of(client).items()
    ]
