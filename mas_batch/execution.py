"""One process at work on a run: what every kind of job needs while it works.

Answering a corpus is the first kind. Nothing here knows what the work is.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass

from distributed import span

from mas_batch.cluster import Connection
from mas_batch.errors import RunError
from mas_batch.events import Emit, Event
from mas_batch.latency.ledger import Ledger
from mas_batch.latency.phases import Phases
from mas_batch.monitor.event_log import EventLog
from mas_batch.monitor.feed import Feed
from mas_batch.monitor.live import LiveRun
from mas_batch.run_folder.lock import RunLock
from mas_batch.run_folder.storage import Store


class ExecutionLog:
    """Every event goes to the run's event log, its ledger, and whoever else reads them.

    Args:
        start: of the execution, by `time.perf_counter`.
    """

    def __init__(self, store: Store, readers: Sequence[Emit], start: float) -> None:
        self._events = EventLog(store)
        self._readers = readers
        self.ledger = Ledger(store, self._events.execution, start)

    def __call__(self, event: Event) -> None:
        """Tell every reader of the event."""
        self._events(event)
        self.ledger(event)
        for read in self._readers:
            read(event)

    def flush(self) -> None:
        """Write to the run what is kept so far."""
        self._events.flush()
        self.ledger.flush()


@dataclass(frozen=True, slots=True)
class Execution:
    """One process that works on one run, connected to a cluster."""

    name: str
    """Of the run."""
    store: Store
    """The run's folder, of which this process holds `lock`."""
    lock: RunLock
    topic: str
    """Names this execution's Dask events, plugin and executor."""
    connection: Connection
    phases: Phases
    log: ExecutionLog


def new_topic(run: str) -> str:
    """Name an execution of the run: a later one is not told what an earlier one's tasks report."""
    return f"mas-batch-{run}-{uuid.uuid4().hex[:8]}"


@contextmanager
def execute(
    live: LiveRun,
    store: Store,
    lock: RunLock,
    connecting: AbstractContextManager[Connection],
    phases: Phases,
    emit: Emit,
) -> Iterator[Execution]:
    """Connect, and keep every event in the run while the `with` block lasts, also if it fails.

    Args:
        live: the run as the dashboard introduces it; it names the run and the execution's topic.
        emit: called with every event, from the calling thread and in order.
    """
    with (
        connecting as connection,
        Feed(connection.client, live) as feed,
        _logged(store, (feed, emit), phases) as log,
        # One for the run: Dask makes a new default span, for ever, whenever nothing is left
        # to do of a kind for a moment. Its dashboard can tell runs apart by it.
        span(live.name),
    ):
        yield Execution(live.name, store, lock, live.execution, connection, phases, log)


@contextmanager
def _logged(store: Store, readers: Sequence[Emit], phases: Phases) -> Iterator[ExecutionLog]:
    log = ExecutionLog(store, readers, phases.start)
    phases.emit_to(log)
    try:
        yield log
    except BaseException:
        with suppress(RunError):  # a full disk, say: what failed first is what people must read
            phases.end()
            log.flush()
        raise
    log.flush()
