"""From the ledgers of runs to what their agents, merges and phases took."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from dask.system import CPU_COUNT

from mas_batch.agents.posts import posts_of
from mas_batch.agents.spec import AgentSpec, agent_specs
from mas_batch.cluster import is_embedded
from mas_batch.engine_info import EngineInfo
from mas_batch.engines.job_options import partitions_at_once
from mas_batch.errors import JobError, RunError
from mas_batch.job import Agent, Job
from mas_batch.latency.phases import ALL, PUBLISHING
from mas_batch.planning.service_time import shares, speeds
from mas_batch.planning.survey import evenly_spaced
from mas_batch.registries import ENGINES
from mas_batch.run_folder.kept_job import read_job
from mas_batch.run_folder.plan import read_plan
from mas_batch.run_folder.read import Run

_MAX_ROWS = 2000
"""Tasks that a fit is made to, evenly spaced over the run; more would not make it better."""


@dataclass(frozen=True, slots=True, eq=False)
class AgentMeasurements:
    """What was measured of one agent."""

    tasks: pd.DataFrame
    """At most 2,000, evenly spaced over the runs; columns as `service_time.fit` takes them, and
    `prompt_tokens` and `completion_tokens`."""
    parts_s: Mapping[str, float]
    """compute, transfer, process → seconds of all tasks."""
    load_s: float
    """Of its model."""
    threads: int
    """Of each measured host."""
    cores: float
    """Of the machine, that a host keeps busy; 0: its hardware is its own."""
    engine: EngineInfo
    peak_memory_bytes: int | None
    failed_fraction: float


@dataclass(frozen=True, slots=True, eq=False)
class Measurements:
    """What was measured, put together from one run or several."""

    source: str
    """Names the runs, for people."""
    agents: Mapping[str, AgentMeasurements]
    merges: pd.DataFrame
    """Columns as `service_time.fit` takes them."""
    phases: tuple[tuple[int, Mapping[str, float]], ...]
    """Of each whole execution: partitions, and phase → seconds."""
    send_s: float
    """From sending a task to a free worker to its begin, and from its end to hearing of it."""
    num_workers: int
    largest_records: int
    """Usable records of the largest partition."""


def gather(runs: Sequence[Run], job: Job, source: str, *, embedded: bool) -> Measurements:
    """Put together what the ledgers of runs tell of a job.

    Args:
        runs: of this job or a similar one; an agent is known by its name,
            model, adapter, `quantize` and what it reads.
        source: names them, for people.
        embedded: whether the job's workers, and so those of these runs, share this machine.

    Raises:
        JobError: an agent of the job has answered nothing in any of them.
        RunError: a run has no ledger, or no job.yaml of this version.
    """
    ledgers = [_RunLedger(run, embedded=embedded) for run in runs]
    agents = {agent.name: _measure_agent(agent, ledgers, source) for agent in job.agents}
    waits = pd.concat([waiting_s(ledger.rows_of("answer")) for ledger in ledgers])
    return Measurements(
        source=source,
        agents=agents,
        merges=_evenly_spaced_rows(pd.concat([ledger.rows_of("merge") for ledger in ledgers])),
        phases=tuple(phases for ledger in ledgers for phases in ledger.phases()),
        send_s=float(waits.median()) if len(waits) else 0.0,
        num_workers=max(sum(post.most for post in posts_of(ledger.job)) for ledger in ledgers),
        largest_records=int(max(ledger.tasks["num_records"].max() for ledger in ledgers)),
    )


class _RunLedger:
    """One run's ledger, with the size of each of its tasks and what it took by itself."""

    def __init__(self, run: Run, *, embedded: bool) -> None:
        ledger: pd.DataFrame = run.ledger().to_pandas()
        plan = read_plan(run.store)
        if ledger.empty or plan is None:
            location = run.store.location("")
            raise RunError(f"{location} has no ledger: it was made by an earlier version")
        self.run, self.job = run, read_job(run)
        self._embedded = embedded and is_embedded(self.job.cluster, None)
        self.specs = agent_specs(self.job, embedded=self._embedded, num_cores=CPU_COUNT)
        is_task = ledger["stage"].isin(["answer", "merge", "load"])
        self._phases, self.tasks = ledger[~is_task], ledger[is_task].copy()
        self._estimated_tokens = plan.table["estimated_tokens"].to_numpy()
        numbers = self.tasks.select_dtypes("number").columns
        self.tasks[numbers] = self.tasks[numbers].fillna(0.0)
        self._add_sizes()
        self._add_seconds()

    def engine(self, agent_id: str) -> EngineInfo:
        """Return the engine that has answered for the agent."""
        name = str(self._facts(agent_id).get("engine"))
        return ENGINES[name] if name in ENGINES else EngineInfo("")

    def cores(self, agent_id: str) -> float:
        """Return how many of the shared machine's cores a host of the agent keeps busy."""
        on_gpu = str(self._facts(agent_id).get("device")).startswith("cuda")
        if not self._embedded or on_gpu or self.engine(agent_id).computes_elsewhere:
            return 0.0
        return float(self.specs[agent_id].threads)

    def _facts(self, agent_id: str) -> Mapping[str, Any]:
        facts: Mapping[str, Any] = self.run.manifest["engines"].get(agent_id, {})
        return facts

    def spec(self, agent: Agent) -> AgentSpec | None:
        """Return the run's agent of that name, if it is the same model and asked alike."""
        found = self.specs.get(agent.name)
        if found is None or _asked(found.agent, self.job) != _asked(agent, self.job):
            return None
        return found

    def rows_of(self, stage: str, agent_id: str | None = None) -> pd.DataFrame:
        """Return the tasks of a stage, of one agent or all."""
        rows = self.tasks[self.tasks["stage"] == stage]
        return rows if agent_id is None else rows[rows["agent_id"] == agent_id]

    def loads_of(self, agent_id: str) -> pd.DataFrame:
        """Return the loads of the hosts that have answered for the agent."""
        hosts, loads = self.rows_of("answer", agent_id)["worker"], self.rows_of("load")
        return loads[loads["worker"].isin(hosts)]

    def phases(self) -> Iterator[tuple[int, Mapping[str, float]]]:
        """Yield the phases of each execution that went from the start to the end."""
        for _, rows in self._phases.groupby("execution", sort=False):
            seconds = rows.groupby("stage")["wall_s"].sum()
            found = {name: float(seconds.get(name, 0.0)) for name in ALL}
            if found[PUBLISHING] > 0:
                yield len(self._estimated_tokens), found

    def _add_sizes(self) -> None:
        """Add the estimated tokens of each task's texts, in proportion to its records."""
        tasks, partitions = self.tasks, self.tasks["partition"].astype(int)
        usable = self.rows_of("answer").groupby("partition")["num_records"].max()
        of_partition = tasks["partition"].map(usable).fillna(0.0)
        estimated = self._estimated_tokens[partitions]
        tokens = np.maximum(0.0, estimated - of_partition * self.job.task.max_new_tokens)
        share = tasks["num_records"] / of_partition.clip(lower=1.0)
        tasks["text_tokens"] = tokens * share.clip(upper=1.0)

    def _add_seconds(self) -> None:
        """Add each task's seconds on a machine that it has to itself, and which are the first."""
        tasks = self.tasks
        tasks["end_s"] = tasks["at_s"] + tasks["wall_s"]
        tasks["own_s"] = sum(tasks[f"{part}_s"] for part in ("read", "write", "compute", "process"))
        tasks["begin_s"] = tasks["end_s"] - tasks["own_s"] - tasks["wait_s"]
        answers = self.rows_of("answer")
        of_agents = {name: self.cores(name) for name in answers["agent_id"].unique()}
        of_hosts = answers.groupby("worker")["agent_id"].first().map(of_agents)
        is_merge = tasks["stage"] == "merge"  # it is in a thread of its own, whatever its worker
        cores = tasks["worker"].map(of_hosts).mask(is_merge).fillna(float(self._embedded))
        hosts = tasks["worker"].mask(is_merge, tasks.index.to_series())
        tasks["concurrent"] = tasks["agent_id"].map(
            {
                agent.name: partitions_at_once(agent, self.engine(agent.name))
                for agent in self.job.agents
                if agent.name in of_agents
            }
        )
        tasks["share"] = 1.0
        for _, rows in tasks.groupby("execution"):
            begins, ends = rows["begin_s"].to_numpy(), rows["end_s"].to_numpy()
            of_rows = cores[rows.index].to_numpy()
            speed = speeds(begins, ends, of_rows, hosts[rows.index].tolist(), CPU_COUNT)
            tasks.loc[rows.index, "seconds"] = speed * rows["own_s"]
            for _, at_host in rows[rows["stage"] == "answer"].groupby("worker"):
                own_share = shares(at_host["begin_s"].to_numpy(), at_host["end_s"].to_numpy())
                # News that is late makes tasks look as if they overlapped with the next ones.
                least = 1 / at_host["concurrent"].to_numpy()
                tasks.loc[at_host.index, "share"] = np.maximum(own_share, least)
        first = answers.groupby(["execution", "worker"])["end_s"].idxmin()
        tasks["is_first"] = tasks.index.isin(first)


def waiting_s(answers: pd.DataFrame) -> pd.Series[float]:
    """Return how long each task waited for something else than the others at its host.

    Args:
        answers: with `worker`; `concurrent`, how many tasks it works on at once; `at_s`,
            `begin_s` and `end_s`, when the task was sent, begun and heard of.
    """
    waited = pd.Series(0.0, answers.index)
    for _, rows in answers.sort_values("at_s", kind="stable").groupby("worker"):
        concurrent = int(rows["concurrent"].iloc[0])
        # They are begun in the order sent: each when so many have ended that there is room for it.
        room = np.full(len(rows), -np.inf)
        room[concurrent:] = np.sort(rows["end_s"])[:-concurrent]
        waited[rows.index] = rows["begin_s"] - np.maximum(rows["at_s"], room)
    return waited.clip(lower=0.0)


def _measure_agent(agent: Agent, ledgers: Sequence[_RunLedger], source: str) -> AgentMeasurements:
    """Put together what the runs tell of one agent."""
    useful = [
        ledger
        for ledger in ledgers
        if ledger.spec(agent) is not None and len(ledger.rows_of("answer", agent.name))
    ]
    if not useful:
        there = sorted({f"{a.name} ({_short(a)})" for k in ledgers for a in k.job.agents})
        raise JobError(
            f"with model {_short(agent)!r} it has answered nothing in {source}; "
            f"agents there: {', '.join(there)}",
            key=f"agents.{agent.name}",
        )
    spec = useful[-1].spec(agent)
    assert spec is not None
    tasks = pd.concat([ledger.rows_of("answer", agent.name) for ledger in useful])
    loads = pd.concat([ledger.loads_of(agent.name) for ledger in useful])
    total = tasks.sum(numeric_only=True)
    num_asked = total["num_records"] * agent.samples
    failed = 1 - float(total["num_answers"] / num_asked) if num_asked else 0.0
    return AgentMeasurements(
        tasks=_evenly_spaced_rows(tasks),
        parts_s={
            "compute": float(total["compute_s"]),
            "transfer": float(total["read_s"] + total["write_s"]),
            "process": float(total["process_s"]),
        },
        load_s=float(loads["seconds"].mean()),
        threads=spec.threads,
        cores=useful[-1].cores(agent.name),
        engine=useful[-1].engine(agent.name),
        peak_memory_bytes=int(tasks["peak_memory_bytes"].max()) or None,
        failed_fraction=min(1.0, max(0.0, failed)),
    )


def _asked(agent: Agent, job: Job) -> tuple[object, ...]:
    """Return what an agent's speed depends on so much that another one's says nothing of it."""
    return agent.model, agent.adapter, agent.quantize, agent.reads_labels(job.task)


def _short(agent: Agent) -> str:
    """Name an agent's model and what else `_asked` compares, for people."""
    more = {"adapter": agent.adapter, "quantize": agent.quantize, "reads": agent.reads}
    given = (f"{key}: {value.partition('#')[0]}" for key, value in more.items() if value)
    return ", ".join([agent.model.partition("#")[0], *given])


def _evenly_spaced_rows(tasks: pd.DataFrame) -> pd.DataFrame:
    return tasks.iloc[evenly_spaced(len(tasks), _MAX_ROWS)]
