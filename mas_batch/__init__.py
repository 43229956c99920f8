"""mas_batch: batch text processing by many LLM agents on Dask.

import mas_batch
summary = mas_batch.run(mas_batch.load_job("jobs/summarize.yaml"))
mas_batch.open_run(summary.run).pandas()
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mas_batch.job import Job
    from mas_batch.job_file import check_job, load_job
    from mas_batch.pipeline import Summary, preview, run
    from mas_batch.run_folder.read import Run, open_run
    from mas_batch.serving.pool import AgentPool

__version__ = "0.1.0"

_HOME = {
    "Job": "mas_batch.job",
    "check_job": "mas_batch.job_file",
    "load_job": "mas_batch.job_file",
    "Summary": "mas_batch.pipeline",
    "preview": "mas_batch.pipeline",
    "run": "mas_batch.pipeline",
    "Run": "mas_batch.run_folder.read",
    "open_run": "mas_batch.run_folder.read",
    "AgentPool": "mas_batch.serving.pool",
}

__all__ = [
    "AgentPool",
    "Job",
    "Run",
    "Summary",
    "check_job",
    "load_job",
    "open_run",
    "preview",
    "run",
]


def __getattr__(name: str) -> Any:
    # Lazy: importing a submodule on a worker must not pull the whole command line side in.
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
