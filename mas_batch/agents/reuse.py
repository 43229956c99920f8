"""Worker side: answers that an earlier run or a sample has are joined with the new ones."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import pyarrow as pa
import pyarrow.compute as pc

from mas_batch.records import ANSWERS, Record, join_answers
from mas_batch.run_folder.names import SAMPLE_PASS, answers_name, reused_name
from mas_batch.run_folder.ref import RunRef


def known_answers(
    run: RunRef, partition: int, agent_id: str, records: Sequence[Record]
) -> tuple[pa.Table, list[Record], list[Record]]:
    """Return earlier answers to these records, the records that have them, and the others."""
    rows = ANSWERS.empty_table()
    names = [reused_name(partition, agent_id)] * run.reuses
    names += [_sampled_name(partition, agent_id)] * _follows_sample(run)
    for name in names:
        with suppress(FileNotFoundError):
            found = join_answers([run.store.read_table(name)])
            new = pc.invert(pc.is_in(found["record_id"], rows["record_id"].combine_chunks()))
            rows = pa.concat_tables([rows, found.filter(new)])
    rows = rows.filter(pc.is_in(rows["record_id"], _record_ids(records)))
    known = set(rows["record_id"].to_pylist())
    return (
        rows,
        [record for record in records if record.record_id in known],
        [record for record in records if record.record_id not in known],
    )


def without_sampled(run: RunRef, partition: int, agent_id: str, answers: pa.Table) -> pa.Table:
    """Return the answers but those that were counted when the escalation's sample was asked."""
    if not _follows_sample(run):
        return answers
    try:
        sampled = run.store.read_table(_sampled_name(partition, agent_id))["record_id"]
    except FileNotFoundError:
        return answers
    return answers.filter(pc.invert(pc.is_in(answers["record_id"], sampled.combine_chunks())))


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


def _follows_sample(run: RunRef) -> bool:
    """Whether the agent was asked about a sample before."""
    sampled = run.escalation is not None and run.escalation.sample is not None
    return sampled and not run.answers_into


def _sampled_name(partition: int, agent_id: str) -> str:
    return f"{SAMPLE_PASS}/{answers_name(partition, agent_id)}"


def _record_ids(records: Sequence[Record]) -> pa.Array:
    return pa.array([record.record_id for record in records], pa.string())
