"""The job that a run, or a merge that was made of one afterwards, was made by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from mas_batch.errors import RunError
from mas_batch.job import Job, fingerprint
from mas_batch.run_folder.manifest import (
    read_job_mapping,
    read_manifest,
    without_credentials_in,
)
from mas_batch.run_folder.names import MERGE_SECTION, MERGES
from mas_batch.run_folder.read import Run
from mas_batch.run_folder.storage import Store


def job_facts(run: Run) -> dict[str, Any]:
    """Return job.yaml as plain data; a merge's is its run's, with the merge's own section.

    Without credentials: `manifest.write_job` strips them, earlier versions may have left some.

    Raises:
        RunError: it is not there.
    """
    whole, section = run.store, {}
    if not whole.exists("job.yaml"):
        folder, is_merge, _ = whole.url.rstrip("/").rpartition(f"/{MERGES}/")
        whole = Store(folder, whole.options)
        if not is_merge or not whole.exists("job.yaml"):
            raise RunError(f"{run.store.location('job.yaml')}: not there; the run is not whole")
        if run.store.exists(MERGE_SECTION):
            section = {"merge": run.store.read_facts(MERGE_SECTION)}
    job = read_job_mapping(whole)
    facts: dict[str, Any] = without_credentials_in({**job, **section})
    return facts


def read_job(run: Run) -> Job:
    """Return `job_facts` as a checked job, `as_asked`.

    Raises:
        RunError: it is not there, or is not a job of this version of mas_batch.
    """
    facts = job_facts(run)
    whole, is_merge, _ = run.store.url.rstrip("/").rpartition(f"/{MERGES}/")
    asked = read_manifest(Store(whole, run.store.options)) if is_merge else run.manifest
    try:
        return as_asked(Job.model_validate(facts), asked or {})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        location = run.store.location("job.yaml")
        raise RunError(f"{location}: {key}: {first['msg']}; another version wrote it") from error


def as_asked(job: Job, manifest: Mapping[str, Any]) -> Job:
    """Return a run's job with `reads: reply` where it does not say what the agent reads, and the
    run, of an earlier version, read replies where this version would read labels.

    Args:
        manifest: the run's.
    """
    sections = manifest.get("asked_as", {})
    nothing = fingerprint({})
    agents = tuple(
        agent.with_changes(reads="reply")
        if agent.reads is None
        and agent.reads_labels(job.task)
        and sections.get(agent.name, {}).get("reads", nothing) == nothing
        else agent
        for agent in job.agents
    )
    return job if agents == job.agents else job.with_changes(agents=agents)
