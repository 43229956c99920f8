"""The desk and the dispatch of a pool, with hosts that do what a test says; no cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest
from distributed import get_client

from mas_batch import AgentPool
from mas_batch.agents.texts import Answered
from mas_batch.aggregate.method import MergeSpec
from mas_batch.aggregate.stopping import StoppingRule
from mas_batch.errors import (
    AnswerTimeoutError,
    EngineError,
    EngineUnavailableError,
    NoAnswerError,
    PoolClosedError,
    Reason,
)
from mas_batch.job import Agent, Job
from mas_batch.latency.times import TaskTimes
from mas_batch.records import Answer, Record
from mas_batch.routing.host import Breaker
from mas_batch.routing.instructions import Rules
from mas_batch.routing.policies import Capability
from mas_batch.serving.desk import Desk
from mas_batch.serving.question import AskingRules
from mas_batch.serving.queues import AgentQueues
from mas_batch.serving.reply import Reply, make_record

VOTE = MergeSpec("vote", None, {}, None, 0.0, "text", None)


class Hosts:
    """Answers what each host's behaviour says; keeps who was called with what."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[str]]] = []
        self.behaviours: dict[str, Callable[[], Awaitable[str]]] = {}
        self.suspects: list[tuple[str, bool]] = []

    async def __call__(self, address: str, agent_id: str, records: Sequence[Record]) -> Answered:
        self.calls.append((address, [str(record.text) for record in records]))
        said = await self.behaviours[address]() if address in self.behaviours else agent_id
        answers = tuple(Answer(r.record_id, agent_id, agent_id, 0, said) for r in records)
        return Answered(answers, TaskTimes(compute_s=0.001), 0.0)

    def suspect(self, address: str, hangs: bool) -> None:
        self.suspects.append((address, hangs))


class Setup:
    """A desk of agents named by letters, with hosts `a1`, `a2`, …; `ab1` is one of both."""

    def __init__(
        self,
        hosts: Hosts,
        *addresses: str,
        max_batch: int = 4,
        timeout_s: float = 600.0,
        max_pending: int = 100,
        concurrent: int = 1,
    ) -> None:
        self.concurrent = concurrent
        names = sorted({agent for address in addresses for agent in address[:-1]})
        agents = [Agent(name=name, model=f"echo:{name}") for name in names]
        rules = Rules(answers_per_record=1, window=None, timeout_s=timeout_s)
        self.queues = AgentQueues(
            agents, rules, hosts, hosts.suspect, max_batch=max_batch, max_wait_s=0.0
        )
        self.desk = Desk(self.queues, Capability(), VOTE, max_pending=max_pending)
        self.samples = dict.fromkeys(names, 1)
        for address in addresses:
            self.join(address)

    def join(self, address: str) -> None:
        self.desk.joined(address, tuple(address[:-1]), self.concurrent, paused=False)

    def ask(
        self,
        text: str = "text",
        wanted: int = 1,
        *,
        race: bool = False,
        stopping: StoppingRule | None = None,
        timeout_s: float = 60.0,
    ) -> asyncio.Task[Reply]:
        asking = AskingRules(self.samples, wanted, race, stopping, timeout_s, True, 8)
        return asyncio.create_task(self.desk.ask(make_record(text, None), asking))


async def settle() -> None:
    """Let everything that is ready happen."""
    for _ in range(20):
        await asyncio.sleep(0)


async def never() -> str:
    await asyncio.Event().wait()
    return ""


async def dies() -> str:
    raise ConnectionResetError("connection reset by peer")


async def refuses() -> str:
    raise EngineError("no such model")


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())  # type: ignore[arg-type]


def test_what_waits_for_a_busy_host_becomes_its_next_batch() -> None:
    async def test() -> None:
        hosts, free = Hosts(), asyncio.Event()

        async def when_free() -> str:
            await free.wait()
            return "said"

        hosts.behaviours["a1"] = when_free
        setup = Setup(hosts, "a1", max_batch=4)
        asked = [setup.ask("text 0")]
        await settle()
        assert hosts.calls == [("a1", ["text 0"])], "a lone text does not wait for company"
        asked += [setup.ask(f"text {i}") for i in range(1, 7)]
        await settle()
        free.set()
        replies = await asyncio.gather(*asked)
        assert [texts for _, texts in hosts.calls[1:]] == [
            ["text 1", "text 2", "text 3", "text 4"],
            ["text 5", "text 6"],
        ]
        assert {reply.answer for reply in replies} == {"said"}
        assert setup.desk.stats().agents["a"].batch_sizes == {1: 1, 2: 1, 4: 1}

    run(test)


def test_what_is_asked_in_the_same_moment_is_shared_among_the_free_hosts() -> None:
    async def test() -> None:
        hosts = Hosts()
        setup = Setup(hosts, "a1", "a2", max_batch=9)
        await asyncio.gather(*(setup.ask(f"text {i}") for i in range(7)))
        assert sorted(len(texts) for _, texts in hosts.calls) == [3, 4]
        assert {address for address, _ in hosts.calls} == {"a1", "a2"}

    run(test)


def test_a_text_that_many_ask_about_is_read_once() -> None:
    async def test() -> None:
        hosts = Hosts()
        setup = Setup(hosts, "a1", max_batch=9)
        replies = await asyncio.gather(*(setup.ask("same") for _ in range(5)))
        assert [texts for _, texts in hosts.calls] == [["same"]]
        assert [reply.answer for reply in replies] == ["a"] * 5

    run(test)


def test_the_first_answer_wins_and_who_has_not_begun_does_not_begin() -> None:
    async def test() -> None:
        hosts = Hosts()
        hosts.behaviours["b1"] = never
        setup = Setup(hosts, "a1", "b1", max_batch=1)
        first, second = setup.ask("one", race=True), setup.ask("two", race=True)
        replies = await asyncio.gather(first, second)
        assert [reply.agents for reply in replies] == [("a",), ("a",)]
        assert [call for call in hosts.calls if call[0] == "b1"] == [("b1", ["one"])]
        stats = setup.desk.stats()
        assert (stats.agents["b"].waiting, stats.agents["b"].in_flight) == (0, 1)
        await setup.desk.close(drain=True)

    run(test)


def test_a_death_is_answered_by_another_host_each_text_alone() -> None:
    async def test() -> None:
        hosts, free = Hosts(), asyncio.Event()

        async def dies_later() -> str:
            await free.wait()
            return await dies()

        hosts.behaviours["a1"] = dies_later
        setup = Setup(hosts, "a1")
        asked = [setup.ask(f"text {i}") for i in range(4)]
        await settle()
        free.set()
        await settle()
        assert hosts.suspects == [("a1", False)]
        setup.join("a2")
        assert {reply.answer for reply in await asyncio.gather(*asked)} == {"a"}
        assert hosts.calls[1][0] == "a2"
        assert hosts.calls[1][1] == ["text 0"], "what was at the dead one comes first, alone"

    run(test)


def test_a_host_works_on_several_batches_of_its_agents_at_once() -> None:
    async def test() -> None:
        hosts = Hosts()
        hosts.behaviours["ab1"] = never
        setup = Setup(hosts, "ab1", concurrent=3)
        for number in range(3):
            setup.ask(f"text {number}", wanted=2)
            await settle()
        assert len(hosts.calls) == 3, "two agents' batches of the first text, and one of the next"
        stats = setup.desk.stats().agents
        assert (stats["a"].in_flight, stats["b"].in_flight) == (2, 1)
        assert (stats["a"].waiting, stats["b"].waiting) == (1, 2)
        await setup.desk.close(drain=False)

    run(test)


def test_agents_that_share_a_host_take_turns() -> None:
    async def test() -> None:
        hosts = Hosts()
        setup = Setup(hosts, "ab1", max_batch=1)
        asked = [setup.ask(f"text {i}", wanted=2) for i in range(8)]
        replies = await asyncio.gather(*asked)
        assert {reply.agents for reply in replies} == {("a", "b")}
        order = [texts[0] for _, texts in hosts.calls]
        assert [order.index(f"text {i}") for i in range(1, 8)] == sorted(
            order.index(f"text {i}") for i in range(1, 8)
        )
        assert order[-2:] == ["text 7", "text 7"], "neither agent has answered all before the other"

    run(test)


def test_after_a_death_each_text_is_alone_and_only_the_one_that_kills_is_given_up() -> None:
    async def test() -> None:
        hosts = Hosts()
        at_work = 0

        async def dies_of_poison() -> str:
            nonlocal at_work
            at_work += 1
            try:
                texts = hosts.calls[-1][1]
                await asyncio.sleep(0)
                if texts == ["poison"]:
                    assert at_work == 1 or len(hosts.calls) <= 4, "not alone"
                    await dies()
                await asyncio.sleep(0.001)
                return "said"
            finally:
                at_work -= 1

        for number in range(1, 4):
            hosts.behaviours[f"a{number}"] = dies_of_poison
        setup = Setup(hosts, "a1", concurrent=4, max_batch=1)
        words = ["one", "two", "poison", "four", "five", "six"]
        asked = [setup.ask(word) for word in words]
        await settle()
        setup.join("a2")
        while not hosts.suspects[1:]:
            await asyncio.sleep(0.001)
        setup.join("a3")
        replies = await asyncio.gather(*asked, return_exceptions=True)
        failed = [w for w, r in zip(words, replies, strict=True) if isinstance(r, Exception)]
        assert failed == ["poison"]
        assert "worker_died: twice" in str(replies[2])
        assert [address for address, _ in hosts.suspects] == ["a1", "a2"]

    run(test)


def test_a_worker_whose_connection_was_lost_is_asked_again() -> None:
    async def test() -> None:
        hosts = Hosts()
        hosts.behaviours["a1"] = dies
        setup = Setup(hosts, "a1")
        asked = setup.ask()
        await settle()
        del hosts.behaviours["a1"]
        setup.join("a1")  # it lives
        assert (await asked).answer == "a"
        assert [address for address, _ in hosts.calls] == ["a1", "a1"]

    run(test)


def test_leaving_answers_also_what_waits_for_room() -> None:
    async def test() -> None:
        hosts, free = Hosts(), asyncio.Event()

        async def waits() -> str:
            await free.wait()
            return "said"

        hosts.behaviours["a1"] = waits
        setup = Setup(hosts, "a1", max_pending=2)
        asking = AskingRules(setup.samples, 1, False, None, 60.0, True, 8)
        records = [make_record(f"text {i}", None) for i in range(6)]
        asked = [
            asyncio.create_task(setup.desk.ask(record, asking, wait_for_room=True))
            for record in records
        ]
        await settle()
        closing = asyncio.create_task(setup.desk.close(drain=True))
        await settle()
        with pytest.raises(PoolClosedError):
            await setup.ask("late")
        free.set()
        assert [reply.answer for reply in await asyncio.gather(*asked)] == ["said"] * 6
        await closing

    run(test)


def test_a_text_that_kills_two_workers_is_given_up_and_others_are_not() -> None:
    async def test() -> None:
        hosts = Hosts()
        hosts.behaviours |= {"a1": dies, "a2": dies}
        setup = Setup(hosts, "a1", "a2", "b1")
        reply = await setup.ask("poison")
        assert reply.agents == ("b",), "somebody else is asked for it"
        (failure,) = reply.failures
        assert (failure.agent_id, failure.reason) == ("a", Reason.WORKER_DIED)
        setup.join("a3")
        assert (await setup.ask("harmless")).agents == ("a",)

    run(test)


def test_an_engine_that_fails_is_passed_over_for_another_host() -> None:
    async def test() -> None:
        hosts = Hosts()
        hosts.behaviours["a1"] = refuses
        setup = Setup(hosts, "a1", "a2")
        for number in range(8):
            assert (await setup.ask(f"text {number}")).answer == "a"
        num_failed = sum(address == "a1" for address, _ in hosts.calls)
        assert num_failed <= 3, "after three failures in a row it is left alone"

    run(test)


def test_an_agent_whose_every_worker_fails_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Breaker, "FIRST_S", 3600.0)

    async def test() -> None:
        hosts = Hosts()
        hosts.behaviours["a1"] = refuses
        setup = Setup(hosts, "a1", "b1")
        for number in range(Breaker.LIMIT):
            reply = await setup.ask(f"text {number}", wanted=2)
            assert reply.failures[0].message == "no such model"
        reply = await setup.ask("text", wanted=2)
        assert reply.agents == ("b",)
        assert reply.failures[0].message == "every worker of the agent is failing"
        assert sum(address == "a1" for address, _ in hosts.calls) == Breaker.LIMIT
        assert (await setup.ask("another")).failures == (), "it is not even asked"

    run(test)


def test_a_host_that_failed_is_tried_again_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Breaker, "FIRST_S", 0.01)

    async def test() -> None:
        hosts = Hosts()
        hosts.behaviours["a1"] = refuses
        setup = Setup(hosts, "a1")
        for number in range(Breaker.LIMIT):
            with pytest.raises(NoAnswerError):
                await setup.ask(f"text {number}")
        del hosts.behaviours["a1"]
        await asyncio.sleep(0.02)
        setup.desk.tick()
        assert (await setup.ask("text")).agents == ("a",)
        assert (await setup.ask("another")).agents == ("a",)

    run(test)


def test_when_all_fail_the_error_says_what_each_did() -> None:
    async def test() -> None:
        hosts = Hosts()
        hosts.behaviours |= {"a1": refuses, "b1": refuses}
        setup = Setup(hosts, "a1", "b1")
        with pytest.raises(NoAnswerError, match="a: agent_failed: no such model; b: agent_failed"):
            await setup.ask()
        assert setup.desk.stats().num_failed == 1
        assert setup.desk.stats().pending == 0

    run(test)


def test_at_the_deadline_what_is_there_is_merged() -> None:
    async def test() -> None:
        hosts = Hosts()
        hosts.behaviours["b1"] = never
        setup = Setup(hosts, "a1", "b1")
        reply = await setup.ask(wanted=2, timeout_s=2.0)
        assert reply.agents == ("a",)
        assert [(f.agent_id, f.message) for f in reply.failures] == [("b", "no answer in time")]
        hosts.behaviours["a1"] = never
        with pytest.raises(AnswerTimeoutError, match=r"no answer within 0.1 s; asked: a"):
            await setup.ask(timeout_s=0.1)
        await setup.desk.close(drain=False)

    run(test)


def test_a_host_that_hangs_is_reported_and_its_texts_go_elsewhere() -> None:
    async def test() -> None:
        hosts = Hosts()
        hosts.behaviours["a1"] = never
        setup = Setup(hosts, "a1", timeout_s=0.1)
        asked = setup.ask()
        while not hosts.suspects:
            await asyncio.sleep(0.01)
        assert hosts.suspects == [("a1", True)]
        setup.join("a2")
        assert (await asked).answer == "a"

    run(test)


def test_a_host_that_answers_anything_does_not_hang() -> None:
    """What it begins late among others takes longer, and is not silence."""

    async def test() -> None:
        hosts, passed_s, loop = Hosts(), 0.0, asyncio.get_running_loop()
        real = loop.time
        loop.time = lambda: real() + passed_s  # type: ignore[method-assign]
        quick = asyncio.Event()

        async def once_quick() -> str:
            await quick.wait()
            return "said"

        calls = iter([never(), once_quick()])
        hosts.behaviours["a1"] = calls.__next__
        setup = Setup(hosts, "a1", timeout_s=60.0, concurrent=2)
        setup.ask("slow", timeout_s=1e6)
        await settle()
        other = setup.ask("quick", timeout_s=1e6)
        passed_s = 50.0
        quick.set()
        assert (await other).answer == "said"
        passed_s = 100.0
        await asyncio.sleep(0.01)
        assert not hosts.suspects
        passed_s = 120.0
        while not hosts.suspects:
            await asyncio.sleep(0.01)
        assert hosts.suspects == [("a1", True)]
        await setup.desk.close(drain=False)

    run(test)


def test_a_late_answer_is_hedged_by_another_host() -> None:
    async def test() -> None:
        hosts = Hosts()
        setup = Setup(hosts, "a1")
        for number in range(20):
            await setup.ask(f"text {number}")
        assert setup.desk.stats().num_hedged == 0
        hosts.behaviours["a1"] = never
        asked = setup.ask("late")
        await settle()
        setup.join("a2")
        assert (await asked).answer == "a"
        assert hosts.calls[-1] == ("a2", ["late"])
        assert setup.desk.stats().num_hedged == 1
        await setup.desk.close(drain=False)

    run(test)


def test_an_agent_without_workers_is_not_waited_for_where_another_can_answer() -> None:
    async def test() -> None:
        hosts = Hosts()
        hosts.behaviours["a1"] = never
        setup = Setup(hosts, "a1", "b1")
        asked = setup.ask()
        await settle()
        setup.desk.left("a1")
        assert (await asked).agents == ("b",)

    run(test)


def test_one_more_is_asked_only_while_the_vote_is_open() -> None:
    async def test() -> None:
        hosts = Hosts()

        async def yes() -> str:
            return "yes"

        async def no() -> str:
            return "no"

        hosts.behaviours |= {"a1": yes, "b1": yes, "c1": yes}
        setup = Setup(hosts, "a1", "b1", "c1")
        rule = StoppingRule(confidence=None, max_answers=3)
        assert (await setup.ask("one", wanted=2, stopping=rule)).agents == ("a", "b")
        hosts.behaviours["b1"] = no
        reply = await setup.ask("two", wanted=2, stopping=rule)
        assert (reply.agents, reply.answer) == (("a", "b", "c"), "yes")

    run(test)


def test_the_latency_of_a_reply_adds_up() -> None:
    async def test() -> None:
        hosts = Hosts()

        async def computes() -> str:
            await asyncio.sleep(0.01)
            return "said"

        hosts.behaviours["a1"] = computes
        setup = Setup(hosts, "a1")
        loop = asyncio.get_running_loop()
        start = loop.time()
        latency = (await setup.ask()).latency
        assert 0.01 <= latency.total_s <= loop.time() - start
        assert latency.compute_s == 0.001
        assert latency.transfer_s >= 0.008, "what the worker did not spend is the way"
        parts = (latency.queue_s, latency.transfer_s, latency.processing_s)
        assert min(parts) >= 0

    run(test)


# Here because no other cluster runs in this module: an active client would be used.
@pytest.mark.processes
def test_a_pool_without_a_cluster_starts_its_own(make_job: Callable[..., Job]) -> None:
    agent = {"name": "a", "model": "echo:a"}
    job = make_job(agents=[agent], cluster={"dashboard_address": None})
    pool = AgentPool(job).sync()
    with pool:
        assert pool.ask("text").answer == "text"
        assert get_client().cluster.name == "mas-batch", "the embedded one"
    assert pool.stats().num_replied == 1
    with pytest.raises(PoolClosedError, match="opened once"), pool:
        pass


async def is_away() -> str:
    raise EngineUnavailableError("http://x/v1: APIConnectionError")


def test_a_question_waits_for_a_server_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Breaker, "FIRST_S", 0.0)

    async def test() -> None:
        hosts = Hosts()
        hosts.behaviours["a1"] = is_away
        setup = Setup(hosts, "a1")
        asked = [setup.ask(f"text {i}") for i in range(3)]
        for _ in range(4):
            await settle()
            setup.desk.tick()
        assert not any(question.done() for question in asked)
        del hosts.behaviours["a1"]
        while not all(question.done() for question in asked):
            await settle()
            setup.desk.tick()
        assert [question.result().answer for question in asked] == ["a"] * 3

    run(test)


def test_another_agent_answers_while_a_server_is_away() -> None:
    async def test() -> None:
        hosts = Hosts()
        hosts.behaviours["a1"] = is_away
        setup = Setup(hosts, "a1", "b1")
        assert (await setup.ask(wanted=1, race=True)).answer == "b"

    run(test)


def test_a_question_that_waits_in_vain_says_for_what() -> None:
    async def test() -> None:
        hosts = Hosts()
        hosts.behaviours["a1"] = is_away
        setup = Setup(hosts, "a1")
        with pytest.raises(AnswerTimeoutError, match=r"a \(its server is away: http://x/v1: API"):
            await setup.ask(timeout_s=0.01)

    run(test)
