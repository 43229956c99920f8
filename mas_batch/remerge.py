"""Merge a run's answers again, by another method, without asking any agent again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import yaml
from dask.system import CPU_COUNT
from distributed import Client, LocalCluster

from mas_batch.agents.work import RunRef
from mas_batch.errors import JobError, RunError
from mas_batch.history import Memory
from mas_batch.job import Job, fingerprint, slug
from mas_batch.job_file import check_job
from mas_batch.learning import Corpus, learned
from mas_batch.monitor.events import Event
from mas_batch.pipeline import merge_spec
from mas_batch.publishing import publish
from mas_batch.results import MERGES, Run, read_plan


def merge_again(
    run: Run,
    changes: Mapping[str, Any],
    *,
    name: str | None = None,
    client: Client | None = None,
    emit: Callable[[Event], None] = lambda event: None,
) -> Run:
    """Merge all answers of a published run as the changed `merge` section says.

    The merge is a folder of its own in the run, with a manifest: the run stays as it is. What
    an execution that was cut short has committed is kept, and a merge that is complete is
    returned as it is.

    Args:
        changes: keys of the job's `merge` section; those not given keep the job's values if
            the method stays the same, else their defaults.
        name: of the merge; None: the method and a hash of the whole section.
        client: the user's own; never closed. None: a cluster on this machine, for the time.

    Raises:
        JobError: the section is wrong, or the method cannot merge this task's answers.
        RunError: the run is not whole, or the cluster was lost.
    """
    job = _changed(run, changes)
    spec = merge_spec(job)
    name = name or f"{spec.method}-{fingerprint(job.merge.model_dump(mode='json'))}"
    try:
        slug(name)
    except ValueError as error:
        raise JobError(str(error), key="--name") from error
    if name in run.merges():
        return run.merge(name)
    plan = read_plan(run.store)
    if plan is None:
        raise RunError(f"{run.store.location('plan.parquet')}: not there; the run is not whole")
    agents = tuple(agent.name for agent in job.agents)
    ref = RunRef(
        run.store, "", job.task, spec, None, plan.passthrough, job.output.keep_text,
        into=f"{MERGES}/{name}",
    )  # fmt: skip
    prior = Memory(job, spec).prior(besides=run.manifest["run"]) if job.merge.history else None
    with _connected(client) as connected:
        corpus = learned(Corpus(connected, ref, plan, agents, emit), "learned.json", prior)
        statistics = corpus.statistics(merge=True)
    publish(corpus.run, f"{run.manifest['run']}/{name}", plan, (), statistics)
    return run.merge(name)


def _changed(run: Run, changes: Mapping[str, Any]) -> Job:
    raw = yaml.safe_load(run.store.read_bytes("job.yaml"))
    kept = raw["merge"]
    method = changes.get("method", kept["method"])
    if method != kept["method"]:  # accuracies are facts about agents; the rest belongs to a method
        kept = {key: kept[key] for key in ("accuracies", "abstain_below")}
    try:
        return check_job({**raw, "merge": {**kept, **changes}}, file="job.yaml")
    except JobError as error:
        raise JobError(f"this run's job with {dict(changes)}: {error}") from error


@contextmanager
def _connected(client: Client | None) -> Iterator[Client]:
    if client is not None:
        yield client
        return
    with (
        LocalCluster(
            n_workers=CPU_COUNT, threads_per_worker=1, dashboard_address=None, silence_logs=40
        ) as cluster,
        Client(cluster) as own,
    ):
        yield own
