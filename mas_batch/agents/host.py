"""Worker side: the plugin that keeps one model resident per worker."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from enum import StrEnum
from resource import RUSAGE_SELF, getrusage
from typing import Any

from distributed import Worker, WorkerPlugin, get_worker
from distributed.metrics import context_meter

from mas_batch.agents.spec import AgentSpec
from mas_batch.code_version import code_version
from mas_batch.engines import load_engine
from mas_batch.engines.base import Engine
from mas_batch.errors import RunError
from mas_batch.latency.times import TaskTimes
from mas_batch.models import fetch


class AgentHost(WorkerPlugin):  # type: ignore[misc]
    """Holds at most one engine. Dask sets it up again when the nanny restarts the worker.

    It is not an Actor, because an actor's state is lost for ever with its worker. `name` is the
    run's topic, so that two runs on one cluster do not remove each other's plugin; it also names
    the one-thread executor in which the model runs, off the event loop and off the task threads.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def setup(self, worker: Worker) -> None:
        """Add the one-thread executor in which the model runs to the worker."""
        code_version()  # now, before an upgrade changes the files of what is imported
        self._engine: Engine | None = None
        self._key = ""
        self._family_id = ""
        self._closing = False
        self._idle_since = time.perf_counter()
        self.worker_name = str(worker.name)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="mas-batch-agent")
        worker.executors[self.name] = self._executor

    def teardown(self, worker: Worker) -> None:
        """Free the model, after the generation that is running; the worker lives on."""
        self._closing = True
        worker.executors.pop(self.name, None)
        self._executor.submit(self._close)
        self._executor.shutdown(wait=False)

    def check_open(self) -> None:
        """Call it before a commit: answers of an engine that is being closed must not be committed.

        Raises:
            RunError: the host is being torn down.
        """
        if self._closing:
            raise RunError("the worker is closing its model")

    def engine(self, spec: AgentSpec) -> tuple[Engine, str, float]:
        """Return the resident engine, its family id, and the seconds of loading (0 if resident).

        Only for tasks in the host's executor: it has one thread, so there is nothing to lock.
        """
        self.check_open()
        if self._engine is not None and self._key == spec.engine_key:
            return self._engine, self._family_id, 0.0
        self._close()
        start = time.perf_counter()
        model = fetch(spec.agent.model)
        self._engine = load_engine(spec.agent.engine, model, spec.engine_config)
        self._key, self._family_id = spec.engine_key, model.family_id
        self._idle_since = time.perf_counter()
        return self._engine, self._family_id, self._idle_since - start

    def begin(self) -> float:
        """Begin a task; returns how many seconds the host had nothing to do before it."""
        return time.perf_counter() - self._idle_since

    def end(self) -> None:
        """End a task."""
        self._idle_since = time.perf_counter()

    def _close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine, self._key = None, ""


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


def current_host(name: str) -> AgentHost:
    """Return the host of that name on the worker that runs this task.

    Raises:
        RunError: the plugin is not registered there.
    """
    host = get_worker().plugins.get(name)
    if not isinstance(host, AgentHost):
        raise RunError(f"worker {get_worker().name} has no plugin {name}")
    return host
