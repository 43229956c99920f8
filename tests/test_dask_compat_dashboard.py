"""The names of Dask and Bokeh that they do not promise to keep are there, and do what we need."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import dask
import pytest
from bokeh.document import Document
from bokeh.models import Div
from distributed import Client, SpecCluster
from tornado.web import RequestHandler

from mas_batch import dask_compat
from tests.clusters import cluster_of
from tests.origins import ACCEPTED, REFUSED, handshake
from tests.waiting import PATIENCE_S


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with cluster_of({}, dashboard=True) as cluster, Client(cluster) as client:
        yield client


def fetch(cluster: SpecCluster, path: str) -> str:
    url = f"http://127.0.0.1:{cluster.scheduler.http_server.port}/{path}"
    with urllib.request.urlopen(url, timeout=PATIENCE_S) as reply:
        return str(reply.read().decode())


def page(scheduler: Any, extra: Mapping[str, Any], doc: Any) -> None:
    dask_compat.use_dasks_template(doc, extra)
    dask_compat.use_dasks_theme(doc)
    doc.add_root(Div(text="ours"))


def test_a_client_calls_a_function_that_was_added_to_the_scheduler(client: Client) -> None:
    def divide(upper: int, lower: int) -> float:
        return upper / lower

    def add(dask_scheduler: Any) -> None:
        dask_compat.add_remote_call(dask_scheduler, "divide", divide)

    client.run_on_scheduler(add)
    assert dask_compat.call_scheduler(client, "divide", 10, upper=6, lower=3) == 2
    with pytest.raises(ZeroDivisionError):
        dask_compat.call_scheduler(client, "divide", 10, upper=6, lower=0)


def test_a_call_that_is_not_answered_in_time_ends(client: Client) -> None:
    def add(dask_scheduler: Any) -> None:
        dask_compat.add_remote_call(dask_scheduler, "never", asyncio.Event().wait)

    client.run_on_scheduler(add)
    with pytest.raises(TimeoutError):
        dask_compat.call_scheduler(client, "never", 0.1)


def test_pages_are_added_to_a_scheduler_that_runs_and_stand_in_its_lists(client: Client) -> None:
    pages = {"/ours": page, "/individual-our-plot": page}

    async def add(dask_scheduler: Any) -> None:
        dask_compat.add_pages(dask_scheduler, pages, listed="ours", after="workers")

    client.run_on_scheduler(add)
    for path in ("ours", "individual-our-plot", "workers"):
        shown = fetch(client.cluster, path)
        assert "bokeh" in shown
        assert shown.index('href="workers"') < shown.index('href="ours"')
        assert "Our Plot" in shown


def test_pages_are_among_dasks_own_on_a_scheduler_that_starts_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from distributed.dashboard import scheduler

    monkeypatch.setattr(scheduler, "applications", dict(scheduler.applications))
    dask_compat.add_pages_to_new_schedulers({"/individual-our-early-plot": page})
    with cluster_of({}, dashboard=True) as cluster:
        assert "bokeh" in fetch(cluster, "individual-our-early-plot")
        plots = json.loads(fetch(cluster, "individual-plots.json"))
    assert plots["Individual Our Early Plot"] == "/individual-our-early-plot"


class Hello(RequestHandler):
    def initialize(self, name: str) -> None:
        self._name = name

    def get(self) -> None:
        self.write(f"hello {self._name}")


def test_a_dashboard_sends_nothing_to_pages_of_other_origins() -> None:
    with (
        dask.config.set(dask_compat.refuse_other_origins()),
        cluster_of({}, dashboard=True) as cluster,
        Client(cluster) as client,
    ):
        scheduler = cluster.scheduler
        dask_compat.allow_origins(scheduler, ["127.0.0.1", "[::1]", "Machine"])
        port = scheduler.http_server.port
        hosts = ("localhost", "127.0.0.1", "[::1]", "machine")
        assert dask_compat.allowed_origins(scheduler) == {f"{host}:{port}" for host in hosts}
        ask = partial(handshake, client, f"http://127.0.0.1:{port}", "status")
        assert all(ask(f"http://{host}:{port}") == ACCEPTED for host in hosts)
        assert ask("http://evil.example") == REFUSED
        assert ask(f"http://127.0.0.1:{port + 1}") == REFUSED


def test_dasks_own_setting_of_origins_is_seen_and_one_of_the_users_stays(client: Client) -> None:
    scheduler = client.cluster.scheduler
    assert dask_compat.allowed_origins(scheduler) == {"*"}
    base = f"http://127.0.0.1:{scheduler.http_server.port}"
    assert handshake(client, base, "status", "http://evil.example") == ACCEPTED
    with dask.config.set({dask_compat._ORIGINS: ["hub.example:443"]}):
        assert dask_compat.refuse_other_origins() == {}


def test_a_url_is_added_to_a_scheduler_that_runs(client: Client) -> None:
    async def add(dask_scheduler: Any) -> None:
        dask_compat.add_url(dask_scheduler, "/hello", Hello, {"name": "you"})

    client.run_on_scheduler(add)
    assert fetch(client.cluster, "hello") == "hello you"


def test_a_url_is_added_to_a_scheduler_without_a_dashboard_too() -> None:
    with cluster_of({}, dashboard=False) as cluster, Client(cluster) as client:

        async def add(dask_scheduler: Any) -> None:
            dask_compat.add_url(dask_scheduler, "/hello", Hello, {"name": "you"})
            dask_compat.add_pages(dask_scheduler, {"/ours": page}, listed="ours", after="workers")

        client.run_on_scheduler(add)
        assert fetch(cluster, "hello") == "hello you"


def test_a_document_has_dasks_template_and_theme() -> None:
    doc, plain = Document(), Document()
    page(None, {"prefix": "/"}, doc)
    assert doc.template.name == "simple.html"
    assert doc.template_variables["prefix"] == "/"
    assert doc.theme is not plain.theme
