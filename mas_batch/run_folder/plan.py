"""The partitions of a run: staged once, then the plan is committed."""

from __future__ import annotations

import base64
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mas_batch.corpus import CorpusReader, conform, records_table
from mas_batch.partition import Partition
from mas_batch.records import PLAN
from mas_batch.run_folder.names import staged_name
from mas_batch.run_folder.ranges import Bitmap
from mas_batch.run_folder.storage import Store

_PLAN_ROWS_AT_ONCE = 4096
_PASSTHROUGH = b"mas_batch.passthrough"


@dataclass(frozen=True, slots=True)
class Plan:
    """The partitions of a run, and the types of the corpus's other columns."""

    table: pa.Table
    passthrough: pa.Schema

    @property
    def num_partitions(self) -> int:
        """How many partitions there are."""
        return int(self.table.num_rows)

    @property
    def num_records(self) -> int:
        """How many rows the corpus has, unusable ones included."""
        return int(pc.sum(self.table["num_records"]).as_py() or 0)

    def num_records_in(self, partitions: Bitmap) -> int:
        """How many rows the given partitions have."""
        return int(self.table["num_records"].to_numpy()[partitions].sum())

    def sizes(self) -> Iterator[tuple[int, int, int]]:
        """Yield (partition, records, estimated tokens) in order."""
        table = self.table.select(["partition", "num_records", "estimated_tokens"])
        for batch in table.to_batches(max_chunksize=_PLAN_ROWS_AT_ONCE):
            yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def read_plan(run: Store) -> Plan | None:
    """Return the committed plan, or None while the corpus is not completely staged."""
    if not run.exists("plan.parquet"):
        return None
    table = run.read_table("plan.parquet")
    encoded = table.schema.metadata[_PASSTHROUGH]
    return Plan(table, pa.ipc.read_schema(pa.BufferReader(base64.b64decode(encoded))))


def stage(run: Store, corpus: CorpusReader, partitions: Iterable[Partition]) -> Plan:
    """Write every partition's records once, then commit the plan.

    Agents read their partition from here: a compressed or remote corpus is read once, by
    one reader, and a file that changes under a resumed run changes nothing.
    """
    run.remove_folder("partitions")  # of a staging that was killed
    columns = {name: array("q") for name in PLAN.names}
    for partition in partitions:
        known = corpus.passthrough_schema() if corpus.has_schema else None
        run.commit_table(staged_name(partition.index), records_table(partition.records, known))
        columns["partition"].append(partition.index)
        columns["first_record"].append(partition.first_record)
        columns["num_records"].append(len(partition.records))
        columns["estimated_tokens"].append(partition.estimated_tokens)
    passthrough = corpus.passthrough_schema()
    encoded = base64.b64encode(passthrough.serialize().to_pybytes())
    table = pa.table({name: np.asarray(column) for name, column in columns.items()}).cast(PLAN)
    table = table.replace_schema_metadata({_PASSTHROUGH: encoded})
    run.commit_table("plan.parquet", table)
    return Plan(table, passthrough)


def read_records(run: Store, partition: int, passthrough: pa.Schema) -> pa.Table:
    """Read a staged partition with the corpus-wide column types."""
    return conform(run.read_table(staged_name(partition)), passthrough)
