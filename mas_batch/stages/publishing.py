"""The last step of a run or a merge: check its counts, and publish its manifest."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from mas_batch.agents.statistics import COMMITTED
from mas_batch.aggregate.method import MergeSpec
from mas_batch.errors import MasBatchError
from mas_batch.job import Job
from mas_batch.latency.summary import summarize
from mas_batch.repeatable import repeatable_facts
from mas_batch.run_folder.commits import has_passes, remove_passes
from mas_batch.run_folder.lock import RunLock
from mas_batch.run_folder.manifest import (
    check_invariant,
    manifest_files,
    read_engines,
    write_manifest,
)
from mas_batch.run_folder.names import FORMAT
from mas_batch.run_folder.plan import Plan
from mas_batch.run_folder.ranges import Ranges
from mas_batch.run_folder.read import read_ledger
from mas_batch.run_folder.ref import RunRef
from mas_batch.run_folder.storage import Store, parquet_bytes

logger = logging.getLogger(__name__)


def publish(
    run: RunRef,
    name: str,
    plan: Plan,
    agents: Sequence[str],
    partial: Any,
    facts: Mapping[str, Any] = MappingProxyType({}),
    job: Job | None = None,
) -> dict[str, Any]:
    """Check the invariant, write the agents table and the manifest; returns the manifest.

    Results and failures are committed already, by the merges on the workers.

    Provisional merges and the journal are removed last: until the manifest is there, a killed
    execution needs them to go on. An execution killed in between leaves them to `remove_leftovers`.

    Args:
        name: the name of the run, or of a merge that was made afterwards.
        partial: a partial of `agents.statistics.COMMITTED`.
        facts: further facts for the manifest.
        job: the run's; None of a merge that was made afterwards.

    Raises:
        RunError: records were lost or doubled; nothing is published.
    """
    store = run.merged
    statistics = COMMITTED.finalize(partial)
    counts = statistics["counts"]
    check_invariant(plan, counts["results"], counts["failures"])
    table = [{"agent_id": agent_id, **facts} for agent_id, facts in counts.pop("agents").items()]
    store.replace("agents.parquet", parquet_bytes(pa.Table.from_pylist(table)))
    manifest = {
        "format": FORMAT,
        "run": name,
        "finished": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "counts": counts,
        "agents": table,
        "engines": read_engines(run.store),
        "merge": _merge_facts(run.merge),
        **_escalation_facts(run.store),
        **_repeatable_facts(run, job, statistics["answers"], plan.num_partitions),
        **facts,
        "versions": {
            "python": platform.python_version(),
            **{
                package: version(package)
                for package in ("mas_batch", "dask", "distributed", "pyarrow")
            },
        },
        "files": manifest_files(
            plan,
            {agent: statistics["answers"].get(agent, []) for agent in agents},
            statistics["failures_files"],
            statistics["reviewed"],
        ),
    }
    if not run.into:  # a merge made afterwards has no ledger of its own
        manifest["latency"] = summarize(read_ledger(store), statistics["latency"])
    store.remove_orphans()  # all is committed: any temporary file is of a killed or late writer
    write_manifest(store, manifest)
    remove_passes(store)
    return manifest


def _repeatable_facts(
    run: RunRef, job: Job | None, answers: Mapping[str, Ranges], num_partitions: int
) -> dict[str, Any]:
    if job is None:
        return {}
    engines = read_engines(run.store)
    return repeatable_facts(job, answers, num_partitions, reuses=run.reuses, engines=engines)


def remove_leftovers(store: Store) -> None:
    """Remove what an execution left that was killed after publishing: passes, temporary files.

    The run is complete with or without them: if they cannot be removed, that is only logged.
    """
    try:
        if has_passes(store) or store.has_orphans():
            with RunLock(store):  # not while the process that published still removes them
                remove_passes(store)
                store.remove_orphans()
    except (MasBatchError, OSError) as error:
        logger.warning("%s: what was left is not removed: %s", store.location(""), error)


def _escalation_facts(run: Store) -> dict[str, Any]:
    """Say which records were escalated, and by which guarantee, if the run is a cascade."""
    name = "escalation.json"
    return {"escalation": run.read_facts(name)} if run.exists(name) else {}


def _merge_facts(spec: MergeSpec) -> dict[str, Any]:
    """Say how answers were merged, for a manifest."""
    facts: dict[str, Any] = {"method": spec.method, "accuracies": dict(spec.accuracies)}
    if spec.rules.uses_utility:
        facts |= {"utility": spec.utility, "weights": spec.weights}
    if spec.chosen is not None:
        facts |= {"chosen_by": "auto", "why": spec.chosen}
    if spec.reliability is not None:
        facts["reliability"] = json.loads(spec.reliability.to_json())
    if spec.calibrated is not None:
        facts["calibration"] = json.loads(spec.calibrated.to_json())
    if spec.warnings:
        facts["warnings"] = list(spec.warnings)
    return facts
