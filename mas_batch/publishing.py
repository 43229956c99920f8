"""The last step of a run and of a merge: what came of it, in a manifest."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import pyarrow as pa

from mas_batch import results
from mas_batch.agents.work import COMMITTED, RunRef
from mas_batch.aggregate.merge import MergeSpec
from mas_batch.results import Plan
from mas_batch.storage import parquet_bytes


def publish(
    run: RunRef, name: str, plan: Plan, agents: Sequence[str], partial: Any
) -> dict[str, Any]:
    """Check the invariant, write the agents table and the manifest; returns that.

    Args:
        name: of the run, or of a merge that was made afterwards.
        partial: of `agents.work.COMMITTED`.

    Raises:
        RunError: records were lost or doubled; nothing is published.
    """
    store = run.merged
    statistics = COMMITTED.finalize(partial)
    counts = statistics["counts"]
    results.check_invariant(plan, counts["results"], counts["failures"])
    table = [{"agent_id": agent_id, **facts} for agent_id, facts in counts.pop("agents").items()]
    store.replace("agents.parquet", parquet_bytes(pa.Table.from_pylist(table)))
    manifest = {
        "format": results.FORMAT,
        "run": name,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "counts": counts,
        "agents": table,
        "engines": results.read_engines(run.store),
        "merge": _merge_facts(run.merge),
        "versions": {
            "python": platform.python_version(),
            **{
                package: version(package)
                for package in ("mas_batch", "dask", "distributed", "pyarrow")
            },
        },
        "files": results.manifest_files(
            store, plan, agents, statistics["failures_files"], statistics["reviewed"]
        ),
    }
    for folder in (results.JOURNAL, results.FIRST_PASS, results.SECOND_PASS):
        store.remove_folder(folder)
    store.remove_orphans()  # all is committed: a temporary file is a killed or beaten writer's
    results.publish(store, manifest)
    return manifest


def _merge_facts(spec: MergeSpec) -> dict[str, Any]:
    """Say how answers were merged, for a manifest."""
    facts: dict[str, Any] = {"method": spec.method, "accuracies": dict(spec.accuracies)}
    if spec.method == "mbr":
        facts |= {"utility": spec.utility, "weights": spec.weights}
    if spec.reliability is not None:
        facts["reliability"] = json.loads(spec.reliability.to_json())
    return facts
