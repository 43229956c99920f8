"""Going through a run's tables a partition at a time, and cutting what is found to size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import PurePath
from typing import Any

import pyarrow as pa

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


def stride(run: Run) -> int:
    """Return one of how many partitions is to be read."""
    num_partitions = sum(1 for _ in run.files("results"))
    num_results: int = run.manifest["counts"]["results"]
    by_records = math.ceil(num_results / MAX_RECORDS)
    return max(1, by_records, math.ceil(num_partitions / MAX_PARTITIONS))


def tables(run: Run, table: str, every: int) -> Iterator[pa.Table]:
    """Yield the rows of every so many partitions, of answers all agents' together."""
    for number, names in groupby(run.files(table), _number_of):
        if number % every == 0:
            found = [run.store.read_table(name).replace_schema_metadata(None) for name in names]
            yield pa.concat_tables(found, promote_options="default").combine_chunks()


def _number_of(name: str) -> int:
    return int(PurePath(name).stem.removeprefix("part-"))


def published_answer(row: Mapping[str, Any]) -> str:
    """Return the answer; of a mean, which is published to its last bit, four digits."""
    is_mean = row["confidence_kind"] == STANDARD_ERROR
    return f"{row['value']:.4g}" if is_mean else clip(row["answer"], ANSWER_CHARS)


def clip_optional(value: Any, length: int) -> str | None:
    """Shorten a text that may be missing."""
    return None if value is None else clip(str(value), length)
