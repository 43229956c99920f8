"""One process that works on a run: its lock, cluster, phases and log, whatever the work is."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass

from mas_batch.cluster import Connection
from mas_batch.errors import RunError
from mas_batch.events import Emit, Event
from mas_batch.latency.ledger import Ledger
from mas_batch.latency.phases import Phases
from mas_batch.monitor.event_log import EventLog
from mas_batch.monitor.feed import Feed
from mas_batch.monitor.live import LiveRun
from mas_batch.routing.upkeep import run_span
from mas_batch.run_folder.lock import RunLock
from mas_batch.run_folder.storage import Store


class ExecutionLog:
    """Passes every event to the run's event log, to its ledger and to all further readers.

    Args:
        readers: called with every event.
        start: when the execution started, by `time.perf_counter`.
    """

    def __init__(self, store: Store, readers: Sequence[Emit], start: float) -> None:
        self._events = EventLog(store)
        self._readers = readers
        self.ledger = Ledger(store, self._events.execution, start)

    def __call__(self, event: Event) -> None:
        """Pass the event on."""
        self._events(event)
        self.ledger(event)
        for read in self._readers:
            read(event)

    def flush(self) -> None:
        """Write the events and rows kept so far to the run."""
        self._events.flush()
        self.ledger.flush()


@dataclass(frozen=True, slots=True)
class Execution:
    """One process that works on one run, connected to a cluster."""

    name: str
    """Name of the run."""
    store: Store
    """The run's folder."""
    lock: RunLock
    """The run's lock, which this process holds."""
    topic: str
    """Names this execution's Dask events, plugin and executor."""
    connection: Connection
    phases: Phases
    log: ExecutionLog


def new_topic(run: str) -> str:
    """Name an execution of the run, so that it does not hear reports of an earlier one's tasks."""
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
    """Connect, and write every event to the run while the `with` block lasts, also if it fails.

    Args:
        live: the run as the dashboard introduces it; it names the run and the execution's topic.
        emit: called with every event, from the calling thread and in order.
    """
    with (
        connecting as connection,
        Feed(connection.client, live) as feed,
        _logged(store, (feed, emit), phases) as log,
        run_span(live.name),
    ):
        yield Execution(live.name, store, lock, live.execution, connection, phases, log)


@contextmanager
def _logged(store: Store, readers: Sequence[Emit], phases: Phases) -> Iterator[ExecutionLog]:
    log = ExecutionLog(store, readers, phases.start)
    phases.emit_to(log)
    try:
        yield log
    except BaseException:
        with suppress(RunError):  # a full disk, say: the first error is the one to raise
            phases.end()
            log.flush()
        raise
    log.flush()
