"""Going through a run's tables a partition at a time, and cutting what is found to size."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mas_batch.records import STANDARD_ERROR
from mas_batch.run_folder.read import Run
from mas_batch.safe_text import clip

MAX_RECORDS = 250_000
MAX_PARTITIONS = 1_000
"""Of a larger run evenly spaced partitions are read: a report is not to take as long as a run."""

TEXT_CHARS = 420
ANSWER_CHARS = 300
ID_CHARS = 200
MESSAGE_CHARS = 300

_NUMBER = re.compile(r"part-(\d+)")


def stride(run: Run) -> int:
    """Return one of how many partitions is to be read."""
    num_partitions = sum(1 for _ in run.files("results"))
    num_results: int = run.manifest["counts"]["results"]
    by_records = math.ceil(num_results / MAX_RECORDS)
    return max(1, by_records, math.ceil(num_partitions / MAX_PARTITIONS))


def tables(run: Run, table: str, every: int) -> Iterator[tuple[int, pa.Table]]:
    """Yield (partition, its rows), of answers all agents' together."""
    for number, names in groupby(run.files(table), _number_of):
        if number % every == 0:
            found = [run.store.read_table(name).replace_schema_metadata(None) for name in names]
            yield number, pa.concat_tables(found, promote_options="default").combine_chunks()


def _number_of(name: str) -> int:
    found = _NUMBER.search(name)
    if found is None:
        raise ValueError(f"{name!r} is not a file of a partition")
    return int(found[1])


def published_answer(row: Mapping[str, Any]) -> str:
    """Return the answer; of a mean, which is published to its last bit, four digits."""
    is_mean = row["confidence_kind"] == STANDARD_ERROR
    return f"{row['value']:.4g}" if is_mean else clip(row["answer"], ANSWER_CHARS)


def clip_optional(value: Any, length: int) -> str | None:
    """Shorten a text that may be missing."""
    return None if value is None else clip(str(value), length)


def rows_of(run: Run, wanted: Mapping[int, set[str]]) -> dict[str, dict[str, Any]]:
    """Look up results by partition and record id; a record without a result is not in it."""
    found: dict[str, dict[str, Any]] = {}
    for number, names in groupby(run.files("results"), _number_of):
        if number in wanted:
            ids = pa.array(sorted(wanted[number]), pa.string())
            for table in map(run.store.read_table, names):
                rows = table.filter(pc.is_in(table["record_id"], ids)).to_pylist()
                found.update((row["record_id"], row) for row in rows)
    return found
