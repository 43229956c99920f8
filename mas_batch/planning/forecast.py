"""Simulates runs with the project's own dispatcher: how long, how many tokens, who is busy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from mas_batch.job import Agent, Job
from mas_batch.latency.model import Floats
from mas_batch.latency.phases import ANSWERING, FIRST_MODEL
from mas_batch.latency.simulate import Costs, History, Simulation, Worker
from mas_batch.planning.evidence import PARTS, Evidence
from mas_batch.planning.rates import HANDLE_S, Rates, other_phases, rates, tokens_asked
from mas_batch.planning.survey import Cut, Survey
from mas_batch.routing.dispatcher import Dispatcher
from mas_batch.routing.instructions import Ask, Rules, Work
from mas_batch.routing.policies import POLICIES
from mas_batch.routing.rules import rules_of

MAX_SIMULATED = 600
"""Partitions of a simulation, evenly spaced; the rest goes on at the rate of its middle half."""
_PER_REPLICA = 8
"""And at least so many for each replica, or its middle would be start and end."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What may be chosen about a run."""

    cut: Cut
    replicas: Mapping[str, int]
    """By agent."""
    policy: str

    @property
    def total(self) -> int:
        """Replicas of all agents."""
        return sum(self.replicas.values())


@dataclass(slots=True)
class Share:
    """What one agent is asked about in one simulated run."""

    num_tasks: float = 0.0
    num_records: float = 0.0
    text_tokens: float = 0.0
    own_s: float = 0.0
    """Of its tasks, each on a machine that it has to itself."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One simulated run."""

    phases: Mapping[str, float]
    """Phase → seconds."""
    history: History
    """Of its passes, or of the part of them that was simulated."""
    shares: Mapping[str, Share]
    """By agent; of the whole corpus."""
    core_fraction: float
    """How busy the shared machine's cores are; 0: there is no shared machine."""

    @property
    def duration_s(self) -> float:
        """From the start of the command to the published manifest."""
        return float(sum(self.phases.values()))


@dataclass(frozen=True, slots=True, eq=False)
class Forecaster:
    """Everything that stays the same while settings are compared."""

    job: Job
    evidence: Evidence
    survey: Survey
    undecided: Mapping[int, float] | None
    """Answers per record → share of the records that is undecided with so many; None: not known,
    and believed to be all."""
    escalated: float
    """Share of the records that go to the last agent."""
    embedded: bool

    def simulate(self, setting: Setting, seed: int | None) -> Outcome:
        """Simulate a run.

        Args:
            seed: of one that might come; None: the one that is expected, from all measurements.
        """
        rng = None if seed is None else np.random.default_rng(seed)
        known = rates(self.job, self.evidence, setting.replicas, embedded=self.embedded, rng=rng)
        drawn = np.random.default_rng(seed or 0)
        phases = other_phases(
            self.evidence,
            num_partitions=len(setting.cut),
            num_records=self.survey.num_records,
            read_s=self.survey.read_s,
            num_workers=setting.total if self.embedded else 0,
        )
        job = self.job
        undecided = self.undecided
        if undecided is None:
            undecided = dict.fromkeys(range(1, job.answers_per_record), 1.0)
        first = _Pass(job, job.first_agents, rules_of(job, {}), undecided, known, drawn)
        history, answering_s = first.run(setting)
        shares, core_s = dict(first.shares), first.core_s
        if self.escalated:
            agents = tuple(a for a in job.agents if a not in job.first_agents)
            plain = replace(rules_of(job, {}), answers_per_record=agents[0].samples, first=None)
            second = _Pass(job, agents, plain, {}, known, drawn)
            later, more_s = second.run(setting, self.escalated)
            history, answering_s = history.followed_by(later), answering_s + more_s
            shares, core_s = shares | second.shares, core_s + second.core_s
        phases |= {FIRST_MODEL: history.loaded_s, ANSWERING: answering_s}
        cores_s = known.num_cores * max(1e-9, history.asking_s)
        return Outcome(phases, history, shares, core_s / cores_s)

    def tokens(self, outcome: Outcome, agent_id: str) -> tuple[int, int]:
        """Return (prompt tokens, completion tokens) of an agent."""
        share = outcome.shares.get(agent_id, Share())
        return tokens_asked(self.evidence.agents[agent_id], share.num_records, share.text_tokens)

    def parts_s(self, outcome: Outcome, agent_id: str) -> dict[str, float]:
        """Return T_compute, T_transfer and T_processing of all of an agent's tasks."""
        share = outcome.shares.get(agent_id, Share())
        measured = self.evidence.agents[agent_id].parts_s
        whole = sum(measured.values()) or 1.0
        own = {part: share.own_s * measured[part] / whole for part in PARTS}
        waiting_s = share.num_tasks * self.evidence.send_s
        return {
            "compute_s": own["compute"],
            "transfer_s": own["transfer"],
            "processing_s": own["process"] + waiting_s,
        }


def busy_fractions(setting: Setting, outcome: Outcome) -> dict[str, float]:
    """Return agent → share of its replicas' time that they are at work while answers are asked."""
    history = outcome.history
    whole_s = max(1e-9, history.asking_s)
    busy = dict.fromkeys(setting.replicas, 0.0)
    for worker, seconds in history.busy_s.items():
        busy[worker.rpartition("-")[0]] += seconds
    return {
        name: min(1.0, seconds / whole_s / setting.replicas[name]) for name, seconds in busy.items()
    }


@dataclass(slots=True)
class _Pass:
    """Asks some of the job's agents about the corpus."""

    job: Job
    agents: tuple[Agent, ...]
    rules: Rules
    undecided: Mapping[int, float]
    known: Rates
    rng: np.random.Generator
    shares: defaultdict[str, Share] = field(default_factory=lambda: defaultdict(Share))
    core_s: float = 0.0
    """Core-seconds of the shared machine."""
    _warm: set[str] = field(default_factory=set)
    _open: dict[int, float] = field(default_factory=dict)
    _records: Floats = field(default_factory=lambda: np.zeros(0))
    _tokens: Floats = field(default_factory=lambda: np.zeros(0))

    def run(self, setting: Setting, fraction: float = 1.0) -> tuple[History, float]:
        """Simulate the pass; returns its history, and how long answering takes.

        Args:
            fraction: of each partition's records that are asked about.
        """
        cut = setting.cut
        chosen = _evenly(len(cut), max(MAX_SIMULATED, _PER_REPLICA * setting.total))
        self._records = cut.num_records[chosen] * fraction
        self._tokens = cut.text_tokens[chosen] * fraction
        merged: list[float] = []
        simulation = Simulation(
            self._dispatcher(setting.policy),
            list(self._workers(setting.replicas)),
            self._costs(),
            samples={agent.name: agent.samples for agent in self.agents},
            undecided=self._undecided,
            may_start=self._may_start,
            on_merged=merged.append,
            look_s=max(1.0, self._longest_s() / 20),
        )
        history = simulation.run()
        self._grow(cut.num_records.sum() * fraction / max(1e-9, self._records.sum()))
        return history, _answering_s(history, merged, len(cut))

    def _dispatcher(self, policy: str) -> Dispatcher:
        per_record = self.job.task.max_new_tokens
        work = [
            Work(index, max(1, round(tokens + records * per_record)), max(1, round(records)))
            for index, (records, tokens) in enumerate(zip(self._records, self._tokens, strict=True))
        ]
        samples = {agent.name: agent.samples for agent in self.agents}
        return Dispatcher(samples, self.rules, POLICIES[policy](), work, len(work))

    def _workers(self, replicas: Mapping[str, int]) -> Iterable[Worker]:
        for agent in self.agents:
            known = self.known.agents[agent.name]
            for number in range(replicas[agent.name]):
                name = f"{agent.name}-{number}"
                yield Worker(name, agent.name, known.load_s, known.cores)

    def _costs(self) -> Costs:
        shared = self.known.num_cores != float("inf")
        return Costs(
            answer_s=self._answer_s,
            merge_s=self._merge_s,
            handle_s=HANDLE_S,
            send_s=self.known.send_s,
            merge_cores=1.0 if shared else 0.0,
            num_cores=self.known.num_cores,
        )

    def _answer_s(self, worker: Worker, ask: Ask, share: float) -> float:
        service = self.known.agents[worker.agent_id].answer
        records = float(self._records[ask.partition]) * share
        tokens = float(self._tokens[ask.partition]) * share
        seconds = service.seconds(records, tokens) * self._stray(service.spread)
        if worker.name not in self._warm:
            self._warm.add(worker.name)
            seconds += service.first_s
        self.core_s += seconds * worker.cores
        if ask.purpose != "copy":  # of two tries, one counts
            asked = self.shares[worker.agent_id]
            asked.num_tasks += 1
            asked.num_records += records
            asked.text_tokens += tokens
            asked.own_s += seconds
        return seconds

    def _merge_s(self, partition: int) -> float:
        service = self.known.merge
        seconds = service.seconds(float(self._records[partition]), float(self._tokens[partition]))
        seconds *= self._stray(service.spread)
        if self.known.num_cores != float("inf"):
            self.core_s += seconds
        return seconds

    def _stray(self, spread: tuple[float, ...]) -> float:
        return spread[self.rng.integers(len(spread))]

    def _undecided(self, partition: int, num_answers: int) -> float:
        """Draw how many of the partition's records that are still open stay so."""
        looks = [n for n in self.undecided if n < num_answers]
        before = self.undecided[max(looks)] if looks else 1.0
        now = min(before, self.undecided.get(num_answers, 0.0))
        records = max(1, round(self._records[partition]))
        still = round(self._open.get(partition, 1.0) * records)
        drawn = self.rng.binomial(still, now / before) if before > 0 else 0
        self._open[partition] = drawn / records
        return float(drawn / records)

    def _may_start(self, served: set[str]) -> bool:
        """As `routing.dask.DaskRouter` waits for models: until who is there can answer enough."""
        samples = {agent.name: agent.samples for agent in self.agents}
        there = sum(samples[name] for name in served)
        return served == samples.keys() or there >= self.rules.answers_per_record

    def _longest_s(self) -> float:
        records, tokens = self._records.max(), self._tokens.max()
        return max(a.answer.seconds(records, tokens) for a in self.known.agents.values())

    def _grow(self, times: float) -> None:
        """Count for the whole corpus what was simulated of a part of it."""
        for asked in self.shares.values():
            asked.num_tasks *= times
            asked.num_records *= times
            asked.text_tokens *= times
            asked.own_s *= times


def _answering_s(history: History, merged: list[float], num_partitions: int) -> float:
    """Return how long all partitions take, by the rate of those in the middle."""
    simulated_s = history.asking_s
    num_more = num_partitions - len(merged)
    if num_more <= 0:
        return simulated_s
    first, last = len(merged) // 4, 3 * len(merged) // 4
    return simulated_s + num_more * (merged[last] - merged[first]) / (last - first)


def _evenly(count: int, most: int) -> NDArray[np.intp]:
    """Return positions, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.intp))
