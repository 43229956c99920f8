"""Predicts a run by simulating it with the project's dispatcher: seconds, tokens, busy agents."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace

import numpy as np

from mas_batch.agents.posts import posts_of
from mas_batch.job import Agent, Job
from mas_batch.latency.phases import ANSWERING, FIRST_MODEL
from mas_batch.latency.simulate import Costs, Simulation, SimulationResult, Worker
from mas_batch.planning.measurements import Measurements
from mas_batch.planning.rates import HANDLE_S, RunRates, fit_rates, other_phases, tokens_asked
from mas_batch.planning.service_time import Floats
from mas_batch.planning.survey import Survey, evenly_spaced
from mas_batch.routing.dispatcher import Dispatcher
from mas_batch.routing.instructions import Ask, Rules, Work
from mas_batch.routing.policies import POLICIES
from mas_batch.routing.rules import rules_of

MAX_SIMULATED = 600
"""Partitions of a simulation, evenly spaced; the rest goes on at the rate of its middle half."""
_PER_HOST = 8
"""A simulation has at least so many for each host: its middle half must not be start and end."""


@dataclass(slots=True)
class AgentTotals:
    """What one agent is asked about in a predicted run."""

    num_tasks: float = 0.0
    num_records: float = 0.0
    text_tokens: float = 0.0
    own_s: float = 0.0
    """Of its tasks, each on a machine that it has to itself."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """A run as predicted for one number of hosts of each post."""

    hosts: Mapping[str, int]
    """By post."""
    phases: Mapping[str, float]
    """Phase → seconds."""
    result: SimulationResult
    """Of its passes, or of the part of them that was simulated."""
    totals: Mapping[str, AgentTotals]
    """By agent; of the whole corpus."""
    core_fraction: float
    """How busy the shared machine's cores are; 0: there is no shared machine."""

    @property
    def duration_s(self) -> float:
        """From the start of the command to the published manifest."""
        return float(sum(self.phases.values()))

    def busy_fractions(self) -> dict[str, float]:
        """Return post → share of the answering time that its hosts are at work."""
        whole_s = max(1e-9, self.result.asking_s)
        busy_s = dict.fromkeys(self.hosts, 0.0)
        for worker, seconds in self.result.busy_s.items():
            busy_s[worker.rpartition("-")[0]] += seconds
        return {
            name: min(1.0, seconds / whole_s / self.hosts[name]) for name, seconds in busy_s.items()
        }


@dataclass(frozen=True, slots=True, eq=False)
class Forecaster:
    """Predicts runs of one job with any number of hosts."""

    job: Job
    measurements: Measurements
    survey: Survey
    undecided: Mapping[int, float] | None
    """Answers per record → share of the records that is undecided with so many; None: not known,
    and taken to be all."""
    escalated: float
    """Share of the records that go to the last agent."""
    embedded: bool
    """Whether the hosts share this machine's cores."""

    def forecast(self, hosts: Mapping[str, int]) -> Forecast:
        """Simulate the run; equal arguments give an equal forecast."""
        job = self.job
        rates = fit_rates(job, self.measurements, hosts, embedded=self.embedded)
        phases = other_phases(
            self.measurements,
            num_partitions=self.survey.num_partitions,
            num_records=self.survey.num_records,
            read_s=self.survey.read_s,
            num_workers=sum(hosts.values()) if self.embedded else 0,
        )
        undecided = self.undecided
        if undecided is None:
            undecided = dict.fromkeys(range(1, job.answers_per_record), 1.0)
        first = _Pass(job, job.first_agents, rules_of(job, {}), undecided, rates)
        result, answering_s = first.run(self.survey, hosts)
        totals, core_s = dict(first.totals), first.core_s
        if self.escalated:
            agents = tuple(a for a in job.agents if a not in job.first_agents)
            plain = replace(rules_of(job, {}), answers_per_record=agents[0].samples, first=None)
            second = _Pass(job, agents, plain, {}, rates)
            later, more_s = second.run(self.survey, hosts, self.escalated)
            result, answering_s = result.followed_by(later), answering_s + more_s
            totals, core_s = totals | second.totals, core_s + second.core_s
        phases |= {FIRST_MODEL: result.loaded_s, ANSWERING: answering_s}
        cores_s = rates.num_cores * max(1e-9, result.asking_s)
        return Forecast(hosts, phases, result, totals, core_s / cores_s)

    def tokens(self, forecast: Forecast, agent_id: str) -> tuple[int, int]:
        """Return (prompt tokens, completion tokens) of an agent."""
        asked = forecast.totals.get(agent_id, AgentTotals())
        measured = self.measurements.agents[agent_id]
        return tokens_asked(measured, asked.num_records, asked.text_tokens)

    def parts_s(self, forecast: Forecast, agent_id: str) -> dict[str, float]:
        """Return T_compute, T_transfer and T_processing of all of an agent's tasks."""
        asked = forecast.totals.get(agent_id, AgentTotals())
        measured = self.measurements.agents[agent_id].parts_s
        whole = sum(measured.values()) or 1.0
        own = {part: asked.own_s * seconds / whole for part, seconds in measured.items()}
        waiting_s = asked.num_tasks * self.measurements.send_s
        return {
            "compute_s": own["compute"],
            "transfer_s": own["transfer"],
            "processing_s": own["process"] + waiting_s,
        }


@dataclass(slots=True)
class _Pass:
    """Simulates one pass over the corpus, in which some of the job's agents answer."""

    job: Job
    agents: tuple[Agent, ...]
    rules: Rules
    undecided: Mapping[int, float]
    rates: RunRates
    totals: defaultdict[str, AgentTotals] = field(default_factory=lambda: defaultdict(AgentTotals))
    core_s: float = 0.0
    """Core-seconds of the shared machine."""
    _rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    _warm: set[str] = field(default_factory=set)
    _open: dict[int, float] = field(default_factory=dict)
    _records: Floats = field(default_factory=lambda: np.zeros(0))
    _tokens: Floats = field(default_factory=lambda: np.zeros(0))

    def run(
        self, survey: Survey, hosts: Mapping[str, int], fraction: float = 1.0
    ) -> tuple[SimulationResult, float]:
        """Simulate the pass; returns its result, and how long answering takes.

        Args:
            fraction: of each partition's records that are asked about.
        """
        most = max(MAX_SIMULATED, _PER_HOST * sum(hosts.values()))
        chosen = evenly_spaced(survey.num_partitions, most)
        self._records = survey.usable_records[chosen] * fraction
        self._tokens = survey.text_tokens[chosen] * fraction
        merged: list[float] = []
        simulation = Simulation(
            self._dispatcher(),
            list(self._workers(hosts)),
            self._costs(),
            samples=self._samples,
            undecided=self._undecided,
            may_start=self._may_start,
            on_merged=merged.append,
            look_s=max(1.0, self._longest_s() / 20),
        )
        result = simulation.run()
        self._scale_totals(survey.num_usable * fraction / max(1e-9, self._records.sum()))
        return result, _answering_s(result, merged, survey.num_partitions)

    def _dispatcher(self) -> Dispatcher:
        per_record = self.job.task.max_new_tokens
        work = [
            Work(index, max(1, round(tokens + records * per_record)), max(1, round(records)))
            for index, (records, tokens) in enumerate(zip(self._records, self._tokens, strict=True))
        ]
        policy = POLICIES[self.job.routing.policy]()
        return Dispatcher(self._samples, self.rules, policy, work, len(work))

    @property
    def _samples(self) -> dict[str, int]:
        return {agent.name: agent.samples for agent in self.agents}

    def _workers(self, hosts: Mapping[str, int]) -> Iterable[Worker]:
        for post in posts_of(self.job):
            agents = tuple(agent.name for agent in self.agents if agent.name in post.agents)
            for number in range(hosts[post.name] if agents else 0):
                rates = self.rates.agents[agents[0]]
                overlap, batched = self._together(agents)
                yield Worker(
                    f"{post.name}-{number}",
                    agents,
                    rates.load_s,
                    rates.cores,
                    concurrent=rates.concurrent,
                    overlap=overlap,
                    batched=batched,
                )

    def _together(self, agents: Sequence[str]) -> tuple[float, float]:
        """Return which shares of the time of a host's tasks overlap, and are a batch's."""
        records, tokens = self._records.mean(), self._tokens.mean()
        rates = [self.rates.agents[name] for name in agents]
        seconds = [each.answer.seconds(records, tokens) for each in rates]
        whole_s = max(1e-9, sum(seconds))
        overlap_s = sum(each.overlap * s for each, s in zip(rates, seconds, strict=True))
        once_s = sum((1.0 - each.overlap) * each.answer.per_task_s for each in rates)
        return overlap_s / whole_s, once_s / whole_s

    def _costs(self) -> Costs:
        shared = self.rates.num_cores != float("inf")
        return Costs(
            answer_s=self._answer_s,
            merge_s=self._merge_s,
            handle_s=HANDLE_S,
            send_s=self.rates.send_s,
            merge_cores=1.0 if shared else 0.0,
            num_cores=self.rates.num_cores,
        )

    def _answer_s(self, worker: Worker, ask: Ask, share: float) -> float:
        service = self.rates.agents[ask.agent_id].answer
        records = float(self._records[ask.partition]) * share
        tokens = float(self._tokens[ask.partition]) * share
        seconds = service.seconds(records, tokens)
        if worker.name not in self._warm:
            self._warm.add(worker.name)
            seconds += service.first_s
        self.core_s += seconds * worker.cores
        if ask.purpose != "copy":  # of two tries, one counts
            asked = self.totals[ask.agent_id]
            asked.num_tasks += 1
            asked.num_records += records
            asked.text_tokens += tokens
            asked.own_s += seconds
        return seconds

    def _merge_s(self, partition: int) -> float:
        service = self.rates.merge
        seconds = service.seconds(float(self._records[partition]), float(self._tokens[partition]))
        if self.rates.num_cores != float("inf"):
            self.core_s += seconds
        return seconds

    def _undecided(self, partition: int, num_answers: int) -> float:
        """Draw how many of the partition's records that are still open stay so."""
        looks = [n for n in self.undecided if n < num_answers]
        before = self.undecided[max(looks)] if looks else 1.0
        now = min(before, self.undecided.get(num_answers, 0.0))
        records = max(1, round(self._records[partition]))
        still = round(self._open.get(partition, 1.0) * records)
        drawn = self._rng.binomial(still, now / before) if before > 0 else 0
        self._open[partition] = drawn / records
        return float(drawn / records)

    def _may_start(self, served: set[str]) -> bool:
        """As `routing.dask.DaskRouter`: wait for models until the loaded ones can answer enough."""
        there = sum(self._samples[name] for name in served)
        return served == self._samples.keys() or there >= self.rules.answers_per_record

    def _longest_s(self) -> float:
        records, tokens = self._records.max(), self._tokens.max()
        return max(a.answer.seconds(records, tokens) for a in self.rates.agents.values())

    def _scale_totals(self, times: float) -> None:
        """Count for the whole corpus what was simulated of a part of it."""
        for agent_id, asked in self.totals.items():
            self.totals[agent_id] = AgentTotals(*(times * total for total in astuple(asked)))


def _answering_s(result: SimulationResult, merged: list[float], num_partitions: int) -> float:
    """Return how long all partitions take, by the rate of those in the middle."""
    num_more = num_partitions - len(merged)
    if num_more <= 0:
        return result.asking_s
    first, last = len(merged) // 4, 3 * len(merged) // 4
    return result.asking_s + num_more * (merged[last] - merged[first]) / (last - first)
