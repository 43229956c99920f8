"""Merge a run's answers again, by another method, without asking any agent again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from distributed import Client

from mas_batch.aggregate.method import MergeSpec
from mas_batch.cluster import local_workers
from mas_batch.errors import JobError, RunError
from mas_batch.events import Emit
from mas_batch.job import Job, fingerprint, slug
from mas_batch.job_file import check_job
from mas_batch.merging import labels_version, merge_spec, read_labels
from mas_batch.run_folder.kept_job import as_asked
from mas_batch.run_folder.manifest import read_job_mapping, without_credentials_in
from mas_batch.run_folder.names import MERGE_SECTION, MERGES
from mas_batch.run_folder.plan import read_plan
from mas_batch.run_folder.read import Run
from mas_batch.run_folder.ref import RunRef
from mas_batch.run_folder.storage import Store
from mas_batch.stages.memory import Memory
from mas_batch.stages.publishing import publish
from mas_batch.stages.whole_corpus import AllAnswers, learned
from mas_batch.tasks import make_task

THE_RUN = ""
"""Folder of the run's own merge, relative to the run's folder."""


def merge_again(
    run: Run,
    changes: Mapping[str, Any],
    *,
    name: str | None = None,
    client: Client | None = None,
    emit: Emit = lambda event: None,
) -> Run:
    """Merge all answers of a published run as the changed `merge` section says.

    The merge has a folder of its own in the run, with a manifest: the run stays as it is. Its
    first file, `merge.json`, says how it is made. What a killed process has committed of the same
    merge is kept, and a merge that is complete is returned as it is. Only the answers that the
    run itself merged are merged.

    Args:
        changes: keys of the job's `merge` section, None for their defaults. Keys that are not
            given keep the job's values if the method stays the same, else their defaults;
            `accuracies` of agents that are not given are kept in any case.
        name: the merge's name; None: the method and a hash of the whole section.
        client: the user's own; never closed. None: a cluster on this machine, for this call.

    Raises:
        JobError: the section is wrong, or the method cannot merge this task's answers.
        RunError: the run has no plan, another merge has this name, or the cluster was lost.
    """
    job = _changed_job(run, changes)
    spec = merge_spec(job)
    if spec.calibrate is not None:
        read_labels(spec)
    section = _effective_section(job, spec)
    name = name or f"{spec.method}-{fingerprint(section)}"
    try:
        slug(name)
    except ValueError as error:
        raise JobError(str(error), key="--name") from error
    plan = read_plan(run.store)
    if plan is None:
        raise RunError(f"{run.store.location('plan.parquet')}: not there; the run is not whole")
    _claim_folder(run.store.child(f"{MERGES}/{name}"), name, section)
    if name in run.merges():
        return run.merge(name)
    agents = tuple(agent.name for agent in job.agents)
    ref = RunRef(
        run.store, "", job.task, spec, None, plan.passthrough, job.output.keep_text,
        into=f"{MERGES}/{name}", passes=(THE_RUN,), code=job.cluster.code,
    )  # fmt: skip
    prior = Memory(job, spec).prior(besides=run.manifest["run"]) if job.merge.history else None
    connection = nullcontext(client) if client is not None else local_workers(processes=True)
    with connection as connected:
        answers = AllAnswers(connected, ref, plan, agents, emit, job.cluster.wait_s)
        answers = learned(answers, "learned.json", prior)
        statistics = answers.statistics(merge=True)
    publish(answers.run, f"{run.manifest['run']}/{name}", plan, (), statistics)
    return run.merge(name)


def _changed_job(run: Run, changes: Mapping[str, Any]) -> Job:
    raw = read_job_mapping(run.store)
    raw["output"]["storage_options"] = dict(run.store.options)  # the history may be there too
    try:
        own = check_job(raw, file="job.yaml")
        default = make_task(own.task).default_merge
        kept = raw["merge"]
        if "method" in changes and (changes["method"] or default) != (own.merge.method or default):
            # Accuracies are facts about agents; the other keys belong to a method.
            kept = {key: kept[key] for key in ("accuracies", "abstain_below")}
        section = {**kept, **changes}
        if isinstance(changes.get("accuracies"), Mapping):
            section["accuracies"] = {**kept["accuracies"], **changes["accuracies"]}
        given = {key: value for key, value in section.items() if value is not None}
        return as_asked(check_job({**raw, "merge": given}, file="job.yaml"), run.manifest)
    except JobError as error:
        raise JobError(f"this run's job with {dict(changes)}: {error}") from error


def _effective_section(job: Job, spec: MergeSpec) -> dict[str, Any]:
    """Return the effective merge section as plain data, defaults filled in, without secrets."""
    utility = spec.utility if spec.rules.uses_utility else job.merge.utility
    filled = {**job.merge.model_dump(mode="json"), "method": spec.method, "utility": utility}
    if job.merge.calibrate is not None:
        filled["calibrate"]["version"] = labels_version(job)
    plain: dict[str, Any] = without_credentials_in(filled)
    return plain


def _claim_folder(merge: Store, name: str, section: Mapping[str, Any]) -> None:
    """Commit `merge.json` to a merge's folder before any other file; the first writer wins.

    Raises:
        RunError: the folder belongs to another merge.
    """
    strangers = merge.list("") - {MERGE_SECTION}
    if strangers and not merge.exists(MERGE_SECTION):
        raise RunError(
            f"{merge.location(MERGE_SECTION)} is missing: an earlier version made the merge "
            f"{name!r} and did not keep how; allowed: another --name"
        )
    merge.commit(MERGE_SECTION, json.dumps(section, ensure_ascii=False, indent=1).encode())
    there = merge.read_facts(MERGE_SECTION)
    different = [
        f"{key} is {there.get(key)!r}, asked for is {section.get(key)!r}"
        for key in sorted({*there, *section})
        if there.get(key) != section.get(key)
    ]
    if different:
        raise RunError(
            f"the merge {name!r} is another one: {'; '.join(different)}; "
            "allowed: the same section again, or another --name"
        )
