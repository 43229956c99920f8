"""Wiring of a pool: the job's merge and policy, a desk, and the agents' residence on a cluster."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Coroutine, Iterable, Sequence
from concurrent.futures import Future as Promise
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, Literal, TypeVar

import pyarrow as pa
from distributed import Client

from mas_batch import cluster
from mas_batch.aggregate.calibration import Calibrated
from mas_batch.aggregate.method import MergeSpec
from mas_batch.engines.job_options import check_options
from mas_batch.errors import JobError, MasBatchError, PoolClosedError
from mas_batch.job import Job
from mas_batch.merging import merge_spec, stopping_rule
from mas_batch.routing.instructions import Rules
from mas_batch.routing.policies import POLICIES
from mas_batch.run_folder.read import open_run
from mas_batch.run_folder.ref import RunRef
from mas_batch.run_folder.storage import Store
from mas_batch.serving.desk import Desk
from mas_batch.serving.measure import PoolStats
from mas_batch.serving.question import AskingRules
from mas_batch.serving.queues import AgentQueues
from mas_batch.serving.reply import Reply, make_record
from mas_batch.serving.residence import Residence

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MIN_SILENCE_S = 60.0
"""Silence after which a worker is restarted, at least, however short a question's timeout is."""

Answers = Literal["first"] | int | None


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on sizes and times; see `AgentPool`.

    Raises:
        ValueError: a limit is out of its range.
    """

    max_batch: int
    max_wait_s: float
    max_pending: int
    timeout_s: float

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_pending"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}: {value} is not allowed; allowed: 1 or more")
        if not 0 <= self.max_wait_s < float("inf"):
            raise ValueError(f"max_wait_s: {self.max_wait_s} is not allowed; allowed: 0 or more")
        check_timeout(self.timeout_s)


class PoolCore:
    """What `AgentPool` and `SyncAgentPool` share. Threads may share it.

    Raises:
        JobError: the job cannot be asked about single texts, or an argument is wrong.
    """

    def __init__(
        self,
        job: Job,
        client: Client | None,
        answers: Answers,
        learned_from: str | None,
        limits: Limits,
        *,
        hedge: bool,
    ) -> None:
        self._job = _check_servable(job)
        self._samples = {agent.name: agent.samples for agent in job.agents}
        self._answers = answers
        self._limits = limits
        self._hedge = hedge
        self._asking_rules(None, None, None)  # raises for a wrong argument before a model is loaded
        spec = pool_spec(job, learned_from)
        topic = f"mas-batch-pool-{job.name}-{uuid.uuid4().hex[:8]}"
        store = Store(job.output.path, job.output.storage_options)
        run = RunRef(
            store, topic, job.task, spec, None, pa.schema([]), keep_text=False,
            code=job.cluster.code,
        )  # fmt: skip
        self._residence = Residence(job, run, _client_to_use(job, client))
        queues = AgentQueues(
            job.agents,
            _queue_rules(job, limits.timeout_s),
            self._residence.call,
            self._residence.suspect,
            max_batch=limits.max_batch,
            max_wait_s=limits.max_wait_s,
        )
        self._desk = Desk(queues, POLICIES[job.routing.policy](), spec, limits.max_pending)
        self._is_open = self._is_abandoned = False

    def open(self) -> None:
        """Load the models, and wait until they are loaded.

        Raises:
            JobError: an agent has no capable worker.
            ModelError: no worker of an agent could load its model.
            RunError: the cluster cannot be reached.
            PoolClosedError: the pool was open before.
        """
        self._residence.open(self._desk)
        self._is_open = not self._is_abandoned

    def abandon(self) -> None:
        """Give up opening the pool, without waiting for `open` to end."""
        self._is_abandoned = True
        self._residence.begin_close()

    def close(self, *, drain: bool) -> None:
        """Take no more questions, and free the models.

        Args:
            drain: whether pending questions are answered first; else they end with an error.
        """
        if not self._is_open:
            return
        try:
            self.begin(self._desk.close(drain=drain)).result()
        except PoolClosedError as error:
            logger.warning("%s before the pool", error)
        finally:
            self._is_open = False
            self._residence.close()

    def begin(self, work: Coroutine[Any, Any, T]) -> Promise[T]:
        """Start the coroutine on the client's event loop, on which the whole pool runs.

        Raises:
            PoolClosedError: the pool is not open, or its client was closed.
        """
        if not self._is_open:
            work.close()
            raise PoolClosedError("the pool is not open; use it as a context manager")
        try:
            return asyncio.run_coroutine_threadsafe(work, self._residence.loop)
        except RuntimeError as error:  # closing a client closes its loop
            work.close()
            raise PoolClosedError("the pool's client was closed") from error

    def question(
        self,
        text: str,
        context: str | None,
        agents: Sequence[str] | None,
        answers: Answers,
        timeout_s: float | None,
    ) -> Promise[Reply]:
        """Begin to ask; see `AgentPool.ask`."""
        asking = self._asking_rules(agents, answers, timeout_s)
        return self.begin(self._desk.ask(make_record(text, context), asking))

    def questions(
        self, texts: Iterable[str], contexts: Iterable[str | None] | None
    ) -> Promise[list[Reply | MasBatchError]]:
        """Begin to ask about many texts; see `AgentPool.ask_many`."""
        texts = list(texts)
        contexts = repeat(None, len(texts)) if contexts is None else contexts
        pairs, asking = (
            list(zip(texts, contexts, strict=True)),
            self._asking_rules(None, None, None),
        )

        async def ask_one(text: str, context: str | None) -> Reply | MasBatchError:
            try:
                record = make_record(text, context)
                return await self._desk.ask(record, asking, wait_for_room=True)
            except MasBatchError as error:
                return error

        async def ask_all() -> list[Reply | MasBatchError]:
            return await asyncio.gather(*(ask_one(*pair) for pair in pairs))

        return self.begin(ask_all())

    def stats(self) -> PoolStats:
        """Return what has been measured since the pool was opened."""

        async def stats() -> PoolStats:
            return self._desk.stats()

        return self.begin(stats()).result() if self._is_open else self._desk.stats()

    def _asking_rules(
        self, agents: Sequence[str] | None, answers: Answers, timeout_s: float | None
    ) -> AskingRules:
        """Resolve the arguments to the rules by which a question is asked.

        Raises:
            JobError, ValueError: an argument is wrong.
        """
        samples = self._samples_of(agents)
        answers = self._answers if answers is None else answers
        asking = AskingRules(
            samples=samples,
            wanted=sum(samples.values()),
            race=answers is not None,
            stopping=None,
            timeout_s=check_timeout(self._limits.timeout_s if timeout_s is None else timeout_s),
            hedge=self._hedge,
            new_tokens=self._job.task.max_new_tokens,
        )
        if answers is not None:
            return replace(asking, wanted=_check_num_wanted(answers, asking.wanted))
        if agents is not None:
            return asking
        adaptive = self._job.routing.adaptive
        wanted = adaptive.first if adaptive else self._job.answers_per_record
        return replace(asking, wanted=wanted, stopping=stopping_rule(self._job))

    def _samples_of(self, agents: Sequence[str] | None) -> dict[str, int]:
        if agents is None:
            return self._samples
        unknown = [name for name in agents if name not in self._samples]
        if unknown or not agents:
            named = repr(unknown[0]) if unknown else "no name"
            allowed = ", ".join(self._samples)
            raise JobError(f"{named} is not allowed; allowed: {allowed}", key="agents")
        return {name: self._samples[name] for name in agents}


def check_timeout(timeout_s: float) -> float:
    """Return the timeout.

    Raises:
        ValueError: it is not above 0.
    """
    if not timeout_s > 0:
        raise ValueError(f"timeout_s: {timeout_s} is not allowed; allowed: above 0")
    return timeout_s


def pool_spec(job: Job, learned_from: str | None) -> MergeSpec:
    """Return how single texts are merged; a merge that learns from a corpus takes it from a run.

    Args:
        learned_from: folder of a published run of the job; None: a merge that needs a corpus is
            replaced by its first pass.

    Raises:
        JobError: the run has learned nothing, or nothing of one of these agents.
        RunError: `learned_from` is no complete run.
    """
    spec = merge_spec(job)
    if not spec.needs_corpus:
        return spec
    if learned_from is None:
        first = spec.first_pass
        logger.warning(
            "%s needs a corpus: merging by plain %s, for want of learned_from",
            _needs(spec), first.method,
        )  # fmt: skip
        return first
    store = open_run(learned_from, job.output.storage_options).store
    known = frozenset(spec.agents)
    try:
        if spec.learning is not None:
            lesson = spec.learning.read(spec, store.read_bytes("learned.json").decode())
            spec, known = lesson.spec, lesson.agents
        if spec.calibrate is not None:
            calibrated = Calibrated.from_json(store.read_bytes("calibration.json").decode())
            spec = replace(spec, calibrated=calibrated)
    except (FileNotFoundError, ValueError) as error:
        message = f"{learned_from!r} has nothing for merge.method {spec.method}: {error}"
        raise JobError(message, key="learned_from") from error
    if missing := [agent for agent in spec.agents if agent not in known]:
        message = f"{learned_from!r} knows nothing of agent {missing[0]!r}"
        raise JobError(f"{message}; it knows: {', '.join(sorted(known))}", key="learned_from")
    return spec


def _needs(spec: MergeSpec) -> str:
    """Name what of a merge needs a corpus."""
    if spec.learning is None:
        return "merge.calibrate"
    return f"merge.weights {spec.weights}" if spec.weights else spec.method


def _check_servable(job: Job) -> Job:
    if job.routing.escalate is not None:
        message = "which records are the least confident is known of a corpus only; remove it"
        raise JobError(f"a pool does not escalate: {message}", key="routing.escalate")
    check_options(job)
    cluster.check_settings(job.cluster)
    return job


def _client_to_use(job: Job, client: Client | None) -> Client | None:
    """Return the client to use; None: the job's `cluster` section decides."""
    if client is not None and client.asynchronous:
        raise ValueError("client: an asynchronous one is not allowed; allowed: Client(address)")
    return cluster.current_client() if cluster.is_embedded(job.cluster, client) else client


def _check_num_wanted(answers: Answers, possible: int) -> int:
    wanted = 1 if answers == "first" else answers
    if not isinstance(wanted, int) or not 1 <= wanted <= possible:
        allowed = f"'first', or 1 to {possible}, which is what these agents can give"
        raise JobError(f"{answers!r} is not allowed; allowed: {allowed}", key="answers")
    return wanted


def _queue_rules(job: Job, timeout_s: float) -> Rules:
    """Return the queues' rules; a worker that is silent for `timeout_s` is restarted."""
    return Rules(
        answers_per_record=job.answers_per_record,
        window=None,  # as many batches as a host works on at once
        weights=job.routing.weights,
        accuracies=job.merge.accuracies,
        timeout_s=job.routing.timeout_s or max(timeout_s, _MIN_SILENCE_S),
    )
