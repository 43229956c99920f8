"""Every name of Dask, distributed and Bokeh that we use and that they do not promise to keep.

They may change in any release. Each stands here once, with what breaks without it, and
`tests/test_dask_compat*.py` ask each of them for what we need, so that `make newest` tells us
before our users do. Nothing large is imported before a function needs it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import dask
from distributed import Client, Worker

# Workers


def workers_of(client: Client) -> Mapping[str, Mapping[str, Any]]:
    """Ask the scheduler for its workers: address → what it knows of each (`name`, `status`, …).

    Not by `Client.scheduler_info`: that returns an attribute which the client's own periodic
    callback replaces by one without workers, and now and then it does so in between.

    Raises:
        OSError: the scheduler did not answer.
    """
    workers: Mapping[str, Mapping[str, Any]] = client.sync(client.scheduler.identity, n_workers=-1)[
        "workers"
    ]
    return workers


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

    Read from the events of the topic that the scheduler names after the worker, whose actions are
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


def hush_lost_heartbeats() -> None:
    """Have the worker in this process not log that a heartbeat has found no scheduler.

    Uses the text of a message of the logger `distributed.worker`. A worker whose cluster ends while
    it sends a heartbeat logs it with a traceback, which without this stands around our one line
    that says what was wrong. Of a scheduler that is really lost the client tells.
    """
    logging.getLogger("distributed.worker").addFilter(_is_no_lost_heartbeat)


def _is_no_lost_heartbeat(record: logging.LogRecord) -> bool:
    return record.msg != "Failed to communicate with scheduler during heartbeat."


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


# The scheduler's memory


def forget_collections(dask_scheduler: Any, tag: str, kept: int) -> int:
    """Shorten lists of submitted collections, on the scheduler; returns how many entries went.

    Args:
        tag: begins the names of the spans whose lists are shortened; all others are left alone.
        kept: so many last entries of a list stay.
    """
    extension = dask_scheduler.extensions.get("spans")
    forgotten = 0
    for span in extension.spans.values() if extension is not None else ():
        if not span.name[-1].startswith(tag):
            continue
        collections = (span.metadata or {}).get("collections", [])
        forgotten += max(0, len(collections) - kept)
        del collections[:-kept]
    return forgotten


# The dashboard


def call_scheduler(client: Any, name: str, timeout_s: float, **arguments: Any) -> Any:
    """Call what `add_remote_call` has added, from a thread of the client's process.

    Uses `Client.scheduler` (its attributes are remote calls) and `callback_timeout` of
    `Client.sync`. Without them no run reaches the dashboard.

    Raises:
        OSError: the scheduler cannot be reached.
        TimeoutError: it has not answered in time; it may have been called.
        Exception: what the call raised there.
    """
    call = getattr(client.scheduler, name)
    return client.sync(call, callback_timeout=timeout_s, **arguments)


def add_remote_call(scheduler: Any, name: str, function: Callable[..., Any]) -> None:
    """Let clients call a function on the scheduler; arguments are passed by their names.

    Uses `Scheduler.handlers`. Without it no run reaches the dashboard.
    """
    scheduler.handlers[name] = function


Page = Callable[[Any, Mapping[str, Any], Any], None]
"""Fills a document: called with the scheduler, `extra` for `use_dasks_template`, the document."""


def add_pages_to_new_schedulers(pages: Mapping[str, Page]) -> None:
    """Have each scheduler that this process starts from now on serve Bokeh pages as Dask's own.

    Uses `distributed.dashboard.scheduler.applications`. Without it the preload fails, and
    JupyterLab's Dask panel does not list the plots.

    Args:
        pages: by path; Dask lists those under `/individual-` as plots.
    """
    from distributed.dashboard.scheduler import applications

    applications.update(pages)


def add_pages(scheduler: Any, pages: Mapping[str, Page], listed: str, after: str) -> None:
    """Serve Bokeh pages beside those of a scheduler that runs, if it has a dashboard.

    Uses `Scheduler.http_application`, `DaskBokehTornado`, `BokehApplication` and
    `template_variables` of `distributed.dashboard`. Without them only schedulers with the preload
    have our page.

    Args:
        pages: by path; those under `/individual-` are listed as plots.
        listed: page, without the slash, that the navigation bar is to name.
        after: page of Dask's that stands before it there.
    """
    from distributed.dashboard.core import BokehApplication
    from distributed.dashboard.scheduler import template_variables
    from tornado.ioloop import IOLoop

    bokeh = _bokeh_of(scheduler)
    if bokeh is None:
        return
    variables = template_variables(scheduler)
    if listed not in variables["pages"]:
        variables["pages"].insert(variables["pages"].index(after) + 1, listed)
    if set(pages) <= set(bokeh.app_paths):
        return  # `add_pages_to_new_schedulers` came before the dashboard was started
    known = {plot["url"] for plot in variables["plots"]}
    urls = [path.strip("/") for path in pages if path.startswith("/individual-")]
    variables["plots"] += [
        {"url": url, "name": url.removeprefix("individual-").replace("-", " ").title()}
        for url in urls
        if url not in known
    ]
    variables["plots"].sort(key=lambda plot: plot["name"])
    added = BokehApplication(
        dict(pages), scheduler, prefix=bokeh.prefix, template_variables=variables
    )
    scheduler.http_application.add_application(added)
    added.initialize(IOLoop.current())
    added.start()


def add_url(scheduler: Any, path: str, handler: type, options: Mapping[str, Any]) -> None:
    """Have the scheduler's HTTP server answer a path with a Tornado handler.

    Uses `Scheduler.http_application` and the dashboard's `prefix`. Without them there is no
    `/agents.json`.

    Args:
        path: below the prefix of the dashboard, if it has one.
        options: arguments of the handler's `initialize`.
    """
    bokeh = _bokeh_of(scheduler)
    prefix = bokeh.prefix if bokeh is not None else ""
    scheduler.http_application.add_handlers(r".*$", [(prefix + path, handler, dict(options))])


def _bokeh_of(scheduler: Any) -> Any:
    """Return Dask's own Bokeh application on a scheduler, or None without a dashboard."""
    return next(iter(_bokehs_of(scheduler)), None)


def _bokehs_of(scheduler: Any) -> list[Any]:
    """Return the Bokeh applications of a scheduler's dashboard, Dask's own first."""
    from distributed.dashboard.core import DaskBokehTornado

    applications = scheduler.http_application.applications
    return [app for app in applications if isinstance(app, DaskBokehTornado)]


_ORIGINS = "distributed.scheduler.dashboard.bokeh-application.allow_websocket_origin"


def refuse_other_origins() -> dict[str, Any]:
    """Return configuration of Dask under which new dashboards send nothing to other sites' pages.

    Uses the key `allow_websocket_origin`, which holds for workers' dashboards too. Its default is
    any origin: without ours any web page in the user's browser reads a dashboard on loopback. A
    setting that is not the default stays.
    """
    return {_ORIGINS: []} if dask.config.get(_ORIGINS) == ["*"] else {}


def allow_origins(scheduler: Any, hosts: Iterable[str]) -> None:
    """Let pages under these hosts, with the port of the dashboard, open its websocket.

    Uses `BokehTornado._websocket_origins`: configuration would need the port before it is known.
    Without it an embedded cluster's pages stay empty, but under `localhost`.
    """
    port = scheduler.http_server.port
    for bokeh in _bokehs_of(scheduler):
        bokeh._websocket_origins |= {f"{host.lower()}:{port}" for host in hosts}


def allowed_origins(scheduler: Any) -> set[str]:
    """Return the origins whose pages may open a dashboard's websocket; `*` is any."""
    return {origin for bokeh in _bokehs_of(scheduler) for origin in bokeh.websocket_origins}


def use_dasks_theme(doc: Any) -> None:
    """Have a Bokeh document look as Dask's.

    Uses `BOKEH_THEME` of `distributed.dashboard.components.scheduler`. Without it a page or plot
    of ours is an error.
    """
    from distributed.dashboard.components.scheduler import BOKEH_THEME

    doc.theme = BOKEH_THEME


def use_dasks_template(doc: Any, extra: Mapping[str, Any]) -> None:
    """Put Dask's navigation bar above a Bokeh document.

    Uses the template `simple.html` of `distributed.dashboard.components.scheduler.env`. Without
    it our page is an error.

    Args:
        extra: what a page is called with.
    """
    from distributed.dashboard.components.scheduler import env

    doc.template = env.get_template("simple.html")
    doc.template_variables.update(extra)
