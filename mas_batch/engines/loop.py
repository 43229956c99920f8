"""One thread in which an engine is called, and the requests of all who ask it.

Callers hand in requests and wait; the thread takes of all that waits what the engine is to do
next, so an engine never stands still while anyone waits. Three kinds of engine:

- one that runs batches: requests of several callers, of one engine view and one sampling, make
  one batch under the token budget; every batch holds a request of whoever came first;
- a `SteppingEngine`: a request that ends makes room for the next one, whoever asks it. What it
  cannot step (beams), and what was in a step that failed, is a batch again, when nothing is
  under way: the token budget bounds the memory of both together;
- a `threadsafe` one, which waits for a server: it is called in its callers' own threads.

One thread, because thread pools of BLAS and OpenMP belong to the thread that calls them: an
engine called from four threads would have four pools. It is loaded and closed there, too.
"""

from __future__ import annotations

import atexit
import copy
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any, TypeVar

from mas_batch.engines.base import (
    Completion,
    Engine,
    Request,
    Sampling,
    SteppingEngine,
    Waiting,
    tokenized_prompt,
)
from mas_batch.engines.batching import (
    answer_batch,
    complete,
    next_batch,
    prepare,
    rows_per_request,
)
from mas_batch.engines.claims import checked
from mas_batch.errors import (
    EngineLostError,
    EngineRefusedError,
    EngineUnavailableError,
    OutOfMemoryError,
    RunError,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

MOST_OFFERED = 256
"""Requests that a stepping engine chooses among: it looks at each before every step."""
_EXIT_PATIENCE_S = 30.0
"""How long a process that exits waits for a batch that is running."""


@dataclass(slots=True, eq=False)
class _Call:
    """The requests that one caller waits for."""

    engine: Engine
    sampling: Sampling
    num_left: int
    answers: dict[int, list[Completion]] = field(default_factory=dict)
    """By position in the caller's list."""
    future: Future[dict[int, list[Completion]]] = field(default_factory=Future)


@dataclass(slots=True, eq=False)
class _Item:
    """A request in the loop."""

    call: _Call
    position: int
    waiting: Waiting
    """Its key is its place in the order of arrival."""
    by_batch: bool = False
    """Whether it is asked by `generate`, not stepped."""


@dataclass(slots=True, eq=False)
class _Errand:
    """Something else to do in the loop's thread."""

    function: Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)


class EngineLoop:
    """Owns one thread, and in it an engine. Its methods may be called from any thread.

    Args:
        load: loads the engine, in the loop's thread; what it raises, the constructor raises.
        lost: called in that thread when the engine is dead, and its process of no use.
    """

    def __init__(
        self, load: Callable[[], Engine], lost: Callable[[EngineLostError], None] | None = None
    ) -> None:
        self._lost = lost
        self._changed = threading.Condition()
        self._open: set[Future[Any]] = set()  # what callers wait for
        self.num_callers = 0
        """Who wait for something now."""
        self._closed = False
        self._idle_s = 0.0
        self._idle_since = 0.0
        self._inbox: queue.SimpleQueue[list[_Item] | _Errand | None] = queue.SimpleQueue()
        self._keys = count()
        # The thread's own:
        self._pending: list[_Item] = []  # in order of arrival
        self._under_way: dict[int, _Item] = {}  # stepped, by key
        self._may_begin = True
        self._num_offered = MOST_OFFERED
        self._short_of_memory = False  # since a `begin`, until nothing is under way
        loaded: Future[Engine] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(load, loaded), daemon=True, name="mas-batch-engine"
        )
        self._thread.start()
        self.engine = loaded.result()
        self._stepping = self.engine if isinstance(self.engine, SteppingEngine) else None
        self._idle_since = time.perf_counter()
        # Daemonic, as nobody may have closed it; but no thread may be cut off inside a library.
        atexit.register(self._close_at_exit)

    # The callers' side

    def complete(
        self, requests: Sequence[Request], sampling: Sampling, engine: Engine | None = None
    ) -> list[list[Completion]]:
        """Answer every request; blocks. See `EngineClient.complete`.

        Args:
            engine: a view of the loop's engine; None: the engine itself.
        """
        engine = engine if engine is not None else self.engine
        prepared = prepare(engine, requests, sampling)
        positions = prepared.fitting
        if not positions:
            return prepared.with_answers({})
        if _is_threadsafe(engine):
            with self._caller():
                return complete(engine, prepared.requests, sampling)
        call = _Call(engine, sampling, len(positions))
        items = [
            _Item(call, i, Waiting(next(self._keys), prepared.requests[i], sampling))
            for i in positions
        ]
        with self._caller(call.future, items):
            return prepared.with_answers(call.future.result())

    def run(self, function: Callable[[], T]) -> T:
        """Call a function in the loop's thread, after what the engine is doing; blocks.

        Raises:
            RunError: the loop is closed.
            Exception: what the function raises.
        """
        errand = _Errand(function)
        with self._caller(errand.future, errand):
            result: T = errand.future.result()
            return result

    @property
    def closed(self) -> bool:
        """Whether it takes no further requests."""
        return self._closed

    @property
    def joins(self) -> bool:
        """Whether what comes is taken up while the engine works on something else."""
        return self._stepping is not None or _is_threadsafe(self.engine)

    def take_idle_s(self) -> float:
        """Return for how many seconds nobody has asked anything, since this was called last."""
        with self._changed:
            if self.num_callers == 0:
                self._pause_idle(time.perf_counter())
            idle_s, self._idle_s = self._idle_s, 0.0
            return idle_s

    def close(self, *, drain: bool = False) -> None:
        """Take no further requests, and free the engine after what it is doing.

        Args:
            drain: answer those who wait, and return when the engine is freed. Otherwise whoever
                waits gets a `RunError`, or what a threadsafe engine makes of calls that its
                `close` ends, and this returns at once.
        """
        with self._changed:
            self._closed = True
            if drain:
                self._changed.wait_for(lambda: self.num_callers == 0)
        self._end(RunError("the worker is closing its model"))
        self._inbox.put(None)
        if drain:
            self._thread.join()

    @contextmanager
    def _caller(
        self, future: Future[Any] | None = None, news: list[_Item] | _Errand | None = None
    ) -> Iterator[None]:
        """Count a caller: the engine is idle when there is none, and is freed after the last.

        Args:
            future: what the caller waits for: `news` is put to the thread, and settles it.
        """
        with self._changed:
            if self._closed:
                raise RunError("the worker is closing its model")
            if self.num_callers == 0:
                self._pause_idle(time.perf_counter())
            self.num_callers += 1
            if future is not None:
                self._open.add(future)
                self._inbox.put(news)
        try:
            yield
        finally:
            with self._changed:
                self.num_callers -= 1
                self._idle_since = time.perf_counter()
                self._changed.notify_all()

    def _pause_idle(self, now: float) -> None:
        self._idle_s += now - self._idle_since
        self._idle_since = now

    def _close_at_exit(self) -> None:
        self.close()
        self._thread.join(_EXIT_PATIENCE_S)

    # The thread's side

    def _run(self, load: Callable[[], Engine], loaded: Future[Engine]) -> None:
        try:
            engine = load()
        except BaseException as error:
            loaded.set_exception(error)
            return
        loaded.set_result(engine)
        try:
            while self._take_in():
                self._turn()
        except BaseException as error:  # our own mistake: no caller may wait for ever
            logger.exception("the engine's loop broke")
            if self._lost is not None and isinstance(error, EngineLostError):
                self._lost(error)
            with self._changed:
                self._closed = True
            self._end(RunError(f"the engine's loop broke: {type(error).__name__}: {error}"))
        if not _is_threadsafe(engine):  # closing one ends the calls that others are in
            with self._changed:
                self._changed.wait_for(lambda: self.num_callers == 0)
        engine.close()
        atexit.unregister(self._close_at_exit)

    def _take_in(self) -> bool:
        """Take what has come, waiting for it if there is nothing to do; False: it is the end."""
        busy = bool(self._pending or self._under_way)
        while True:
            try:
                news = self._inbox.get(block=not busy)
            except queue.Empty:
                return True
            if news is None:
                return False
            if isinstance(news, _Errand):
                self._do(news)
                continue
            call = news[0].call
            by_batch = not self._can_step(call.engine, call.sampling)
            for item in news:
                item.by_batch = by_batch
            self._pending += news
            busy = self._may_begin = True

    def _do(self, errand: _Errand) -> None:
        try:
            self._settle(errand.future, errand.function())
        except BaseException as error:
            self._settle(errand.future, error=error)
            if isinstance(error, EngineLostError):
                raise

    def _turn(self) -> None:
        """Have the engine do one thing: a step, or a batch."""
        by_batch = bool(self._pending) and self._pending[0].by_batch
        if self._stepping is None or (by_batch and not self._under_way):
            self._run_batch()
            return
        if self._pending and not by_batch and self._may_begin:
            self._begin(self._stepping)
        if self._under_way:
            self._step(self._stepping)

    def _can_step(self, engine: Engine, sampling: Sampling) -> bool:
        return engine is self._stepping and self._stepping.can_step(sampling)

    def _begin(self, engine: SteppingEngine) -> None:
        """Begin with what there is room for.

        Which of those offered the engine has failed on is not known. So after a failure one is
        offered, and twice as many each time that it begins: the culprit fails alone in the end.
        """
        stepped = (item for item in self._pending if not item.by_batch)
        offered = list(islice(stepped, self._num_offered))
        try:
            begun = [offered[i] for i in engine.begin([item.waiting for item in offered])]
        except EngineLostError:
            raise
        except Exception as error:
            no_memory = isinstance(error, (OutOfMemoryError, MemoryError))
            self._short_of_memory |= no_memory
            if isinstance(error, (EngineRefusedError, EngineUnavailableError)):
                self._fail(offered, error)
            elif len(offered) > 1:
                self._num_offered = 1
            elif no_memory and self._under_way:
                self._may_begin = False  # there will be room when others have ended
            else:
                self._short_of_memory &= bool(self._under_way)
                self._ask_by_batch(offered, error)
            return
        if not begun and not self._under_way:
            self._ask_by_batch(offered, RunError("the engine begins with nothing"))
            return
        self._may_begin = bool(begun)  # one that reads prompts in groups may have room for more
        if begun and not self._short_of_memory:
            self._num_offered = min(2 * self._num_offered, MOST_OFFERED)
        self._under_way.update({item.waiting.key: item for item in begun})
        self._pending = [item for item in self._pending if item.waiting.key not in self._under_way]

    def _step(self, engine: SteppingEngine) -> None:
        try:
            finished = engine.step()
        except EngineLostError:
            raise
        except Exception as error:
            items = list(self._under_way.values())
            self._under_way.clear()
            self._short_of_memory = False
            engine.drop()
            self._pending = sorted([*items, *self._pending], key=lambda item: item.waiting.key)
            self._ask_by_batch(items, error)
            self._may_begin = True
            return
        for each in finished:
            item = self._under_way.pop(each.key)
            self._answer(item, [checked(c, item.waiting.sampling) for c in each.completions])
        self._may_begin |= bool(finished)
        self._short_of_memory &= bool(self._under_way)

    def _ask_by_batch(self, items: Sequence[_Item], error: Exception) -> None:
        """Have `generate` find out which of these the engine has failed on."""
        if isinstance(error, (EngineRefusedError, EngineUnavailableError)):
            self._fail(items, error)
            return
        logger.info("%d requests are asked again: %s", len(items), error)
        for item in items:
            item.by_batch = True

    def _run_batch(self) -> None:
        first = self._pending[0].call
        group = [
            item
            for item in self._pending
            if item.by_batch
            and item.call.engine is first.engine
            and item.call.sampling == first.sampling
        ]
        chosen = next_batch(
            [tokenized_prompt(first.engine, item.waiting.request).num_tokens for item in group],
            [i for i, item in enumerate(group) if item.call is first],
            first.sampling.max_new_tokens,
            first.engine.max_batch_tokens,
            num_samples=rows_per_request(first.sampling),
        )
        batch = [group[i] for i in chosen]
        keys = {item.waiting.key for item in batch}
        self._pending = [item for item in self._pending if item.waiting.key not in keys]
        requests = [item.waiting.request for item in batch]
        try:
            rows = answer_batch(first.engine, requests, first.sampling)
        except (EngineRefusedError, EngineUnavailableError) as error:
            self._fail(batch, error)
            return
        for item, row in zip(batch, rows, strict=True):
            self._answer(item, row)
        self._may_begin = True

    def _answer(self, item: _Item, completions: list[Completion]) -> None:
        call = item.call
        call.answers[item.position] = completions
        call.num_left -= 1
        if call.num_left == 0:
            self._settle(call.future, call.answers)

    def _fail(self, items: Sequence[_Item], error: Exception) -> None:
        """End the calls that have requests among these."""
        calls = {item.call for item in items}
        self._pending = [item for item in self._pending if item.call not in calls]
        for call in calls:
            self._settle(call.future, error=_copy(error))

    def _end(self, error: Exception) -> None:
        """End all that anyone waits for."""
        with self._changed:
            for future in list(self._open):
                self._settle(future, error=_copy(error))

    def _settle(
        self, future: Future[Any], result: Any = None, *, error: BaseException | None = None
    ) -> None:
        """Wake the caller, unless it was woken: its call has failed, or the loop was closed."""
        with self._changed:
            if future not in self._open:
                return
            self._open.remove(future)
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)


def _is_threadsafe(engine: Engine) -> bool:
    return getattr(engine, "threadsafe", False)


def _copy(error: Exception) -> Exception:
    """Return an error of each caller's own: a traceback grows in every thread that raises it."""
    own = copy.copy(error)
    own.__cause__ = error
    return own
