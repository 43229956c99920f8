"""Answers single questions: asks agents, stops when the answers are enough, merges. Knows no Dask.

Everything runs on one event loop, but for the merges, which have a thread of their own.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count

from mas_batch.aggregate.method import MergeSpec
from mas_batch.aggregate.stopping import StoppingRule, is_decided
from mas_batch.errors import (
    AnswerTimeoutError,
    NoAnswerError,
    PoolBusyError,
    PoolClosedError,
)
from mas_batch.partition import estimate_tokens
from mas_batch.records import Record
from mas_batch.routing.policies import PartitionView, Policy
from mas_batch.serving.measure import Meter, PoolStats
from mas_batch.serving.parts import AgentPart
from mas_batch.serving.question import AskingRules, Question, Quorum
from mas_batch.serving.queues import AgentQueues
from mas_batch.serving.reply import Reply, encoder_of, merged_reply, rows_of


class Desk:
    """Asks agents about many questions at a time, waits for their answers, and merges them.

    Args:
        queues: the agents' queues and hosts.
        policy: chooses the agent that is asked next about a question.
        spec: how answers are merged.
        max_pending: the most questions at a time.
    """

    def __init__(
        self, queues: AgentQueues, policy: Policy, spec: MergeSpec, max_pending: int
    ) -> None:
        self._queues = queues
        self._policy = policy
        self._spec = spec
        self._room = asyncio.Semaphore(max_pending)
        self._max_pending = max_pending
        self._pending: dict[Question, asyncio.Task[object]] = {}
        self._merging = ThreadPoolExecutor(1, thread_name_prefix="mas-batch-merge")
        self._numbers = count()
        self._closed = ""
        self._meters = {
            part: Meter() for part in ("queue", "compute", "transfer", "processing", "total")
        }
        self._num_failed = self._num_busy = self._num_hedged = 0
        self._num_taken = 0  # pending, or waiting for room
        self._drains = False
        self._all_settled = asyncio.Event()

    async def ask(
        self, record: Record, asking: AskingRules, *, wait_for_room: bool = False
    ) -> Reply:
        """Return the merged answer to the record.

        Raises:
            PoolBusyError: too many questions are pending; never with `wait_for_room`.
            PoolClosedError: the pool is closing, or its cluster was lost.
            AnswerTimeoutError: no agent has answered in time.
            NoAnswerError: every agent failed.
        """
        self._check_open()
        if self._room.locked() and not wait_for_room:
            self._num_busy += 1
            raise PoolBusyError(
                f"{self._max_pending} questions are pending, no more are taken (max_pending)"
            )
        self._num_taken += 1
        try:
            async with self._room:
                if not self._drains:
                    self._check_open()
                return await self._ask(record, asking)
        finally:
            self._num_taken -= 1
            if not self._num_taken:
                self._all_settled.set()

    async def _ask(self, record: Record, asking: AskingRules) -> Reply:
        context = estimate_tokens(record.context) if record.context else 0
        tokens = estimate_tokens(record.text or "") + context + asking.new_tokens
        quorum = Quorum(asking.samples, asking.wanted, asking.race)
        question = Question(record, quorum, tokens, next(self._numbers), self._now())
        task = asyncio.current_task()
        assert task is not None
        self._pending[question] = task
        try:
            await self._gather_in_time(question, asking)
            self._withdraw(question)  # before the merge: no further agent shall begin meanwhile
            return await self._merge(question)
        except asyncio.CancelledError:
            if self._closed:
                raise PoolClosedError(self._closed) from None
            raise
        except NoAnswerError:
            self._num_failed += 1
            raise
        finally:
            del self._pending[question]
            self._withdraw(question)

    def tick(self) -> None:
        """Let hosts that failed be tried again when it is time; call it every second."""
        self._queues.tick()

    def joined(self, host_id: str, agents: tuple[str, ...], concurrent: int, paused: bool) -> None:
        """Note that a host holds its engine, and answers for these agents."""
        self._queues.joined(host_id, agents, concurrent, paused=paused)
        self._wake_questions()

    def paused(self, host_id: str, paused: bool) -> None:
        """Note that a host is paused, and takes no further batch, or works again."""
        self._queues.paused(host_id, paused)
        self._wake_questions()

    def left(self, host_id: str) -> None:
        """Note that a host is gone."""
        self._queues.left(host_id)
        self._wake_questions()

    def fail(self, why: str) -> None:
        """End every question with `PoolClosedError` of this message, and take no more."""
        self._closed, self._drains = why, False
        for task in self._pending.values():
            task.cancel()

    async def close(self, *, drain: bool) -> None:
        """Take no more questions; with `drain` answer the pending ones, else end them."""
        self._drains = drain and not self._closed
        self._closed = self._closed or "the pool is closed"
        if not drain:
            for task in self._pending.values():
                task.cancel()
        if self._num_taken:
            self._all_settled.clear()
            await self._all_settled.wait()
        self._queues.close()
        self._merging.shutdown(wait=False)

    def stats(self) -> PoolStats:
        """Return what has been measured."""
        latency = {part: meter.summary() for part, meter in self._meters.items()}
        return PoolStats(
            pending=len(self._pending),
            num_replied=int(latency["total"].get("count", 0)),
            num_failed=self._num_failed,
            num_busy=self._num_busy,
            num_hedged=self._num_hedged,
            latency=latency,
            agents=self._queues.stats(),
        )

    # Asking

    async def _gather_in_time(self, question: Question, asking: AskingRules) -> None:
        """Gather the answers that come in time, even if they are not enough.

        Raises:
            AnswerTimeoutError: no answer came.
        """
        try:
            async with asyncio.timeout(asking.timeout_s):
                await self._gather(question, asking)
        except TimeoutError:
            if not question.quorum.num_answers:
                agents = ", ".join(map(self._named, question.parts)) or "no agent"
                message = f"no answer within {asking.timeout_s:g} s; asked: {agents}"
                raise AnswerTimeoutError(message) from None

    def _named(self, agent_id: str) -> str:
        awaited = self._queues.awaited(agent_id)
        return f"{agent_id} (its server is away: {awaited})" if awaited else agent_id

    async def _gather(self, question: Question, asking: AskingRules) -> None:
        """Ask agents until there are answers enough, or no agent is left to ask."""
        quorum = question.quorum
        while True:
            if asking.stopping is not None and quorum.is_complete:
                quorum.wanted += not await self._is_decided(question, asking.stopping)
            while quorum.wants_more(self._stalled(quorum)) and (agent := self._choose(question)):
                self._submit(question, agent)
            if quorum.is_over:
                return
            late_in_s = self._late_in_s(question) if asking.hedge else None
            try:
                async with asyncio.timeout(late_in_s):
                    await question.news.wait()
            except TimeoutError:
                self._hedge(question)
            question.news.clear()

    def _stalled(self, quorum: Quorum) -> list[str]:
        return [agent for agent in quorum.open if not self._queues.is_served(agent)]

    def _choose(self, question: Question) -> str | None:
        """Choose the agent to ask next, by the job's policy; None: wait for an answer first.

        If no agent can be asked now and no answer is awaited, it is the first one, whose queue
        holds the part until it can.
        """
        unasked = question.quorum.unasked
        views = [view for agent in unasked for view in self._queues.views(agent)]
        if not views:
            return None if question.quorum.open else unasked[0]
        partition = PartitionView(question.number, question.tokens, len(question.parts))
        # A policy that would rather wait for another host returns None; this does not wait.
        chosen = self._policy.choose(partition, views)
        return chosen.agent_id if chosen is not None else views[0].agent_id

    def _submit(self, question: Question, agent_id: str) -> None:
        question.quorum.ask(agent_id)
        now = self._now()
        part = AgentPart(question.record, agent_id, question.tokens, now, question.hear)
        question.parts[agent_id] = part
        self._queues.submit(part)

    def _withdraw(self, question: Question) -> None:
        for part in question.parts.values():
            self._queues.withdraw(part)

    # Late answers

    def _late_in_s(self, question: Question) -> float | None:
        """Return in how many seconds the next part is late; None: no part, or it is not known."""
        dues = [
            due
            for agent in question.quorum.open
            if (due := self._late_at(question.parts[agent])) is not None
        ]
        return max(0.0, min(dues) - self._now()) if dues else None

    def _late_at(self, part: AgentPart) -> float | None:
        if part.hedged:
            return None
        late_s = self._queues.late_s(part.agent_id)
        return None if late_s is None else part.asked + part.patience * late_s

    def _hedge(self, question: Question) -> None:
        """For every late part ask another agent, or else another host of the same agent."""
        for agent in question.quorum.open:
            part = question.parts[agent]
            due = self._late_at(part)
            if due is None or due > self._now():
                continue
            other = self._choose(question) if question.quorum.unasked else None
            if other is not None:
                self._submit(question, other)
            part.hedged = other is not None or self._queues.hedge(part)
            part.patience *= 2
            self._num_hedged += part.hedged

    # Deciding and merging

    async def _is_decided(self, question: Question, rule: StoppingRule) -> bool:
        answers, spec = question.answers, self._spec
        failed = [a.outcome.failure for a in question.parts.values() if a.outcome]

        def decide() -> bool:
            encode = encoder_of(spec, answers)
            # A failed answer counts as an answer that has come: its agent is not asked again.
            missing = [{"reason": each.reason} for each in failed if each is not None]
            return is_decided([*rows_of(answers), *missing], spec, rule, encode)

        return await asyncio.get_running_loop().run_in_executor(self._merging, decide)

    async def _merge(self, question: Question) -> Reply:
        settled = question.quorum.settled
        heard = self._now()
        failures = question.failures
        if not question.quorum.num_answers:
            said = "; ".join(f"{f.agent_id}: {f.reason}: {f.message}" for f in failures)
            raise NoAnswerError(f"no agent gave an answer: {said or 'none could be asked'}")
        voters = [agent for agent, num_answers in settled.items() if num_answers]
        work = (question.record, question.answers, failures, voters, self._spec)
        loop = asyncio.get_running_loop()
        reply = await loop.run_in_executor(self._merging, merged_reply, *work)
        latency = question.latency(voters[-1], heard, self._now())
        for part, meter in self._meters.items():
            meter.note(getattr(latency, f"{part}_s"))
        return replace(reply, latency=latency)

    def _check_open(self) -> None:
        if self._closed:
            raise PoolClosedError(self._closed)

    def _wake_questions(self) -> None:
        """Let every pending question check again which agents it can ask."""
        for question in self._pending:
            question.news.set()

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
