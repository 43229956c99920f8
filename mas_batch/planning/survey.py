"""One pass over the corpus: how it would be cut in several sizes, and a sample of its records."""

from __future__ import annotations

import heapq
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import tee
from typing import Generic, TypeVar

import numpy as np

from mas_batch.corpus import CorpusReader
from mas_batch.errors import JobError
from mas_batch.job import Job, Partitioning
from mas_batch.latency.model import Floats
from mas_batch.partition import Partition, partition
from mas_batch.records import Record

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """A corpus cut into partitions of one size; a row per partition, in its order."""

    sizing: Partitioning
    num_records: Floats
    """Usable ones: the others are asked of nobody."""
    text_tokens: Floats
    """Estimated tokens of their texts, without what is to be generated."""

    def __len__(self) -> int:
        return len(self.num_records)


@dataclass(frozen=True, slots=True, eq=False)
class Survey:
    """What a look at the whole corpus tells."""

    num_records: int
    num_usable: int
    read_s: float
    """Seconds of reading alone."""
    cuts: tuple[Cut, ...]
    sample: tuple[Record, ...]
    """Usable records, evenly spaced over the corpus."""


def survey(job: Job, sizings: Sequence[Partitioning], num_sampled: int) -> Survey:
    """Read the corpus once; memory is that of the largest partitions and three numbers for each.

    Raises:
        JobError: the corpus cannot be read as the job says, or nothing in it can be asked about.
    """
    reading, sample = _Timed(CorpusReader(job.corpus)), _EvenlySpaced[Record](num_sampled)
    num_records = 0

    def counted() -> Iterator[Record]:
        nonlocal num_records
        for record in reading:
            num_records += 1
            if record.reason is None:
                sample.offer(record)
            yield record

    cuts = _cut(counted(), sizings, job.task.max_new_tokens)
    num_usable = int(cuts[0].num_records.sum())
    if not num_usable:
        where = ", ".join(job.corpus.path)
        raise JobError(f"{where}: none of its {num_records} records is usable", key="corpus.path")
    return Survey(num_records, num_usable, reading.spent_s, cuts, tuple(sample.chosen()))


def _cut(
    records: Iterator[Record], sizings: Sequence[Partitioning], tokens_per_record: int
) -> tuple[Cut, ...]:
    """Cut one stream in several sizes: who has read least reads on, so that little is held."""
    columns = [(array("d"), array("d")) for _ in sizings]
    streams: list[Iterator[Partition]] = [
        partition(
            stream,
            max_tokens=sizing.max_tokens,
            max_records=sizing.max_records,
            tokens_per_record=tokens_per_record,
        )
        for sizing, stream in zip(sizings, tee(records, len(sizings)), strict=True)
    ]
    positions = [(0, which) for which in range(len(sizings))]
    while positions:
        _, which = heapq.heappop(positions)
        part = next(streams[which], None)
        if part is None:
            continue
        usable = sum(record.text is not None for record in part.records)
        columns[which][0].append(usable)
        columns[which][1].append(part.estimated_tokens - usable * tokens_per_record)
        heapq.heappush(positions, (part.first_record + len(part.records), which))
    return tuple(
        Cut(sizing, np.array(usable), np.array(tokens))
        for sizing, (usable, tokens) in zip(sizings, columns, strict=True)
    )


class _Timed:
    """Adds up what another iterable takes."""

    def __init__(self, items: Iterable[Record]) -> None:
        self._items = items
        self.spent_s = 0.0

    def __iter__(self) -> Iterator[Record]:
        items, end = iter(self._items), object()
        while True:
            start = time.perf_counter()
            item = next(items, end)
            self.spent_s += time.perf_counter() - start
            if not isinstance(item, Record):
                return
            yield item


class _EvenlySpaced(Generic[T]):
    """Keeps items of a stream of unknown length, all equally far from the next."""

    def __init__(self, num_wanted: int) -> None:
        self._num_wanted = num_wanted
        self._kept: list[T] = []
        self._stride = 1
        self._num_seen = 0

    def offer(self, item: T) -> None:
        """Take the next item, or leave it."""
        if self._num_seen % self._stride == 0:
            self._kept.append(item)
            if len(self._kept) == 2 * self._num_wanted:
                del self._kept[1::2]
                self._stride *= 2
        self._num_seen += 1

    def chosen(self) -> list[T]:
        """Return as many as are wanted, or all there were; between one and two strides apart."""
        if len(self._kept) <= self._num_wanted:
            return self._kept
        which = np.linspace(0, len(self._kept) - 1, self._num_wanted).round().astype(int)
        return [self._kept[index] for index in which]
