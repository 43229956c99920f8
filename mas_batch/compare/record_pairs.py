"""Two runs' results side by side, joined by record id.

The runs may have any order and partitioning. Memory holds the ids, answers, confidences and
references of some 250,000 records of each: larger runs are read in several passes, each of which
joins the records whose ids have another hash.
"""

from __future__ import annotations

import heapq
import math
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mas_batch.aggregate.normalise import normalise_text
from mas_batch.records import STANDARD_ERROR
from mas_batch.run_folder.read import Run

RECORDS_PER_PASS = 250_000
_ROWS_AT_ONCE = 20_000
"""Joined records that are Python objects at one time."""

_SIDE = pa.schema(
    [
        pa.field("record_id", pa.string()),
        pa.field("answer", pa.string()),  # null: the record failed
        pa.field("confidence", pa.float64()),
        pa.field("confidence_kind", pa.string()),
        pa.field("reference", pa.string()),
        pa.field("there", pa.bool_()),  # null, after the join: the run has no such record
    ]
)


@dataclass(frozen=True, slots=True)
class RecordPair:
    """One record in both runs."""

    record_id: str
    answer_a: str
    answer_b: str
    confidence_a: float | None
    confidence_b: float | None
    confidence_kind_a: str | None
    confidence_kind_b: str | None


@dataclass(frozen=True, slots=True)
class Judged:
    """Common records with a reference, by whose published answer equals it."""

    num_records: int
    right_in_both: int
    fixed: int
    """Wrong in the first run, right in the second."""
    broken: int
    p: float
    """Of as many fixed and broken were both equally likely: McNemar's exact test, two-sided."""


@dataclass(frozen=True, slots=True)
class Records:
    """How two runs' records compare."""

    only_a: int
    only_b: int
    common: int
    same: int
    """Answered alike by both, up to normalisation (case, white space, punctuation at the ends)."""
    different: int
    newly_answered: int
    """Failed in the first run, answered in the second."""
    newly_failed: int
    failed_in_both: int
    confidence_change: float | None
    """Mean, of records that both answered; None: the runs' confidences are of unlike kinds."""
    changed: tuple[RecordPair, ...]
    """Other answers, those first of which both runs are sure."""
    shifted: tuple[RecordPair, ...]
    """The biggest changes of confidence."""
    judged: Judged | None
    """None: no common record has a reference, or answers are not labels."""


def compare_records(a: Run, b: Run, num_shown: int, *, judge: bool) -> Records:
    """Join the runs' results and failures by record id, and count.

    Args:
        num_shown: records of each list, at most.
        judge: whether an answer is right if, and only if, it equals the reference.

    Raises:
        RunError: a table cannot be read.
    """
    counted: Counter[str] = Counter()
    change, num_changes = 0.0, 0
    changed: list[RecordPair] = []
    shifted: list[RecordPair] = []
    for joined in _joined(a, b):
        counted.update(_count(joined))
        pairs = _both_answered(joined)
        comparable = [row for row in pairs if _comparable(row)]
        change += math.fsum(row["confidence_b"] - row["confidence_a"] for row in comparable)
        num_changes += len(comparable)
        found = (_pair(row) for row in pairs if not _same(row["answer_a"], row["answer_b"]))
        changed = heapq.nsmallest(num_shown, [*changed, *found], key=_surest_first)
        moved = (_pair(row) for row in comparable if row["confidence_a"] != row["confidence_b"])
        shifted = heapq.nsmallest(num_shown, [*shifted, *moved], key=_shift)
    return Records(
        **{name: counted[name] for name in _COUNTS},
        confidence_change=change / num_changes if num_changes else None,
        changed=tuple(changed),
        shifted=tuple(shifted),
        judged=_judged(counted) if judge else None,
    )


_COUNTS = (
    *("only_a", "only_b", "common", "same", "different"),
    *("newly_answered", "newly_failed", "failed_in_both"),
)


def mcnemar(fixed: int, broken: int) -> float:
    """Return the two-sided p of so unequal a split of a fair coin's tosses; 1 of no toss."""
    tosses = fixed + broken
    whole = math.lgamma(tosses + 1) - tosses * math.log(2)
    return min(
        1.0,
        2  # In logarithms: the integers that the coefficients are have as many bits as tosses.
        * math.fsum(
            math.exp(whole - math.lgamma(k + 1) - math.lgamma(tosses - k + 1))
            for k in range(min(fixed, broken) + 1)
        ),
    )


def _joined(a: Run, b: Run) -> Iterator[pa.Table]:
    """Yield all records of both, some at a time; a record's rows of both runs are one row."""
    most = max(_num_records(a), _num_records(b))
    num_passes = max(1, math.ceil(most / RECORDS_PER_PASS))
    for number in range(num_passes):
        left, right = (_side(run, number, num_passes) for run in (a, b))
        joined = left.join(right, "record_id", None, "full outer", "_a", "_b", use_threads=False)
        for first in range(0, joined.num_rows, _ROWS_AT_ONCE):
            yield joined.slice(first, _ROWS_AT_ONCE)


def _num_records(run: Run) -> int:
    counts = run.manifest["counts"]
    return int(counts["results"] + counts["failures"])


def _side(run: Run, number: int, num_passes: int) -> pa.Table:
    """Read the run's records of one pass."""
    tables = [_SIDE.empty_table()]
    for folder in ("results", "failures"):
        for name in run.files(folder):
            table = run.store.read_table(name, _SIDE.names)
            if num_passes > 1:
                mine = _hashes(table["record_id"].to_pylist()) % num_passes == number
                table = table.filter(pa.array(mine))
            columns = [_column(table, field) for field in _SIDE]
            tables.append(pa.table(columns, schema=_SIDE))
    return pa.concat_tables(tables)


def _column(table: pa.Table, field: pa.Field) -> pa.Array:
    """Return a column of `_SIDE`; failures have none but their ids."""
    if field.name == "there":
        return pa.repeat(True, table.num_rows)
    if field.name not in table.column_names:
        return pa.nulls(table.num_rows, field.type)
    return table[field.name].cast(field.type)


def _hashes(ids: Sequence[str]) -> npt.NDArray[np.int64]:
    return np.fromiter((zlib.crc32(key.encode()) for key in ids), np.int64, len(ids))


def _count(joined: pa.Table) -> Counter[str]:
    counted: Counter[str] = Counter()
    for row in joined.to_pylist():
        if row["there_a"] is None or row["there_b"] is None:
            counted["only_a" if row["there_b"] is None else "only_b"] += 1
            continue
        counted["common"] += 1
        counted[_fate(row["answer_a"], row["answer_b"])] += 1
        reference = row["reference_a"] or row["reference_b"]
        if reference is not None:
            right = (_same(row["answer_a"], reference), _same(row["answer_b"], reference))
            counted[_VERDICTS[right]] += 1
    return counted


_VERDICTS = {
    (True, True): "right_in_both",
    (False, True): "fixed",
    (True, False): "broken",
    (False, False): "wrong_in_both",
}


def _fate(a: str | None, b: str | None) -> str:
    if a is None or b is None:
        return "failed_in_both" if a is b else "newly_answered" if a is None else "newly_failed"
    return "same" if _same(a, b) else "different"


def _same(a: str | None, b: str | None) -> bool:
    return a == b or (a is not None and b is not None and normalise_text(a) == normalise_text(b))


def _judged(counted: Counter[str]) -> Judged | None:
    num_records = sum(counted[verdict] for verdict in _VERDICTS.values())
    if not num_records:
        return None
    fixed, broken = counted["fixed"], counted["broken"]
    return Judged(num_records, counted["right_in_both"], fixed, broken, mcnemar(fixed, broken))


def _both_answered(joined: pa.Table) -> list[dict[str, Any]]:
    both = pc.and_(pc.is_valid(joined["answer_a"]), pc.is_valid(joined["answer_b"]))
    rows: list[dict[str, Any]] = joined.filter(both).to_pylist()
    return rows


def _comparable(row: dict[str, Any]) -> bool:
    known = row["confidence_a"] is not None and row["confidence_b"] is not None
    return known and row["confidence_kind_a"] == row["confidence_kind_b"]


def _pair(row: dict[str, Any]) -> RecordPair:
    return RecordPair(**{field.name: row[field.name] for field in fields(RecordPair)})


def _surest_first(pair: RecordPair) -> tuple[float, str]:
    a = _sureness(pair.confidence_a, pair.confidence_kind_a)
    b = _sureness(pair.confidence_b, pair.confidence_kind_b)
    return -min(a, b), pair.record_id


def _sureness(confidence: float | None, kind: str | None) -> float:
    """Return what is larger the surer an answer is; a standard error is smaller."""
    if confidence is None:
        return -math.inf
    return -confidence if kind == STANDARD_ERROR else confidence


def _shift(pair: RecordPair) -> tuple[float, str]:
    return -abs((pair.confidence_b or 0.0) - (pair.confidence_a or 0.0)), pair.record_id
