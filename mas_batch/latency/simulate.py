"""A run on a virtual clock: the project's own dispatcher, workers that only take time.

Deterministic: equal arguments give an equal result. The caller says what a task takes; this module
knows when each worker works, what it waits for, and what sharing a machine's cores costs.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count

from mas_batch.routing.dispatcher import Dispatcher
from mas_batch.routing.instructions import Ask, Instruction, Merge

_LOOK_S = 1.0
"""How often the router looks at its workers: until then it does not know that one is dead."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A host, from when to when it is there, and what it takes of the machine."""

    name: str
    agents: tuple[str, ...]
    """Those that it answers for."""
    load_s: float = 0.0
    """Of its model, on a machine that it has to itself."""
    cores: float = 0.0
    """Cores of the shared machine that it keeps busy at work; 0: its hardware is its own."""
    concurrent: int = 1
    """Partitions that it works on at once."""
    overlap: float = 0.0
    """Share of a task's time in which the engine can work for others: 0 where they only share the
    engine's time, 1 where each takes as long as if it were alone."""
    batched: float = 0.0
    """Share of a task's time that all it works on at once take once: an engine's batch has it
    whoever is in it."""
    joins_s: float = 0.0
    dies_s: float = float("inf")


@dataclass(frozen=True, slots=True)
class Costs:
    """What a run's tasks take, in seconds on a machine that each has to itself."""

    answer_s: Callable[[Worker, Ask, float], float]
    """(host, question, share of the partition's records that are asked about) → seconds."""
    merge_s: Callable[[int], float]
    """Partition → seconds."""
    handle_s: float = 0.0
    """Of the submitting process and the scheduler, per piece of news and what follows from it."""
    send_s: float = 0.0
    """Until a task that was sent begins, if its worker is free."""
    merge_cores: float = 0.0
    """Cores of the shared machine that a merge keeps busy."""
    num_cores: float = float("inf")
    """Of the shared machine."""


@dataclass(slots=True)
class _Work:
    """Work that a clock has been given."""

    cores: float
    event: Callable[[], None]
    began: float
    """On the clock's count of work done."""
    is_over: bool = False

    def end(self) -> None:
        if not self.is_over:
            self.is_over = True
            self.event()


@dataclass(slots=True)
class _AtHost:
    """What a worker works on, and what waits there; all it works on gets the same share of it."""

    worker: Worker
    waiting: deque[Ask] = field(default_factory=deque)
    begun: list[tuple[float, int, Ask]] = field(default_factory=list)
    """Heap by the `done` at which each is done."""
    done: float = 0.0
    """Seconds of work that a task begun at 0 has been able to do."""
    work: _Work | None = None
    """Until the first of them is done, if nothing else begins before."""
    since: float = 0.0
    """Until when its time at work is counted."""

    @property
    def speed(self) -> float:
        """Of each of the tasks, if one alone has 1."""
        batched, each = self.worker.batched, 1.0 - self.worker.overlap - self.worker.batched
        return 1.0 / max(1.0, batched + each * len(self.begun))


class Clock:
    """Two queues of events: at a time, and when work is done whose speed depends on other work.

    All that is at work on the shared machine gets the same share of it: with more cores wanted than
    there are, everything takes as much longer (processor sharing).
    """

    def __init__(self, num_cores: float) -> None:
        self.now = 0.0
        self._num_cores = num_cores
        self._wanted = 0.0
        self._done = 0.0  # seconds of work that a task at work since the start has been able to do
        self._timed: list[tuple[float, int, Callable[[], None]]] = []
        self._working: list[tuple[float, int, _Work]] = []
        self._tie = count()
        self._num_working = 0

    def at(self, when_s: float, event: Callable[[], None]) -> None:
        """Call at a time that is not past."""
        heapq.heappush(self._timed, (when_s, next(self._tie), event))

    def work(self, work_s: float, cores: float, event: Callable[[], None]) -> _Work:
        """Call when the work is done that begins now."""
        work = _Work(cores, event, self._progress(cores))
        if cores == 0:
            self.at(self.now + work_s, work.end)
        else:
            heapq.heappush(self._working, (self._done + work_s, next(self._tie), work))
            self._num_working += 1
            self._wanted += cores
        return work

    def cancel(self, work: _Work) -> float:
        """Stop the work, and do not call; returns how many seconds of it are done."""
        work.is_over = True
        self._leave(work)
        return self._progress(work.cores) - work.began

    def step(self) -> None:
        """Go on to the next event and call it."""
        while self._working and self._working[0][2].is_over:
            heapq.heappop(self._working)
        due = self.now
        if self._working:
            due += max(0.0, self._working[0][0] - self._done) / self._speed
        if self._working and not (self._timed and self._timed[0][0] <= due):
            self._advance(due)
            self._done, _, work = heapq.heappop(self._working)
            self._leave(work)
            work.end()
        else:
            when_s, _, event = heapq.heappop(self._timed)
            self._advance(when_s)
            event()

    def _leave(self, work: _Work) -> None:
        if work.cores:
            self._num_working -= 1
            # Without this, sums of fractions would leave a trace of cores that no task wants.
            self._wanted = self._wanted - work.cores if self._num_working else 0.0

    def _progress(self, cores: float) -> float:
        return self._done if cores else self.now

    def _advance(self, now: float) -> None:
        self._done += (now - self.now) * self._speed
        self.now = now

    @property
    def num_events(self) -> int:
        """Events that are to come."""
        return len(self._timed) + self._num_working

    @property
    def _speed(self) -> float:
        return min(1.0, self._num_cores / self._wanted) if self._wanted else 1.0


@dataclass(slots=True)
class SimulationResult:
    """What came of a simulation; times are seconds after its start."""

    loaded_s: float = 0.0
    """When enough models were loaded to begin."""
    makespan_s: float = 0.0
    """When the last partition was merged."""
    busy_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Worker → seconds at work."""
    ended_s: dict[str, float] = field(default_factory=dict)
    """Worker → when it ended its last task."""
    handling_s: float = 0.0
    """The submitting process was busy for so long."""

    @property
    def asking_s(self) -> float:
        """Seconds from the first question to the last merge."""
        return self.makespan_s - self.loaded_s

    def followed_by(self, later: SimulationResult) -> SimulationResult:
        """Return both passes as one: all models are loaded, then one pass follows the other."""
        loaded_s = self.loaded_s + later.loaded_s
        shift_s = loaded_s + self.asking_s - later.loaded_s
        ended_s = {name: end + later.loaded_s for name, end in self.ended_s.items()}
        return SimulationResult(
            loaded_s=loaded_s,
            makespan_s=loaded_s + self.asking_s + later.asking_s,
            busy_s=defaultdict(float, self.busy_s | later.busy_s),
            ended_s=ended_s | {name: end + shift_s for name, end in later.ended_s.items()},
            handling_s=self.handling_s + later.handling_s,
        )


class Simulation:
    """Runs one dispatcher to its end.

    Args:
        dispatcher: fresh.
        workers: each of agents of the dispatcher's.
        undecided: (partition, answers per record so far) → share of its records that need
            another agent, of all its records; never more than the time before.
        may_start: given the agents that are served, whether asking may begin.
        on_merged: called with the time of every merge.
        look_s: how often the router looks at its workers.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        workers: Sequence[Worker],
        costs: Costs,
        *,
        samples: dict[str, int],
        undecided: Callable[[int, int], float] = lambda partition, num_answers: 0.0,
        may_start: Callable[[set[str]], bool] = lambda served: True,
        on_merged: Callable[[float], None] = lambda now: None,
        look_s: float = _LOOK_S,
    ) -> None:
        self.result = SimulationResult()
        self._dispatcher = dispatcher
        self._workers = {worker.name: worker for worker in workers}
        self._costs = costs
        self._samples = samples
        self._undecided = undecided
        self._may_start = may_start
        self._on_merged = on_merged
        self._look_s = look_s
        self._clock = Clock(costs.num_cores)
        self._hosts = {worker.name: _AtHost(worker) for worker in workers}
        self._tie = count()
        self._ready: list[Worker] = []
        self._gone: set[str] = set()
        self._open: dict[int, float] = {}  # partition → share of its records that is undecided
        self._has_started = False
        self._free_s = 0.0  # when the submitting process has handled what it has heard

    def run(self) -> SimulationResult:
        """Run to the last merge.

        Raises:
            RuntimeError: nothing can happen any more, and partitions are left.
        """
        for worker in self._workers.values():
            self._clock.at(worker.joins_s, partial(self._load, worker))
            if worker.dies_s != float("inf"):
                self._clock.at(worker.dies_s, partial(self._gone.add, worker.name))
                self._clock.at(worker.dies_s + self._look_s, partial(self._leave, worker))
        self._clock.at(self._look_s, self._look)
        num_idle = 0
        while not self._dispatcher.done:
            self._clock.step()
            num_idle = num_idle + 1 if self._clock.num_events == 1 else 0  # the next look
            if num_idle > 2:
                raise RuntimeError("partitions are left for an agent without workers")
        return self.result

    def _load(self, worker: Worker) -> None:
        self._clock.work(worker.load_s, worker.cores, partial(self._loaded, worker))

    def _loaded(self, worker: Worker) -> None:
        self._ready.append(worker)
        if self._has_started:
            self._hear(partial(self._join, worker))
        elif self._may_start({agent for ready in self._ready for agent in ready.agents}):
            self._has_started = True
            self.result.loaded_s = self._clock.now
            there = [w for w in self._workers.values() if w.joins_s <= self._clock.now]
            self._dispatcher.expect(Counter(agent for w in there for agent in w.agents))
            for ready in self._ready:
                self._hear(partial(self._join, ready))

    def _arrive(self, ask: Ask) -> None:
        host = self._hosts[ask.host_id]
        host.waiting.append(ask)
        self._begin_more(host)

    def _begin_more(self, host: _AtHost) -> None:
        """Let the host begin what it has room for; the others are slower from now on."""
        if not host.waiting or len(host.begun) >= host.worker.concurrent:
            return
        if host.work is not None:
            host.done += self._clock.cancel(host.work) * host.speed
        elif not host.begun:
            host.done, host.since = 0.0, self._clock.now
        while host.waiting and len(host.begun) < host.worker.concurrent:
            ask = host.waiting.popleft()
            share = self._open.get(ask.partition, 1.0) if ask.earlier else 1.0
            work_s = self._costs.answer_s(host.worker, ask, share)
            heapq.heappush(host.begun, (host.done + work_s, next(self._tie), ask))
        self._go_on(host)

    def _go_on(self, host: _AtHost) -> None:
        left_s = max(0.0, host.begun[0][0] - host.done) / host.speed
        host.work = self._clock.work(left_s, host.worker.cores, partial(self._end, host))

    def _end(self, host: _AtHost) -> None:
        name, now = host.worker.name, self._clock.now
        if name in self._gone:
            return
        self.result.busy_s[name] += now - host.since
        self.result.ended_s[name] = host.since = now
        host.work = None
        host.done, _, ask = heapq.heappop(host.begun)
        self._begin_more(host)
        if host.begun and host.work is None:
            self._go_on(host)
        self._hear(partial(self._answered, ask))

    def _hear(self, handle: Callable[[], list[Instruction]]) -> None:
        """Handle news when what was heard before is handled."""
        self._free_s = max(self._free_s, self._clock.now) + self._costs.handle_s
        self.result.handling_s += self._costs.handle_s
        self._clock.at(self._free_s, lambda: self._act(handle()))

    def _join(self, worker: Worker) -> list[Instruction]:
        return self._dispatcher.host_joined(
            worker.name, worker.agents, self._clock.now, concurrent=worker.concurrent
        )

    def _answered(self, ask: Ask) -> list[Instruction]:
        return self._dispatcher.answered(ask.partition, ask.agent_id, ask.host_id, self._clock.now)

    def _merged(self, merge: Merge) -> list[Instruction]:
        partition, now = merge.partition, self._clock.now
        if not merge.final:
            num_answers = sum(self._samples[agent_id] for agent_id in merge.agents)
            share = self._undecided(partition, num_answers)
            if share > 0:
                self._open[partition] = share
                # The dispatcher only needs to know that there are some.
                return self._dispatcher.undecided(partition, 1, now)
        self._open.pop(partition, None)
        self.result.makespan_s = now
        self._on_merged(now)
        return self._dispatcher.merged(partition, now)

    def _leave(self, worker: Worker) -> None:
        self._act(self._dispatcher.host_left(worker.name, self._clock.now))

    def _look(self) -> None:
        self._clock.at(self._clock.now + self._look_s, self._look)
        if self._has_started:
            self._act(self._dispatcher.tick(self._clock.now))

    def _act(self, instructions: list[Instruction]) -> None:
        sent_s = self._clock.now + self._costs.send_s
        for instruction in instructions:
            match instruction:
                case Ask():
                    self._clock.at(sent_s, partial(self._arrive, instruction))
                case Merge():
                    self._clock.at(sent_s, partial(self._merge, instruction))

    def _merge(self, merge: Merge) -> None:
        work_s = self._costs.merge_s(merge.partition)
        heard = partial(self._hear, partial(self._merged, merge))
        self._clock.work(work_s, self._costs.merge_cores, heard)
