"""`AgentPool`: a job's agents stay resident, answer single texts, and are merged as in a run."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Self

from distributed import Client

from mas_batch.errors import MasBatchError
from mas_batch.job import Job
from mas_batch.serving.core import Answers, Limits, PoolCore
from mas_batch.serving.measure import PoolStats
from mas_batch.serving.reply import Reply


class AgentPool:
    """Keeps a job's agents resident and asks them about single texts; an async context manager.

        async with AgentPool(load_job("jobs/reply.yaml")) as pool:
            reply = await pool.ask("Where is my parcel?", context=order)

    Prompts, parsers, engines, merge and confidence are those of a batch run of the same job; its
    corpus and output are not touched. Opening takes as long as the models take to load. Leaving
    the `async with` block answers the pending questions first, unless an exception left it.

    Args:
        job: its `routing.policy` chooses the agents where not all of them are asked.
        client: as in `mas_batch.run`; a synchronous one.
        answers: None: the job's `answers_per_record` (and `adaptive`), of as few agents as give
            them. k: all agents are asked, the first k answers are merged. "first": k = 1.
        learned_from: folder of a published run of this job, for merges that learn from a whole
            corpus (`reliability`, learned weights). None: they merge as in their first pass.
        max_batch: the most texts that a host is asked about at once.
        max_wait_s: how long a text may wait, with a host free, for others to join its batch.
        max_pending: the most questions at a time; further ones are refused.
        timeout_s: time of a question, from asking to the last answer.
        hedge: ask another agent or host too when an answer is later than 95 % of those before.

    Raises:
        JobError: the job cannot be asked about single texts, or an argument does not go with it.
        ValueError: a limit is out of its range.
    """

    def __init__(
        self,
        job: Job,
        *,
        client: Client | None = None,
        answers: Answers = None,
        learned_from: str | None = None,
        max_batch: int = 16,
        max_wait_s: float = 0.0,
        max_pending: int = 1024,
        timeout_s: float = 60.0,
        hedge: bool = True,
    ) -> None:
        limits = Limits(max_batch, max_wait_s, max_pending, timeout_s)
        self._core = PoolCore(job, client, answers, learned_from, limits, hedge=hedge)

    def sync(self) -> SyncAgentPool:
        """Return the same pool for code that is not asynchronous; a context manager."""
        return SyncAgentPool(self._core)

    async def __aenter__(self) -> Self:
        try:
            await asyncio.to_thread(self._core.open)
        except asyncio.CancelledError:
            self._core.abandon()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        await asyncio.to_thread(self._core.close, drain=kind is None)

    async def ask(
        self,
        text: str,
        context: str | None = None,
        *,
        agents: Sequence[str] | None = None,
        answers: Answers = None,
        timeout_s: float | None = None,
    ) -> Reply:
        """Ask the agents about a text and return their merged answer.

        At the deadline the answers that are there are merged; late agents are among the reply's
        `failures`. Cancelling the call frees its place; no host begins work on it any more.

        Args:
            context: background, as the job's `corpus.context` column would hold.
            agents: ask only these; if `answers` is None, all of them.
            answers, timeout_s: replace the pool's.

        Raises:
            RecordError: the text would be unusable in a corpus too: it is empty, for example.
            PoolBusyError: too many questions are pending.
            PoolClosedError: the pool is not open, or its cluster was lost.
            AnswerTimeoutError: there was no answer in time.
            NoAnswerError: every agent failed.
            JobError: no agent has such a name, or the agents cannot give so many answers.
        """
        promise = self._core.question(text, context, agents, answers, timeout_s)
        return await asyncio.wrap_future(promise)

    async def ask_many(
        self, texts: Iterable[str], contexts: Iterable[str | None] | None = None
    ) -> list[Reply | MasBatchError]:
        """Ask about many texts; returns a reply or an error for each, in the texts' order.

        Texts wait for room in the pool instead of being refused; each one's timeout begins then.

        Raises:
            PoolClosedError: the pool is not open.
            ValueError: `contexts` has another length than `texts`.
        """
        return await asyncio.wrap_future(self._core.questions(texts, contexts))

    def stats(self) -> PoolStats:
        """Return what has been measured since the pool was opened."""
        return self._core.stats()


class SyncAgentPool:
    """An `AgentPool` whose methods wait; for scripts and notebooks. Threads may share it.

    with AgentPool(job).sync() as pool:
        print(pool.ask("Where is my parcel?").answer)
    """

    def __init__(self, core: PoolCore) -> None:
        self._core = core

    def __enter__(self) -> Self:
        try:
            self._core.open()
        except KeyboardInterrupt:
            self._core.abandon()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._core.close(drain=kind is None)

    def ask(
        self,
        text: str,
        context: str | None = None,
        *,
        agents: Sequence[str] | None = None,
        answers: Answers = None,
        timeout_s: float | None = None,
    ) -> Reply:
        """Ask the agents about a text and return their merged answer; see `AgentPool.ask`."""
        promise = self._core.question(text, context, agents, answers, timeout_s)
        try:
            return promise.result()
        finally:
            promise.cancel()  # an interrupted caller wants no answer

    def ask_many(
        self, texts: Iterable[str], contexts: Iterable[str | None] | None = None
    ) -> list[Reply | MasBatchError]:
        """Ask about many texts; see `AgentPool.ask_many`."""
        promise = self._core.questions(texts, contexts)
        try:
            return promise.result()
        finally:
            promise.cancel()

    def stats(self) -> PoolStats:
        """Return what has been measured since the pool was opened."""
        return self._core.stats()
