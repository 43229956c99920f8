"""What every task of a run needs to know of it."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from mas_batch.aggregate.escalation import Escalation
from mas_batch.aggregate.merge_spec import MergeSpec
from mas_batch.aggregate.stopping import StoppingRule
from mas_batch.job import Task
from mas_batch.run_folder.storage import Store


@dataclass(frozen=True, slots=True)
class RunRef:
    """What every task of a run needs to know of it."""

    store: Store
    topic: str
    """Names this execution's Dask events, plugin and executor."""
    task: Task
    merge: MergeSpec
    stopping: StoppingRule | None
    """Adaptive: when a record needs no further answer; None: every agent asked answers all."""
    passthrough: pa.Schema
    keep_text: bool
    into: str = ""
    """Folder of the run in which merges are committed: a first pass, or a merge made afterwards;
    empty: they are the run's results."""
    passes: tuple[str, ...] = ()
    """Folders of the run with earlier merges: only answers that went into one of them are merged.
    What came later is passed over, or the outcome would depend on when. Empty: there are none."""
    escalation: Escalation | None = None
    """Which records its agent is asked about; all other agents are asked about every one."""
    reuses: bool = False
    """Answers of an earlier run are there, in `reused/`: only the others are asked for."""

    @property
    def merged(self) -> Store:
        """Where merges are committed."""
        return self.store.child(self.into) if self.into else self.store
