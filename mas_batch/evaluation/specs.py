"""How a run was merged, and how else its answers could be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mas_batch.aggregate.method import METHODS, MergeSpec
from mas_batch.aggregate.utilities import EMBEDDING
from mas_batch.errors import JobError, RunError
from mas_batch.evaluation.gather import answers_by_partition, plan_of
from mas_batch.job import Job
from mas_batch.merging import merge_spec
from mas_batch.run_folder.read import Run
from mas_batch.tasks import make_task


def run_spec(run: Run, job: Job) -> MergeSpec:
    """Return how the run was merged, by its manifest and job."""
    facts = run.manifest["merge"]
    utility = facts.get("utility") or merge_spec(job).utility
    return replace(
        merge_spec(job),
        method=facts["method"],
        utility=utility,
        accuracies=facts["accuracies"],
        weights=facts["weights"] if "weights" in facts else merge_spec(job).weights,
        chosen=facts.get("why"),
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
    asked = tuple(methods or METHODS)
    accuracies = merge_spec(job).accuracies  # the run's own may be learned weights of `mbr`
    utility = make_task(job.task).default_utility if own.utility == EMBEDDING else own.utility
    # Where no probabilities are read, the mean of labels is the vote.
    reads_labels = any(agent.reads_labels(job.task) for agent in job.agents)
    as_votes = ("mean",) if own.kind.column == "label" and not reads_labels else ()
    specs: dict[str, MergeSpec] = {}
    skipped: dict[str, str] = {}
    for method in asked:
        if method == own.method:
            continue
        if methods is None and method in as_votes:
            continue
        try:
            other = replace(
                own,
                method=method,
                utility=utility,
                weights=None,
                accuracies=accuracies,
                chosen=None,
            )
        except JobError as error:  # not for this kind of answer
            if methods:
                skipped[method] = error.message
            continue
        specs[method] = other if other.learning is None else _taught(other, run)
    for method in asked:
        plain = own if method == own.method else specs.get(method)
        if plain is not None and (weights := _weights_to_learn(plain)) is not None:
            specs[f"{method}, {weights}"] = _taught(replace(plain, weights=weights), run)
    return specs, skipped


def own_samples(own: MergeSpec, job: Job) -> dict[str, tuple[str, MergeSpec]]:
    """Return name → (agent, how to merge its samples alone), for agents with several samples.

    More samples of the best agent are the other way to spend what a mix of agents costs, and often
    the better one: Li et al., "Rethinking mixture-of-agents" (Self-MoA), 2025.
    """
    plain = {"label": "vote", "value": "mean", "text": "mbr"}
    by_samples = ("vote", "mean", "mbr", "rover")
    method = own.method if own.method in by_samples else plain[own.kind.column]
    utility = make_task(job.task).default_utility if own.utility == EMBEDDING else own.utility
    spec = replace(own, method=method, utility=utility, weights=None, chosen=None, last_word=None)
    return {
        f"{agent.name} × {agent.samples} samples": (agent.name, spec)
        for agent in job.agents
        if agent.samples > 1 and len(job.agents) > 1
    }


def _weights_to_learn(plain: MergeSpec) -> str | None:
    """Return the `merge.weights` by which the method would learn, where it has none so far."""
    if plain.weights is not None or plain.needs_encoder or len(plain.agents) < 2:
        return None
    learning = (word for word, learns in plain.rules.weights.items() if word and learns)
    return next(learning, None)


def _taught(spec: MergeSpec, run: Run) -> MergeSpec:
    """Return the merge with what it learns from the run's answers."""
    learning = spec.learning
    assert learning is not None
    families = {agent: agent for agent in spec.agents}
    counts = []
    for answers in answers_by_partition(run, plan_of(run)):
        pairs = answers.group_by(["agent_id", "family_id"]).aggregate([]).to_pylist()
        families.update((row["agent_id"], row["family_id"]) for row in pairs)
        counts.append(learning.count(answers, spec, spec.agents, None))
    found = learning.reduction.combine(counts)
    return learning.read(spec, learning.find(found, spec, spec.agents, families, None)).spec
