"""Worker side of `since: last`: an earlier run's answers are joined with the new ones."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from mas_batch.records import ANSWERS, Record
from mas_batch.run_folder.names import reused_name
from mas_batch.run_folder.storage import Store


def known_answers(
    run: Store, partition: int, agent_id: str, records: Sequence[Record]
) -> tuple[pa.Table, list[Record], list[Record]]:
    """Return earlier answers to these records, the records that have them, and the others."""
    name = reused_name(partition, agent_id)
    try:
        rows = run.read_table(name)
    except FileNotFoundError:
        return ANSWERS.empty_table(), [], list(records)
    rows = rows.filter(pc.is_in(rows["record_id"], _record_ids(records)))
    known = set(rows["record_id"].to_pylist())
    return (
        rows,
        [record for record in records if record.record_id in known],
        [record for record in records if record.record_id not in known],
    )


def in_order(answers: Sequence[pa.Table], records: Sequence[Record]) -> pa.Table:
    """Join tables of answers, sorted by the order of these records and then by sample."""
    table = pa.concat_tables(answers)
    place = pc.index_in(table["record_id"], value_set=_record_ids(records))
    keys = pa.table({"place": place, "sample": table["sample_id"]})
    order = pc.sort_indices(keys, sort_keys=[("place", "ascending"), ("sample", "ascending")])
    return table.take(order).combine_chunks()


def asked_now(answers: pa.Table) -> pa.Table:
    """Return the answers that this run has asked for."""
    return answers.filter(pc.is_null(answers["reused_from"]))


def _record_ids(records: Sequence[Record]) -> pa.Array:
    return pa.array([record.record_id for record in records], pa.string())
