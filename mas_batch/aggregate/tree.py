"""A reduction as a tree of Dask tasks: partials meet `split_every` at a time."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from distributed import Client, Future, KilledWorker

from mas_batch.aggregate.reductions import Reduction
from mas_batch.dask_compat import workers_of
from mas_batch.errors import MasBatchError, RunError, VersionError
from mas_batch.task_call import TaskCall

SPLIT_EVERY = 8

_LOOK_EVERY_S = 1.0
_LEAF_PRIORITY, _COMBINE_PRIORITY = 5, 6  # above the leaves: fewer partials wait in memory


def tree_reduce(
    client: Client,
    leaf: Callable[..., Any],
    groups: Iterable[tuple[Any, ...]],
    reduction: Reduction,
    *,
    wait_s: float,
    code: str = "",
    split_every: int = SPLIT_EVERY,
    max_in_flight: int = 64,
) -> Any:
    """Run `leaf(*group)` for every group and combine the partials up a tree.

    Partials are combined as they become ready, in whatever order: the reduction must be
    associative and commutative, and then the result does not depend on it. At most
    `max_in_flight` tasks are running or waiting at a time; `groups` is read as they end. A
    partial that is lost with its worker is computed again, by Dask. The scheduler remembers
    every task until the end, a few kB each: give it thousands of leaves, not millions.

    Args:
        wait_s: how long the cluster may be without any worker.
        code: that a worker must have to run a task, as `code_version` says it; empty: any.

    Returns:
        The combined partial; None when there are no groups.

    Raises:
        RunError: the scheduler was lost, no worker came for `wait_s`, or a task failed (an
            error of this package is raised as it is) or killed its workers, one after another.
        VersionError: every worker has other code.
    """
    if split_every < 2:
        raise ValueError(f"split_every must be at least 2, got {split_every}")
    tree = _Tree(client, reduction, split_every, wait_s, code)
    try:
        for group in groups:
            tree.start(_Step(0, _LEAF_PRIORITY, TaskCall(code, leaf, *group)))
            tree.work_off(max_in_flight - 1)
        tree.work_off(0)
        return tree.root()
    finally:
        tree.release()


def combine_partials(reduction: Reduction, partials: list[Any]) -> Any:
    """Combine partials on a worker (named for the dashboard)."""
    return reduction.combine(partials)


@dataclass(frozen=True, slots=True)
class _Step:
    """A task of the tree."""

    level: int
    """Of its partial."""
    priority: int
    call: TaskCall
    partials: tuple[list[Future], ...] = ()
    """What it combines."""


class _Tree:
    """What runs, and the partials that wait for their siblings: under `split_every` a level."""

    def __init__(
        self, client: Client, reduction: Reduction, split_every: int, wait_s: float, code: str
    ) -> None:
        self._client = client
        self._reduction = reduction
        self._split_every = split_every
        self._wait_s = wait_s
        self._code = code
        self._refused: set[str] = set()  # addresses of workers that have other code
        self._workers: list[str] | None = None  # addresses of the others; None: all
        self._running: dict[Future, _Step] = {}
        self._levels: list[list[Future]] = []
        self._ended: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self._last_worker = time.monotonic()

    def start(self, step: _Step) -> None:
        future = self._client.submit(
            step.call, *step.partials, workers=self._workers, pure=False, priority=step.priority
        )
        self._running[future] = step
        future.add_done_callback(self._ended.put)

    def work_off(self, most: int) -> None:
        """Take what ends until at most so many tasks run."""
        while len(self._running) > most:
            future = self._next_ended()
            level = self._running.pop(future).level
            while level >= len(self._levels):
                self._levels.append([])
            self._levels[level].append(future)
            if len(self._levels[level]) == self._split_every:
                self._combine(self._levels[level], level + 1)
                self._levels[level] = []

    def root(self) -> Any:
        """Combine what is left of every level, and bring the last partial here."""
        rest = [future for level in self._levels for future in level]
        if not rest:
            return None
        if len(rest) > 1:
            self._combine(rest, len(self._levels))
            rest = [self._next_ended()]
        return self._result(rest[0])

    def release(self) -> None:
        """Let go of everything; the scheduler cancels tasks that no client waits for."""
        for future in (*self._running, *(f for level in self._levels for f in level)):
            future.release()

    def _combine(self, partials: list[Future], level: int) -> None:
        call = TaskCall(self._code, combine_partials, self._reduction)
        self.start(_Step(level, _COMBINE_PRIORITY, call, (list(partials),)))

    def _next_ended(self) -> Future:
        while True:
            try:
                future = self._ended.get(timeout=_LOOK_EVERY_S)
            except queue.Empty:
                self._check_cluster()
                continue
            if future.status == "error" and isinstance(error := future.exception(), VersionError):
                self._start_elsewhere(self._running.pop(future), error)
                continue
            if future.status in ("error", "cancelled"):  # "lost": Dask is doing it again
                self._raise(future)
            self._last_worker = time.monotonic()
            return future

    def _start_elsewhere(self, step: _Step, error: VersionError) -> None:
        self._refused.add(error.address)
        with suppress(OSError):  # no news this time: the next refusal tells more
            self._workers = sorted(workers_of(self._client).keys() - self._refused)
        if not self._workers:
            raise error
        self.start(step)

    def _result(self, future: Future) -> Any:
        """Gather a partial; that of a worker which is just dying comes when it is done again."""
        while True:
            if future.status == "error":
                self._raise(future)
            try:
                return future.result(timeout=_LOOK_EVERY_S)
            except TimeoutError:
                self._check_cluster()

    def _raise(self, future: Future) -> None:
        self._check_cluster()
        error = future.exception() if future.status == "error" else None
        if isinstance(error, MasBatchError):
            raise error
        if isinstance(error, KilledWorker):
            what = f"a task killed the workers that it ran on; their logs may say why: {error}"
        elif error is None:
            what = f"a task was {future.status}"
        else:
            what = f"a task failed: {type(error).__name__}: {error}"
        raise RunError(f"{self._reduction.name}: {what}") from error

    def _check_cluster(self) -> None:
        if self._client.status != "running":
            raise RunError(
                f"the scheduler was lost while {self._reduction.name} was counted; "
                "what is answered is kept: run the same command again"
            )
        try:
            has_workers = bool(workers_of(self._client))
        except OSError:  # no news this time; a scheduler that is lost shows in the client's status
            return
        if has_workers:
            self._last_worker = time.monotonic()
        elif time.monotonic() - self._last_worker > self._wait_s:
            raise RunError(
                f"no worker for {self._wait_s:g} s to count {self._reduction.name}; "
                "what is answered is kept: start a worker and run the same command again"
            )
