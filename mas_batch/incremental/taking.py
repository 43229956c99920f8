"""Take answers over from an earlier run, a bounded part of the corpus at a time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import accumulate, pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mas_batch.incremental.earlier import EarlierRun, Wanted
from mas_batch.incremental.identity import (
    changed_sections,
    hash_of_prompt,
    is_random,
    why_not_reusable,
)
from mas_batch.incremental.index import COLUMNS, Keys, Matches, RecordIndex, record_keys
from mas_batch.incremental.settling import Settling
from mas_batch.job import Agent, Job
from mas_batch.run_folder.commits import Committed, committed
from mas_batch.run_folder.manifest import read_engines, write_engines
from mas_batch.run_folder.names import answers_name, reused_name, staged_name
from mas_batch.run_folder.plan import Plan
from mas_batch.run_folder.storage import Store

FILE = "since.json"

_RECORDS_AT_ONCE = 65_536
"""Records whose answers are held in memory. If the corpus has another order than the earlier one,
the earlier answers are read once for every so many records."""

_THREADS = 8
"""The threads mostly wait for a disk or a network."""


@dataclass(frozen=True, slots=True)
class Since:
    """What a run reuses of an earlier run."""

    run: str | None
    """Name of the earlier run; None: there is none."""
    to_ask: tuple[str, ...]
    """Agents that may have to be asked; no other agent's model need be loaded."""
    records: Mapping[str, int] = field(default_factory=dict)
    """Numbers of `unchanged`, `changed`, `new` and `gone` records."""
    answers: Mapping[str, int] = field(default_factory=dict)
    """Agent → number of its earlier answers that can be reused."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Agent → why none of its earlier answers can be reused."""
    is_retry: bool = False
    """Only what failed in the earlier run is asked for again."""


def read_since(run: Store) -> Since | None:
    """Return what `take_over` has found for this run; None: it was not called."""
    if not run.exists(FILE):
        return None
    facts = run.read_facts(FILE)
    return Since(**{**facts, "to_ask": tuple(facts["to_ask"])})


@dataclass(frozen=True, slots=True)
class Present:
    """The run that takes answers over; its corpus is staged."""

    job: Job
    store: Store
    plan: Plan
    is_embedded: bool
    """Whether models are loaded on this machine."""


def take_over(
    present: Present,
    settling: Settling,
    earlier: Callable[[], EarlierRun | None],
    check: Callable[[], None] = lambda: None,
) -> Since:
    """Take over answers of an earlier run, unless an execution has done so already.

    Memory: 48 bytes per record of the earlier run, twice that for a moment, and the answers to
    `_RECORDS_AT_ONCE` records.

    Args:
        earlier: opens that run; None: there is none.
        check: called for every `_RECORDS_AT_ONCE` records; an exception that it raises ends the
            call.

    Raises:
        JobError: an agent's examples are not there.
        RunError: an earlier run cannot be read; no agent was asked.
    """
    if (known := read_since(present.store)) is not None:
        return known
    found = earlier()
    if found is None:
        since = Since(None, tuple(agent.name for agent in present.job.agents))
    else:
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="since-last") as pool:
            since = _Taking.begin(present, settling, found, pool).run(check)
    content = json.dumps(asdict(since), ensure_ascii=False, indent=1)
    present.store.commit(FILE, content.encode())
    return since


@dataclass(frozen=True, slots=True, eq=False)
class _PresentPartition:
    """A partition of the present run, without its texts."""

    number: int
    records: pa.Table
    """`record_id` and `reason`."""
    keys: Keys


@dataclass(frozen=True, slots=True, eq=False)
class _Neighbours:
    """Neighbouring partitions, and where the earlier run has their records."""

    partitions: Sequence[_PresentPartition]
    matches: Matches
    usable: NDArray[np.bool_]

    @classmethod
    def of(cls, partitions: Sequence[_PresentPartition], index: RecordIndex) -> _Neighbours:
        matches = index.find(np.concatenate([each.keys for each in partitions]))
        usable = (each.records["reason"].is_null().to_numpy() for each in partitions)
        return cls(partitions, matches, np.concatenate(list(usable)))

    def wanted(self, *, same_id: bool) -> Wanted:
        """Return the usable records that the earlier run has; with `same_id`, under the same id."""
        matches = self.matches
        there = matches.same_id if same_id else matches.position >= 0
        owners = np.flatnonzero(there & self.usable)
        columns = (each.records["record_id"].combine_chunks() for each in self.partitions)
        ids = pa.chunked_array(columns)
        known = ids.take(pa.array(owners)).to_pylist()
        return Wanted(known, owners, matches.position[owners], matches.same_id[owners])

    def split(self, rows: pa.Table, owners: NDArray[np.int64]) -> list[pa.Table]:
        """Return each partition's rows, in the order of its records."""
        order = np.argsort(owners, kind="stable")
        ends = accumulate((each.records.num_rows for each in self.partitions), initial=0)
        bounds = np.searchsorted(owners[order], np.fromiter(ends, np.int64))
        rows = rows.take(pa.array(order)).combine_chunks()
        return [rows.slice(start, stop - start) for start, stop in pairwise(bounds.tolist())]

    def tally(self, tally: Tally) -> None:
        """Count the records as unchanged, changed or new."""
        position, changed = self.matches.position, self.matches.changed
        # All unusable records have the same content; only their ids differ.
        unchanged = self.matches.same_id | ((position >= 0) & self.usable)
        tally.add(position[unchanged], changed[~unchanged])


class Tally:
    """Counts records that are unchanged, changed, new or gone since the earlier run."""

    def __init__(self, num_earlier: int) -> None:
        self._is_gone = np.ones(num_earlier, np.bool_)
        self._num_unchanged = self._num_unlike = 0
        self._same_id: list[NDArray[np.int64]] = []

    def add(self, found: NDArray[np.int64], unlike: NDArray[np.int64]) -> None:
        """Count some records of the present corpus.

        Args:
            found: earlier positions of the unchanged records.
            unlike: for every other record, the earlier position of its id, else -1.
        """
        self._is_gone[found] = False
        self._num_unchanged += len(found)
        self._num_unlike += len(unlike)
        self._same_id.append(unlike[unlike >= 0])

    def counts(self) -> dict[str, int]:
        """Return the counts of unchanged, changed, new and gone; call it after the last `add`."""
        same_id = np.concatenate([np.empty(0, np.int64), *self._same_id])
        # Where ids are made of positions, the earlier record may be there still, under another id.
        changed = same_id[self._is_gone[same_id]]
        self._is_gone[changed] = False
        return {
            "unchanged": self._num_unchanged,
            "changed": len(changed),
            "new": self._num_unlike - len(changed),
            "gone": int(np.count_nonzero(self._is_gone)),
        }


@dataclass(frozen=True, slots=True, eq=False)
class _Taking:
    present: Present
    settling: Settling
    earlier: EarlierRun
    done: Committed
    """What earlier executions of the present run have committed."""
    agents: Sequence[Agent]
    """Agents whose earlier answers can be reused."""
    refused: Mapping[str, str]
    pool: Executor

    @classmethod
    def begin(
        cls, present: Present, settling: Settling, earlier: EarlierRun, pool: Executor
    ) -> _Taking:
        job, manifest = present.job, earlier.run.manifest
        may_change = ("limits",) if earlier.is_retried else ()
        refused = {
            agent.name: why
            for agent in job.agents
            if (
                why := why_not_reusable(
                    job, agent, manifest, is_embedded=present.is_embedded, may_change=may_change
                )
            )
        }
        agents = [agent for agent in job.agents if agent.name not in refused]
        done = committed(present.store, present.plan, settling.samples)
        return cls(present, settling, earlier, done, agents, refused, pool)

    def run(self, check: Callable[[], None]) -> Since:
        self._copy_engine_facts()
        index = self.earlier.index(self.pool)
        tally = Tally(len(index))
        answers: Counter[str] = Counter()
        to_ask = set(self._escalated)
        for partitions in self._read_partitions():
            check()
            block = _Neighbours.of(partitions, index)
            block.tally(tally)
            known = {agent.name: self._known_answers(agent, block) for agent in self.agents}
            answers.update({agent: sum(map(len, tables)) for agent, tables in known.items()})
            tables_of = _by_partition(known, len(partitions))
            for asked in self.pool.map(self._commit_known, partitions, tables_of):
                to_ask |= asked
        return Since(
            self.earlier.name,
            tuple(agent.name for agent in self.present.job.agents if agent.name in to_ask),
            tally.counts(),
            {agent.name: answers[agent.name] for agent in self.agents},
            self.refused,
            self.earlier.is_retried,
        )

    @property
    def _escalated(self) -> frozenset[str]:
        """The agent that is asked last; the other agents' answers decide about which records."""
        escalate = self.present.job.routing.escalate
        return frozenset() if escalate is None else frozenset([escalate.agent])

    def _copy_engine_facts(self) -> None:
        """Copy the earlier run's facts about engines; an engine that is loaded replaces its own."""
        earlier = self.earlier.run.manifest["engines"]
        facts = {agent.name: earlier[agent.name] for agent in self.agents if agent.name in earlier}
        store = self.present.store
        write_engines(store, facts | read_engines(store))

    def _read_partitions(self) -> Iterator[list[_PresentPartition]]:
        """Read the staged partitions, about `_RECORDS_AT_ONCE` records at a time."""
        numbers: list[int] = []
        num_records = 0
        for number, count, _ in self.present.plan.sizes():
            numbers.append(number)
            num_records += count
            if num_records >= _RECORDS_AT_ONCE:
                yield list(self.pool.map(self._read_partition, numbers))
                numbers, num_records = [], 0
        if numbers:
            yield list(self.pool.map(self._read_partition, numbers))

    def _read_partition(self, number: int) -> _PresentPartition:
        name = staged_name(number)
        records = self.present.store.read_table(name, [*COLUMNS, "reason"])
        return _PresentPartition(
            number, records.select(["record_id", "reason"]), record_keys(records)
        )

    def _known_answers(self, agent: Agent, block: _Neighbours) -> list[pa.Table]:
        """Return the agent's earlier answers that can be reused, a table per partition."""
        job, earlier = self.present.job, self.earlier
        prompt = hash_of_prompt(job, agent)
        wanted = block.wanted(same_id=is_random(agent))
        has_changed = bool(changed_sections(job, agent, earlier.run.manifest))  # a limit
        found = earlier.answers(
            agent.name, agent.samples, prompt, wanted, self.pool, only_whole=has_changed
        )
        return block.split(*found)

    def _commit_known(
        self, partition: _PresentPartition, known: Mapping[str, pa.Table]
    ) -> set[str]:
        """Commit a partition's known answers; returns agents that may have to be asked about it."""
        store, done = self.present.store, self.done.agents(partition.number)
        choice = self.settling.choose(partition.records, known, done)
        for agent_id, rows in choice.answers.items():
            store.commit_table(answers_name(partition.number, agent_id), rows)
        asked = (
            set()
            if choice.is_settled
            else self.settling.samples.keys() - done - choice.answers.keys()
        )
        for agent_id in sorted(known.keys() & (asked | self._escalated)):
            if known[agent_id].num_rows:
                name = reused_name(partition.number, agent_id)
                store.commit_table(name, known[agent_id])
        return asked


def _by_partition(
    known: Mapping[str, Sequence[pa.Table]], num_partitions: int
) -> Iterator[dict[str, pa.Table]]:
    return ({agent: tables[i] for agent, tables in known.items()} for i in range(num_partitions))
