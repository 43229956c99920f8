"""A reduction as a tree of Dask tasks: partials meet `split_every` at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from distributed import Client, Future, as_completed

from mas_batch.aggregate.reductions import Reduction

SPLIT_EVERY = 8


def tree_reduce(
    client: Client,
    leaf: Callable[..., Any],
    groups: Iterable[tuple[Any, ...]],
    reduction: Reduction,
    *,
    split_every: int = SPLIT_EVERY,
    max_in_flight: int = 64,
) -> Any:
    """Run `leaf(*group)` for every group and combine the partials up a tree.

    Partials are combined as they become ready, in whatever order: the reduction must be
    associative and commutative, and then the result does not depend on it. At most
    `max_in_flight` leaves are in the scheduler at a time, so memory stays flat. Returns the
    combined partial (None when there are no groups).
    """
    if split_every < 2:
        raise ValueError(f"split_every must be at least 2, got {split_every}")
    levels: list[list[Future]] = [[]]
    running = as_completed([])
    in_flight = 0
    for group in groups:
        running.add(client.submit(leaf, *group, key=None, pure=False, priority=5))
        in_flight += 1
        if in_flight >= max_in_flight:
            _add(client, levels, next(running), reduction, split_every)
            in_flight -= 1
    for future in running:
        _add(client, levels, future, reduction, split_every)
    rest = [future for level in levels for future in level]
    if not rest:
        return None
    partial = rest[0] if len(rest) == 1 else _combine(client, reduction, rest)
    return partial.result()


def _add(
    client: Client,
    levels: list[list[Future]],
    future: Future,
    reduction: Reduction,
    split_every: int,
) -> None:
    """Put a partial on the lowest level; a full level becomes one partial of the next."""
    for level in levels:
        level.append(future)
        if len(level) < split_every:
            return
        future = _combine(client, reduction, level)
        level.clear()
    levels.append([future])


def _combine(client: Client, reduction: Reduction, partials: list[Future]) -> Future:
    return client.submit(combine_partials, reduction, partials, pure=False, priority=6)


def combine_partials(reduction: Reduction, partials: list[Any]) -> Any:
    """Combine partials on a worker (named for the dashboard)."""
    return reduction.combine(partials)
