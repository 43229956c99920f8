"""Worker side of a pool: texts come with a call to the worker, and its reply holds the answers.

This is a handler of the worker, not a task: a task passes the scheduler twice, and takes ten times
as long as the reply of an idle worker (docs/decisions/0007). `EngineHost` holds the engine, and
calls run in the host's threads, as tasks do: a text joins what the engine is doing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distributed import Worker, WorkerPlugin
from distributed.protocol import to_serialize

from mas_batch.agents.answering import answer_records
from mas_batch.agents.host import EngineHost
from mas_batch.agents.spec import AgentSpec
from mas_batch.agents.work import profile_of
from mas_batch.by_name import pickled_by_name
from mas_batch.dask_compat import add_handler, remove_handler
from mas_batch.errors import EngineError, MasBatchError
from mas_batch.job import Task
from mas_batch.latency.times import Stopwatch, TaskTimes
from mas_batch.records import Answer, Record
from mas_batch.tasks import make_task


@pickled_by_name
@dataclass(frozen=True, slots=True)
class Answered:
    """A worker's reply to a batch of texts."""

    answers: tuple[Answer, ...]
    """One answer per record and sample, in the records' order."""
    times: TaskTimes
    """Times of the whole batch; nothing is read or written."""
    waited_s: float
    """Waiting for a thread of the host before that."""


class TextHost(WorkerPlugin):  # type: ignore[misc]
    """Adds a handler, named like the plugin, by which a worker is called with agent and records.

    Args:
        topic: name of the `EngineHost` whose engine answers.
        task: what is asked of every text.
        specs: agents by name.
    """

    def __init__(self, topic: str, task: Task, specs: Mapping[str, AgentSpec]) -> None:
        self.name = texts_op(topic)
        self._topic = topic
        self._task = task
        self._specs = dict(specs)

    def setup(self, worker: Worker) -> None:
        """Begin to take calls."""
        self._worker = worker
        add_handler(worker, self.name, self.answer)

    def teardown(self, worker: Worker) -> None:
        """Stop taking calls."""
        remove_handler(worker, self.name)

    async def answer(self, agent_id: str, records: Sequence[tuple[str, str, str | None]]) -> Any:
        """Ask the agent about the records (id, text, context); returns an `Answered` or an error.

        Errors are returned: Dask would log a traceback on the worker for an error that is raised.
        None: the worker no longer hosts the pool's agents, or is about to close.
        """
        arrived = time.perf_counter()
        asked = [Record(*record) for record in records]
        loop, executor = asyncio.get_running_loop(), self._worker.executors.get(self._topic)
        host: EngineHost | None = self._worker.plugins.get(self._topic)
        if host is None or executor is None:
            return None
        try:
            reply = await loop.run_in_executor(executor, self._ask, host, agent_id, asked, arrived)
            return to_serialize(reply)
        except MasBatchError as error:
            return None if host.closing else to_serialize(error)
        except Exception as error:  # of any type, also of one that cannot be pickled
            return to_serialize(EngineError(f"{type(error).__name__}: {error}"))

    def _ask(
        self, host: EngineHost, agent_id: str, records: Sequence[Record], arrived: float
    ) -> Answered:
        waited_s = time.perf_counter() - arrived
        spec, watch = self._specs[agent_id], Stopwatch()
        client = host.client(spec)
        profile = profile_of(self._task, spec, host.family_id(spec), host.engine(spec))
        watch.lap("process")
        answers = answer_records(records, make_task(self._task), client, profile)
        host.check_open()
        watch.model(answers, client.asked_s)
        return Answered(tuple(answers), watch.times(host.take_idle_s()), waited_s)


def texts_op(topic: str) -> str:
    """Return the name of the plugin and of the handler by which workers are called."""
    return f"{topic}-texts"
