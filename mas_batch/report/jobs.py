"""The job that a run, or a merge that was made of one afterwards, was made by."""

from __future__ import annotations

import json
from typing import Any

import yaml

from mas_batch.errors import RunError
from mas_batch.run_folder.manifest import without_credentials_in
from mas_batch.run_folder.names import MERGES
from mas_batch.run_folder.read import Run
from mas_batch.run_folder.storage import Store

_SECTION = "merge.json"


def job_text(run: Run) -> str:
    """Return job.yaml, without credentials; a merge's is its run's, with the merge's own section.

    Value by value, as `results.write_job` strips them: earlier versions may have left some.

    Raises:
        RunError: it is not there.
    """
    if run.store.exists("job.yaml"):
        return _shown(yaml.safe_load(run.store.read_bytes("job.yaml")))
    folder, is_merge, _ = run.store.url.rstrip("/").rpartition(f"/{MERGES}/")
    whole = Store(folder, run.store.options)
    if not is_merge or not whole.exists("job.yaml"):
        raise RunError(f"{run.store.location('job.yaml')}: not there; the run is not whole")
    job = yaml.safe_load(whole.read_bytes("job.yaml"))
    if run.store.exists(_SECTION):
        job["merge"] = json.loads(run.store.read_bytes(_SECTION))
    return _shown(job)


def _shown(job: Any) -> str:
    text: str = yaml.safe_dump(without_credentials_in(job), sort_keys=False, allow_unicode=True)
    return text


def read_job(run: Run) -> dict[str, Any]:
    """Return `job_text` as plain data."""
    job: dict[str, Any] = yaml.safe_load(job_text(run))
    return job
