"""Records on which the agents spent the longest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from mas_batch.report.record_facts import SlowRecord
from mas_batch.report.walk import ID_CHARS, TEXT_CHARS, clip_optional, published_answer, rows_of
from mas_batch.run_folder.read import Run
from mas_batch.safe_text import clip

NUM_SLOWEST = 5
MAX_AGENTS = 8
"""Of one record, the slowest of them."""

Found: TypeAlias = tuple[float, str, int, dict[str, Any]]
"""(seconds, record id, partition, the fields of `SlowRecord` that answers tell)."""

_TIMES = ("t_compute_s", "t_transfer_s", "t_processing_s")
_TOKENS = ("prompt_tokens", "completion_tokens")


def slowest_of(answers: pa.Table) -> list[dict[str, Any]]:
    """Return the partition's records on which the agents together spent the longest."""
    seconds = [pc.fill_null(answers[name], 0.0) for name in _TIMES]
    total = pc.add(pc.add(seconds[0], seconds[1]), seconds[2])
    timed = answers.select(["record_id", "agent_id", *_TOKENS]).append_column("total_s", total)
    sums = timed.group_by("record_id", use_threads=False).aggregate(
        [(name, "sum") for name in ("total_s", *_TOKENS)]
    )
    top = sums.sort_by([("total_s_sum", "descending"), ("record_id", "descending")])
    return [
        {
            "record_id": row["record_id"],
            "total_s": row["total_s_sum"],
            "by_agent": _by_agent(timed, row["record_id"]),
            **{name: row[f"{name}_sum"] or 0 for name in _TOKENS},
        }
        for row in top.slice(0, NUM_SLOWEST).to_pylist()
    ]


def _by_agent(timed: pa.Table, record_id: str) -> dict[str, float]:
    spent: Counter[str] = Counter()
    for row in timed.filter(pc.equal(timed["record_id"], record_id)).to_pylist():
        spent[row["agent_id"]] += row["total_s"]
    return dict(spent.most_common(MAX_AGENTS))


def with_texts(run: Run, slowest: Sequence[Found]) -> Iterator[SlowRecord]:
    """Add text and answer, for which the records' partitions are read once more."""
    wanted: dict[int, set[str]] = {}
    for _, record_id, number, _ in slowest:
        wanted.setdefault(number, set()).add(record_id)
    found = rows_of(run, wanted)
    for _, record_id, _, facts in slowest:
        row = found.get(record_id, {})
        yield SlowRecord(
            **{**facts, "record_id": clip(record_id, ID_CHARS)},
            text=clip_optional(row.get("text"), TEXT_CHARS),
            answer=published_answer(row) if row else None,
        )
