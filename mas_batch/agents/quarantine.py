"""Finds a record that kills its worker, gives it up after some deaths, and answers the others.

A process that dies (a native crash, a memory limit, a hang that ends in a restart) cannot say
what it died of. So records are asked one at a time: before one is asked a mark is committed,
afterwards its answers are, and the worker that is given the partition next knows which record a
death fell on. Knows no Dask.

    journal/agent=<name>/part-000007/<hash of the record's id>/
        begun-1          try 1; its content is the record's id, for people
        ended-1          try 1 raised an exception: no worker died of it
        answers.parquet  the record's answers; final

Files are created if absent and never changed, so copies of a task can share a journal: the
answers journalled first win, and at worst a record is asked once per copy. A try that is still
under way looks like a death, so the dispatcher makes no copies of careful tasks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import count

import pyarrow as pa

from mas_batch.agents.answering import AgentProfile, failed_answers
from mas_batch.errors import EngineError, Reason
from mas_batch.job import fingerprint
from mas_batch.records import ANSWERS, Answer, Record
from mas_batch.run_folder.names import JOURNAL, partition_stem
from mas_batch.run_folder.storage import Store

logger = logging.getLogger(__name__)

_ALL_DEAD = 3
"""If the first so many records all killed their workers, the agent is to blame, not the records."""

_SCHEMA = pa.schema([ANSWERS.field(field.name) for field in fields(Answer)])


@dataclass(frozen=True, slots=True)
class Tries:
    """How often a record was asked without getting an answer so far."""

    num_begun: int
    num_deaths: int
    """Tries that neither gave answers nor raised an exception."""


@dataclass(frozen=True, slots=True)
class Journal:
    """The journal of a partition whose records one agent is asked one at a time."""

    store: Store
    """The run's folder."""
    partition: int
    agent_id: str

    def answers(self, record_id: str) -> list[Answer] | None:
        """Return the record's journalled answers; None if there are none."""
        try:
            rows = self.store.read_table(self._path(record_id, "answers.parquet")).to_pylist()
        except FileNotFoundError:
            return None
        return [
            Answer(**{**row, "reason": row["reason"] and Reason(row["reason"])}) for row in rows
        ]

    def tries(self, record_id: str) -> Tries:
        """Count the tries of a record, and the deaths among them."""
        names = self.store.list(self._path(record_id))
        begun = [name for name in names if name.startswith("begun-")]
        num_ended = sum(name.startswith("ended-") for name in names)
        return Tries(len(begun), len(begun) - num_ended)

    def begin(self, record_id: str, number: int) -> int:
        """Mark that try `number` begins, or the next free number; returns the number.

        A copy of the task may have taken a number already.
        """
        content = record_id.encode()
        return next(
            n
            for n in count(number)
            if self.store.commit(self._path(record_id, f"begun-{n}"), content)
        )

    def end(self, record_id: str, number: int) -> None:
        """Mark that a try ended in an exception, not in a death."""
        self.store.commit(self._path(record_id, f"ended-{number}"), b"")

    def keep(self, record_id: str, answers: list[Answer]) -> list[Answer]:
        """Journal the answers, unless a copy of the task has; returns the journalled ones."""
        table = pa.Table.from_pylist([asdict(answer) for answer in answers], schema=_SCHEMA)
        if self.store.commit_table(self._path(record_id, "answers.parquet"), table):
            return answers
        first = self.answers(record_id)
        # None: the copy that was first has finished the partition and removed the journal.
        return answers if first is None else first

    def remove(self) -> None:
        """Remove the journal; call it when the partition's answers are committed."""
        try:
            self.store.remove_folder(self._folder)
        except OSError as error:
            # A copy of the task removes it too, or still writes to it. No task will read it again.
            logger.info("%s is left behind: %s", self.store.path(self._folder), error)

    @property
    def _folder(self) -> str:
        return f"{JOURNAL}/agent={self.agent_id}/{partition_stem(self.partition)}"

    def _path(self, record_id: str, file: str = "") -> str:
        # By id, not by position: an adaptive job's next try may ask about fewer records.
        return f"{self._folder}/{fingerprint(record_id)}/{file}".rstrip("/")


def answer_carefully(
    records: Sequence[Record],
    ask: Callable[[Sequence[Record]], list[Answer]],
    journal: Journal,
    profile: AgentProfile,
    *,
    max_deaths: int = 2,
) -> list[Answer]:
    """Ask about every record without a `reason`, one at a time; returns all answers in order.

    Answers in the journal are reused. A record whose worker died `max_deaths` times is not asked
    again: its answers are failed ones with `Reason.WORKER_DIED`, one per sample. An exception
    from `ask` or the storage is raised and not counted as a death.

    Args:
        ask: returns the answers to the records that it is given; it is given one record.
        max_deaths: at least 1.

    Raises:
        EngineError: the first records all killed their workers: the agent is to blame.
    """
    answers: list[Answer] = []
    for number, record in enumerate((r for r in records if r.reason is None), 1):
        answers += _answer_one(record, ask, journal, profile, max_deaths)
        if number >= _ALL_DEAD and all(a.reason is Reason.WORKER_DIED for a in answers):
            journal.remove()  # the records are not to blame: a repaired machine asks them again
            raise EngineError(
                f"its worker died {max_deaths} times on each of the first {number} records; "
                "nothing was answered in between"
            )
    return answers


def _answer_one(
    record: Record,
    ask: Callable[[Sequence[Record]], list[Answer]],
    journal: Journal,
    profile: AgentProfile,
    max_deaths: int,
) -> list[Answer]:
    known = journal.answers(record.record_id)
    if known is not None:
        return known
    tries = journal.tries(record.record_id)
    if tries.num_deaths >= max_deaths:
        message = (
            f"its worker died in {tries.num_deaths} of {tries.num_begun} tries "
            "while this record alone was asked"
        )
        failed = failed_answers(record, profile, Reason.WORKER_DIED, message)
        return journal.keep(record.record_id, failed)
    number = journal.begin(record.record_id, tries.num_begun + 1)
    try:
        return journal.keep(record.record_id, ask([record]))
    except Exception:
        journal.end(record.record_id, number)
        raise
