"""Worker side: the plugin that holds one engine and answers for every agent of it."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from functools import partial
from resource import RUSAGE_SELF, getrusage
from typing import Any

import psutil
from distributed import Worker, WorkerPlugin, get_worker
from distributed.metrics import context_meter

from mas_batch.agents.held import HeldPartition, HeldPartitions
from mas_batch.agents.spec import AgentSpec
from mas_batch.code_version import code_version
from mas_batch.engines import detect_engine, load_engine
from mas_batch.engines.base import Completion, Engine, Request, Sampling, TokenizedPrompt
from mas_batch.engines.client import LoopClient
from mas_batch.engines.loop import EngineLoop
from mas_batch.errors import EngineLostError, JobError, RunError
from mas_batch.job import fingerprint
from mas_batch.latency.times import TaskTimes
from mas_batch.models import ModelFiles, fetch
from mas_batch.registries import ENGINES
from mas_batch.run_folder.ref import RunRef

logger = logging.getLogger(__name__)

_ENGINE_LOST = 70
"""Exit status of a worker whose engine is dead (EX_SOFTWARE)."""


@dataclass(slots=True, eq=False)
class _Resident:
    """An engine in memory, and the views of its agents."""

    key: str
    """`AgentSpec.engine_key`."""
    name: str
    """The engine's, in its registry."""
    model: ModelFiles
    loop: EngineLoop
    views: dict[str, Engine] = field(default_factory=dict)
    """By hash of an agent's own options."""
    adapters: set[str] = field(default_factory=set)
    """Those that the engine was given, named by their sources."""
    known: dict[str, dict[tuple[Request, Sampling], Completion]] = field(default_factory=dict)
    """By agent, for as long as the engine is there: see `EngineClient.known`."""
    agents: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def wish(self) -> int:
        """How many partitions keep it busy."""
        own: int | None = getattr(self.loop.engine, "concurrent", None)
        return ENGINES[self.name].concurrent if own is None else own

    def view(self, spec: AgentSpec) -> Engine:
        """Return the engine as this agent asks it; agents with the same options share a view."""
        engine: Any = self.loop.engine
        options = ENGINES[self.name].of_agent(spec.agent.options)
        key = fingerprint(options)
        has_views = bool(ENGINES[self.name].agent_options)
        with self._lock:
            self._add_adapter(spec.agent.adapter)
            if has_views and key not in self.views:
                self.views[key] = self.loop.run(lambda: engine.for_agent(options))
            self.agents.add(spec.agent_id)
            return self.views[key] if has_views else self.loop.engine

    def _add_adapter(self, source: str | None) -> None:
        if source is None or source in self.adapters:
            return
        if not ENGINES[self.name].adapters:
            raise JobError(f"the engine {self.name!r} has no adapters", key="agents.adapter")
        engine: Any = self.loop.engine
        files = fetch(source)
        self.loop.run(lambda: engine.add_adapter(source, files))
        self.adapters.add(source)


class EngineHost(WorkerPlugin):  # type: ignore[misc]
    """Holds at most one engine. Dask sets it up again when the nanny restarts the worker.

    It is not an Actor, because an actor's state is lost for ever with its worker. `name` is the
    run's topic, so that two runs on one cluster do not remove each other's plugin; it also names
    the executor in whose threads the tasks of its agents run. The engine runs in a thread of its
    own (`engines.loop`), and the executor has as many threads as partitions keep it busy, so that
    no more are begun. To Dask a task that only waits for a thread of an executor is executing, and
    has one of the worker's task slots (`nthreads`): so that merges find one free, at most
    `max_in_flight` tasks may be there.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def setup(self, worker: Worker) -> None:
        """Add the executor; it has one thread until an engine is loaded."""
        code_version()  # now, before an upgrade changes the files of what is imported
        self._worker = worker
        self._resident: _Resident | None = None
        self._held = HeldPartitions()
        self._closing = False
        self._changing = threading.Lock()  # held while an engine is loaded
        self._state = threading.Lock()
        self._executors: list[ThreadPoolExecutor] = []
        self.max_in_flight = max(1, worker.state.nthreads - 1)
        self.worker_name = str(worker.name)
        self.concurrent = 0
        self._admit(1)

    def teardown(self, worker: Worker) -> None:
        """Free the engine, after what it is generating; the worker lives on."""
        with self._state:
            self._closing = True
            worker.executors.pop(self.name, None)
            resident = self._resident
        if resident is not None:
            resident.loop.close()
        for executor in self._executors:
            executor.shutdown(wait=False)

    @property
    def closing(self) -> bool:
        """Whether it is being torn down."""
        return self._closing

    def check_open(self) -> None:
        """Call it before a commit: answers of an engine that is being closed must not be committed.

        Raises:
            RunError: the host is being torn down.
        """
        if self._closing:
            raise RunError("the worker is closing its model")

    def load(self, spec: AgentSpec) -> float:
        """Make the agent's engine resident; returns the seconds that it took, 0.0 if it was.

        An engine with another key is freed first, when it has answered whoever was asking it.

        Raises:
            ModelError, JobError: the engine cannot be loaded.
            RunError: the host is being torn down.
        """
        start = time.perf_counter()
        with self._changing:
            if self._usable(spec) is not None:
                return 0.0
            self._replace(spec)
        return time.perf_counter() - start

    def family_id(self, spec: AgentSpec) -> str:
        """Return the family of the agent's model."""
        return self._of(spec).model.family_id

    def engine(self, spec: AgentSpec) -> Engine:
        """Return the agent's view of the engine: to look at, not to ask; see `client`.

        The agent's adapter is there then, too.

        Raises:
            ModelError, JobError: the engine or the adapter cannot be loaded, or it has no such
                view.
        """
        return self._of(spec).view(spec)

    def client(self, spec: AgentSpec, held: HeldPartition | None = None) -> LoopClient:
        """Return what asks the engine for one task of the agent.

        Args:
            held: the partition that is asked about; it keeps the prompts for other agents.
        """
        resident = self._of(spec)
        view = resident.view(spec)
        tokenize: Callable[[Request], TokenizedPrompt] | None = None
        if held is not None and len(resident.agents) > 1:
            tokenize = lambda request: held.tokenize(view, request)  # noqa: E731
        known = resident.known.setdefault(spec.agent_id, {})
        return LoopClient(resident.loop, view, tokenize, adapter=spec.agent.adapter, known=known)

    @property
    def joins(self) -> bool:
        """Whether the engine takes up what comes while it works on something else."""
        return self._resident is not None and self._resident.loop.joins

    def held(self, run: RunRef, partition: int) -> HeldPartition:
        """Return a partition's records; where there are several agents, they are kept for a while.

        That is: a partition in flight or just answered, and as many that are to come.
        """
        resident = self._resident
        shared = resident is not None and len(resident.agents) > 1
        return self._held.get(run.store, partition, 2 * self.concurrent + 2 if shared else 0)

    def take_idle_s(self) -> float:
        """Return how long the engine had nothing to do since this was called last."""
        resident = self._resident
        return resident.loop.take_idle_s() if resident is not None else 0.0

    def _of(self, spec: AgentSpec) -> _Resident:
        """Return the agent's engine; after a restart of the worker it is loaded now."""
        resident = self._usable(spec)
        if resident is None:
            self.load(spec)
            resident = self._usable(spec)
        if resident is None:
            raise RunError(f"the engine of agent {spec.agent_id!r} was freed for another one")
        return resident

    def _usable(self, spec: AgentSpec) -> _Resident | None:
        self.check_open()
        resident = self._resident
        if resident is None or resident.loop.closed or resident.key != spec.engine_key:
            return None
        return resident

    def _replace(self, spec: AgentSpec) -> None:
        """Free the engine that is there, and load another one."""
        if self._resident is not None:
            self._resident.loop.close(drain=True)  # before: two may not fit into the memory
            self._resident, self._held = None, HeldPartitions()
        model = fetch(spec.agent.model)
        name = spec.agent.engine if spec.agent.engine != "auto" else detect_engine(model)
        of_agents = ENGINES[name].of_agent(spec.agent.options)
        options = {k: v for k, v in spec.engine_config.options.items() if k not in of_agents}
        config = replace(spec.engine_config, options=options)
        loop = EngineLoop(
            lambda: load_engine(name, model, config), partial(_end_process, self._worker)
        )
        resident = _Resident(spec.engine_key, name, model, loop)
        with self._state:
            if not self._closing:
                self._resident = resident
                self._admit(resident.wish)
                return
        loop.close()
        raise RunError("the worker is closing its model")

    def _admit(self, wish: int) -> None:
        """Have so many tasks of the agents run at once, as far as the worker has task slots."""
        concurrent = min(wish, self.max_in_flight)
        if concurrent == self.concurrent:
            return
        self.concurrent = concurrent
        # The one before stays: Dask may be about to submit to it, and it runs the load task.
        for executor in self._executors[:-1]:
            executor.shutdown(wait=False)
        executor = ThreadPoolExecutor(concurrent, thread_name_prefix="mas-batch-agent")
        self._executors = [*self._executors[-1:], executor]
        self._worker.executors[self.name] = executor


def _end_process(worker: Worker, error: EngineLostError) -> None:
    """End the worker's process, and those that its engine has started: its nanny starts another.

    At once, because nothing here can be answered any more and threads may hang in a dead library.
    What has not been committed is asked again, of any host. A worker without a nanny may be a
    thread of somebody's notebook: it is left alone, and whoever asks the engine gets a RunError.
    """
    if worker.nanny is None:
        logger.critical(
            "the engine of worker %s is dead: %s; the worker has no nanny to start it again and "
            "may share its process with others, so start that process anew",
            worker.name, error,
        )  # fmt: skip
        return
    logger.critical("the worker ends itself, its engine is dead: %s", error)
    with suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):  # they hold the cards
            with suppress(psutil.Error):
                child.kill()
    logging.shutdown()
    os._exit(_ENGINE_LOST)


class Report(StrEnum):
    """What a report of a task is about."""

    LOADED = "load_agents"
    ANSWERED = "answer_partition"
    ANSWERING = "answer_progress"
    AWAY = "answer_put_off"
    MERGED = "merge_partition"


def report(topic: str, what: Report, facts: Mapping[str, Any]) -> None:
    """Tell the submitting process what a task has done; call it after the commit.

    Facts are sent as JSON, because Dask's comms cannot carry everything an engine says of itself.
    """
    worker = get_worker()
    message = {
        "task": what.value,
        "worker": worker.address,
        "facts": json.dumps(facts, default=str),
    }
    worker.log_event(topic, message)


def report_timed(topic: str, what: Report, facts: Mapping[str, Any], times: TaskTimes) -> None:
    """Report what a task did and its times, which Dask's Fine Performance Metrics show too."""
    known = {"prefill": times.prefill_s, "decode": times.decode_s}
    if times.prefill_s is None:
        known = {"compute": times.compute_s}
    for label, seconds in {**known, "read": times.read_s, "write": times.write_s}.items():
        if seconds:
            context_meter.digest_metric(f"mas-batch-{label}", seconds, "seconds")
    report(topic, what, {**facts, "times": asdict(times)})


def peak_memory_bytes() -> int:
    """Return the most memory that this process has used so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return getrusage(RUSAGE_SELF).ru_maxrss * unit


def current_host(name: str) -> EngineHost:
    """Return the host of that name on the worker that runs this task.

    Raises:
        RunError: the plugin is not registered there.
    """
    host = get_worker().plugins.get(name)
    if not isinstance(host, EngineHost):
        raise RunError(f"worker {get_worker().name} has no plugin {name}")
    return host
