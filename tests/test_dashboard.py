"""The agents' page, JSON and metrics on real schedulers, fed by real runs."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from bokeh.util.token import generate_jwt_token, generate_session_id
from distributed import Client, Worker
from prometheus_client.parser import text_string_to_metric_families

from mas_batch import cluster, pipeline
from mas_batch.agents.spec import agent_specs
from mas_batch.errors import RunError
from mas_batch.events import Event, PartitionAnswered
from mas_batch.job import Job
from mas_batch.job_file import load_job
from mas_batch.monitor.dashboard.plugin import AgentsDashboard
from tests.clusters import cluster_of
from tests.recipes import write_job
from tests.waiting import PATIENCE_S

MakeJob = Callable[..., Job]

ALL = {"summarize": 1.0, "strong": 1.0, "weak": 1.0}
WORKERS = {
    f"{name}-0": {
        "cls": Worker,
        "options": {"name": f"{name}-0", "nthreads": 3, "resources": {"summarize": 1, name: 1}},
    }
    for name in ("strong", "weak")
}


@pytest.fixture
def dashboard() -> Iterator[tuple[Client, str]]:
    """A cluster with a dashboard, as a user's own; its client and its dashboard's URL."""
    with cluster_of(WORKERS, dashboard=True) as cluster, Client(cluster) as client:
        client.wait_for_workers(len(WORKERS))
        yield client, f"http://127.0.0.1:{cluster.scheduler.http_server.port}"


def slow_agents(seconds: float) -> list[dict[str, Any]]:
    options = {"seconds_per_batch": seconds}
    return [
        {"name": name, "model": f"echo:{name}", "capabilities": ["summarize", name],
         "options": options}
        for name in ("strong", "weak")
    ]  # fmt: skip


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=PATIENCE_S) as reply:
        return str(reply.read().decode())


def newest(base: str) -> dict[str, Any]:
    runs = json.loads(fetch(f"{base}/agents.json"))["runs"]
    return dict(runs[0]) if runs else {}


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.05)
    return value


class Background:
    """A run in a thread of its own."""

    def __init__(self, job: Job, client: Client) -> None:
        self.error: BaseException | None = None

        def run() -> None:
            try:
                pipeline.run(job, client=client)
            except BaseException as error:
                self.error = error

        self._thread = threading.Thread(target=run)

    def __enter__(self) -> Background:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._thread.join(120)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error


def test_a_run_feeds_a_scheduler_that_knew_nothing_of_us(
    dashboard: tuple[Client, str], make_job: MakeJob
) -> None:
    client, base = dashboard
    # Both come after the dashboard was started and its metrics were scraped.
    assert "mas_batch" not in fetch(f"{base}/metrics")
    pipeline.run(make_job(), client=client)
    run = newest(base)
    assert (run["status"], run["progress"], run["merged_records"]) == ("finished", 1.0, 20)
    assert run["partitions"] == {"waiting": 0, "answering": 0, "answered": 0, "merged": 7}
    agents = {agent["agent"]: agent for agent in run["agents"]}
    assert agents["strong"]["answers"] == agents["weak"]["answers"] == 20
    assert agents["strong"]["model"] == "echo:strong"
    assert agents["strong"]["capabilities"] == ["summarize", "strong"]
    assert agents["weak"]["asked"] == {"answer": 7}
    assert agents["weak"]["compared"] == 20
    assert {r["worker"]: (r["state"], r["answered"]) for r in run["hosts"]} == {
        "strong-0": ("released", 7),
        "weak-0": ("released", 7),
    }
    for page in ("agents", "individual-agent-latency"):
        assert "bokeh" in fetch(f"{base}/{page}")


def test_metrics_follow_prometheus_conventions_and_say_what_the_run_did(
    dashboard: tuple[Client, str], make_job: MakeJob
) -> None:
    client, base = dashboard
    rows = [{"id": f"r{i}", "text": f"text number {i}"} for i in range(9)] + [
        {"id": "bad", "text": ""}
    ]
    pipeline.run(make_job(rows), client=client)
    families = {
        family.name: family
        for family in text_string_to_metric_families(fetch(f"{base}/metrics"))
        if family.name.startswith("mas_batch_")
    }
    values = {
        (sample.name, *(v for k, v in sorted(sample.labels.items()) if k != "run")): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert values["mas_batch_run_progress_ratio",] == 1
    assert values["mas_batch_records_merged_total",] == 10
    assert values["mas_batch_records_failed_total", "empty"] == 1
    assert values["mas_batch_records_failed_total", "engine_error"] == 0
    assert values["mas_batch_answers_total", "strong"] == 9
    assert values["mas_batch_tokens_total", "strong", "completion"] > 0
    assert values["mas_batch_agent_seconds_total", "weak", "compute"] > 0
    assert values["mas_batch_run_status", "finished"] == 1
    assert values["mas_batch_partitions", "merged"] == 4
    assert values["mas_batch_hosts", "strong", "released"] == 1
    assert values["mas_batch_last_success_timestamp_seconds", "test"] > time.time() - 600
    labels = {name for f in families.values() for s in f.samples for name in s.labels}
    assert labels == {
        *("run", "agent", "post", "job_name"),  # as many as there are
        *("state", "status", "reason", "kind", "part", "purpose"),  # words of fixed lists
    }


def test_two_runs_at_once_and_a_failed_one(
    dashboard: tuple[Client, str], make_job: MakeJob, tmp_path: Path
) -> None:
    client, base = dashboard
    client.register_plugin(AgentsDashboard())  # else there is no such page for a moment
    first = make_job(agents=slow_agents(0.1))
    second = first.model_copy(update={"name": "other"})
    with Background(first, client), Background(second, client):
        both = wait_for(lambda: [r for r in runs(base) if r["status"] == "answering"])
        assert both
    assert {run["job"]: run["status"] for run in runs(base)} == {
        "test": "finished",
        "other": "finished",
    }
    broken = first.model_copy(update={"name": "broken"})

    def fail(event: Event) -> None:
        if isinstance(event, PartitionAnswered):
            raise RunError("no more of this")

    with pytest.raises(RunError):
        pipeline.run(broken, client=client, emit=fail)
    run = newest(base)
    assert (run["job"], run["status"]) == ("broken", "failed")
    assert run["message"] == "RunError: no more of this"


def runs(base: str) -> list[dict[str, Any]]:
    return list(json.loads(fetch(f"{base}/agents.json"))["runs"])


def test_the_page_lives_in_a_real_browser(
    dashboard: tuple[Client, str], make_job: MakeJob, browser_page: Any, tmp_path: Path
) -> None:
    client, base = dashboard
    rows = [{"id": f"r{i}", "text": f"text number {i}"} for i in range(60)]
    pipeline.run(make_job(), client=client)
    with Background(make_job(rows, agents=slow_agents(0.2)), client):
        wait_for(lambda: newest(base).get("status") == "answering")
        browser_page.open(f"{base}/agents")
        links = "[...document.querySelectorAll('.navbar a')].map(a => a.innerText)"
        assert {"Workers", "Agents"} <= set(browser_page.wait_for(links))
        # What is to be seen, not what the page has been sent: Bokeh 3.9 kept that to itself.
        browser_page.wait_for(f"{ROWS}.length == 4")
        first = browser_page.evaluate(ROWS)[0]
        assert first.startswith("strong\nsummarize, strong\necho:strong\necho\n1 busy\n")
        browser_page.wait_for(f"{ROWS}[0] != arguments[0]", first)
        browser_page.wait_for(f"/^weak-0\\nweak\\n. busy/.test({ROWS}[3])")
        merged = f"{SOURCES}.find(s => s.data.merged)?.data.merged"
        browser_page.wait_for(f"Array.from({merged} ?? []).at(-1) >= 20")
    browser_page.wait_for(f"{SUMMARY}.includes('finished')")
    for name in ("agents", "agent-partitions", "agent-routing", "agent-latency"):
        browser_page.open(f"{base}/individual-{name}")
        browser_page.wait_for("window.Bokeh && Bokeh.documents.length == 1")
    browser_page.open(f"{base}/workers")  # Dask's own pages are as they were
    browser_page.wait_for("window.Bokeh && Bokeh.documents.length == 1")
    assert browser_page.errors == []


def test_a_page_of_another_origin_gets_nothing_of_an_embedded_cluster(
    tmp_path: Path, browser_page: Any
) -> None:
    job = load_job(write_job(tmp_path), ["cluster.dashboard_address=127.0.0.1:0"])
    with cluster.connect(job, agent_specs(job, embedded=True, num_cores=2), "test") as connection:
        link = urlsplit(connection.client.dashboard_link)
        own, socket = f"{link.scheme}://{link.netloc}", f"ws://{link.netloc}/status/ws"
        token = generate_jwt_token(generate_session_id())  # anybody can make one
        browser_page.open(f"{own}/status")
        browser_page.wait_for("window.Bokeh && Bokeh.documents.length == 1")
        assert browser_page.wait_for(OPENED, socket, token) == "opened"
        assert browser_page.errors == []
        (tmp_path / "evil.html").write_text("<h1>another site</h1>")
        site = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
        with ThreadingHTTPServer(("127.0.0.1", 0), site) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            browser_page.open(f"http://127.0.0.1:{server.server_port}/evil.html")
            assert browser_page.wait_for(OPENED, socket, token) == "refused"
            server.shutdown()


OPENED = """(() => {
  if (!window.asked) {
    window.asked = new WebSocket(arguments[0], ["bokeh", arguments[1]])
    window.asked.onopen = () => { window.outcome = "opened" }
    window.asked.onerror = () => { window.outcome ??= "refused" }
  }
  return window.outcome
})()"""
"""Opens a websocket at the first call; in the end whether the server let this page's origin in."""

MODELS = "[...(window.Bokeh?.documents[0]?._all_models.values() ?? [])]"
SOURCES = f"{MODELS}.filter(m => m.type == 'ColumnDataSource')"
ROWS = """(() => {
  const rows = []
  const walk = (node) => {
    if (node.classList?.contains("slick-row")) rows.push(node.innerText)
    for (const child of [...(node.shadowRoot?.children ?? []), ...node.children]) walk(child)
  }
  walk(document.body)
  return rows
})()"""
"""The text of all rows of all tables, which are in shadow trees."""
SUMMARY = f"({MODELS}.find(m => m.type == 'Div')?.text ?? '')"


# Schedulers that will not have us


@contextmanager
def scheduler_process(folder: Path, preload: str) -> Iterator[str]:
    """A scheduler by `dask scheduler --preload`; yields the file that names its address."""
    file = folder / "scheduler.json"
    command = [
        *(sys.executable, "-m", "distributed.cli.dask_scheduler", "--scheduler-file", str(file)),
        *("--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0"),
        *("--preload", preload),
    ]
    with (folder / "scheduler.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for(file.exists)
        yield str(file)
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def test_a_scheduler_with_an_older_package_is_fed_nothing_and_the_run_goes_on(
    make_job: MakeJob, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    older = tmp_path / "older.py"
    older.write_text("import sys; sys.modules['mas_batch.monitor.dashboard'] = None")

    async def start(address: str) -> list[Worker]:
        return [await Worker(address, **each["options"]) for each in WORKERS.values()]

    async def stop(workers: list[Worker]) -> None:
        await asyncio.gather(*(worker.close() for worker in workers))

    with (
        scheduler_process(tmp_path, str(older)) as file,
        Client(scheduler_file=file, timeout=PATIENCE_S) as client,
        caplog.at_level(logging.DEBUG, logger="mas_batch.monitor.feed"),
    ):
        workers = client.sync(start, client.scheduler.address)
        summary = pipeline.run(make_job(), client=client)
        client.sync(stop, workers)
    assert summary.manifest["counts"]["results"] == 20
    (said,) = [r.message for r in caplog.records if r.name == "mas_batch.monitor.feed"]
    assert said.startswith("the scheduler shows no agents: ")
    assert "mas_batch.monitor.dashboard" in said


def test_a_scheduler_that_does_not_answer_for_a_while_is_told_later(
    dashboard: tuple[Client, str], make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mas_batch.monitor import feed
    from mas_batch.monitor.dashboard import plugin

    client, base = dashboard
    taken = plugin.AgentsDashboard.receive
    calls: list[bytes] = []

    def lose(self: Any, version: str, data: bytes) -> Any:
        finished = b'"stage":"finished"'
        last_words = finished in data and not any(finished in each for each in calls)
        calls.append(data)
        if len(calls) == 2:  # it has taken it, but does not answer
            return asyncio.sleep(2, taken(self, version, data))
        if len(calls) == 3 or last_words:
            return asyncio.sleep(2)
        return taken(self, version, data)

    monkeypatch.setattr(feed, "_CALL_S", 0.3)
    monkeypatch.setattr(feed, "EVERY_S", 0.1)
    monkeypatch.setattr(plugin.AgentsDashboard, "receive", lose)
    pipeline.run(make_job(agents=slow_agents(0.2)), client=client)
    run = newest(base)
    assert len(calls) > 4
    assert (run["status"], run["merged_records"]) == ("finished", 20)
    assert {agent["answers"] for agent in run["agents"]} == {20}


def test_a_scheduler_of_its_own_process_with_the_preload(tmp_path: Path) -> None:
    with (
        scheduler_process(tmp_path, "mas_batch.monitor.preload") as file,
        Client(scheduler_file=file, timeout=PATIENCE_S) as client,
    ):
        base = f"http://127.0.0.1:{client.scheduler_info()['services']['dashboard']}"
        assert json.loads(fetch(f"{base}/agents.json"))["runs"] == []
        assert "mas_batch_run_records" in fetch(f"{base}/metrics")
        plots = json.loads(fetch(f"{base}/individual-plots.json"))
        assert "/individual-agent-routing" in plots.values()
        assert 'href="agents"' in fetch(f"{base}/agents")
    assert "Traceback" not in (tmp_path / "scheduler.log").read_text()
