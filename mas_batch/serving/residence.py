"""Hosting of a pool's agents on a cluster while the pool is open, in a thread of its own.

`routing.hosting` decides which workers hold which engine, loads it, and notices workers that
come, pause, leave or hang, as for a batch run. Its calls block, so they run in this thread; the
listener hears of changes on the client's event loop.
"""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future as Promise
from contextlib import ExitStack, suppress
from typing import Any, Protocol

from dask.system import CPU_COUNT
from distributed import Client, Future

from mas_batch import cluster
from mas_batch.agents.spec import agent_specs
from mas_batch.agents.texts import Answered, TextHost, texts_op
from mas_batch.dask_compat import call_worker, call_worker_by_scheduler
from mas_batch.errors import MasBatchError, PoolClosedError
from mas_batch.events import Event, HostDraining, HostLost
from mas_batch.job import Job
from mas_batch.records import Record
from mas_batch.routing.hosting import Failure, Hosting, Loaded, watch
from mas_batch.run_folder.ref import RunRef

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0
_REACH_S = 3.0
"""A worker that can be reached directly answers within so many seconds."""


class HostListener(Protocol):
    """Is called when a pool's hosts change; every call is made on the client's event loop."""

    def joined(self, host_id: str, agents: tuple[str, ...], concurrent: int, paused: bool) -> None:
        """A host holds its engine, and answers for these agents."""
        ...

    def paused(self, host_id: str, paused: bool) -> None:
        """A host is paused, and takes no further batch, or works again."""
        ...

    def left(self, host_id: str) -> None:
        """A host is gone."""
        ...

    def tick(self) -> None:
        """A second has passed."""
        ...

    def fail(self, why: str) -> None:
        """The cluster is lost."""
        ...


def _log_event(event: Event) -> None:
    """Write an event to the process's log: a pool has no event log."""
    level = logging.WARNING if isinstance(event, HostLost | HostDraining) else logging.INFO
    logger.log(level, "%s", event)


class Residence:
    """Hosts a job's agents on a cluster; `open` and `close` block, the other methods do not.

    Args:
        run: gives the topic; its store is never touched.
        client: the user's own, or None as in `pipeline.run`.
    """

    def __init__(self, job: Job, run: RunRef, client: Client | None) -> None:
        self._job = job
        self._run = run
        self._given = client
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._opened: Promise[None] = Promise()
        self._closing = threading.Event()
        self._suspects: set[str] = set()  # hosts
        self._doubtful: set[str] = set()  # suspects of the look before
        self._last_look = 0.0
        self._proxied: set[str] = set()  # hosts that are reached through the scheduler only
        self._thread = threading.Thread(target=self._run_thread, daemon=True, name="mas-batch-pool")

    # Called from any thread

    def open(self, listener: HostListener) -> None:
        """Connect, load every agent's model, and call the listener from then on.

        Raises:
            JobError: an agent has no capable worker.
            ModelError: no worker of an agent could load its model.
            RunError: the cluster cannot be reached.
            PoolClosedError: the pool was open before.
        """
        if self._opened.done():
            raise PoolClosedError("a pool is opened once; make another")
        self._listener = listener
        self._thread.start()
        self._opened.result()

    def begin_close(self) -> None:
        """Begin to close, without waiting."""
        self._closing.set()
        self._inbox.put(lambda: None)

    def close(self) -> None:
        """Free the models; an embedded cluster ends, the user's own client stays as it is."""
        self.begin_close()
        self._thread.join()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The client's event loop; not before `open` has returned."""
        loop: asyncio.AbstractEventLoop = self._client.loop.asyncio_loop
        return loop

    # Called on the client's event loop

    async def call(self, host_id: str, agent_id: str, records: Sequence[Record]) -> Answered:
        """Ask the agent about the records, at the leading worker of the host.

        Raises:
            OSError: the worker is dead or out of reach.
            MasBatchError: the agent could not answer; the worker lives.
        """
        op = texts_op(self._run.topic)
        texts = [(record.record_id, record.text, record.context) for record in records]
        call = call_worker_by_scheduler if host_id in self._proxied else call_worker
        reply = await call(self._client, host_id, op, agent_id=agent_id, records=texts)
        if isinstance(reply, MasBatchError):
            raise reply
        if not isinstance(reply, Answered):
            raise OSError(f"worker {host_id} no longer hosts the pool's agents")
        return reply

    def suspect(self, host_id: str, hangs: bool) -> None:
        """Check a host that was out of reach, or restart one that hangs."""
        self._inbox.put(lambda: self._look_after(host_id, hangs))

    # Called in the thread of its own

    def _run_thread(self) -> None:
        try:
            with ExitStack() as stack:
                self._connect_and_load(stack)
                self._opened.set_result(None)
                self._host_until_closed()
        except BaseException as error:
            if not self._opened.done():
                self._opened.set_exception(error)
            else:
                logger.warning("the pool did not close well: %s", error)

    def _connect_and_load(self, stack: ExitStack) -> None:
        job, topic = self._job, self._run.topic
        embedded = cluster.is_embedded(job.cluster, self._given)
        specs = agent_specs(job, embedded=embedded, num_cores=CPU_COUNT)
        connection = stack.enter_context(cluster.connect(job, specs, topic, self._given))
        client = self._client = connection.client
        cluster.register(client, TextHost(topic, job.task, specs))
        if not embedded:
            stack.callback(cluster.unregister, client, texts_op(topic))
        self._hosting = Hosting(client, job, self._run, specs, _log_event, self._watch)
        self._hosting.listener = self
        client.subscribe_topic(topic, self._on_report)
        stack.callback(self._if_running, client.unsubscribe_topic, topic)
        stack.callback(self._hosting.close)
        self._hosting.start()
        while unserved := self._hosting.unserved:
            self._handle_next()
            self._hosting.check_loaded(unserved & self._hosting.unserved)
            if self._closing.is_set():
                raise PoolClosedError("the pool was left before it was open")

    def _host_until_closed(self) -> None:
        try:
            while not self._closing.is_set():
                self._handle_next()
        except Exception as error:  # the scheduler is lost, say; `close` still needs the loop
            logger.warning("the pool's cluster is lost: %s", error)
            self._notify(self._listener.fail, f"the pool's cluster is lost: {error}")
            self._closing.wait()

    def _if_running(self, call: Callable[[str], object], name: str) -> None:
        if self._client.status == "running":
            call(name)

    def _handle_next(self) -> None:
        """Handle one call from the inbox, and refresh the state of all workers every second."""
        with suppress(queue.Empty):
            self._inbox.get(timeout=_LOOK_EVERY_S)()
        if time.monotonic() - self._last_look > _LOOK_EVERY_S:
            self._last_look = time.monotonic()
            # The end of a process can be known here before the scheduler knows it: a text that is
            # sent there once more would be blamed for a second death. So two looks must find it.
            doubtful, self._doubtful, self._suspects = self._doubtful, self._suspects, set()
            self._hosting.refresh()
            for host_id in doubtful & self._hosting.ready.keys():  # these live
                self.joined(host_id, self._hosting.ready[host_id])
            self._notify(self._listener.tick)

    def _look_after(self, host_id: str, hangs: bool) -> None:
        if not hangs:
            self._suspects.add(host_id)
        elif host_id in self._hosting.ready:
            self._hosting.restart(host_id, "it does not answer")

    def _on_report(self, event: Any) -> None:
        """Handle a worker's report that it has loaded a model; see `agents.host.report`."""
        message = event[1]
        address, facts = message["worker"], json.loads(message["facts"])
        self._inbox.put(lambda: self._hosting.loaded(address, facts))

    def _watch(self, future: Future, handle: Callable[[Failure], None]) -> None:
        """Call `handle` from the inbox when the task has ended, with its exception if it failed."""
        watch(future, handle, self._inbox.put)

    # Called by `Hosting`

    def joined(self, host_id: str, loaded: Loaded) -> None:
        """Note that a host holds its engine."""
        if self._is_directly_reachable(host_id):
            self._proxied.discard(host_id)
        else:
            self._proxied.add(host_id)
        # A batch that would only wait for the one before it is better still growing in the queue.
        at_once = loaded.concurrent if loaded.joins else 1
        paused = self._hosting.is_paused(host_id)
        self._notify(self._listener.joined, host_id, loaded.agents, at_once, paused)

    def paused(self, host_id: str, paused: bool) -> None:
        """Note that a host is paused, and takes no further batch, or works again."""
        self._notify(self._listener.paused, host_id, paused)

    def left(self, host_id: str, *, blamed: bool) -> None:
        """Note that a host is gone."""
        self._notify(self._listener.left, host_id)

    def _is_directly_reachable(self, address: str) -> bool:
        """Say whether the worker can be reached without going through the scheduler."""

        async def knock() -> None:
            await self._client.rpc(address).identity()

        try:
            self._client.sync(knock, callback_timeout=_REACH_S)
        except OSError:
            return False
        return True

    def _notify(self, call: Callable[..., None], *args: object) -> None:
        self.loop.call_soon_threadsafe(call, *args)
