"""The last published run of a job, and which of its answers can be taken over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mas_batch.errors import Reason, RunError
from mas_batch.incremental.index import COLUMNS, RecordIndex, record_keys
from mas_batch.records import ANSWERS, join_answers
from mas_batch.run_folder.names import answers_name, earlier_runs, staged_name
from mas_batch.run_folder.plan import Plan, read_plan
from mas_batch.run_folder.ranges import from_ranges
from mas_batch.run_folder.read import Run, open_run
from mas_batch.run_folder.storage import Store

_IN_VAIN = pa.array([str(reason) for reason in Reason if not reason.worth_retrying])
"""Reasons for which an answer would fail again."""


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """Records of the present corpus whose text and context an earlier run has; in any order."""

    ids: Sequence[str]
    """Their ids in the present corpus."""
    owners: NDArray[np.int64]
    """[n], a number by which the caller knows each record; returned with its answers."""
    positions: NDArray[np.int64]
    """[n], positions in the earlier corpus."""
    same_id: NDArray[np.bool_]
    """[n], whether the record had the same id in the earlier corpus."""


@dataclass(frozen=True, slots=True)
class EarlierRun:
    """A published run, to take answers from."""

    run: Run
    plan: Plan
    is_retried: bool = False
    """Only failed answers for which that may help are asked for again: other failed ones are taken
    over as they are, and so are answers to whole texts when only a limit has changed."""

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.run.manifest["run"])

    def index(self, pool: Executor) -> RecordIndex:
        """Index the run's records; each thread holds the texts of one partition at a time.

        Raises:
            RunError: a file of the run is missing, or cannot be read.
        """

        def keys(partition: int) -> NDArray[np.bytes_]:
            return record_keys(self._read(staged_name(partition), COLUMNS))

        return RecordIndex.of(pool.map(keys, range(self.plan.num_partitions)))

    def answers(
        self,
        agent_id: str,
        samples: int,
        prompt_hash: str,
        wanted: Wanted,
        pool: Executor,
        *,
        only_whole: bool = False,
    ) -> tuple[pa.Table, NDArray[np.int64]]:
        """Return the agent's answers to these records, under their present ids, and their owners.

        Only records whose samples are all usable count: a failed answer is asked for again, unless
        the run is retried and that would be in vain.

        Args:
            only_whole: leave out answers to texts that were asked about in parts.

        Raises:
            RunError: a file of the run is missing, or cannot be read.
        """
        first = self.plan.table["first_record"].to_numpy()
        partitions = np.searchsorted(first, wanted.positions, side="right") - 1
        answered = set(from_ranges(self.run.manifest["files"]["answers"].get(agent_id, [])))
        here = [p for p in np.unique(partitions).tolist() if p in answered]

        def read_answers(partition: int) -> tuple[pa.Table, list[int]]:
            name = answers_name(partition, agent_id)
            rows = self._usable_answers(self._read(name), prompt_hash, only_whole)
            members = np.flatnonzero(partitions == partition).tolist()
            now = then = [wanted.ids[i] for i in members]
            if not wanted.same_id[members].all():
                ids = self._read(staged_name(partition), ["record_id"])["record_id"]
                then = ids.take(pa.array(wanted.positions[members] - first[partition])).to_pylist()
            return _rows_of_complete_records(rows, samples, now, then, members)

        tables, owners = [ANSWERS.empty_table()], [np.empty(0, np.int64)]
        for table, members in pool.map(read_answers, here):
            tables.append(self._with_origin(table))
            owners.append(wanted.owners[members])
        return pa.concat_tables(tables), np.concatenate(owners)

    def _usable_answers(self, rows: pa.Table, prompt_hash: str, only_whole: bool) -> pa.Table:
        usable = pc.is_null(rows["reason"])
        if self.is_retried:
            usable = pc.or_(usable, pc.is_in(rows["reason"], _IN_VAIN))
        if only_whole:
            usable = pc.and_(usable, pc.equal(rows["num_parts"], 1))
        return rows.filter(pc.and_(usable, pc.equal(rows["prompt_hash"], prompt_hash)))

    def _read(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        try:
            return self.run.store.read_table(name, columns)
        except (OSError, RunError) as error:
            raise _unreadable_run(self.run.store, error) from error

    def _with_origin(self, rows: pa.Table) -> pa.Table:
        """Fill `reused_from` with the run that asked, which may be even earlier than this one."""
        rows = join_answers([rows])
        source = pc.fill_null(rows["reused_from"], self.name)
        at = ANSWERS.get_field_index("reused_from")
        return rows.set_column(at, ANSWERS.field(at), source)


def last_published(output: Store, job_name: str, current: str) -> EarlierRun | None:
    """Find the run of a job of that name that was published last; None: there is no other run.

    A run that another one has looked at as its last is not the last. Among the others, of which
    there is one where every run is made with `since`, the time in the manifest decides.

    Raises:
        RunError: a run of the job cannot be read, so it is not known which run is the last.
    """
    try:
        runs = list(_published_runs(output, job_name, current))
        if not runs:
            return None
        followed = {(run.manifest.get("since") or {}).get("run") for run in runs}
        latest = [run for run in runs if run.manifest["run"] not in followed]
        last = max(latest or runs, key=lambda run: (run.manifest["finished"], run.manifest["run"]))
        return _with_plan(last)
    except (KeyError, OSError, RunError, ValueError) as error:
        raise _unreadable_run(output, error) from error


def to_retry(output: Store, name: str) -> EarlierRun:
    """Open the published run whose failed answers are asked for again, where that may help.

    Raises:
        RunError: it cannot be read.
    """
    store = output.child(name)
    run = _with_plan(open_run(store.url, store.options))
    return replace(run, is_retried=True)


def _with_plan(run: Run) -> EarlierRun:
    plan = read_plan(run.store)
    if plan is None:
        raise RunError(f"{run.store.location('plan.parquet')} is not there")
    return EarlierRun(run, plan)


def _published_runs(output: Store, job_name: str, current: str) -> Iterator[Run]:
    for name in earlier_runs(output, job_name, current):
        store = output.child(name)
        if store.exists("manifest.json"):
            yield open_run(store.url, store.options)


def _unreadable_run(store: Store, error: Exception) -> RunError:
    """Build the error for an earlier run that cannot be read.

    To ask about every record instead might cost more than the user has agreed to.
    """
    return RunError(
        f"{store.location('')}: `since: last` cannot read an earlier run: {error}; mend it or "
        "remove its folder, or ask about every record: --set since=null"
    )


def _rows_of_complete_records(
    rows: pa.Table, samples: int, ids: Sequence[str], then: Sequence[str], members: Sequence[int]
) -> tuple[pa.Table, list[int]]:
    """Return the rows of records that have all samples, under the records' present ids.

    Args:
        ids, then: each record's id in the present corpus and in the earlier one.
        members: each record's number; the second result holds it once per row.
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
