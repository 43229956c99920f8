"""From the job and the hardware to agents and workers: pure, tested without a cluster."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mas_batch.engines.base import EngineConfig
from mas_batch.errors import JobError
from mas_batch.job import Agent, Job, fingerprint


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
        agent = self.agent
        return fingerprint(
            [agent.model, agent.engine, agent.dtype, agent.device, agent.options, self.threads]
        )


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
    """Resolve the job's agents, in the job's order; there may be none to ask.

    `threads: 0` shares the cores among the embedded replicas; on a user's cluster it leaves
    the choice to the worker's own environment.
    """
    num_replicas = sum(agent.most for agent in job.agents)
    share = max(1, num_cores // max(1, num_replicas)) if embedded else 0
    return {agent.name: AgentSpec(agent, agent.threads or share) for agent in job.agents}


def worker_options(
    job: Job,
    specs: Mapping[str, AgentSpec],
    *,
    memory_bytes: int,
    num_gpus: int = 0,
    local_directory: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Return worker name → options of a Nanny, one worker per replica (`small-0`, `small-1`).

    All replicas that the job allows (`max_count`) are there, whether or not they are started.
    A worker has a task slot for each partition of its window and one more, so that a merge
    never waits behind a long generation; the model itself runs in an executor of one thread.
    """
    options: dict[str, dict[str, Any]] = {}
    gpu = 0
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
            if agent.resources.get("GPU") and num_gpus:
                env["CUDA_VISIBLE_DEVICES"] = str(gpu % num_gpus)
                gpu += 1
            options[name] = {
                "name": name,
                "nthreads": (job.routing.window or 2) + 1,
                "resources": job.capabilities(agent),
                "memory_limit": memory_limit,
                "local_directory": local_directory,
                # Dask's defaults are every interface: whoever reaches a worker runs code on it.
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
    without a worker while another has two.

    Raises:
        JobError: an agent has no worker; lists what every worker declares.
    """
    matched: dict[str, str] = {}  # address → agent
    slots = [
        agent
        for r in range(max(a.most for a in job.agents))
        for agent in job.agents
        if r < agent.most
    ]
    by_preference = sorted(workers, key=lambda w: (len(w.resources), w.name, w.address))
    holder: dict[str, int] = {}  # address → slot
    for slot in range(len(slots)):
        _augment(slot, slots, by_preference, job, holder, set())
    for address, slot in holder.items():
        matched[address] = slots[slot].name
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


def _augment(
    slot: int,
    slots: Sequence[Agent],
    workers: Sequence[WorkerInfo],
    job: Job,
    holder: dict[str, int],
    seen: set[str],
) -> bool:
    """Find a worker for the slot, moving earlier slots to other workers where that helps."""
    agent = slots[slot]
    capable = [w for w in workers if can_host(w, agent, job)]
    named = [w for w in capable if w.name.rpartition("-")[0] == agent.name]
    for worker in named or capable:
        if worker.address in seen:
            continue
        seen.add(worker.address)
        current = holder.get(worker.address)
        if current is None or _augment(current, slots, workers, job, holder, seen):
            holder[worker.address] = slot
            return True
    return False


def _show(resources: Mapping[str, float]) -> str:
    return ",".join(f"{name}={amount:g}" for name, amount in sorted(resources.items()))


def _describe(workers: Sequence[WorkerInfo]) -> Iterator[str]:
    for worker in workers:
        declared = _show(worker.resources) or "no resources"
        yield f"{worker.name} ({worker.address}) declares {declared}"
