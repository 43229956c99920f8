"""Published runs made of plain rows, for readers of runs: nothing was asked of anybody."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from mas_batch.aggregate.reductions import add_counts, count_run, summarize_run
from mas_batch.records import ANSWERS, FAILURES, RESULT_FIELDS
from mas_batch.run_folder.manifest import write_manifest
from mas_batch.run_folder.names import FORMAT, answers_name, partition_stem, results_name
from mas_batch.run_folder.read import Run, open_run
from mas_batch.run_folder.storage import Store

RESULTS = pa.schema(
    [
        pa.field("record_id", pa.string(), nullable=False),
        pa.field("text", pa.string()),
        pa.field("reference", pa.string()),
        *RESULT_FIELDS,
    ]
)
_JOB: dict[str, Any] = {
    "name": "made",
    "task": {"kind": "classify"},
    "routing": {"policy": "least-loaded"},
    "output": {"max_failed_fraction": 0.05},
}


def result(record_id: str, answer: str = "x", **columns: Any) -> dict[str, Any]:
    """Return a row of the results; by default one agent gave the answer."""
    return {
        "record_id": record_id,
        "text": f"text of {record_id}",
        "answer": answer,
        "method": "vote",
        "confidence": 1.0,
        "confidence_kind": "agreement",
        "entropy": 0.0,
        "num_answers": 1,
        "num_distinct": 1,
        "support": [{"answer": answer, "weight": 1.0, "agents": ["one"]}],
        "tie": False,
        "abstain": False,
        **columns,
    }


def failure(record_id: str, reason: str = "empty", **columns: Any) -> dict[str, Any]:
    return {"record_id": record_id, "stage": "corpus", "reason": reason, "message": "", **columns}


def answer(record_id: str, agent_id: str = "one", **columns: Any) -> dict[str, Any]:
    times = {f"t_{part}_s": 0.0 for part in ("compute", "transfer", "processing")}
    facts = {"family_id": agent_id, "sample_id": 0, "text": "x", "label": "x"}
    return {"record_id": record_id, "agent_id": agent_id, **facts, **times, **columns}


def made_run(
    folder: Path,
    rows: Sequence[Sequence[Mapping[str, Any]]],
    answers: Sequence[Sequence[Mapping[str, Any]]] = (),
    job: Mapping[str, Any] | None = None,
    **manifest: Any,
) -> Run:
    """Write and open a run.

    Args:
        rows: per partition, rows of `result` and of `failure`.
        answers: per partition, rows of `answer`; an agent's are one file.
        manifest: further entries.
    """
    store = Store(str(folder))
    counted, failures_files = [], []
    agents = sorted({row["agent_id"] for given in answers for row in given})
    for number, partition in enumerate(rows):
        done = pa.Table.from_pylist([row for row in partition if "answer" in row], RESULTS)
        failed = pa.Table.from_pylist([row for row in partition if "reason" in row], FAILURES)
        given = pa.Table.from_pylist(list(answers[number]) if answers else [], ANSWERS)
        store.commit_table(results_name(number), done)
        if failed.num_rows:
            failures_files.append(f"failures/{partition_stem(number)}-0.parquet")
            store.commit_table(failures_files[-1], failed)
        for agent in agents:
            own = given.filter(pc.equal(given["agent_id"], agent))
            store.commit_table(answers_name(number, agent), own)
        counted.append(count_run(done, failed, given, "label"))
    store.replace("job.yaml", yaml.safe_dump(job or _JOB).encode())
    counts = summarize_run(add_counts(counted))
    by_agent = [{"agent_id": name, **facts} for name, facts in counts.pop("agents").items()]
    every = [[0, len(rows)]]
    files = {"results": every, "review": [], "failures": failures_files}
    published = {
        "format": FORMAT,
        "run": folder.name,
        "counts": counts,
        "agents": by_agent,
        "engines": {},
        "merge": {"method": "vote"},
        "versions": {"mas_batch": "0"},
        "files": {**files, "answers": dict.fromkeys(agents, every)},
        **manifest,
    }
    write_manifest(store, published)
    return open_run(store.url)
