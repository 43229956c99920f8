"""Which answers and merges of a run are committed; commits of results, failures and review."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mas_batch.records import FAILURES
from mas_batch.run_folder.names import (
    PASSES,
    partition_stem,
    results_name,
    review_name,
)
from mas_batch.run_folder.plan import Plan
from mas_batch.run_folder.ranges import Bitmap
from mas_batch.run_folder.storage import Store, parquet_bytes

_PARTITION_FILE = re.compile(
    r"part-([0-9]{6}|[1-9][0-9]{6,})\.parquet"
)  # as `partition_stem` writes them
_FAILURES = b"mas_batch.failures"
_AGENTS = b"mas_batch.agents"


@dataclass(frozen=True, slots=True, eq=False)
class Committed:
    """What earlier executions of the run have committed: a byte per partition and folder."""

    is_merged: Bitmap
    """Partition → whether its results are committed."""
    is_answered: Mapping[str, Bitmap]
    """Agent → partition → whether its answers are committed."""

    @property
    def num_merged(self) -> int:
        """How many partitions are merged."""
        return int(np.count_nonzero(self.is_merged))

    @property
    def num_answers_to_open(self) -> int:
        """Number of pairs of agent and partition that are answered but not merged yet."""
        return sum(
            int(np.count_nonzero(parts & ~self.is_merged)) for parts in self.is_answered.values()
        )

    def agents(self, partition: int) -> frozenset[str]:
        """Agents whose answers to the partition are committed."""
        return frozenset(agent for agent, parts in self.is_answered.items() if parts[partition])


def committed(
    store: Store, plan: Plan, agents: Iterable[str], merged: Store | None = None
) -> Committed:
    """List what is committed; one listing per folder.

    Args:
        merged: the folder in which merges are committed; None: the run itself.
    """
    size = plan.num_partitions
    answered = {
        agent: _partitions_of(_list_names(store, f"answers/agent={agent}"), size)
        for agent in agents
    }
    return Committed(_partitions_of(_list_names(merged or store, "results"), size), answered)


def _list_names(store: Store, folder: str) -> Iterator[str]:
    """Yield the names in a folder; a local listing is streamed, without a stat of each file."""
    if not store.is_local:
        yield from store.list(folder)
        return
    try:
        with os.scandir(store.path(folder)) as entries:
            for entry in entries:
                yield entry.name
    except FileNotFoundError:
        return
    except OSError:
        yield from store.list(folder)  # raises the error that people can act on


def _partitions_of(names: Iterable[str], size: int) -> Bitmap:
    """Mark the partitions that have a file; other names in the folder are ignored."""
    members = np.zeros(size, np.bool_)
    for name in names:
        match = _PARTITION_FILE.fullmatch(name)
        if match and int(match[1]) < size:
            members[int(match[1])] = True
    return members


def commit_results(
    store: Store, partition: int, merged: pa.Table, failures: pa.Table, agents: Iterable[str]
) -> tuple[int, int]:
    """Commit a partition's results and failures as one step; returns their row counts.

    The results file names its failures file, whose own name is a hash of its content: if two
    copies of the merge saw different answers, the winner's pair stays together. It also names the
    agents whose answers were merged: answers that are committed later do not count.

    Args:
        agents: agents whose answers were merged; agent names have no comma.
    """
    name = None
    if failures.num_rows:
        content = parquet_bytes(failures)
        digest = hashlib.blake2b(content, digest_size=6).hexdigest()
        name = f"failures/{partition_stem(partition)}-{digest}.parquet"
        store.commit(name, content)
    metadata = {_FAILURES: (name or "").encode(), _AGENTS: ",".join(sorted(agents)).encode()}
    if store.commit_table(results_name(partition), merged.replace_schema_metadata(metadata)):
        return merged.num_rows, failures.num_rows
    winner = read_results(store, partition)
    return winner.results.num_rows, winner.failures.num_rows


@dataclass(frozen=True, slots=True, eq=False)
class Merged:
    """The committed merge of a partition."""

    results: pa.Table
    failures: pa.Table
    failures_name: str | None
    """The failures file, if there is one."""
    agents: tuple[str, ...] | None
    """Agents whose answers were merged, sorted; None: an earlier version did not say."""


def read_results(store: Store, partition: int) -> Merged:
    """Read a partition's committed results and failures."""
    merged = store.read_table(results_name(partition))
    name = ((merged.schema.metadata or {}).get(_FAILURES) or b"").decode() or None
    failures = store.read_table(name) if name else FAILURES.empty_table()
    plain = merged.replace_schema_metadata(None)
    return Merged(plain, failures, name, _agents_in_metadata(merged.schema))


def merged_agents(store: Store, partition: int) -> tuple[str, ...] | None:
    """Read only `Merged.agents`."""
    return _agents_in_metadata(store.read_schema(results_name(partition)))


def _agents_in_metadata(schema: pa.Schema) -> tuple[str, ...] | None:
    named = (schema.metadata or {}).get(_AGENTS)
    return None if named is None else tuple(filter(None, named.decode().split(",")))


def commit_review(store: Store, partition: int, merged: pa.Table) -> int:
    """Commit the doubtful results to `review/`, if there are any; returns how many there are.

    Doubtful are ties and results below the job's confidence; they are kept with all candidates.
    """
    doubtful = merged.filter(pc.or_(merged["tie"], merged["abstain"]))
    if doubtful.num_rows:
        store.commit_table(review_name(partition), doubtful)
    return int(doubtful.num_rows)


def has_passes(store: Store) -> bool:
    """Say whether the run has provisional merges, or a journal."""
    return not store.list("").isdisjoint(PASSES)


def remove_passes(store: Store) -> None:
    """Remove the provisional merges of a published run, and its journal."""
    for folder in PASSES:
        store.remove_folder(folder)
