"""How a run was merged, and how else its answers could be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from mas_batch.aggregate.consensus import SUPPORT
from mas_batch.aggregate.learning import learn
from mas_batch.aggregate.merge_spec import EMBEDDING, MergeSpec
from mas_batch.aggregate.partials import pattern_partial, support_partial
from mas_batch.errors import JobError, RunError
from mas_batch.evaluation.gather import answers_by_partition, plan_of
from mas_batch.job import Job, MergeMethod
from mas_batch.merging import merge_spec
from mas_batch.run_folder.names import staged_name
from mas_batch.run_folder.read import Run
from mas_batch.tasks import make_task

METHODS: tuple[str, ...] = get_args(MergeMethod)
"""Merge methods that may be asked for."""

LEARNED_MBR = "mbr, learned"
"""Name of `mbr` with weights that the corpus teaches, where the run's own `mbr` has none."""


def run_spec(run: Run, job: Job) -> MergeSpec:
    """Return how the run was merged, by its manifest and job."""
    facts = run.manifest["merge"]
    utility = facts.get("utility") or merge_spec(job).utility
    return replace(
        merge_spec(job),
        method=facts["method"],
        utility=utility,
        accuracies=facts["accuracies"],
    )


def other_specs(
    run: Run, own: MergeSpec, job: Job, methods: Sequence[str] | None
) -> tuple[dict[str, MergeSpec], dict[str, str]]:
    """Return the merges to try beside the run's own, and why others cannot be (by method).

    One that needs the whole corpus learns from the run's answers here.

    Raises:
        RunError: there is no such method.
    """
    unknown = sorted(set(methods or ()) - set(METHODS))
    if unknown:
        raise RunError(f"no merge method {unknown[0]!r}; allowed: {', '.join(METHODS)}")
    accuracies = merge_spec(job).accuracies  # the run's own may be learned weights of `mbr`
    specs: dict[str, MergeSpec] = {}
    skipped: dict[str, str] = {}
    for method in methods or METHODS:
        if method == own.method:
            continue
        utility = make_task(job.task).default_utility if own.utility == EMBEDDING else own.utility
        try:
            other = replace(
                own, method=method, utility=utility, weights=None, accuracies=accuracies
            )
        except JobError as error:  # not for this kind of answer
            if methods:
                skipped[method] = error.message
            continue
        specs[method] = _with_reliability(other, run) if method == "reliability" else other
    mbr = own if own.method == "mbr" else specs.get("mbr")
    asked = "mbr" in (methods or METHODS)
    if asked and mbr is not None and _can_learn_weights(mbr):
        specs[LEARNED_MBR] = _with_weights(mbr, run)
    return specs, skipped


def _can_learn_weights(mbr: MergeSpec) -> bool:
    return mbr.weights is None and mbr.utility != EMBEDDING and len(mbr.agents) > 1


def _with_reliability(spec: MergeSpec, run: Run) -> MergeSpec:
    answers = run.arrow("answers")
    patterns = pattern_partial(answers, spec, spec.agents)
    pairs = answers.select(["agent_id", "family_id"]).group_by(["agent_id", "family_id"])
    known = {row["agent_id"]: row["family_id"] for row in pairs.aggregate([]).to_pylist()}
    families = {agent: known.get(agent, agent) for agent in spec.agents}
    return replace(spec, reliability=learn(patterns, spec.agents, families, spec.labels))


def _with_weights(spec: MergeSpec, run: Run) -> MergeSpec:
    partials = [
        support_partial(run.store.read_table(staged_name(index)), answers, spec)
        for index, answers in enumerate(answers_by_partition(run, plan_of(run)))
    ]
    weights = SUPPORT.finalize(SUPPORT.combine(partials))
    return replace(spec, weights="learned", accuracies=weights)
