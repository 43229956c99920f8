"""A run on disk: its names, its commits, what is left to do, and its readers.

    <output>/<job name>-<fingerprint>/
        job.yaml                              the effective job, without secrets
        partitions/part-000000.parquet        the records as read, one file per partition
        plan.parquet                          the partitions; committed when all are staged
        answers/agent=<name>/part-….parquet   one row per answer
        results/part-….parquet                one row per answered record
        failures/part-…-<hash>.parquet        one row per record without an answer
        review/part-….parquet                 records in a tie or of low confidence, for people
        agents.parquet                        per agent: answers, failures, tokens, times
        learned.json                          what the merge learned from the whole corpus
        escalation.json                       which records one more agent was asked about
        merges/<name>/                        the answers merged again: results, failures, manifest,
                                              and merge.json, how
        engines.json                          what each agent's engine says of itself
        since.json                            what is reused of an earlier run; see `incremental`
        reused/                               its answers, until a partition's others are there
        events/<time>-0000.jsonl              every routing decision and every outcome
        evaluation/                           what `mas-batch evaluate` has found
        journal/                              while a record that kills its worker is searched for
        first-pass/                           while answers come, if the merge needs all of them
        manifest.json                         what is valid, counts, versions; published last
        report.html                           all of it for people; see `report`

The folder's name is a hash of everything that determines the results, so that resuming is
a matter of which files exist: the same job finds its own files, a changed one never does.
"""

from __future__ import annotations

import base64
import hashlib
import heapq
import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from mas_batch.cards import card
from mas_batch.corpus import CorpusReader, conform, records_table
from mas_batch.engines import examples
from mas_batch.errors import RunError
from mas_batch.job import Job, fingerprint
from mas_batch.latency.ledger import read_ledger
from mas_batch.partition import Partition
from mas_batch.records import ANSWERS, FAILURES, PLAN, RESULT_FIELDS
from mas_batch.safe_text import without_credentials
from mas_batch.storage import Store, parquet_bytes

FORMAT = 3
"""Version of this layout; a change of it is a change of every fingerprint.

1: the manifest named every file. 2: it holds ranges of partition numbers; see `manifest_files`.
3: a results file names the agents whose answers it merges, and has a column `coverage`.
"""

FIRST_PASS = "first-pass"
"""Folder of merges that serve until the whole corpus is answered."""

SECOND_PASS = "second-pass"
"""Folder of merges that only say which partitions' escalated records are answered."""

MERGES = "merges"
"""Folder of merges that were made afterwards, each a folder with a manifest."""

EVALUATION = "evaluation"
"""Folder of what `mas-batch evaluate` has found; see `evaluation.files`."""

REUSED = "reused"
"""Folder of an earlier run's answers, by partition and agent, until all others are there too."""

JOURNAL = "journal"
"""Folder of what `agents.quarantine` notes in one execution: the next may have better machines."""

_PASSES = (JOURNAL, REUSED, FIRST_PASS, SECOND_PASS)

Bitmap: TypeAlias = npt.NDArray[np.bool_]
"""One bool per partition of the run."""

Ranges: TypeAlias = Sequence[Sequence[int]]
"""Partition numbers as ascending pairs `[first, stop)`."""

_PLAN_ROWS_AT_ONCE = 4096

_PART = re.compile(r"part-([0-9]{6}|[1-9][0-9]{6,})\.parquet")  # as `part` writes them
_PASSTHROUGH = b"mas_batch.passthrough"
_FAILURES = b"mas_batch.failures"
_AGENTS = b"mas_batch.agents"


def part(partition: int) -> str:
    """Return the stem of a partition's files."""
    return f"part-{partition:06d}"


def staged_name(partition: int) -> str:
    """Return where the partition's records are."""
    return f"partitions/{part(partition)}.parquet"


def answers_name(partition: int, agent_id: str) -> str:
    """Return where the agent's answers to the partition are."""
    return f"answers/agent={agent_id}/{part(partition)}.parquet"


def reused_name(partition: int, agent_id: str) -> str:
    """Return where those of the agent's answers are that an earlier run has, if not all."""
    return f"{REUSED}/agent={agent_id}/{part(partition)}.parquet"


def results_name(partition: int) -> str:
    """Return where the partition's results are."""
    return f"results/{part(partition)}.parquet"


def review_name(partition: int) -> str:
    """Return where those of the partition's results are that people should look at."""
    return f"review/{part(partition)}.parquet"


# Before the run: identity, staging, plan


def run_name(job: Job, corpus: CorpusReader) -> str:
    """Name the run after everything that determines its results.

    Raises:
        JobError: an agent's examples are not there.
    """
    taught = [examples.fingerprint(agent.options) for agent in job.agents]
    return f"{job.name}-{fingerprint([FORMAT, job.identity(), corpus.fingerprint, taught])}"


def earlier_runs(output: Store, job_name: str, current: str) -> list[str]:
    """List other runs of a job of that name: what changed made a new one."""
    prefix_length = len(current) - len(job_name) - 1
    return sorted(
        name
        for name in output.list("")
        if name != current
        and name.startswith(f"{job_name}-")
        and len(name) == len(job_name) + 1 + prefix_length
    )


def write_job(run: Store, job: Job) -> None:
    """Keep the effective job in the run; storage options may hold secrets and stay out."""
    secret = {"corpus": {"storage_options"}, "output": {"storage_options"}}
    kept = job.model_dump(mode="json", exclude=secret)
    for agent in kept["agents"]:
        agent["options"].pop("extra_body", None)  # what endpoints want there may be a key
    content = yaml.safe_dump(without_credentials_in(kept), sort_keys=False, allow_unicode=True)
    run.replace("job.yaml", content.encode())


def read_job_mapping(run: Store) -> dict[str, Any]:
    """Return job.yaml as plain data, without keys that only earlier versions had."""
    job: dict[str, Any] = yaml.safe_load(run.read_bytes("job.yaml"))
    job["routing"].pop("mode", None)  # it never changed a result
    return job


def without_credentials_in(value: Any) -> Any:
    """Take the credentials out of the URLs in plain data.

    Before it is YAML, which breaks long lines where it likes. Not out of prompts: they are no URLs.
    """
    if isinstance(value, str):
        return without_credentials(value)
    if isinstance(value, list):
        return [without_credentials_in(item) for item in value]
    if isinstance(value, dict):
        return {
            key: item if key in ("prompt", "system") else without_credentials_in(item)
            for key, item in value.items()
        }
    return value


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
    run.remove_folder("partitions")  # of a staging that was cut short
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


# During the run: commits, and what is left


@dataclass(frozen=True, slots=True, eq=False)
class Committed:
    """What earlier executions of the run left behind: a byte per partition and folder."""

    merged: Bitmap
    """Partition → its results are there."""
    answered: Mapping[str, Bitmap]
    """Agent → partition → its answers are there."""

    @property
    def num_merged(self) -> int:
        """How many partitions are merged."""
        return int(np.count_nonzero(self.merged))

    @property
    def num_answers_to_open(self) -> int:
        """How many answers, of one agent to one partition, wait for a merge."""
        return sum(int(np.count_nonzero(parts & ~self.merged)) for parts in self.answered.values())

    def agents(self, partition: int) -> frozenset[str]:
        """Agents whose answers to the partition are there."""
        return frozenset(agent for agent, parts in self.answered.items() if parts[partition])


def committed(
    run: Store, plan: Plan, agents: Iterable[str], merged: Store | None = None
) -> Committed:
    """List what is committed; one listing per folder.

    Args:
        merged: where the merges are; None: in the run itself.
    """
    size = plan.num_partitions
    answered = {agent: _bitmap(_names(run, f"answers/agent={agent}"), size) for agent in agents}
    return Committed(_bitmap(_names(merged or run, "results"), size), answered)


def _names(run: Store, folder: str) -> Iterator[str]:
    """Stream the names in a folder; a local one is not held in memory, nor is each file asked."""
    if not run.is_local:
        yield from run.list(folder)
        return
    try:
        with os.scandir(run.path(folder)) as entries:
            for entry in entries:
                yield entry.name
    except FileNotFoundError:
        return
    except OSError:
        yield from run.list(folder)  # raises the error that people can act on


def _bitmap(names: Iterable[str], size: int) -> Bitmap:
    """Mark the partitions of file names; what else a filesystem keeps there is passed over."""
    members = np.zeros(size, np.bool_)
    for name in names:
        match = _PART.fullmatch(name)
        if match and int(match[1]) < size:
            members[int(match[1])] = True
    return members


def commit_results(
    run: Store, partition: int, merged: pa.Table, failures: pa.Table, agents: Iterable[str]
) -> tuple[int, int]:
    """Commit a partition's results and failures as one step; returns their row counts.

    The results file names its failures file, whose own name is a hash of its content: if two
    copies of the merge saw different answers, the winner's pair stays together. It names the
    agents too: answers that are committed later are not part of what is merged.

    Args:
        agents: whose answers were merged; agent names have no comma.
    """
    name = None
    if failures.num_rows:
        content = parquet_bytes(failures)
        digest = hashlib.blake2b(content, digest_size=6).hexdigest()
        name = f"failures/{part(partition)}-{digest}.parquet"
        run.commit(name, content)
    metadata = {_FAILURES: (name or "").encode(), _AGENTS: ",".join(sorted(agents)).encode()}
    if run.commit_table(results_name(partition), merged.replace_schema_metadata(metadata)):
        return merged.num_rows, failures.num_rows
    winner = read_results(run, partition)
    return winner.results.num_rows, winner.failures.num_rows


@dataclass(frozen=True, slots=True, eq=False)
class Merged:
    """What is committed of a partition's merge."""

    results: pa.Table
    failures: pa.Table
    failures_name: str | None
    """The failures file, if there is one."""
    agents: tuple[str, ...] | None
    """Whose answers were merged, sorted; None: an earlier version did not say."""


def read_results(run: Store, partition: int) -> Merged:
    """Read a partition's committed results and failures."""
    merged = run.read_table(results_name(partition))
    name = ((merged.schema.metadata or {}).get(_FAILURES) or b"").decode() or None
    failures = run.read_table(name) if name else FAILURES.empty_table()
    plain = merged.replace_schema_metadata(None)
    return Merged(plain, failures, name, _agents_in(merged.schema))


def merged_agents(run: Store, partition: int) -> tuple[str, ...] | None:
    """Read only `Merged.agents`."""
    return _agents_in(run.read_schema(results_name(partition)))


def _agents_in(schema: pa.Schema) -> tuple[str, ...] | None:
    named = (schema.metadata or {}).get(_AGENTS)
    return None if named is None else tuple(filter(None, named.decode().split(",")))


# After the run: invariant, manifest


def check_invariant(plan: Plan, num_results: int, num_failures: int) -> None:
    """Rows in = rows in results + rows in failures.

    Raises:
        RunError: they differ; nothing is published.
    """
    if plan.num_records != num_results + num_failures:
        raise RunError(
            f"{plan.num_records} records went in, {num_results} results + {num_failures} "
            "failures came out; nothing is published; please report this defect"
        )


def write_engines(run: Store, facts: Mapping[str, Any]) -> None:
    """Keep what the engines say of themselves; a later execution may find nothing left to ask."""
    run.replace("engines.json", json.dumps(facts, ensure_ascii=False, indent=1).encode())


def read_engines(run: Store) -> dict[str, Any]:
    """Return what the engines said of themselves when they were last loaded."""
    if not run.exists("engines.json"):
        return {}
    facts: dict[str, Any] = json.loads(run.read_bytes("engines.json"))
    return facts


def commit_review(run: Store, partition: int, merged: pa.Table) -> int:
    """Commit what people should look at, if anything; returns how many records.

    These are the results in a tie or below the job's confidence, with all their candidates.
    """
    doubtful = merged.filter(pc.or_(merged["tie"], merged["abstain"]))
    if doubtful.num_rows:
        run.commit_table(review_name(partition), doubtful)
    return int(doubtful.num_rows)


def manifest_files(
    plan: Plan,
    answers: Mapping[str, Ranges],
    failures: Mapping[int, str],
    review: Iterable[int],
) -> dict[str, Any]:
    """Say which files are valid, in a size that hardly grows with the number of partitions.

    Results and answers have one possible name per partition: `results` is ranges `[first, stop)`
    of partition numbers, so is `review`, and `answers` is agent → ranges. A failures file's
    name holds a hash: `failures` is names, in corpus order.

    Args:
        answers: agent → the partitions in whose merge its answers are.
        failures: partition → its failures file, of those that have one.
        review: partitions that have a review file.
    """
    reviewed = np.zeros(plan.num_partitions, np.bool_)
    reviewed[list(review)] = True
    return {
        "results": to_ranges(np.ones(plan.num_partitions, np.bool_)),
        "review": to_ranges(reviewed),
        "failures": [failures[partition] for partition in sorted(failures)],
        "answers": {agent: [list(pair) for pair in ranges] for agent, ranges in answers.items()},
    }


def join_ranges(parts: Iterable[Ranges]) -> list[list[int]]:
    """Return the union of ranges `[first, stop)` that do not overlap: ascending, none touching."""
    joined: list[list[int]] = []
    for first, stop in sorted(map(tuple, chain.from_iterable(parts))):
        if joined and joined[-1][1] == first:
            joined[-1][1] = stop
        else:
            joined.append([first, stop])
    return joined


def to_ranges(members: Bitmap) -> list[list[int]]:
    """Return the members of a bitmap as ascending ranges `[first, stop)` that do not touch."""
    edges = np.flatnonzero(np.diff(members, prepend=False, append=False))
    ranges: list[list[int]] = edges.reshape(-1, 2).tolist()
    return ranges


def from_ranges(ranges: Ranges) -> Iterator[int]:
    """Yield the members of ranges `[first, stop)`."""
    for first, stop in ranges:
        yield from range(first, stop)


def publish(run: Store, manifest: Mapping[str, Any]) -> None:
    """Publish the manifest: from now on readers see the run as complete."""
    run.replace("manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False).encode())


def has_passes(run: Store) -> bool:
    """Say whether the run has provisional merges, or a journal."""
    return not run.list("").isdisjoint(_PASSES)


def remove_passes(run: Store) -> None:
    """Remove the provisional merges of a published run, and its journal."""
    for folder in _PASSES:
        run.remove_folder(folder)


def read_manifest(run: Store) -> dict[str, Any] | None:
    """Return the manifest of a published run, else None."""
    if not run.exists("manifest.json"):
        return None
    manifest: dict[str, Any] = json.loads(run.read_bytes("manifest.json"))
    return manifest


# Readers, for notebooks


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

        One file is open at a time; its rows are in chunks of 64 files, of which each file by
        itself would be a chunk of every column.
        """
        groups = _in_groups(self.files(table), _FILES_PER_GROUP)
        tables = [_read_files(names, self.store) for names in groups]
        return pa.concat_tables(tables) if tables else _EMPTY[table].empty_table()

    def pandas(self, table: str = "results") -> Any:
        """Read a whole table as a pandas DataFrame."""
        return self.arrow(table).to_pandas()

    def dask(self, table: str = "results") -> Any:
        """Open a table as a Dask DataFrame.

        A Dask partition is one file for up to 1,000 files; of more it is several, at most 64.
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
        """Name the merges that were made afterwards of this run's answers."""
        return sorted(
            name
            for name in self.store.list(MERGES)
            if self.store.exists(f"{MERGES}/{name}/manifest.json")
        )

    def merge(self, name: str) -> Run:
        """Open one of `merges`: its results and failures, beside this run's answers.

        Raises:
            RunError: there is no such merge.
        """
        if name not in self.merges():
            allowed = ", ".join(self.merges()) or "there is none"
            raise RunError(f"{self.store.location(MERGES)}: no merge {name!r}; allowed: {allowed}")
        return open_run(self.store.child(f"{MERGES}/{name}").url, self.store.options)


_EMPTY = {
    "results": pa.schema([pa.field("record_id", pa.string()), *RESULT_FIELDS]),
    "review": pa.schema([pa.field("record_id", pa.string()), *RESULT_FIELDS]),
    "failures": FAILURES,
    "answers": ANSWERS,
}


_FILES_PER_GROUP = 64
_DASK_PARTITIONS = 1000
"""Up to so many, a Dask partition is one file."""


def _in_groups(names: Iterable[str], size: int) -> Iterator[list[str]]:
    rest = iter(names)
    return iter(lambda: list(islice(rest, size)), [])


def _read_files(names: Sequence[str], store: Store) -> pa.Table:
    tables = [store.read_table(name).replace_schema_metadata(None) for name in names]
    return pa.concat_tables(tables).combine_chunks()


def _read_pandas(names: Sequence[str], store: Store) -> Any:
    return _read_files(names, store).to_pandas()


def _answers_names(ranges: Mapping[str, Sequence[Sequence[int]]]) -> Iterator[str]:
    """Yield partition by partition, its agents in the manifest's order."""

    def of(position: int, agent: str) -> Iterator[tuple[int, int, str]]:
        return ((partition, position, agent) for partition in from_ranges(ranges[agent]))

    for partition, _, agent in heapq.merge(*(of(i, agent) for i, agent in enumerate(ranges))):
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
