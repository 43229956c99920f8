"""Facts out of a run's folder. Tables are read a partition at a time; nothing is written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import yaml

from mas_batch.aggregate.reliability import Reliability
from mas_batch.errors import ExitCode
from mas_batch.quality import KeptEvaluation, read_evaluation
from mas_batch.report.facts import (
    AgentFacts,
    Agreement,
    ExitFacts,
    Facts,
    Spread,
    Totals,
)
from mas_batch.report.findings import findings
from mas_batch.report.label_counts import confusion, label_counts
from mas_batch.report.scan import failed_answers, scan_failures, scan_results
from mas_batch.report.timing import spreads, time_facts
from mas_batch.report.walk import stride
from mas_batch.run_folder.kept_job import job_facts
from mas_batch.run_folder.read import Run
from mas_batch.safe_text import clip, without_credentials

MAX_AGENTS = 40
MAX_AGENTS_IN_MATRIX = 16
MAX_SYSTEMS = 60
JOB_CHARS = 40_000
MODEL_CHARS = 300


def collect(run: Run, *, whole: bool = False) -> Facts:
    """Collect what a report says of a run.

    Args:
        whole: read every partition, also of a run that is larger than `walk.MAX_RECORDS`.

    Raises:
        RunError: a table of the run cannot be read.
    """
    manifest = run.manifest
    job = job_facts(run)
    every = 1 if whole else stride(run)
    keep_text, labels = job["output"].get("keep_text", True), job["task"].get("labels") or ()
    results = scan_results(run, every, keep_text=keep_text, with_labels=bool(labels))
    agents = sorted(agent["agent_id"] for agent in manifest["agents"])
    histogram = manifest["counts"].get("confidence_histogram") or []
    return Facts(
        run=manifest["run"],
        location=run.store.location(""),
        finished=manifest.get("finished"),
        task=job["task"]["kind"],
        method=manifest["merge"]["method"],
        policy=job["routing"]["policy"],
        outcome=_outcome(manifest["counts"], job),
        findings=findings(run),
        totals=totals(run),
        quality=_evaluation(run),
        time=time_facts(run),
        agents=agents_of(run)[:MAX_AGENTS],
        num_agents_left_out=len(agents[MAX_AGENTS:]),
        labels=label_counts(run),
        confusion=confusion(results.confusion, labels),
        agreement=_agreement(agents, results.pairs),
        reliability=_reliability(manifest["merge"].get("reliability")),
        confidence=tuple(histogram) if any(histogram) else (),
        confidence_kind=results.confidence_kind,
        doubtful=results.doubtful,
        failures=scan_failures(run),
        failed_answers=failed_answers(run, every),
        scope=results.scope,
        job=_job_text(job),
        models=tuple(model(agent, manifest) for agent in agents[:MAX_AGENTS]),
        versions=manifest.get("versions", {}),
    )


def _job_text(job: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(job, sort_keys=False, allow_unicode=True)
    return text if len(text) <= JOB_CHARS else text[:JOB_CHARS] + "\n# … the rest is in job.yaml"


def _outcome(counts: Mapping[str, int], job: Mapping[str, Any]) -> ExitFacts:
    limit = job["output"].get("max_failed_fraction", 0.05)
    failed = counts["failures"] / max(1, counts["results"] + counts["failures"])
    if failed > limit:
        meaning = "more records failed than the job allows"
        return ExitFacts(ExitCode.TOO_MANY_FAILED_RECORDS, meaning, failed, limit)
    meaning = "no more records failed than the job allows" if failed else "every record is answered"
    return ExitFacts(ExitCode.ANSWERED, meaning, failed, limit)


def totals(run: Run) -> Totals:
    """Return the run in figures, from its manifest alone."""
    counts, agents = run.manifest["counts"], run.manifest["agents"]
    records = counts["results"] + counts["failures"]
    latency = run.manifest.get("latency") or {}
    wall_s = latency.get("wall_s")

    def total(name: str) -> int:
        return sum(agent[name] for agent in agents)

    return Totals(
        records=records,
        results=counts["results"],
        failures=counts["failures"],
        ties=counts.get("ties", 0),
        abstained=counts.get("abstained", 0),
        cut=counts.get("cut", 0),
        answers=total("answers"),
        failed_answers=total("failed_answers"),
        prompt_tokens=total("prompt_tokens"),
        cached_tokens=latency.get("tokens", {}).get("cached_tokens"),
        completion_tokens=total("completion_tokens"),
        reused=sum(agent.get("reused", 0) for agent in agents),
        wall_s=wall_s,
        records_per_s=records / wall_s if wall_s else None,
    )


def agents_of(run: Run) -> tuple[AgentFacts, ...]:
    """Return the run's agents, in order of their names, from its manifest alone."""
    by_agent = spreads(run)
    ordered = sorted(run.manifest["agents"], key=lambda counts: str(counts["agent_id"]))
    return tuple(_agent(c, run.manifest, by_agent.get(c["agent_id"])) for c in ordered)


def _agent(
    counts: Mapping[str, Any], manifest: Mapping[str, Any], spread: Spread | None
) -> AgentFacts:
    engine = _engine(counts["agent_id"], manifest)
    compute_s = counts.get("compute_s") or 0.0
    return AgentFacts(
        agent_id=counts["agent_id"],
        family=clip(engine.get("family_id", ""), MODEL_CHARS),
        answers=counts["answers"],
        failed_answers=counts["failed_answers"],
        wins=counts["wins"],
        agreement=counts["agreement"],
        prompt_tokens=counts["prompt_tokens"],
        completion_tokens=counts["completion_tokens"],
        tokens_per_s=counts["completion_tokens"] / compute_s if compute_s else None,
        latency=spread,
    )


def _engine(agent_id: str, manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = manifest.get("engines", {}).get(agent_id, {})
    return found


def model(agent_id: str, manifest: Mapping[str, Any]) -> dict[str, str | None]:
    """Name what answered, so that it can be had again; `source` is a hub id, a path or a wheel.

    Of an engine's facts only these are named: its options may hold anything.
    """
    engine = _engine(agent_id, manifest)
    source, adapter = engine.get("model"), engine.get("adapter", {})
    return {
        "agent_id": agent_id,
        "engine": engine.get("engine", ""),
        "family": clip(engine.get("family_id", ""), MODEL_CHARS),
        "source": None if source is None else clip(without_credentials(source), MODEL_CHARS),
        **{name: engine.get(name) for name in ("sha256", "device", "examples_sha256")},
        "adapter": clip(without_credentials(adapter.get("source", "")), MODEL_CHARS),
        "adapter_sha256": adapter.get("sha256"),
    }


def _agreement(agents: Sequence[str], pairs: Mapping[str, Mapping[str, float]]) -> Agreement | None:
    if not pairs:
        return None
    shown = tuple(agents[:MAX_AGENTS_IN_MATRIX])
    shares = {(a, b): pairs.get(min(a, b), {}).get(max(a, b)) for a in shown for b in shown}
    return Agreement(shown, shares, len(agents) - len(shown))


def _reliability(learned: Mapping[str, Any] | None) -> Reliability | None:
    if learned is None:
        return None
    found = Reliability.from_json(json.dumps(learned))
    return replace(found, agents=dict(list(found.agents.items())[:MAX_AGENTS]))


def _evaluation(run: Run) -> KeptEvaluation | None:
    found = read_evaluation(run)
    return found and replace(found, qualities=found.qualities[:MAX_SYSTEMS])
