"""Which records of a run are worth labelling, so that its confidences can be calibrated."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from mas_batch.aggregate.patterns import Floats, Integers
from mas_batch.errors import RunError
from mas_batch.run_folder.read import Run

LEAST_SPREAD = 0.15
"""Standard deviation that a record's being right has at least, however sure the merge is."""


def rows_to_label(run: Run, count: int) -> pa.Table:
    """Choose records that tell most about the run's confidences; deterministic.

    They are spread over all confidences, in proportion to the standard deviation √(c (1 - c)) of
    being right that a confidence c promises: a sure answer that is right tells little (Neyman, "On
    the two different aspects of the representative method", 1934). Within equal confidences the
    choice is by a hash of the id.

    Returns:
        `record_id`, `text` if the run keeps it, `answer`, `confidence`, `answers` (what was said
        and by whom), and an empty column `label`, in the corpus' order.

    Raises:
        RunError: no record has a confidence in [0, 1].
    """
    results = run.arrow()
    confidences = results["confidence"].to_numpy(zero_copy_only=False).astype(np.float64)
    usable = np.flatnonzero((confidences >= 0) & (confidences <= 1))
    if not len(usable) or "standard_error" in results["confidence_kind"].to_pylist()[:1]:
        raise RunError(f"{run.manifest['run']}: no record has a confidence between 0 and 1")
    ids = [str(results["record_id"][int(row)]) for row in usable]
    chosen = results.take(usable[spread(confidences[usable], ids, count)])
    columns = {"record_id": chosen["record_id"]}
    if "text" in chosen.column_names:
        columns["text"] = chosen["text"]
    columns |= {name: chosen[name] for name in ("answer", "confidence")}
    columns["answers"] = pa.array(map(_said, chosen["support"].to_pylist()), pa.string())
    columns["label"] = pa.array([""] * chosen.num_rows, pa.string())
    return pa.table(columns)


def write_rows(table: pa.Table, path: str) -> None:
    """Write the rows as .csv, .parquet or .jsonl, by the path's ending.

    Raises:
        RunError: it has another ending, or is there already: labels are work.
    """
    target = Path(path)
    if target.suffix not in (".csv", ".parquet", ".jsonl"):
        raise RunError(f"{path}: allowed are names that end in .csv, .parquet or .jsonl")
    if target.exists():
        raise RunError(f"{path} is there already, and may hold labels; give another --output")
    if target.suffix == ".csv":
        pa_csv.write_csv(table, target)
    elif target.suffix == ".parquet":
        pq.write_table(table, target)
    else:
        target.write_text(table.to_pandas().to_json(orient="records", lines=True))


def spread(confidences: Floats, ids: list[str], count: int) -> Integers:
    """Return places spread evenly over the records by confidence, weighed by what they tell."""
    lots = np.array([hashlib.blake2b(i.encode(), digest_size=8).hexdigest() for i in ids])
    order = np.lexsort((lots, confidences))
    spread = np.maximum(np.sqrt(confidences * (1 - confidences)), LEAST_SPREAD)[order]
    reached = np.cumsum(spread) / spread.sum()
    wanted = (np.arange(count) + 0.5) / count
    picked = np.unique(np.searchsorted(reached, wanted))  # a record may be wanted twice
    others = np.setdiff1d(np.arange(len(ids)), picked)[: max(0, count - len(picked))]
    return np.sort(order[np.concatenate([picked, others])])


def _said(support: list[dict[str, Any]]) -> str:
    return "; ".join(f"{each['answer']} ({', '.join(each['agents'])})" for each in support)
