"""What a run's reader should know first, as sentences: for the report's head and the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mas_batch.quality import KeptEvaluation, Kind, read_evaluation
from mas_batch.run_folder.kept_job import job_facts
from mas_batch.run_folder.read import Run
from mas_batch.safe_text import clip

MIN_ANSWERS = 20
"""An agent with fewer answers is not said to favour a label."""

FAVOURED_LEAD = 0.25
"""An agent favours a label if it says it so much more often, of all its answers, than the other
agents do on average."""

ONLY_LABEL = 0.98
"""Share of one label above which an agent without others to compare with is named."""

_WARNING_CHARS = 600


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence."""

    text: str
    is_bad: bool
    """Whether something should be done about it."""


def findings(run: Run) -> tuple[Finding, ...]:
    """Return what is to be said first of a run, from its manifest and its last evaluation."""
    evaluation = read_evaluation(run)
    found = [
        *_worth(evaluation, run),
        *(Finding(text, is_bad=True) for text in _warnings(run)),
        *_cut(run.manifest["counts"]),
        *_favourites(run.manifest["counts"].get("labels") or {}),
        *_choices(run),
        *_unproven(run.manifest.get("merge") or {}, is_judged=evaluation is not None),
    ]
    return tuple(found)


def _warnings(run: Run) -> list[str]:
    """Return the sentences in which engines have warned of a model, or the merge of its outcome."""
    merge = run.manifest.get("merge") or {}
    places = [run.manifest, *(run.manifest.get("engines") or {}).values(), merge]
    weighed = (merge.get("calibration") or {}).get("weights")  # then `merge` has what still holds
    if not weighed:
        places.append(merge.get("reliability") or {})
    if not weighed and run.store.exists("learned.json"):
        places.append(run.store.read_facts("learned.json"))
    said = [text for place in places for text in place.get("warnings") or ()]
    return [clip(str(text), _WARNING_CHARS) for text in dict.fromkeys(said)]


def _worth(evaluation: KeptEvaluation | None, run: Run) -> Iterator[Finding]:
    if evaluation is None:
        if (job_facts(run).get("corpus") or {}).get("reference") and len(
            run.manifest["agents"]
        ) > 1:
            yield Finding(
                "Not judged yet: `mas-batch evaluate` says whether the merge is better than its "
                "best agent.",
                is_bad=False,
            )
        return
    merge = next((q for q in evaluation.qualities if q.kind is Kind.RUN), None)
    agents = [q for q in evaluation.qualities if q.kind is Kind.AGENT]
    best = next((q for q in agents if q.scores[0].difference is None), None)
    if merge is None or best is None or len(agents) < 2:
        return
    goal, difference = merge.scores[0], merge.scores[0].difference
    agent = f"its best agent, {best.name}"
    if best.num_records < merge.num_records:
        agent += f", on the {best.num_records:,} records that it was asked about"
    subject = f"The merge ({merge.name}, {goal.metric} {_figure(goal.value)})"
    if difference is None or difference.value == 0:
        yield Finding(f"{subject} is as good as {agent}.", is_bad=False)
        return
    is_better = (difference.value > 0) != (goal.metric == "MAE")
    in_noise = difference.low <= 0 <= difference.high
    word = "better" if is_better else "worse" if in_noise else "WORSE"
    sign = "+" if difference.value > 0 else "-"
    yield Finding(
        f"{subject} is {word} than {agent}, {'within' if in_noise else 'beyond'} noise: "
        f"{sign}{_figure(abs(difference.value))}, p = {difference.p:.3f}, "
        f"{merge.num_records:,} references.",
        is_bad=not is_better and not in_noise,
    )


def _figure(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1f}" if abs(value) > 1.5 else f"{value:.3f}"


def _cut(counts: Mapping[str, Any]) -> Iterator[Finding]:
    if cut := counts.get("cut"):
        share = cut / max(1, counts["results"])
        yield Finding(
            f"{cut:,} published answers ({share:.0%}) are cut off at task.max_new_tokens.", True
        )


def _favourites(labels: Mapping[str, Mapping[str, Mapping[str, int]]]) -> Iterator[Finding]:
    """Name agents that say one label much more often than the others do."""
    agents = {name: said for name, said in labels.get("agents", {}).items() if sum(said.values())}
    for name, said in agents.items():
        total = sum(said.values())
        label, count = max(said.items(), key=lambda item: (item[1], item[0]))
        others = [
            each.get(label, 0) / sum(each.values()) for a, each in agents.items() if a != name
        ]
        if total < MIN_ANSWERS:
            continue
        usual = sum(others) / len(others) if others else None
        if usual is None and count > ONLY_LABEL * total:
            yield Finding(f"{name} says {label!r} in {count:,} of {total:,} answers.", True)
        elif usual is not None and count / total > max(usual + FAVOURED_LEAD, 0.5):
            yield Finding(
                f"{name} says {label!r} too often: in {count:,} of {total:,} answers "
                f"({count / total:.0%}); the other agents in {usual:.0%} of theirs.",
                True,
            )


def _choices(run: Run) -> Iterator[Finding]:
    manifest = run.manifest
    merge = manifest.get("merge") or {}
    if merge.get("chosen_by"):
        yield Finding(f"merge.method auto has chosen {merge['why']}.", False)
    if chosen := (merge.get("calibration") or {}).get("chosen"):
        yield Finding(f"{chosen[0].upper()}{chosen[1:]}.", False)
    escalation = manifest.get("escalation") or {}
    if "target" in escalation:
        agent_id, of = escalation["agent_id"], escalation["of"]
        asked = _num_answers(manifest, agent_id) / _num_samples(run, agent_id)
        yield Finding(
            f"{agent_id} was asked about {asked:,.0f} of {of:,} records "
            f"({asked / max(1, of):.0%}), a sample of {escalation['labels']:,} among them: with "
            f"probability {1 - escalation['delta']:g}, published answers agree with its own on "
            f"{escalation['target']:.0%} of all records or more.",
            False,
        )


def _unproven(merge: Mapping[str, Any], *, is_judged: bool) -> Iterator[Finding]:
    """Say of what was learned without labels that it may be worse than what learns nothing."""
    if is_judged or merge.get("calibration"):
        return
    if merge.get("method") == "reliability":
        if (merge.get("reliability") or {}).get("method") == "vote":
            return  # a warning says why the vote is published
        yield Finding(
            "Without labels it is not proven that learned reliability is better than the vote on "
            "this corpus: rows from `mas-batch label RUN`, labelled and named by "
            "merge.calibrate.labels, tell.",
            is_bad=False,
        )
    elif merge.get("weights") == "learned" and not merge.get("chosen_by"):
        yield Finding(
            "Without references it is not proven that learned weights are better than equal ones "
            "on this corpus: `mas-batch evaluate` with references tells.",
            is_bad=False,
        )


def _num_answers(manifest: Mapping[str, Any], agent_id: str) -> int:
    counts = (agent for agent in manifest["agents"] if agent["agent_id"] == agent_id)
    return sum(agent["answers"] + agent["failed_answers"] for agent in counts)


def _num_samples(run: Run, agent_id: str) -> int:
    agents = job_facts(run).get("agents") or ()
    return next((agent["samples"] for agent in agents if agent["name"] == agent_id), 1)
