"""The loop of an engine: requests of all callers, in one thread, and each gets its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mas_batch.engines.base import Engine, Sampling, SteppingEngine
from mas_batch.engines.batching import complete
from mas_batch.engines.client import LoopClient
from mas_batch.engines.loop import MOST_OFFERED, EngineLoop
from mas_batch.errors import (
    EngineLostError,
    EngineRefusedError,
    EngineUnavailableError,
    ModelError,
    OutOfMemoryError,
    Reason,
    RunError,
)
from tests.loop_engines import Capitals, Server, StepByStep, requests, spoken
from tests.waiting import PATIENCE_S, wait_until

GREEDY = Sampling(max_new_tokens=4)
BEAMS = Sampling(max_new_tokens=4, num_beams=2)


@contextmanager
def loop_of(engine: Engine) -> Iterator[EngineLoop]:
    loop = EngineLoop(lambda: engine)
    try:
        yield loop
    finally:
        if isinstance(engine, Capitals):
            engine.go_on.set()
        loop.close()


@contextmanager
def callers() -> Iterator[Callable[..., Future[Any]]]:
    """Yield a function that asks a loop in a thread, once it has all that was asked before."""
    with ThreadPoolExecutor(8) as threads:

        def ask(
            loop: EngineLoop, *texts: str, sampling: Sampling = GREEDY, engine: Engine | None = None
        ) -> Future[Any]:
            before = loop.num_callers
            future = threads.submit(loop.complete, requests(*texts), sampling, engine)
            wait_until(lambda: loop.num_callers > before or future.done())
            return future

        yield ask


def answers(future: Future[Any]) -> list[str]:
    return spoken(future.result(PATIENCE_S))


# --- Batches


def test_requests_of_several_callers_make_one_batch_and_each_gets_its_own() -> None:
    engine = Capitals()
    with loop_of(engine) as loop, callers() as ask:
        first = ask(loop, "held")
        engine.holding.wait(PATIENCE_S)
        others = [ask(loop, "a b", "a"), ask(loop, "b c d", "b")]
        engine.go_on.set()
        assert [answers(each) for each in (first, *others)] == [
            ["HELD"],
            ["A B", "A"],
            ["B C D", "B"],
        ]
    assert engine.batches == [["held"], ["b c d", "a b", "a", "b"]]


def test_who_came_first_is_served_by_every_batch_until_it_has_all() -> None:
    engine = Capitals(max_batch_tokens=12)  # two of the shortest, or one
    with loop_of(engine) as loop, callers() as ask:
        waiting = [ask(loop, "held")]
        engine.holding.wait(PATIENCE_S)
        waiting += [ask(loop, "a1", "a2", "a3"), ask(loop, "b1 b b b b b", "b2")]
        engine.go_on.set()
        assert answers(waiting[2]) == ["B1 B B B B B", "B2"]
    assert engine.batches[1:] == [["a1", "a2"], ["a3", "b2"], ["b1 b b b b b"]]


def test_other_samplings_and_other_views_make_other_batches() -> None:
    engine, view = Capitals(), Capitals()
    with loop_of(engine) as loop, callers() as ask:
        waiting = [ask(loop, "held")]
        engine.holding.wait(PATIENCE_S)
        waiting += [ask(loop, "a"), ask(loop, "b", sampling=BEAMS), ask(loop, "c", engine=view)]
        engine.go_on.set()
        assert [answers(each) for each in waiting] == [["HELD"], ["A"], ["B"], ["C"]]
    assert (engine.batches, view.batches) == ([["held"], ["a"], ["b"]], [["c"]])
    assert not view.closed


def test_a_culprit_costs_its_batch_mates_of_other_callers_nothing() -> None:
    engine = Capitals()
    with loop_of(engine) as loop, callers() as ask:
        first = ask(loop, "held")
        engine.holding.wait(PATIENCE_S)
        guilty, innocent = ask(loop, "a", "broken"), ask(loop, "b", "c")
        engine.go_on.set()
        assert answers(guilty) == ["A", Reason.ENGINE_ERROR]
        assert answers(innocent) == ["B", "C"]
        assert answers(first) == ["HELD"]


@pytest.mark.parametrize("engine", [Capitals(), StepByStep()], ids=["batches", "steps"])
@pytest.mark.parametrize(
    ("text", "error"), [("refused", EngineRefusedError), ("away", EngineUnavailableError)]
)
def test_who_had_requests_in_a_batch_that_no_batch_can_answer_hears_of_it(
    engine: Capitals, text: str, error: type[Exception]
) -> None:
    engine.holding.clear()
    engine.go_on.clear()
    with loop_of(engine) as loop, callers() as ask:
        first = ask(loop, "held", sampling=BEAMS)
        engine.holding.wait(PATIENCE_S)
        together = [ask(loop, "a", text), ask(loop, "b")]
        apart = ask(loop, "c", sampling=BEAMS)
        engine.go_on.set()
        assert answers(first) == ["HELD"]
        found = [each.exception(PATIENCE_S) for each in together]
        assert answers(apart) == ["C"]
        assert answers(ask(loop, "d")) == ["D"], "the engine goes on"
    assert [type(each) for each in found] == [error, error]
    assert found[0] is not found[1]
    if isinstance(found[1], EngineUnavailableError):
        assert (found[1].message, found[1].retry_after_s, found[1].wait_s) == ("gone", 7.0, 11.0)


def test_what_is_over_the_context_never_reaches_the_engine() -> None:
    engine = Capitals(max_context_tokens=6)
    with loop_of(engine) as loop:
        assert spoken(loop.complete(requests("a b c"), GREEDY)) == [Reason.TOO_LONG]
        assert loop.complete([], GREEDY) == []
    assert engine.batches == []


# --- Steps


def test_it_is_an_engine_that_steps() -> None:
    assert isinstance(StepByStep(), SteppingEngine)
    assert not isinstance(Capitals(), SteppingEngine)


def test_a_request_that_ends_makes_room_for_one_of_another_caller() -> None:
    engine = StepByStep(max_rows=2)
    with loop_of(engine) as loop, callers() as ask:
        first = ask(loop, "held", sampling=BEAMS)
        engine.holding.wait(PATIENCE_S)
        others = [ask(loop, "a a a a", "b"), ask(loop, "c c", "d")]
        engine.go_on.set()
        assert [answers(each) for each in (first, *others)] == [
            ["HELD"],
            ["A A A A", "B"],
            ["C C", "D"],
        ]
    # Two at a time as long as there are two.
    assert engine.steps == [
        ["a a a a", "b"],
        ["a a a a", "c c"],
        ["a a a a", "c c"],
        ["a a a a", "d"],
    ]


def test_what_cannot_be_stepped_is_a_batch_when_nothing_is_under_way() -> None:
    engine = StepByStep(max_rows=2)

    def generate(asked: Sequence[Any], sampling: Sampling) -> Any:
        assert engine.num_running == 0, "the budget bounds the memory of both"
        return Capitals.generate(engine, asked, sampling)

    engine.generate = generate  # type: ignore[method-assign]
    with loop_of(engine) as loop, callers() as ask:
        waiting = [ask(loop, "held", sampling=BEAMS)]
        engine.holding.wait(PATIENCE_S)
        waiting += [ask(loop, "a a a"), ask(loop, "b", sampling=BEAMS), ask(loop, "c c")]
        engine.go_on.set()
        assert [answers(each) for each in waiting] == [["HELD"], ["A A A"], ["B"], ["C C"]]
    assert engine.batches == [["held"], ["b"]]


@pytest.mark.parametrize(
    ("fault", "outcome"), [("unbegun", Reason.ENGINE_ERROR), ("stuck x x", "STUCK X X")]
)
def test_what_was_in_a_step_that_failed_is_asked_again_as_a_batch(fault: str, outcome: str) -> None:
    engine = StepByStep(max_rows=2)
    with loop_of(engine) as loop, callers() as ask:
        first = ask(loop, "held", sampling=BEAMS)
        engine.holding.wait(PATIENCE_S)
        others = [ask(loop, "a a a a", fault), ask(loop, "c c", "d")]
        engine.go_on.set()
        assert [answers(each) for each in (first, *others)] == [
            ["HELD"],
            ["A A A A", outcome],
            ["C C", "D"],
        ]
        assert answers(ask(loop, "e")) == ["E"]
    assert engine.steps[-1] == ["e"], "it steps again"


def test_without_memory_for_another_one_it_goes_on_with_those_under_way() -> None:
    engine = StepByStep()
    begin = engine.begin

    def begin_two(waiting: Sequence[Any]) -> list[int]:
        if engine.num_running:
            raise OutOfMemoryError("no room")
        return begin(waiting[:2])

    engine.begin = begin_two  # type: ignore[method-assign]
    with loop_of(engine) as loop:
        assert spoken(loop.complete(requests("a a", "b", "c"), GREEDY)) == ["A A", "B", "C"]
    assert engine.batches == [], "none was asked again"
    assert engine.steps == [["a a", "b"], ["a a"], ["c"]]


def test_one_that_cannot_begin_keeps_nobody_else_from_being_stepped() -> None:
    engine = StepByStep(max_rows=2)
    texts = ["a a a", "b b", "c", "unbegun", *"defgh"]
    with loop_of(engine) as loop:
        found = spoken(loop.complete(requests(*texts), GREEDY))
    assert found == ["A A A", "B B", "C", Reason.ENGINE_ERROR, *"DEFGH"]
    assert engine.batches == [["unbegun"]]


def test_after_one_for_which_there_was_no_memory_one_is_begun_at_a_time() -> None:
    engine = StepByStep()
    begin, tries = engine.begin, []

    def begin_in_three(waiting: Sequence[Any]) -> list[int]:
        tries.append((engine.num_running, len(waiting)))
        if engine.num_running + len(waiting) > 3:
            raise OutOfMemoryError("no room")
        return begin(waiting)

    engine.begin = begin_in_three  # type: ignore[method-assign]
    with loop_of(engine) as loop, callers() as ask:
        first = ask(loop, "held", sampling=BEAMS)
        engine.holding.wait(PATIENCE_S)
        others = [ask(loop, "a a a a", "b"), ask(loop, "c c", "d", "e", "f")]
        engine.go_on.set()
        found = [answers(each) for each in (first, *others)]
    assert found == [["HELD"], ["A A A A", "B"], ["C C", "D", "E", "F"]]
    assert engine.batches == [["held"]], "none was asked again"
    assert tries[0] == (0, 6)
    assert all(number == 1 for running, number in tries[1:] if running), tries


def test_of_very_many_the_engine_is_offered_the_first() -> None:
    engine = StepByStep()
    begin, sizes = engine.begin, []

    def noting(waiting: Sequence[Any]) -> list[int]:
        sizes.append(len(waiting))
        return begin(waiting)

    engine.begin = noting  # type: ignore[method-assign]
    texts = [f"a{i}" for i in range(600)]
    with loop_of(engine) as loop:
        assert spoken(loop.complete(requests(*texts), GREEDY)) == [t.upper() for t in texts]
    assert max(sizes) == MOST_OFFERED < 600


def test_an_engine_that_begins_with_a_group_at_a_time_is_filled_up() -> None:
    engine = StepByStep()
    begin, sizes = engine.begin, []

    def begin_one(waiting: Sequence[Any]) -> list[int]:
        sizes.append(len(waiting))
        return begin(waiting[:1])

    engine.begin = begin_one  # type: ignore[method-assign]
    with loop_of(engine) as loop:
        texts = ("a a a a", "b b b", "c c", "d", "e")
        assert spoken(loop.complete(requests(*texts), GREEDY)) == [t.upper() for t in texts]
    assert [len(step) for step in engine.steps] == [1, 2, 3, 3, 1, 1]
    assert sizes == [5, 4, 3, 2, 2, 1], "in vain it is asked once"


TEXTS = st.lists(st.lists(st.text("ab ", min_size=1, max_size=9), max_size=5), max_size=5)


@given(TEXTS, st.sampled_from([Capitals, StepByStep, Server]), st.none() | st.integers(1, 30))
def test_answers_do_not_depend_on_who_else_asks(
    asked: list[list[str]], kind: type[Capitals], budget: int | None
) -> None:
    engine = kind(max_batch_tokens=budget)
    with loop_of(engine) as loop, ThreadPoolExecutor(5) as threads:
        found = [threads.submit(loop.complete, requests(*texts), GREEDY) for texts in asked]
        alone = [complete(kind(), requests(*texts), GREEDY) for texts in asked]
        assert [answers(each) for each in found] == [spoken(rows) for rows in alone]


# --- Threads


def test_an_engine_is_loaded_called_and_closed_in_one_thread() -> None:
    engine = StepByStep()

    def load() -> Engine:
        engine.threads.add(threading.get_ident())
        return engine

    loop = EngineLoop(load)
    loop.complete(requests("a", "b"), GREEDY)
    loop.complete(requests("a"), BEAMS)
    assert loop.run(threading.get_ident) in engine.threads
    loop.close(drain=True)
    assert engine.closed
    assert len(engine.threads) == 1
    assert threading.get_ident() not in engine.threads


def test_an_engine_that_waits_for_a_server_is_called_by_its_callers() -> None:
    engine = Server()
    with loop_of(engine) as loop, callers() as ask:
        first = ask(loop, "held")
        engine.holding.wait(PATIENCE_S)
        assert spoken(loop.complete(requests("a"), GREEDY)) == ["A"]
        engine.go_on.set()
        assert answers(first) == ["HELD"]
        loop.close(drain=True)
    assert engine.closed
    assert len(engine.threads) == 3


def test_an_error_of_loading_is_the_callers() -> None:
    def load() -> Engine:
        raise ModelError("no such files")

    with pytest.raises(ModelError, match="no such files"):
        EngineLoop(load)


def test_an_error_of_something_else_is_its_callers() -> None:
    def fail() -> None:
        raise ModelError("no such view")

    with loop_of(Capitals()) as loop:
        with pytest.raises(ModelError, match="no such view"):
            loop.run(fail)
        assert spoken(loop.complete(requests("a"), GREEDY)) == ["A"]


# --- The end


def test_closing_wakes_all_who_wait_and_frees_the_engine_after_its_batch() -> None:
    engine = Capitals()
    loop = EngineLoop(lambda: engine)
    with callers() as ask:
        waiting = [ask(loop, "held")]
        engine.holding.wait(PATIENCE_S)
        waiting += [ask(loop, "a"), ask(loop, "b", sampling=BEAMS)]
        wait_until(lambda: loop.num_callers == len(waiting))
        loop.close()
        for each in waiting:
            with pytest.raises(RunError, match="closing"):
                each.result(PATIENCE_S)
        assert not engine.closed, "a batch is running"
        engine.go_on.set()
        wait_until(lambda: engine.closed)
        with pytest.raises(RunError, match="closing"):
            loop.complete(requests("a"), GREEDY)
        with pytest.raises(RunError, match="closing"):
            loop.run(lambda: None)
    assert engine.batches == [["held"]]


def test_closing_an_engine_that_waits_for_a_server_ends_its_calls() -> None:
    engine = Server()

    def close() -> None:
        engine.closed = True
        engine.go_on.set()  # nothing else ends the call

    engine.close = close  # type: ignore[method-assign]
    loop = EngineLoop(lambda: engine)
    with callers() as ask:
        first = ask(loop, "held")
        engine.holding.wait(PATIENCE_S)
        loop.close()
        wait_until(lambda: engine.closed)
        first.exception(PATIENCE_S)


@pytest.mark.parametrize("engine", [Capitals(), Server()], ids=["batches", "server"])
def test_draining_answers_who_waits(engine: Capitals) -> None:
    loop = EngineLoop(lambda: engine)
    with callers() as ask, ThreadPoolExecutor(1) as closer:
        waiting = [ask(loop, "held")]
        engine.holding.wait(PATIENCE_S)
        waiting.append(ask(loop, "a"))
        wait_until(lambda: loop.num_callers == 2 or waiting[1].done())
        closing = closer.submit(loop.close, drain=True)
        wait_until(lambda: loop.closed)
        engine.go_on.set()
        assert [answers(each) for each in waiting] == [["HELD"], ["A"]]
        closing.result(PATIENCE_S)
        assert engine.closed


def test_a_mistake_of_the_loop_itself_leaves_nobody_waiting(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = StepByStep()

    def drop() -> None:
        raise ZeroDivisionError

    engine.drop = drop  # type: ignore[method-assign]
    loop = EngineLoop(lambda: engine)
    with pytest.raises(RunError, match="broke: ZeroDivisionError"):
        loop.complete(requests("a", "stuck a a"), GREEDY)
    assert loop.closed
    wait_until(lambda: engine.closed)
    assert "the engine's loop broke" in caplog.text


# --- Seconds


@pytest.mark.parametrize("engine", [Capitals(), StepByStep()], ids=["batches", "steps"])
def test_whoever_asks_a_dead_engine_is_told_and_so_is_its_worker(
    engine: Capitals, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*arguments: object) -> None:
        raise EngineLostError("the card is gone")

    told: list[EngineLostError] = []
    loop = EngineLoop(lambda: engine, told.append)
    monkeypatch.setattr(engine, "step" if isinstance(engine, StepByStep) else "generate", die)
    with pytest.raises(RunError, match="the card is gone"):
        loop.complete(requests("one", "two"), Sampling(4))
    assert [str(error) for error in told] == ["the card is gone"]
    assert loop.closed


def test_an_errand_that_finds_the_engine_dead_ends_the_loop_too() -> None:
    def die() -> None:
        raise EngineLostError("the card is gone")

    told: list[EngineLostError] = []
    engine = Capitals()
    loop = EngineLoop(lambda: engine, told.append)
    with pytest.raises(EngineLostError, match="the card is gone"):
        loop.run(die)
    wait_until(lambda: engine.closed)
    assert [str(error) for error in told] == ["the card is gone"]
    assert loop.closed


def test_the_engine_is_idle_when_nobody_asks_and_that_is_told_once() -> None:
    engine = Capitals()
    with loop_of(engine) as loop, callers() as ask:
        assert loop.take_idle_s() > 0
        first = ask(loop, "held")
        engine.holding.wait(PATIENCE_S)
        assert loop.take_idle_s() > 0, "before it was asked"
        assert loop.take_idle_s() == 0.0, "it is busy"
        engine.go_on.set()
        answers(first)


def test_a_client_tokenizes_in_its_own_thread_and_knows_how_long_it_asked() -> None:
    engine = Capitals()
    with loop_of(engine) as loop:
        seen: list[int] = []

        def tokenize(request: Any) -> Any:
            seen.append(threading.get_ident())
            return Capitals.tokenize(engine, request)

        client = LoopClient(loop, engine, tokenize)
        assert client.asked_s == 0.0
        assert spoken(client.complete(requests("a", "b"), GREEDY)) == ["A", "B"]
        assert client.asked_s > 0.0
    assert seen == [threading.get_ident()] * 2
    assert list(chain(*engine.batches)) == ["a", "b"]
