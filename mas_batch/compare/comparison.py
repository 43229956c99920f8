"""Two runs, side by side: pure facts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mas_batch.aggregate.answer_kinds import ANSWER_KINDS
from mas_batch.compare.changes import Change, changes
from mas_batch.compare.record_pairs import Records, compare_records
from mas_batch.quality import KeptEvaluation, Kind, MetricScore, Quality, read_evaluation
from mas_batch.report.collect import agents_of, model, totals
from mas_batch.report.facts import AgentFacts
from mas_batch.report.timing import time_facts
from mas_batch.run_folder.kept_job import job_facts
from mas_batch.run_folder.read import Run
from mas_batch.tasks import TASKS


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of both runs; None: not measured, or no such agent."""

    name: str
    """`records`, `wall_s`, …; the unit is its suffix."""
    a: float | None
    b: float | None


@dataclass(frozen=True, slots=True)
class QualityPair:
    """One system of both evaluations, by one metric."""

    kind: str
    name: str
    """`the run` for what each run published, whatever its method."""
    metric: str
    a: float | None
    b: float | None
    interval_a: tuple[float, float] | None
    """95 %."""
    interval_b: tuple[float, float] | None
    overlap: bool | None
    """The intervals do, so that the difference may be noise; None: there are not two."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What differs between two runs; nothing is said of what is equal, but for figures."""

    run_a: str
    run_b: str
    location_a: str
    location_b: str
    job: tuple[Change, ...]
    models: tuple[Change, ...]
    """By agent, and fact."""
    versions: tuple[Change, ...]
    totals: tuple[Figure, ...]
    time: tuple[Figure, ...]
    """Phases and hosts' seconds; empty: neither run has a ledger."""
    agents: Mapping[str, tuple[Figure, ...]]
    quality: tuple[QualityPair, ...]
    """Empty: not both are evaluated by the same metric."""
    records: Records

    def to_json(self) -> dict[str, Any]:
        """Return plain data for `json.dumps`."""
        facts: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return facts


def compare(a: Run, b: Run, *, num_shown: int = 10) -> Comparison:
    """Compare two published runs, of one corpus or of corpora that share records.

    Args:
        num_shown: records of each list, at most.

    Raises:
        RunError: a table of a run cannot be read.
    """
    job_a, job_b = job_facts(a), job_facts(b)
    judge = _judged_by_equality(job_a) and _judged_by_equality(job_b)
    return Comparison(
        run_a=a.manifest["run"],
        run_b=b.manifest["run"],
        location_a=a.store.location(""),
        location_b=b.store.location(""),
        job=changes(job_a, job_b),
        models=changes(_models(a), _models(b)),
        versions=changes(a.manifest.get("versions", {}), b.manifest.get("versions", {})),
        totals=_figures(asdict(totals(a)), asdict(totals(b))),
        time=_figures(_time(a), _time(b)),
        agents=_agents(a, b),
        quality=_quality(read_evaluation(a), read_evaluation(b)),
        records=compare_records(a, b, num_shown, judge=judge),
    )


def _judged_by_equality(job: Mapping[str, Any]) -> bool:
    """Whether answers are right or wrong; False where the task's package is not here."""
    kind = job["task"]["kind"]
    return kind in TASKS and ANSWER_KINDS[TASKS[kind].answer_kind].right_or_wrong


def _models(run: Run) -> dict[str, Any]:
    found = {}
    for agent_id in sorted(agent["agent_id"] for agent in run.manifest["agents"]):
        facts = model(agent_id, run.manifest)
        found[agent_id] = {k: value for k, value in facts.items() if value and k != "agent_id"}
    return found


def _figures(a: Mapping[str, float], b: Mapping[str, float]) -> tuple[Figure, ...]:
    names = [*a, *(name for name in b if name not in a)]
    figures = (Figure(name, a.get(name), b.get(name)) for name in names)
    return tuple(each for each in figures if (each.a, each.b) != (None, None))


def _time(run: Run) -> dict[str, float]:
    found = time_facts(run)
    if found is None:
        return {}
    phases = {f"{name} phase_s": value for name, value in found.phases.items()}
    return phases | {f"hosts' {name}_s": value for name, value in found.hosts.items()}


_AGENT_FIGURES: dict[str, Callable[[AgentFacts], float | None]] = {
    "answers": lambda agent: agent.answers,
    "failed_answers": lambda agent: agent.failed_answers,
    "agreement": lambda agent: agent.agreement,
    "tokens_per_s": lambda agent: agent.tokens_per_s,
    "p50_s": lambda agent: agent.latency.p50_s if agent.latency else None,
    "p95_s": lambda agent: agent.latency.p95_s if agent.latency else None,
}


def _agents(a: Run, b: Run) -> dict[str, tuple[Figure, ...]]:
    of_a, of_b = ({each.agent_id: each for each in agents_of(run)} for run in (a, b))
    return {
        name: tuple(
            Figure(figure, *(of(side[name]) if name in side else None for side in (of_a, of_b)))
            for figure, of in _AGENT_FIGURES.items()
        )
        for name in sorted({*of_a, *of_b})
    }


def _quality(a: KeptEvaluation | None, b: KeptEvaluation | None) -> tuple[QualityPair, ...]:
    if a is None or b is None or a.metrics[0] != b.metrics[0]:
        return ()
    in_b = {_key(system): system for system in b.qualities}
    both = ((system, in_b[_key(system)]) for system in a.qualities if _key(system) in in_b)
    return tuple(_pair(*pair) for pair in both)


def _key(system: Quality) -> tuple[str, str]:
    """Tell systems apart; what the run published is one, by whatever method."""
    return system.kind, "the run" if system.kind is Kind.RUN else system.name


def _pair(a: Quality, b: Quality) -> QualityPair:
    score_a, score_b = a.scores[0], b.scores[0]
    first, second = _interval(score_a), _interval(score_b)
    overlap = None
    if first and second:
        overlap = first[0] <= second[1] and second[0] <= first[1]
    return QualityPair(
        *_key(a), score_a.metric, score_a.value, score_b.value, first, second, overlap
    )


def _interval(score: MetricScore) -> tuple[float, float] | None:
    return None if score.low is None or score.high is None else (score.low, score.high)
