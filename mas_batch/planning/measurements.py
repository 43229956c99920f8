"""From the ledgers of runs to what their agents, merges and phases took."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from dask.system import CPU_COUNT

from mas_batch.agents.spec import AgentSpec, agent_specs
from mas_batch.cluster import is_embedded
from mas_batch.errors import JobError, RunError
from mas_batch.job import Agent, Job
from mas_batch.latency.phases import ALL, PUBLISHING
from mas_batch.planning.service_time import Floats, Tasks, waits, work_done
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

    tasks: Tasks
    """At most 2,000, evenly spaced over the runs."""
    prompt_tokens: Floats
    """Of each of these tasks."""
    completion_tokens: Floats
    parts_s: Mapping[str, float]
    """compute, transfer, process → seconds of all tasks."""
    load_s: float
    """Of its model."""
    threads: int
    """Of each measured replica."""
    cores: float
    """Of the machine, that a replica keeps busy; 0: its hardware is its own."""
    peak_memory_bytes: int | None
    failed_fraction: float


@dataclass(frozen=True, slots=True, eq=False)
class Measurements:
    """What was measured, put together from one run or several."""

    source: str
    """Names the runs, for people."""
    agents: Mapping[str, AgentMeasurements]
    merges: Tasks
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
        runs: of this job or a similar one; an agent is known by its name and model.
        source: names them, for people.
        embedded: whether the job's workers, and so those of these runs, share this machine.

    Raises:
        JobError: an agent of the job has answered nothing in any of them.
        RunError: a run has no ledger, or no job.yaml of this version.
    """
    ledgers = [_RunLedger(run, embedded=embedded) for run in runs]
    agents = {agent.name: _measure_agent(agent, ledgers, source) for agent in job.agents}
    merges = _concat([ledger.tasks_of("merge") for ledger in ledgers])
    lags = np.concatenate([ledger.lags() for ledger in ledgers])
    return Measurements(
        source=source,
        agents=agents,
        merges=merges.take(evenly_spaced(len(merges), _MAX_ROWS)),
        phases=tuple(phases for ledger in ledgers for phases in ledger.phases()),
        send_s=float(np.median(lags)) if len(lags) else 0.0,
        num_workers=max(sum(agent.most for agent in ledger.job.agents) for ledger in ledgers),
        largest_records=int(max(ledger.largest for ledger in ledgers)),
    )


class _RunLedger:
    """One run's ledger as columns, with the size of each of its tasks."""

    def __init__(self, run: Run, *, embedded: bool) -> None:
        ledger = run.ledger()
        plan = read_plan(run.store)
        if not ledger.num_rows or plan is None:
            location = run.store.location("")
            raise RunError(f"{location} has no ledger: it was made by an earlier version")
        self.run, self.job = run, read_job(run)
        self._embedded = embedded and is_embedded(self.job.cluster, None)
        self.specs = agent_specs(self.job, embedded=self._embedded, num_cores=CPU_COUNT)
        self.num_partitions = plan.num_partitions
        is_task = pc.is_in(ledger["stage"], pa.array(["answer", "merge", "load"]))
        tasks = ledger.filter(is_task)
        self._phases = ledger.filter(pc.invert(is_task))
        self._columns = {name: _column(tasks, name) for name in tasks.schema.names}
        self._stage, self._agent = self._columns["stage"], self._columns["agent_id"]
        self._records, self._tokens = self._sizes(plan.table)
        self._work_s = self._work()

    @property
    def largest(self) -> float:
        """Usable records of the largest partition that was asked about."""
        return float(self._records.max(initial=0))

    def cores(self, agent_id: str | None) -> float:
        """Return how many of the shared machine's cores a replica of the agent keeps busy."""
        if not self._embedded:
            return 0.0
        if agent_id is None:
            return 1.0  # a merge
        facts = self.run.manifest["engines"].get(agent_id, {})
        engine = str(facts.get("engine"))
        elsewhere = engine in ENGINES and ENGINES[engine].computes_elsewhere
        elsewhere = elsewhere or str(facts.get("device")).startswith("cuda")
        return 0.0 if elsewhere else float(self.specs[agent_id].threads)

    def spec(self, agent: Agent) -> AgentSpec | None:
        """Return the run's agent of that name and model."""
        found = self.specs.get(agent.name)
        return found if found is not None and found.agent.model == agent.model else None

    def rows_of(self, stage: str, agent_id: str | None = None) -> Any:
        """Return a mask of the tasks."""
        mask = self._stage == stage
        return mask if agent_id is None else mask & (self._agent == agent_id)

    def column(self, name: str, rows: Any) -> Floats:
        """Return a column of these tasks."""
        found: Floats = self._columns[name][rows]
        return found

    def tasks_of(self, stage: str, agent_id: str | None = None) -> Tasks:
        """Return the tasks for a fit."""
        rows = self.rows_of(stage, agent_id)
        workers = self._columns["worker"][rows]
        first = np.zeros(len(workers), np.bool_)
        if stage == "answer":
            order = np.argsort(self._ends()[rows], kind="stable")
            _, where = np.unique(workers[order].astype(str), return_index=True)
            first[order[where]] = True
        return Tasks(self._records[rows], self._tokens[rows], self._work_s[rows], first)

    def loads_s(self, agent_id: str) -> Floats:
        """Return what loading the agent's model took each time, had it the machine to itself."""
        found: Floats = self._work_s[self.rows_of("load", agent_id)]
        return found

    def lags(self) -> Floats:
        """Return how long each question waited, but for its worker to be free."""
        answers = self.rows_of("answer")
        sent, heard, own = self._columns["at_s"], self._ends(), self._own()
        found = []
        for worker in set(self._columns["worker"][answers]):
            rows = np.flatnonzero(answers & (self._columns["worker"] == worker))
            rows = rows[np.argsort(heard[rows], kind="stable")]
            found.append(waits(sent[rows], heard[rows], own[rows]))
        return np.concatenate(found) if found else np.zeros(0)

    def phases(self) -> Iterator[tuple[int, Mapping[str, float]]]:
        """Yield the phases of each execution that went from the start to the end."""
        for execution in pc.unique(self._phases["execution"]).to_pylist():
            own = self._phases.filter(pc.equal(self._phases["execution"], execution))
            rows = own.select(["stage", "wall_s"]).to_pylist()
            found = {
                name: sum(row["wall_s"] for row in rows if row["stage"] == name) for name in ALL
            }
            if found[PUBLISHING] > 0:
                yield self.num_partitions, found

    def _ends(self) -> Floats:
        return np.asarray(self._columns["at_s"] + self._columns["wall_s"])

    def _own(self) -> Floats:
        parts = (self._columns[f"{part}_s"] for part in ("read", "write", "compute", "process"))
        return np.asarray(sum(np.nan_to_num(part) for part in parts))

    def _work(self) -> Floats:
        """Return each task's seconds had it had the machine to itself."""
        ends, own = self._ends(), self._own()
        cores = np.array([self.cores(agent_id) for agent_id in self._agent])
        work_s = np.zeros(len(own))
        for execution in set(self._columns["execution"]):
            rows = self._columns["execution"] == execution
            work_s[rows] = work_done((ends - own)[rows], ends[rows], cores[rows], CPU_COUNT)
        return work_s

    def _sizes(self, plan: pa.Table) -> tuple[Floats, Floats]:
        """Return each task's records, and the estimated tokens of their texts."""
        partitions = np.nan_to_num(self._columns["partition"]).astype(int)
        records = np.nan_to_num(self._columns["num_records"])
        usable = np.zeros(self.num_partitions)
        answers = self._stage == "answer"
        np.maximum.at(usable, partitions[answers], records[answers])
        estimated = plan["estimated_tokens"].to_numpy()
        tokens = np.maximum(0.0, estimated - usable * self.job.task.max_new_tokens)
        share = records / np.maximum(1.0, usable[partitions])
        return records, np.asarray(tokens[partitions] * np.minimum(1.0, share))


def _measure_agent(agent: Agent, ledgers: Sequence[_RunLedger], source: str) -> AgentMeasurements:
    """Put together what the runs tell of one agent."""
    useful = [
        (ledger, ledger.rows_of("answer", agent.name))
        for ledger in ledgers
        if ledger.spec(agent) is not None and ledger.rows_of("answer", agent.name).any()
    ]
    if not useful:
        there = sorted({f"{a.name} ({_short(a.model)})" for k in ledgers for a in k.job.agents})
        raise JobError(
            f"with model {_short(agent.model)!r} it has answered nothing in {source}; "
            f"agents there: {', '.join(there)}",
            key=f"agents.{agent.name}",
        )

    def column(name: str) -> Floats:
        return np.concatenate([np.nan_to_num(each.column(name, rows)) for each, rows in useful])

    last = useful[-1][0]
    spec = last.spec(agent)
    assert spec is not None
    num_asked = (column("num_records") * agent.samples).sum()
    failed = 1 - float(column("num_answers").sum() / num_asked) if num_asked else 0.0
    tasks = _concat([each.tasks_of("answer", agent.name) for each, _ in useful])
    kept = evenly_spaced(len(tasks), _MAX_ROWS)
    return AgentMeasurements(
        tasks=tasks.take(kept),
        prompt_tokens=column("prompt_tokens")[kept],
        completion_tokens=column("completion_tokens")[kept],
        parts_s={
            "compute": float(column("compute_s").sum()),
            "transfer": float((column("read_s") + column("write_s")).sum()),
            "process": float(column("process_s").sum()),
        },
        load_s=float(np.mean(np.concatenate([e.loads_s(agent.name) for e, _ in useful]))),
        threads=spec.threads,
        cores=last.cores(agent.name),
        peak_memory_bytes=int(column("peak_memory_bytes").max()) or None,
        failed_fraction=min(1.0, max(0.0, failed)),
    )


def _short(model: str) -> str:
    return model.partition("#")[0]


def _column(table: pa.Table, name: str) -> Any:
    """Return numbers as floats, null as NaN, everything else as objects."""
    column = table[name]
    if pa.types.is_floating(column.type) or pa.types.is_integer(column.type):
        return column.cast(pa.float64()).to_numpy()
    return np.array(column.to_pylist(), dtype=object)


def _concat(parts: Sequence[Tasks]) -> Tasks:
    return Tasks(
        np.concatenate([part.num_records for part in parts]),
        np.concatenate([part.text_tokens for part in parts]),
        np.concatenate([part.seconds for part in parts]),
        np.concatenate([part.is_first for part in parts]),
    )
