"""A run on disk: its names, its commits, what is left to do, and its readers.

    <output>/<job name>-<fingerprint>/
        job.yaml                              the effective job, without secrets
        partitions/part-000000.parquet        the records as read, one file per partition
        plan.parquet                          the partitions; committed when all are staged
        answers/agent=<name>/part-….parquet   one row per answer
        results/part-….parquet                one row per answered record
        failures/part-…-<hash>.parquet        one row per record without an answer
        agents.parquet                        per agent: answers, failures, tokens, times
        engines.json                          what each agent's engine says of itself
        events/<time>-0000.jsonl              every routing decision and every outcome
    journal/                              while a record that kills its worker is searched for
        manifest.json                         what is valid, counts, versions; published last

The folder's name is a hash of everything that determines the results, so that resuming is
a matter of which files exist: the same job finds its own files, a changed one never does.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import yaml

from mas_batch.corpus import CorpusReader, conform, records_table
from mas_batch.errors import RunError
from mas_batch.job import Job, fingerprint
from mas_batch.partition import Partition
from mas_batch.records import ANSWERS, FAILURES, PLAN, RESULT_FIELDS
from mas_batch.storage import Store, parquet_bytes

FORMAT = 1
"""Version of this layout; a change of it is a change of every fingerprint."""

JOURNAL = "journal"
"""Folder of what `agents.quarantine` notes in one execution: the next may have better machines."""

_PART = re.compile(r"part-(\d+)\.parquet")
_PASSTHROUGH = b"mas_batch.passthrough"
_FAILURES = b"mas_batch.failures"


def part(partition: int) -> str:
    """Return the stem of a partition's files."""
    return f"part-{partition:06d}"


def staged_name(partition: int) -> str:
    """Return where the partition's records are."""
    return f"partitions/{part(partition)}.parquet"


def answers_name(partition: int, agent_id: str) -> str:
    """Return where the agent's answers to the partition are."""
    return f"answers/agent={agent_id}/{part(partition)}.parquet"


def results_name(partition: int) -> str:
    """Return where the partition's results are."""
    return f"results/{part(partition)}.parquet"


# Before the run: identity, staging, plan


def run_name(job: Job, corpus: CorpusReader) -> str:
    """Name the run after everything that determines its results."""
    return f"{job.name}-{fingerprint([FORMAT, job.identity(), corpus.fingerprint])}"


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
    content = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    run.replace("job.yaml", content.encode())


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
        return sum(self.table["num_records"].to_pylist())

    def sizes(self) -> Iterator[tuple[int, int, int]]:
        """Yield (partition, records, estimated tokens) in order."""
        columns = (
            self.table[name].to_pylist()
            for name in ("partition", "num_records", "estimated_tokens")
        )
        yield from zip(*columns, strict=True)


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
    rows = []
    for partition in partitions:
        known = corpus.passthrough_schema() if corpus.has_schema else None
        run.commit_table(staged_name(partition.index), records_table(partition.records, known))
        rows.append(
            {
                "partition": partition.index,
                "first_record": partition.first_record,
                "num_records": len(partition.records),
                "estimated_tokens": partition.estimated_tokens,
            }
        )
    passthrough = corpus.passthrough_schema()
    encoded = base64.b64encode(passthrough.serialize().to_pybytes())
    table = pa.Table.from_pylist(rows, schema=PLAN).replace_schema_metadata({_PASSTHROUGH: encoded})
    run.commit_table("plan.parquet", table)
    return Plan(table, passthrough)


def read_records(run: Store, partition: int, passthrough: pa.Schema) -> pa.Table:
    """Read a staged partition with the corpus-wide column types."""
    return conform(run.read_table(staged_name(partition)), passthrough)


# During the run: commits, and what is left


@dataclass(frozen=True, slots=True)
class Committed:
    """What earlier executions of the run left behind."""

    merged: frozenset[int]
    answered: Mapping[str, frozenset[int]]
    """Agent → partitions whose answers are there."""

    def agents(self, partition: int) -> frozenset[str]:
        """Agents whose answers to the partition are there."""
        return frozenset(agent for agent, parts in self.answered.items() if partition in parts)


def committed(run: Store, agents: Iterable[str]) -> Committed:
    """List what is committed; one listing per folder."""
    answered = {agent: _partitions(run.list(f"answers/agent={agent}")) for agent in agents}
    return Committed(_partitions(run.list("results")), answered)


def _partitions(names: Iterable[str]) -> frozenset[int]:
    """Number the partitions of file names; what else a filesystem keeps there is passed over."""
    found = (_PART.fullmatch(name) for name in names)
    return frozenset(int(match[1]) for match in found if match)


def commit_results(
    run: Store, partition: int, merged: pa.Table, failures: pa.Table
) -> tuple[int, int]:
    """Commit a partition's results and failures as one step; returns their row counts.

    The results file names its failures file, whose own name is a hash of its content: if two
    copies of the merge saw different answers, the winner's pair stays together.
    """
    name = None
    if failures.num_rows:
        content = parquet_bytes(failures)
        digest = hashlib.blake2b(content, digest_size=6).hexdigest()
        name = f"failures/{part(partition)}-{digest}.parquet"
        run.commit(name, content)
    metadata = {_FAILURES: (name or "").encode()}
    if run.commit_table(results_name(partition), merged.replace_schema_metadata(metadata)):
        return merged.num_rows, failures.num_rows
    merged, failures = read_results(run, partition)
    return merged.num_rows, failures.num_rows


def read_results(run: Store, partition: int) -> tuple[pa.Table, pa.Table]:
    """Read a partition's committed results and failures."""
    merged = run.read_table(results_name(partition))
    name = failures_name(merged.schema)
    failures = run.read_table(name) if name else _no_failures()
    return merged.replace_schema_metadata(None), failures


def failures_name(schema: pa.Schema) -> str | None:
    """Return the failures file that belongs to a results file of this schema."""
    return ((schema.metadata or {}).get(_FAILURES) or b"").decode() or None


def _no_failures() -> pa.Table:
    return FAILURES.empty_table()


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


def publish(run: Store, manifest: Mapping[str, Any]) -> None:
    """Publish the manifest: from now on readers see the run as complete."""
    run.replace("manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False).encode())


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

    def arrow(self, table: str = "results") -> pa.Table:
        """Read a whole table: `results`, `failures`, `answers` or `agents`."""
        names = self.files(table)
        if not names:
            return _EMPTY[table].empty_table()
        return pa.concat_tables(
            [self.store.read_table(n).replace_schema_metadata(None) for n in names]
        )

    def pandas(self, table: str = "results") -> Any:
        """Read a whole table as a pandas DataFrame."""
        return self.arrow(table).to_pandas()

    def dask(self, table: str = "results") -> Any:
        """Open a table as a Dask DataFrame, one partition per file."""
        import dask.dataframe as dd

        names = self.files(table)
        if not names:
            return dd.from_pandas(_EMPTY[table].empty_table().to_pandas(), npartitions=1)
        empty = _read_pandas(names[0], self.store).iloc[:0]
        return dd.from_map(_read_pandas, names, store=self.store, meta=empty)

    def files(self, table: str) -> list[str]:
        """List the table's files, in corpus order.

        Raises:
            RunError: there is no such table.
        """
        if table == "agents":
            return ["agents.parquet"]
        if table not in ("results", "failures", "answers"):
            raise RunError(f"no table {table!r}; allowed: results, failures, answers, agents")
        files: list[str] = self.manifest["files"][table]
        return files


_EMPTY = {
    "results": pa.schema([pa.field("record_id", pa.string()), *RESULT_FIELDS]),
    "failures": FAILURES,
    "answers": ANSWERS,
}


def _read_pandas(name: str, store: Store) -> Any:
    return store.read_table(name).replace_schema_metadata(None).to_pandas()


def open_run(path: str, storage_options: Mapping[str, Any] | None = None) -> Run:
    """Open a published run by its folder (or URL).

    Raises:
        RunError: there is no complete run there.
    """
    store = Store(str(path), storage_options or {})
    manifest = read_manifest(store)
    if manifest is None:
        raise RunError(
            f"{path}: no manifest.json; the run is not complete (or this is not a run folder)"
        )
    return Run(store, manifest)


def manifest_files(run: Store, plan: Plan, agents: Iterable[str]) -> dict[str, list[str]]:
    """List the valid files of every table, in corpus order."""
    done = committed(run, agents)
    results = [results_name(p) for p, _, _ in plan.sizes()]
    failures = [name for n in results if (name := failures_name(run.read_schema(n)))]
    answers = [
        answers_name(p, a)
        for p, _, _ in plan.sizes()
        for a in done.answered
        if p in done.answered[a]
    ]
    return {"results": results, "failures": failures, "answers": answers}
