"""Every name of Dask, distributed and Bokeh that we use and that they do not document.

They may change in any release. Each stands here once, with what breaks without it, and
`tests/test_dask_compat.py` asks each of them for what we need, so that `make newest` tells us
before our users do. `pyproject.toml` bounds the versions that no test has seen.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

from distributed import Client, Worker


def restart_process(client: Client, address: str, timeout_s: float) -> None:
    """End a worker's process; its nanny, if it has one, starts another.

    Not by `Client.restart_workers`, which refuses workers without a nanny: the scheduler's own
    handler `restart_workers` only cuts such a worker off. Without it a worker that hangs keeps
    its partition for ever.
    """
    client.sync(
        client.scheduler.restart_workers,
        workers=[address],
        timeout=timeout_s,
        wait_for_workers=False,
        on_error="return",
        stimulus_id=f"mas-batch-restart-{time.time()}",
    )


def left_on_purpose(client: Client, address: str) -> bool:
    """Whether the scheduler took the worker off on purpose: retired, scaled down.

    Told by the events of the topic that the scheduler names after the worker, whose actions are
    not documented. Without it a worker that was scaled down is blamed for what it was at.
    """
    return any(_is_farewell(event) for _, event in client.get_events(address))


def _is_farewell(event: object) -> bool:
    match event:
        case {"action": "remove-worker", "expected": True} | {"action": "retired"}:
            return True
        case {"action": "worker-status-change", "status": "closing_gracefully" | "closing"}:
            return True  # the second is all that one sees of a worker that a SpecCluster ends
    return False


def add_handler(worker: Worker, name: str, handler: Callable[..., Awaitable[Any]]) -> None:
    """Let the worker be called by a name (`Server.handlers`); a pool's texts come that way."""
    worker.handlers[name] = handler


def remove_handler(worker: Worker, name: str) -> None:
    """Take a handler away, if it is there."""
    worker.handlers.pop(name, None)


async def call_worker(client: Client, address: str, name: str, **arguments: Any) -> Any:
    """Call a handler of a worker from the client's event loop (`Client.rpc`).

    Raises:
        OSError: the worker is dead or out of reach.
    """
    return await getattr(client.rpc(address), name)(**arguments)


async def call_worker_by_scheduler(
    client: Client, address: str, name: str, **arguments: Any
) -> Any:
    """Call a handler of a worker that only the scheduler can reach (its handler `proxy`).

    Raises:
        OSError: the worker is dead or out of reach.
    """
    return await client.scheduler.proxy(worker=address, msg={"op": name, **arguments})
