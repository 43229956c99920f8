"""From the job and the hardware to agents and workers: pure, tested without a cluster."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mas_batch.agents.posts import Post, posts_of
from mas_batch.by_name import pickled_by_name
from mas_batch.engines.base import EngineConfig
from mas_batch.engines.job_options import engine_of, partitions_at_once
from mas_batch.job import Agent, Job, fingerprint


@pickled_by_name
@dataclass(frozen=True, slots=True)
class AgentSpec:
    """An agent as its worker needs it."""

    agent: Agent
    threads: int
    """CPU threads for the model; 0 leaves the library's choice."""
    post: str = ""
    """Name of its post in the whole job."""
    adapters: int = 0
    """Different adapters among the agents of its post."""

    @property
    def agent_id(self) -> str:
        """The agent's name in the job."""
        return self.agent.name

    @property
    def engine_config(self) -> EngineConfig:
        """How the engine is to hold the model; the agent's own options are not among these."""
        return EngineConfig(
            dtype=self.agent.dtype,
            device=self.agent.device,
            threads=self.threads,
            max_batch_tokens=self.agent.batch_tokens,
            quantize=self.agent.quantize,
            tensor=self.agent.parallel.tensor,
            adapters=self.adapters,
            options=self.agent.engine_options,
        )

    @property
    def engine_key(self) -> str:
        """The same for all agents of a host; with another one, another model is to be loaded."""
        return fingerprint([*self.agent.engine_settings, self.threads, self.adapters])


def agent_specs(job: Job, *, embedded: bool, num_cores: int) -> dict[str, AgentSpec]:
    """Resolve the job's agents, in the job's order.

    `threads: 0` shares the cores among the embedded hosts whose engines use threads, and gives
    the others one; on a user's cluster it leaves the choice to the worker's own environment.
    """
    posts = posts_of(job)
    computing = sum(p.most * p.size for p in posts if engine_of(_agent(job, p)).uses_threads)
    share = max(1, num_cores // computing) if computing else 1
    found: dict[str, tuple[int, str, int]] = {}
    for post in posts:
        uses_threads = engine_of(_agent(job, post)).uses_threads
        threads = (share if uses_threads else 1) if embedded else 0
        adapters = {a.adapter for a in job.agents if a.name in post.agents}
        found |= dict.fromkeys(post.agents, (threads, post.name, len(adapters - {None})))
    return {
        agent.name: AgentSpec(agent, agent.threads or threads, post, adapters)
        for agent in job.agents
        for threads, post, adapters in [found[agent.name]]
    }


def worker_options(
    job: Job,
    specs: Mapping[str, AgentSpec],
    *,
    memory_bytes: int,
    devices: Mapping[str, str],
    local_directory: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Return worker name → options of a Nanny, a worker for each member of a host (`small-0`).

    All hosts that the job allows (`max_count`) are there, whether or not they are started. A
    worker has a task slot for each partition that its engine works on at once, for one that waits
    there, and for a merge, which so never waits behind a long generation.

    Args:
        devices: worker name → value of `CUDA_VISIBLE_DEVICES`; see `devices.assign_devices`.
    """
    posts = posts_of(job)
    # Dask's own `auto` would share the memory by task slots per core, of which we have few.
    memory_limit: str | int = job.cluster.memory_limit
    if memory_limit == "auto":
        memory_limit = memory_bytes // sum(post.most * post.size for post in posts)
    options: dict[str, dict[str, Any]] = {}
    for post in posts:
        threads = str(specs[post.agents[0]].threads)
        # Nannies default these to 1, and MKL's wins over OMP's.
        env = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
        # Threads that spin while they wait starve the neighbours that share their cores.
        env["OMP_WAIT_POLICY"] = "PASSIVE"
        env["TQDM_DISABLE"] = "1"  # a worker's own bars would garble the terminal
        in_flight = job.routing.window or partitions_at_once(_agent(job, post)) + 1
        for name in post.worker_names:
            seen = {"CUDA_VISIBLE_DEVICES": devices[name]} if name in devices else {}
            options[name] = {
                "name": name,
                "nthreads": in_flight + 1,
                "resources": dict(post.needs),
                "memory_limit": memory_limit,
                "local_directory": local_directory,
                # Dask's default is every interface: who reaches a worker can run code on it.
                "host": "127.0.0.1",
                "dashboard_address": "127.0.0.1:0",
                "env": {**env, **seen},
                "silence_logs": logging.ERROR,
            }
    return options


def _agent(job: Job, post: Post) -> Agent:
    """Return one of the post's agents; their engine is the same."""
    return next(agent for agent in job.agents if agent.name == post.agents[0])
