"""From the job and the hardware to agents and workers: pure, tested without a cluster."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mas_batch.by_name import pickled_by_name
from mas_batch.engines.base import EngineConfig
from mas_batch.errors import JobError
from mas_batch.job import Agent, Job, fingerprint


@pickled_by_name
@dataclass(frozen=True, slots=True)
class AgentSpec:
    """An agent as its worker needs it."""

    agent: Agent
    threads: int
    """CPU threads for the model; 0 leaves the library's choice."""

    @property
    def agent_id(self) -> str:
        """The agent's name in the job."""
        return self.agent.name

    @property
    def engine_config(self) -> EngineConfig:
        """How the engine is to hold the model."""
        return EngineConfig(
            dtype=self.agent.dtype,
            device=self.agent.device,
            threads=self.threads,
            max_batch_tokens=self.agent.batch_tokens,
            options=self.agent.options,
        )

    @property
    def engine_key(self) -> str:
        """Changes when the resident model has to be loaded anew."""
        return fingerprint([*self.agent.loaded_as, self.agent.options, self.threads])


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What is known of a worker of a running cluster."""

    address: str
    name: str
    resources: Mapping[str, float]
    status: str = "running"
    """Dask's: `paused` by memory, `closing_gracefully` when it is being retired."""
    last_seen: float = 0.0
    """Unix time of its last heartbeat, on the scheduler's clock."""


def agent_specs(job: Job, *, embedded: bool, num_cores: int) -> dict[str, AgentSpec]:
    """Resolve the job's agents, in the job's order.

    `threads: 0` shares the cores among the embedded replicas; on a user's cluster it leaves
    the choice to the worker's own environment.
    """
    num_replicas = sum(agent.most for agent in job.agents)
    share = max(1, num_cores // num_replicas) if embedded else 0
    return {agent.name: AgentSpec(agent, agent.threads or share) for agent in job.agents}


def worker_options(
    job: Job,
    specs: Mapping[str, AgentSpec],
    *,
    memory_bytes: int,
    devices: Mapping[str, str],
    local_directory: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Return worker name → options of a Nanny, one worker per replica (`small-0`, `small-1`).

    All replicas that the job allows (`max_count`) are there, whether or not they are started.
    A worker has a task slot for each partition of its window and one more, so that a merge
    never waits behind a long generation; the model itself runs in an executor of one thread.

    Args:
        devices: worker name → value of `CUDA_VISIBLE_DEVICES`; see `devices.assign_devices`.
    """
    options: dict[str, dict[str, Any]] = {}
    # Dask's own `auto` would share the memory by task slots per core, of which we have few.
    memory_limit: str | int = job.cluster.memory_limit
    if memory_limit == "auto":
        memory_limit = memory_bytes // sum(agent.most for agent in job.agents)
    for agent in job.agents:
        for replica in range(agent.most):
            name = replica_name(agent.name, replica)
            threads = str(specs[agent.name].threads)
            # Nannies default these to 1, and MKL's wins over OMP's.
            env = dict.fromkeys(
                ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads
            )
            # Threads that spin while they wait starve the neighbours that share their cores.
            env["OMP_WAIT_POLICY"] = "PASSIVE"
            env["TQDM_DISABLE"] = "1"  # a worker's own bars would garble the terminal
            if name in devices:
                env["CUDA_VISIBLE_DEVICES"] = devices[name]
            options[name] = {
                "name": name,
                "nthreads": (job.routing.window or 2) + 1,
                "resources": job.capabilities(agent),
                "memory_limit": memory_limit,
                "local_directory": local_directory,
                # Dask's default is every interface: who reaches a worker can run code on it.
                "host": "127.0.0.1",
                "dashboard_address": "127.0.0.1:0",
                "env": env,
                "silence_logs": logging.ERROR,
            }
    return options


def replica_name(agent_id: str, number: int) -> str:
    """Return the name of the embedded worker that is the agent's replica of that number."""
    return f"{agent_id}-{number}"


def match_workers(workers: Sequence[WorkerInfo], job: Job) -> dict[str, str]:
    """Decide which worker serves which agent: worker address → agent name.

    A worker can host an agent if it declares all its capabilities and resources. Workers
    named `<agent>-<number>` go to that agent; the rest by maximum bipartite matching (Kuhn
    1955), every agent's first replica before any agent's second, so that no agent is left
    without a worker while another has two. Workers that declare the same are one vertex: time
    grows with workers, not with their square.

    Raises:
        JobError: an agent has no worker; lists what every worker declares.
    """
    groups = _groups(workers, job)
    choices = {agent.name: _choices(agent, groups, job) for agent in job.agents}
    waiting = job.agents
    for replica in range(max(agent.most for agent in job.agents)):
        # Who gets no further worker now never will: what helps later was tried already.
        waiting = tuple(
            agent for agent in waiting if replica < agent.most and _give_worker(agent.name, choices)
        )
    matched = {
        worker.address: agent_id
        for group in groups
        for worker, agent_id in zip(group.workers, group.agents, strict=False)
    }
    unserved = [i for i, agent in enumerate(job.agents) if agent.name not in matched.values()]
    if unserved:
        agent = job.agents[unserved[0]]
        raise JobError(
            f"{agent.name!r} needs a worker with {_show(job.capabilities(agent))}; none is free. "
            f"Workers there: {'; '.join(_describe(workers)) or 'none'}. "
            f"Start one with: dask worker SCHEDULER --resources '{_show(job.capabilities(agent))}'",
            key=f"agents.{unserved[0]}.capabilities",
        )
    return matched


def place_newcomer(worker: WorkerInfo, job: Job, serving: Iterable[str]) -> str | None:
    """Choose the agent that a worker which joined later shall serve, or None if it is not needed.

    A restarted worker gets its old agent by its name; any other the agent that lacks most.
    """
    counts = Counter(serving)
    wanted = [
        agent
        for agent in job.agents
        if counts[agent.name] < agent.most and can_host(worker, agent, job)
    ]
    wanted.sort(key=lambda a: (worker.name.rpartition("-")[0] != a.name, counts[a.name] / a.most))
    return wanted[0].name if wanted else None


def can_host(worker: WorkerInfo, agent: Agent, job: Job) -> bool:
    """Whether the worker declares all that the agent needs."""
    needs = job.capabilities(agent)
    return all(worker.resources.get(name, 0) >= amount for name, amount in needs.items())


@dataclass(frozen=True, slots=True)
class _Group:
    """Workers that are equally good for every agent."""

    workers: list[WorkerInfo]
    named_for: str
    """The agent whose name they bear; empty: no agent's."""
    agents: list[str] = field(default_factory=list)
    """Whom they serve, one entry per worker that is taken."""

    @property
    def has_free_worker(self) -> bool:
        return len(self.agents) < len(self.workers)


def _groups(workers: Sequence[WorkerInfo], job: Job) -> list[_Group]:
    """Group the workers by what they declare; those that could do least for others come first."""
    names = {agent.name for agent in job.agents}
    groups: dict[tuple[object, str], _Group] = {}
    for worker in sorted(workers, key=lambda w: (len(w.resources), w.name, w.address)):
        prefix = worker.name.rpartition("-")[0]
        named_for = prefix if prefix in names else ""
        key = (frozenset(worker.resources.items()), named_for)
        groups.setdefault(key, _Group([], named_for)).workers.append(worker)
    return list(groups.values())


def _choices(agent: Agent, groups: Sequence[_Group], job: Job) -> list[_Group]:
    """Return the groups whose workers may serve the agent."""
    capable = [group for group in groups if can_host(group.workers[0], agent, job)]
    return [group for group in capable if group.named_for == agent.name] or capable


def _give_worker(agent_id: str, choices: Mapping[str, list[_Group]]) -> bool:
    """Give the agent one more worker: a free one, or one whose agent can go to another.

    The agents that could make room are searched breadth first, so the fewest have to go.
    """
    wanted_by: dict[int, str] = {}  # id of a group without a free worker → who would go there
    leaves: dict[str, _Group] = {}  # agent that could make room → where
    queue = deque([agent_id])
    while queue:
        mover = queue.popleft()
        free = next((group for group in choices[mover] if group.has_free_worker), None)
        if free is not None:
            free.agents.append(mover)
            while mover != agent_id:
                left = leaves[mover]
                successor = wanted_by[id(left)]
                left.agents[left.agents.index(mover)] = successor
                mover = successor
            return True
        for group in choices[mover]:
            if id(group) in wanted_by:
                continue
            wanted_by[id(group)] = mover
            for other in dict.fromkeys(group.agents):
                if other != agent_id and other not in leaves:
                    leaves[other] = group
                    queue.append(other)
    return False


def _show(resources: Mapping[str, float]) -> str:
    return ",".join(f"{name}={amount:g}" for name, amount in sorted(resources.items()))


def _describe(workers: Sequence[WorkerInfo]) -> Iterator[str]:
    for worker in workers:
        declared = _show(worker.resources) or "no resources"
        yield f"{worker.name} ({worker.address}) declares {declared}"
