"""Where a run's time went, by its ledger and the sketches of its answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mas_batch.latency.phases import ALL


def summarize(ledger: pa.Table, per_record: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures that a manifest keeps of a run's latency.

    Args:
        ledger: rows of `LEDGER` of all executions.
        per_record: result of `RECORD_LATENCY`: agent → part of the latency → figures.

    Returns:
        `wall_s` and `phases` of the submitting process, all executions together; `hosts`:
        the seconds of the agents' workers, added up; `tokens`: `prompt_tokens`, and of those of
        engines that can tell, `cached_tokens`; `per_partition`: quantiles by stage and agent;
        `per_record`: quantiles of an answer's seconds by agent and part of the latency.
    """
    phases = {name: _total_s(_rows_of(ledger, name), "wall_s") for name in ALL}
    rows = [
        {"agent_id": agent_id, "part": part, **figures}
        for agent_id, parts in per_record.items()
        for part, figures in parts.items()
    ]
    return {
        "wall_s": sum(phases.values()),
        "phases": {name: seconds for name, seconds in phases.items() if seconds},
        "hosts": _hosts(ledger),
        "tokens": _tokens(_rows_of(ledger, "answer")),
        "per_partition": _per_partition(ledger),
        "per_record": rows,
    }


def _hosts(ledger: pa.Table) -> dict[str, Any]:
    """Add up what the hosts did.

    `load_s`, `compute_s` and `idle_s` together are about the time that they were there; the rest
    is of tasks, several of which run at once while the engine computes or is idle.
    """
    answers, loads = _rows_of(ledger, "answer"), _rows_of(ledger, "load")
    return {
        "num": pc.count_distinct(loads["worker"]).as_py(),
        "compute_s": _total_s(answers, "compute_s"),
        "transfer_s": _total_s(answers, "read_s") + _total_s(answers, "write_s"),
        "wait_s": _total_s(answers, "wait_s"),
        "processing_s": _total_s(answers, "process_s"),
        "failed_s": _total_s(_rows_of(ledger, "failed answer"), "wall_s"),
        "idle_s": _total_s(answers, "idle_s"),
        "load_s": _total_s(loads, "wall_s"),
        "queue_s": _total_s(answers, "queue_s"),
    }


def _tokens(answers: pa.Table) -> dict[str, int | None]:
    """Add up the tokens of prompts, and those of them that had been read for others."""
    names = ("prompt_tokens", "cached_tokens")
    return {name: pc.sum(answers[name]).as_py() for name in names}


def _per_partition(ledger: pa.Table) -> list[dict[str, Any]]:
    """Return quantiles of tasks' wall seconds and of their waiting, by stage and agent."""
    tasks = ledger.filter(pc.is_valid(ledger["partition"]))
    keys = (
        tasks.group_by(["stage", "agent_id"])
        .aggregate([])
        .sort_by([("stage", "ascending"), ("agent_id", "ascending")])
    )
    found = []
    for key in keys.to_pylist():
        own = _rows_of(tasks, key["stage"])
        if key["agent_id"] is not None:
            own = own.filter(pc.equal(own["agent_id"], key["agent_id"]))
        times = {name: _quantiles(own, f"{name}_s") for name in ("wall", "queue")}
        found.append({**key, "count": own.num_rows, **times})
    return found


def _quantiles(table: pa.Table, column: str) -> dict[str, float]:
    seconds = table[column].drop_null().to_numpy()
    p50, p95, p99 = np.quantile(seconds, [0.5, 0.95, 0.99]) if len(seconds) else [0.0] * 3
    return {"p50_s": float(p50), "p95_s": float(p95), "p99_s": float(p99)}


def _rows_of(ledger: pa.Table, stage: str) -> pa.Table:
    return ledger.filter(pc.equal(ledger["stage"], stage))


def _total_s(table: pa.Table, column: str) -> float:
    return float(pc.sum(table[column]).as_py() or 0.0)
