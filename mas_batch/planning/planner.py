"""Predicts a job's run, compares settings, and says what would help and what meets a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from dask.system import CPU_COUNT
from distributed import Client

from mas_batch import cluster
from mas_batch.job import Job, Partitioning
from mas_batch.planning.bottleneck import find_bottleneck
from mas_batch.planning.evidence import gather
from mas_batch.planning.forecast import Forecaster, Outcome, Setting, busy_fractions
from mas_batch.planning.machine import Others, others
from mas_batch.planning.planned import AgentForecast, Option, Planned, Range, Recommendation
from mas_batch.planning.sampling import sampled
from mas_batch.planning.shares import escalated_share, undecided_shares
from mas_batch.planning.survey import Cut, Survey, survey
from mas_batch.routing.policies import POLICIES
from mas_batch.run_folder.read import Run, open_run

_SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Sizes of partitions that are compared, in the job's."""
_NUM_DRAWS = 21
_QUIET = 0.1
"""Share of the cores that others may take without being mentioned."""
_WORTH_IT = 0.98
"""Another setting is named if it takes less than this share of the time."""


def plan(
    job: Job,
    *,
    former: str | None = None,
    num_sampled: int = 64,
    deadline_s: float | None = None,
    replicas: tuple[int, int] | None = None,
    client: Client | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Planned:
    """Predict a run of the job.

    Args:
        former: a published run to learn from, of this job or one with the same agents; None: a
            sample of the corpus is run first.
        num_sampled: records of that sample.
        deadline_s: for the recommendation: the fewest replicas with which nine of ten simulated
            runs end by then.
        replicas: the fewest and the most of each agent to look at; None: 1 to 4, or twice the
            job's.
        client: as `pipeline.run` takes it.
        tell: called with a line for people before anything that takes long.

    Raises:
        JobError: the job cannot run as written, its corpus has nothing to ask about, or `former`
            does not know one of its agents.
        MasBatchError: the sample could not be run.
    """
    tell("reading the corpus")
    seen = survey(job, _sizings(job), num_sampled)
    embedded = cluster.is_embedded(job.cluster, client or cluster.current_client())
    bounds = replicas or _default_range(job)
    if former is not None:
        forecaster = _learn([open_run(former)], job, former, seen, embedded)
        tell("simulating")
        return compare_settings(forecaster, bounds, deadline_s=deadline_s)
    start = time.perf_counter()
    with others() as beside, sampled(job, seen.sample, client, tell) as runs:
        source = f"a sample of {len(seen.sample)} records"
        forecaster = _learn(runs, job, source, seen, embedded)
    measuring_s = time.perf_counter() - start
    tell("simulating")
    found = compare_settings(forecaster, bounds, deadline_s=deadline_s)
    notes = found.notes + (_others_note(beside) if embedded else ())
    return replace(found, measuring_s=measuring_s, notes=notes)


def compare_settings(
    forecaster: Forecaster, replicas: tuple[int, int], *, deadline_s: float | None = None
) -> Planned:
    """Predict the job's own setting and others; see `plan`."""
    return _Planner(forecaster, deadline_s, replicas).planned()


def _learn(runs: list[Run], job: Job, source: str, seen: Survey, embedded: bool) -> Forecaster:
    return Forecaster(
        job=job,
        evidence=gather(runs, job, source, embedded=embedded),
        survey=seen,
        undecided=undecided_shares(runs, job),
        escalated=escalated_share(runs, job),
        embedded=embedded,
    )


def _others_note(beside: Others) -> tuple[str, ...]:
    if beside.num_cores < _QUIET * CPU_COUNT:
        return ()
    return (
        f"other programs kept {beside.num_cores:.1f} of this machine's {CPU_COUNT} cores busy "
        "while it was measured, and will",
    )


def _sizings(job: Job) -> list[Partitioning]:
    """Return the sizes that are compared, the job's first."""
    own = job.partition
    scaled = (
        Partitioning(
            max_tokens=max(1, round(own.max_tokens * scale)),
            max_records=min(1_000_000, max(1, round(own.max_records * scale))),
        )
        for scale in (1.0, *_SCALES)
    )
    return list({(s.max_tokens, s.max_records): s for s in scaled}.values())


def _default_range(job: Job) -> tuple[int, int]:
    return 1, max(4, 2 * max(agent.most for agent in job.agents))


class _Planner:
    """Compares settings of one job."""

    def __init__(
        self, forecaster: Forecaster, deadline_s: float | None, replicas: tuple[int, int]
    ) -> None:
        self._forecaster = forecaster
        self._job = forecaster.job
        self._deadline_s = deadline_s
        self._fewest, self._most = replicas
        seen: Survey = forecaster.survey
        self._cuts: dict[tuple[int, int], Cut] = {
            (cut.sizing.max_tokens, cut.sizing.max_records): cut for cut in seen.cuts
        }
        self._setting = Setting(
            seen.cuts[0],
            {agent.name: agent.most for agent in self._job.agents},
            self._job.routing.policy,
        )
        self._outcomes: dict[tuple[object, ...], Outcome] = {}
        self._draws, self._middle = self._draw(self._setting)

    def planned(self) -> Planned:
        """Put everything together."""
        forecaster, setting, outcome = self._forecaster, self._setting, self._middle
        allocations = list(self._allocations())
        sizes = [self._option(replace(setting, cut=cut)) for cut in self._cuts.values()]
        policies = [self._option(replace(setting, policy=policy)) for policy in POLICIES]
        own = self._as_option(setting, self._draws)
        return Planned(
            job=self._job.name,
            source=forecaster.evidence.source,
            measuring_s=0.0,
            num_records=forecaster.survey.num_records,
            num_usable=forecaster.survey.num_usable,
            own=own,
            phases=outcome.phases,
            agents=tuple(self._agents(outcome)),
            bottleneck=find_bottleneck(forecaster, setting, outcome),
            allocations=tuple(allocations),
            sizes=tuple(sorted(sizes, key=lambda option: option.max_records)),
            policies=tuple(policies),
            recommendation=self._recommend(own, allocations, sizes),
            notes=tuple(self._notes()),
        )

    # Settings

    def _expect(self, setting: Setting) -> Outcome:
        """Simulate what is expected, once."""
        key = (setting.cut.sizing, tuple(setting.replicas.items()), setting.policy)
        if key not in self._outcomes:
            self._outcomes[key] = self._forecaster.simulate(setting, None)
        return self._outcomes[key]

    def _draw(self, setting: Setting) -> tuple[Range, Outcome]:
        """Simulate runs that might come; returns how long they take, and the one in the middle."""
        drawn = [self._forecaster.simulate(setting, seed) for seed in range(_NUM_DRAWS)]
        drawn.sort(key=lambda outcome: outcome.duration_s)
        seconds = [outcome.duration_s for outcome in drawn]
        middle = drawn[len(drawn) // 2]
        low, high = np.quantile(seconds, [0.1, 0.9])
        return Range(float(low), middle.duration_s, float(high)), middle

    def _option(self, setting: Setting) -> Option:
        """Simulate once; how far runs may be off that is taken from the job's own setting."""
        times = self._expect(setting).duration_s / self._expect(self._setting).duration_s
        own = self._draws
        duration = Range(own.p10_s * times, own.median_s * times, own.p90_s * times)
        return self._as_option(setting, duration)

    def _as_option(self, setting: Setting, duration: Range) -> Option:
        sizing = setting.cut.sizing
        return Option(
            dict(setting.replicas),
            sizing.max_records,
            sizing.max_tokens,
            len(setting.cut),
            setting.policy,
            duration,
        )

    def _allocations(self) -> Iterator[Option]:
        """Yield ever more replicas: each time one more of the agent that is busiest."""
        replicas = dict.fromkeys(self._setting.replicas, self._fewest)
        while True:
            setting = replace(self._setting, replicas=dict(replicas))
            yield self._option(setting)
            busy = busy_fractions(setting, self._expect(setting))
            growing = [name for name in replicas if replicas[name] < self._most]
            if not growing:
                return
            replicas[max(growing, key=lambda name: busy[name])] += 1

    # What comes of it

    def _agents(self, outcome: Outcome) -> Iterator[AgentForecast]:
        busy = busy_fractions(self._setting, outcome)
        for agent in self._job.agents:
            known = self._forecaster.evidence.agents[agent.name]
            share = outcome.shares.get(agent.name)
            asked = round(share.num_records * agent.samples) if share else 0
            failed = round(asked * known.failed_fraction)
            prompt, completion = self._forecaster.tokens(outcome, agent.name)
            yield AgentForecast(
                agent_id=agent.name,
                replicas=self._setting.replicas[agent.name],
                busy_fraction=busy[agent.name],
                answers=asked - failed,
                failed_answers=failed,
                prompt_tokens=prompt,
                completion_tokens=completion,
                memory_bytes=known.peak_memory_bytes,
                **self._forecaster.parts_s(outcome, agent.name),
            )

    def _recommend(
        self, own: Option, allocations: list[Option], sizes: list[Option]
    ) -> Recommendation:
        best = min(sizes, key=lambda option: option.duration.median_s)
        if best.duration.median_s >= _WORTH_IT * own.duration.median_s:
            best = own
        if self._deadline_s is None:
            why = "no other size of partition is clearly faster"
            if best is not own:
                why = f"partitions of {best.max_records} records: the fastest of those compared"
            return Recommendation(best, None, why)
        cut = self._cuts[best.max_tokens, best.max_records]
        return self._in_time(cut, sorted(allocations, key=lambda o: o.total), self._deadline_s)

    def _in_time(self, cut: Cut, options: list[Option], deadline_s: float) -> Recommendation:
        tried: list[Option] = []
        for option in options:
            setting = replace(self._setting, cut=cut, replicas=option.replicas)
            expected = self._option(setting)
            if expected.duration.p10_s <= deadline_s:
                expected = self._as_option(setting, self._draw(setting)[0])
            if expected.duration.p90_s <= deadline_s:
                return Recommendation(expected, True, "the fewest replicas that are in time")
            tried.append(expected)
        best = min(tried, key=lambda option: option.duration.p90_s)
        setting = replace(self._setting, cut=cut, replicas=best.replicas)
        found = find_bottleneck(self._forecaster, setting, self._expect(setting))
        why = f"no number of replicas from {self._fewest} to {self._most} is in time: {found.what}"
        return Recommendation(best, False, why)

    def _notes(self) -> Iterator[str]:
        job, evidence = self._job, self._forecaster.evidence
        if self._forecaster.embedded:
            yield (
                "replicas share this machine's cores: more of them are faster only where an agent "
                "waits for something else"
            )
        else:
            yield "every replica is taken to have hardware of its own, like the measured one"
        largest = self._forecaster.survey.cuts[0].num_records.max()
        if evidence.largest_records < 0.5 * largest:
            yield (
                f"measured partitions had at most {evidence.largest_records} records, the job's "
                f"have {largest:.0f}: a larger --sample measures them"
            )
        if any(agent.max_count for agent in job.agents):
            yield "agents with max_count are taken to have so many replicas from the start"
        if self._forecaster.undecided is None:
            yield "how many records stay undecided is not known: all are taken to"
        if job.routing.policy == "reliability":
            yield "agents are taken to agree with the merged answers equally often"
