"""One pass over the corpus: its partitions' sizes, and a sample of its records."""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from mas_batch.corpus import open_corpus
from mas_batch.errors import JobError
from mas_batch.job import Job
from mas_batch.partition import partition
from mas_batch.planning.service_time import Floats
from mas_batch.records import Record

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Survey:
    """What a look at the whole corpus tells."""

    num_records: int
    read_s: float
    """Seconds of reading and cutting it."""
    usable_records: Floats
    """Of each partition, in their order; agents are asked about no others."""
    text_tokens: Floats
    """Of each partition: estimated tokens of its texts, without what is to be generated."""
    sample: tuple[Record, ...]
    """Usable records, evenly spaced over the corpus."""

    @property
    def num_partitions(self) -> int:
        """Partitions of the job's size."""
        return len(self.usable_records)

    @property
    def num_usable(self) -> int:
        """Records that agents are asked about."""
        return int(self.usable_records.sum())


def survey(job: Job, num_sampled: int) -> Survey:
    """Read the corpus once; memory is that of one partition, the sample and two numbers for each.

    Raises:
        JobError: the corpus cannot be read as the job says, or no record of it is usable.
    """
    start, num_records = time.perf_counter(), 0
    usable_records, text_tokens = array("d"), array("d")
    sample = EvenlySpacedSample[Record](num_sampled)
    tokens_per_record = job.task.max_new_tokens
    for part in partition(
        open_corpus(job),
        max_tokens=job.partition.max_tokens,
        max_records=job.partition.max_records,
        tokens_per_record=tokens_per_record,
    ):
        num_records += len(part.records)
        usable = [record for record in part.records if record.text is not None]
        for record in usable:
            sample.offer(record)
        usable_records.append(len(usable))
        text_tokens.append(part.estimated_tokens - len(usable) * tokens_per_record)
    read_s = time.perf_counter() - start
    if not sum(usable_records):
        where = ", ".join(job.corpus.path)
        raise JobError(f"{where}: none of its {num_records} records is usable", key="corpus.path")
    return Survey(
        num_records, read_s, np.array(usable_records), np.array(text_tokens), sample.chosen()
    )


class EvenlySpacedSample(Generic[T]):
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

    def chosen(self) -> tuple[T, ...]:
        """Return as many as are wanted, or all there were; between one and two strides apart."""
        positions = evenly_spaced(len(self._kept), self._num_wanted)
        return tuple(self._kept[position] for position in positions)


def evenly_spaced(count: int, most: int) -> NDArray[np.intp]:
    """Return at most so many positions of `count`, the first and the last among them."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(np.intp)
