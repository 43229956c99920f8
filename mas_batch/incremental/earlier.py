"""The last published run of a job, and what of its answers can be taken over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mas_batch.errors import RunError
from mas_batch.incremental.index import COLUMNS, RecordIndex, record_keys
from mas_batch.records import ANSWERS, join_answers
from mas_batch.run_folder.names import answers_name, earlier_runs, staged_name
from mas_batch.run_folder.plan import Plan, read_plan
from mas_batch.run_folder.ranges import from_ranges
from mas_batch.run_folder.read import Run, open_run
from mas_batch.run_folder.storage import Store


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """Records of the present corpus whose text and context an earlier run has; in any order."""

    ids: Sequence[str]
    """Their ids now."""
    owners: NDArray[np.int64]
    """[n], their positions in whatever the caller counts."""
    positions: NDArray[np.int64]
    """[n], positions in the earlier corpus."""
    same_id: NDArray[np.bool_]
    """[n], whether the ids then are the ids now."""


@dataclass(frozen=True, slots=True)
class EarlierRun:
    """A published run, to take answers from."""

    run: Run
    plan: Plan

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.run.manifest["run"])

    def index(self, pool: Executor) -> RecordIndex:
        """Index its records; texts are held one partition per thread at a time.

        Raises:
            RunError: a file of the run is gone, or cannot be read.
        """

        def keys(partition: int) -> NDArray[np.bytes_]:
            return record_keys(self._read(staged_name(partition), COLUMNS))

        return RecordIndex.of(pool.map(keys, range(self.plan.num_partitions)))

    def answers(
        self, agent_id: str, samples: int, prompt_hash: str, wanted: Wanted, pool: Executor
    ) -> tuple[pa.Table, NDArray[np.int64]]:
        """Return the agent's answers to these records: rows as they are now, and their owners.

        Only records whose samples are all valid count: a failed answer is asked for again.

        Raises:
            RunError: a file of the run is gone, or cannot be read.
        """
        first = self.plan.table["first_record"].to_numpy()
        partitions = np.searchsorted(first, wanted.positions, side="right") - 1
        answered = set(from_ranges(self.run.manifest["files"]["answers"].get(agent_id, [])))
        here = [p for p in np.unique(partitions).tolist() if p in answered]

        def found(partition: int) -> tuple[pa.Table, list[int]]:
            name = answers_name(partition, agent_id)
            rows = _valid(self._read(name), prompt_hash)
            members = np.flatnonzero(partitions == partition).tolist()
            now = then = [wanted.ids[i] for i in members]
            if not wanted.same_id[members].all():
                ids = self._read(staged_name(partition), ["record_id"])["record_id"]
                then = ids.take(pa.array(wanted.positions[members] - first[partition])).to_pylist()
            return _of(rows, samples, now, then, members)

        tables, owners = [ANSWERS.empty_table()], [np.empty(0, np.int64)]
        for table, members in pool.map(found, here):
            tables.append(self._taken(table))
            owners.append(wanted.owners[members])
        return pa.concat_tables(tables), np.concatenate(owners)

    def _read(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        try:
            return self.run.store.read_table(name, columns)
        except (OSError, RunError) as error:
            raise _unreadable(self.run.store, error) from error

    def _taken(self, rows: pa.Table) -> pa.Table:
        """Say where the rows come from: the run that asked, also if it is not this one."""
        rows = join_answers([rows])
        source = pc.fill_null(rows["reused_from"], self.name)
        at = ANSWERS.get_field_index("reused_from")
        return rows.set_column(at, ANSWERS.field(at), source)


def last_published(output: Store, job_name: str, current: str) -> EarlierRun | None:
    """Find the run of a job of that name that was published last; None: there is no other.

    Raises:
        RunError: one of them cannot be read, so which is the last is not known.
    """
    try:
        runs = list(_published(output, job_name, current))
        if not runs:
            return None
        last = max(runs, key=lambda run: (run.manifest["finished"], run.manifest["run"]))
        plan = read_plan(last.store)
    except (KeyError, OSError, RunError, ValueError) as error:
        raise _unreadable(output, error) from error
    if plan is None:
        raise _unreadable(output, RunError(f"{last.store.location('plan.parquet')} is not there"))
    return EarlierRun(last, plan)


def _published(output: Store, job_name: str, current: str) -> Iterator[Run]:
    for name in earlier_runs(output, job_name, current):
        store = output.child(name)
        if store.exists("manifest.json"):
            yield open_run(store.url, store.options)


def _unreadable(store: Store, error: Exception) -> RunError:
    """Not a full run: that may cost what nobody would have agreed to."""
    return RunError(
        f"{store.location('')}: `since: last` cannot read an earlier run: {error}; mend it or "
        "remove its folder, or ask about every record: --set since=null"
    )


def _valid(rows: pa.Table, prompt_hash: str) -> pa.Table:
    has_answer = pc.is_null(rows["reason"])
    return rows.filter(pc.and_(has_answer, pc.equal(rows["prompt_hash"], prompt_hash)))


def _of(
    rows: pa.Table, samples: int, ids: Sequence[str], then: Sequence[str], members: Sequence[int]
) -> tuple[pa.Table, list[int]]:
    """Pick the rows of records that have all samples, under the ids of now.

    Args:
        ids, then: of each record, its id now and then.
        members: of each record, what stands for it in the second result, once per row.
    """
    by_id: dict[str, list[int]] = {}
    for row, record_id in enumerate(rows["record_id"].to_pylist()):
        by_id.setdefault(record_id, []).append(row)
    picked: list[int] = []
    owners: list[int] = []
    named: list[str] = []
    for now, earlier, member in zip(ids, then, members, strict=True):
        own = by_id.get(earlier, [])
        if len(own) == samples:
            picked += own
            owners += [member] * samples
            named += [now] * samples
    at = rows.schema.get_field_index("record_id")
    taken = rows.take(pa.array(picked, pa.int64()))
    return taken.set_column(at, rows.schema.field(at), pa.array(named, pa.string())), owners
