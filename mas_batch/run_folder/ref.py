"""What every task on a worker needs to know of its run."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from mas_batch.aggregate.escalation import Escalation
from mas_batch.aggregate.method import MergeSpec
from mas_batch.aggregate.stopping import StoppingRule
from mas_batch.by_name import pickled_by_name
from mas_batch.job import Task
from mas_batch.run_folder.storage import Store


@pickled_by_name
@dataclass(frozen=True, slots=True)
class RunRef:
    """What every task on a worker needs to know of its run."""

    store: Store
    topic: str
    """Names this execution's Dask events, plugin and executor."""
    task: Task
    merge: MergeSpec
    stopping: StoppingRule | None
    """Adaptive: when a record needs no further answer; None: an asked agent answers all records."""
    passthrough: pa.Schema
    keep_text: bool
    into: str = ""
    """Folder of the run in which merges are committed: a first pass, or a merge made afterwards;
    empty: the merges are the run's results."""
    passes: tuple[str, ...] = ()
    """Folders of the run with earlier merges: only answers that went into one of them are merged.
    Answers committed later are ignored, else results would depend on timing. Empty: no folders."""
    escalation: Escalation | None = None
    """Which records are escalated to its agent; all other agents are asked about every record."""
    answers_into: str = ""
    """Folder of the run in which answers are committed; empty: they are the run's own."""
    reuses: bool = False
    """Whether `reused/` may hold answers of an earlier run: workers ask only for the others."""
    code: str = ""
    """The code that every worker must have, as `code_version` says it; empty: any."""

    @property
    def merged(self) -> Store:
        """The folder in which merges are committed."""
        return self.store.child(self.into) if self.into else self.store

    @property
    def answered(self) -> Store:
        """The folder in which answers are committed."""
        return self.store.child(self.answers_into) if self.answers_into else self.store
