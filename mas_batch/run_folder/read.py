"""A published run, for notebooks and other readers: by its manifest, never by globbing."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa

from mas_batch.cards import card
from mas_batch.errors import RunError
from mas_batch.records import ANSWERS, FAILURES, LEDGER, RESULT_FIELDS
from mas_batch.run_folder.manifest import read_manifest
from mas_batch.run_folder.names import (
    FORMAT,
    LEDGER_FOLDER,
    MERGES,
    answers_name,
    results_name,
    review_name,
)
from mas_batch.run_folder.ranges import from_ranges
from mas_batch.run_folder.storage import Store

_EMPTY = {
    "results": pa.schema([pa.field("record_id", pa.string()), *RESULT_FIELDS]),
    "review": pa.schema([pa.field("record_id", pa.string()), *RESULT_FIELDS]),
    "failures": FAILURES,
    "answers": ANSWERS,
}


_FILES_PER_GROUP = 64
_DASK_PARTITIONS = 1000
"""Up to so many files, a Dask partition is one file."""


class Run:
    """A published run. Tables come as Arrow, pandas or Dask, from the manifest's files alone."""

    def __init__(self, store: Store, manifest: dict[str, Any]) -> None:
        self.store = store
        self.manifest = manifest

    def __repr__(self) -> str:
        counts = self.manifest["counts"]
        results, failures = counts["results"], counts["failures"]
        return f"<Run {self.manifest['run']}: {results} results, {failures} failures>"

    def _repr_html_(self) -> str:
        counts = self.manifest["counts"]
        facts = {
            "results": counts["results"],
            "failures": counts["failures"],
            "in doubt": counts.get("ties", 0) + counts.get("abstained", 0),
            "merged by": self.manifest["merge"]["method"],
            "agents": ", ".join(agent["agent_id"] for agent in self.manifest.get("agents", [])),
            "finished": self.manifest.get("finished"),
            "folder": self.store.location(""),
        }
        return card("run", self.manifest["run"], facts)

    def arrow(self, table: str = "results") -> pa.Table:
        """Read a whole table: `results`, `review`, `failures`, `answers` or `agents`.

        One file is open at a time. A chunk of the table is 64 files; else every file would be a
        chunk of every column.
        """
        groups = _in_groups(self.files(table), _FILES_PER_GROUP)
        tables = [_read_files(names, self.store) for names in groups]
        return _joined(tables) if tables else _EMPTY[table].empty_table()

    def pandas(self, table: str = "results") -> Any:
        """Read a whole table as a pandas DataFrame."""
        return self.arrow(table).to_pandas()

    def dask(self, table: str = "results") -> Any:
        """Open a table as a Dask DataFrame.

        With up to 1,000 files a Dask partition is one file; with more it is several, at most 64.
        """
        import dask.dataframe as dd

        names = list(self.files(table))
        if not names:
            return dd.from_pandas(_EMPTY[table].empty_table().to_pandas(), npartitions=1)
        groups = _in_groups(names, min(_FILES_PER_GROUP, -(-len(names) // _DASK_PARTITIONS)))
        empty = _read_pandas(names[:1], self.store).iloc[:0]
        return dd.from_map(_read_pandas, list(groups), store=self.store, meta=empty)

    def files(self, table: str) -> Iterator[str]:
        """Yield the names of the table's files, in corpus order.

        Raises:
            RunError: there is no such table.
        """
        if table == "agents":
            return iter(["agents.parquet"])
        if table not in _EMPTY:
            raise RunError(f"no table {table!r}; allowed: {', '.join(_EMPTY)}, agents")
        files = self.manifest["files"].get(table, [])
        if table == "failures" or self.manifest["format"] == 1:
            return iter(files)
        if table == "answers":
            return _answers_names(files)
        return map(results_name if table == "results" else review_name, from_ranges(files))

    def ledger(self) -> pa.Table:
        """Read what took time in the run, `LEDGER`; empty for a run of an earlier version."""
        return read_ledger(self.store)

    def merges(self) -> list[str]:
        """Return the names of the merges that were made of this run's answers afterwards."""
        return sorted(
            name
            for name in self.store.list(MERGES)
            if self.store.exists(f"{MERGES}/{name}/manifest.json")
        )

    def merge(self, name: str) -> Run:
        """Open one of `merges`, which has results and failures of its own.

        Raises:
            RunError: there is no such merge.
        """
        if name not in self.merges():
            allowed = ", ".join(self.merges()) or "there is none"
            raise RunError(f"{self.store.location(MERGES)}: no merge {name!r}; allowed: {allowed}")
        return open_run(self.store.child(f"{MERGES}/{name}").url, self.store.options)


def _in_groups(names: Iterable[str], size: int) -> Iterator[list[str]]:
    rest = iter(names)
    return iter(lambda: list(islice(rest, size)), [])


def _read_files(names: Sequence[str], store: Store) -> pa.Table:
    tables = [store.read_table(name).replace_schema_metadata(None) for name in names]
    return _joined(tables).combine_chunks()


def _joined(tables: Sequence[pa.Table]) -> pa.Table:
    """Put tables together; a column that an earlier version did not write is null."""
    return pa.concat_tables(tables, promote_options="default")


def _read_pandas(names: Sequence[str], store: Store) -> Any:
    return _read_files(names, store).to_pandas()


def _answers_names(ranges: Mapping[str, Sequence[Sequence[int]]]) -> Iterator[str]:
    """Yield the files partition by partition, agents in the manifest's order."""

    def answered_by(agent: str, position: int) -> Iterator[tuple[int, int, str]]:
        return ((partition, position, agent) for partition in from_ranges(ranges[agent]))

    by_agent = (answered_by(agent, position) for position, agent in enumerate(ranges))
    for partition, _, agent in heapq.merge(*by_agent):
        yield answers_name(partition, agent)


def open_run(path: str, storage_options: Mapping[str, Any] | None = None) -> Run:
    """Open a published run by its folder (or URL).

    Raises:
        RunError: there is no complete run there, or one of a later version's format.
    """
    store = Store(str(path), storage_options or {})
    manifest = read_manifest(store)
    if manifest is None:
        raise RunError(
            f"{path}: no manifest.json; the run is not complete (or this is not a run folder)"
        )
    if manifest["format"] > FORMAT:
        raise RunError(
            f"{path}: manifest.json is of format {manifest['format']}, this version of mas_batch "
            f"reads 1 to {FORMAT}; use the version that wrote it: {manifest['versions']}"
        )
    return Run(store, manifest)


def read_ledger(store: Store) -> pa.Table:
    """Read the rows of all executions of a run; a run of an earlier version has none."""
    names = sorted(name for name in store.list(LEDGER_FOLDER) if name.endswith(".parquet"))
    tables = [store.read_table(f"{LEDGER_FOLDER}/{name}") for name in names]
    # A column that an earlier version did not write is null.
    joined = pa.concat_tables([LEDGER.empty_table(), *tables], promote_options="default")
    return joined.select(LEDGER.names)
