"""Shared fixtures."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from functools import wraps
from importlib import import_module
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests import budget, grouping
from tests.grouping import pytest_collection_modifyitems  # noqa: F401

# Before Dask and torch are imported, and inherited by the processes that tests start.
# Workers are forked from a process that has imported Dask, which takes a third of the time of a
# run of some records; `make nightly` starts them as users do, each a new interpreter.
os.environ.setdefault("DASK_DISTRIBUTED__WORKER__MULTIPROCESSING_METHOD", "forkserver")
# OpenMP's threads spin while they wait for each other: beside another busy process a small model
# takes several times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# A machine that is busy is slow at drawing data too; that is not a test's failure.
_CALM = {"suppress_health_check": [HealthCheck.too_slow], "deadline": None}
settings.register_profile("ci", max_examples=30, **_CALM)
settings.register_profile("nightly", max_examples=300, **_CALM)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser: pytest.Parser) -> None:
    budget.add_option(parser)
    group = parser.getgroup("chaos", "tests that kill processes")
    group.addoption("--chaos-rounds", type=int, default=1, help="times that each fault happens")
    group.addoption("--chaos-seed", type=int, default=0, help="of the moments and the victims")


def pytest_configure(config: pytest.Config) -> None:
    budget.start(config)
    grouping.add_markers(config)


def pytest_sessionfinish(session: pytest.Session) -> None:
    budget.check(session)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "chaos_seed" in metafunc.fixturenames:
        seed, rounds = (metafunc.config.getoption(f"--chaos-{x}") for x in ("seed", "rounds"))
        metafunc.parametrize("chaos_seed", range(seed, seed + rounds))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    from tests.chaos import CHAOS, Outcome, as_table

    outcomes = [
        Outcome(**value)
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == CHAOS and report.when == "call"
    ]
    if outcomes:
        terminalreporter.section("chaos")
        terminalreporter.write_line(as_table(outcomes))
    budget.report(terminalreporter)


@pytest.fixture(scope="session")
def chaos_rounds(request: pytest.FixtureRequest) -> int:
    rounds: int = request.config.getoption("--chaos-rounds")
    return rounds


@pytest.fixture(scope="session")
def _s3_endpoint() -> Iterator[str]:
    server_module = pytest.importorskip("moto.server", reason="needs moto[server]")
    responses = import_module("moto.s3.responses").S3Response
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    with pytest.MonkeyPatch.context() as patch:
        # S3 decides on a conditional put in one step; moto's threads look first, then put.
        patch.setattr(responses, "put_object", _one_at_a_time(responses.put_object))
        server.start()
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
        server.stop()


def _one_at_a_time(call: Callable[..., Any]) -> Callable[..., Any]:
    lock = threading.Lock()

    @wraps(call)
    def locked(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return call(*args, **kwargs)

    return locked


@pytest.fixture
def s3_options(_s3_endpoint: str) -> dict[str, Any]:
    """Storage options of a real local S3-compatible server with an empty bucket `bucket`."""
    import s3fs

    options = {
        "key": "test",
        "secret": "test",
        "client_kwargs": {"endpoint_url": _s3_endpoint, "region_name": "eu-west-1"},
    }
    filesystem = s3fs.S3FileSystem(**options, skip_instance_cache=True)
    if filesystem.exists("bucket"):
        filesystem.rm("bucket", recursive=True)
    filesystem.mkdir("bucket")
    return options


@pytest.fixture(scope="module")
def cluster_client() -> Iterator[Any]:
    """A cluster in this process with unlike workers, as a user's own might be.

    One per module: its threads draw random numbers, which upsets Hypothesis in other modules.
    `strong` and `weak` can do every task; `spare` declares nothing that an agent needs.
    """
    from distributed import Client, Worker

    from tests.clusters import cluster_of

    tasks = dict.fromkeys(("summarize", "translate", "classify", "score", "reply"), 1.0)
    resources = {"strong-0": {**tasks, "strong": 1}, "weak-0": {**tasks, "weak": 1}, "spare": {}}
    workers = {
        name: {"cls": Worker, "options": {"name": name, "nthreads": 3, "resources": declared}}
        for name, declared in resources.items()
    }
    with cluster_of(workers) as cluster, Client(cluster) as client:
        client.wait_for_workers(len(workers))
        yield client


@pytest.fixture
def short_connect() -> Iterator[None]:
    """Dask tries for 30 s to reach a scheduler; a test that none answers need not."""
    import dask

    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        yield


@pytest.fixture
def browser_page() -> Iterator[Any]:
    """A window of a real headless browser, a `tests.browser.Page`."""
    from tests.browser import browser

    with browser() as page:
        yield page


@pytest.fixture
def make_job(tmp_path: Any) -> Any:
    """Build a job of two unlike echo agents on a small corpus; keywords replace sections."""
    import json

    from mas_batch.job_file import check_job

    def make(rows: list[dict[str, Any]] | None = None, **sections: Any) -> Any:
        corpus = tmp_path / "corpus.jsonl"
        if rows is not None or not corpus.exists():
            rows = rows or [
                {"id": f"r{i}", "text": f"text number {i} of the corpus"} for i in range(20)
            ]
            corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return check_job(
            {
                "name": "test",
                "corpus": {"path": str(corpus), "id": "id"},
                "task": {"kind": "summarize", "max_new_tokens": 8},
                "agents": [
                    {
                        "name": "strong",
                        "model": "echo:strong",
                        "capabilities": ["summarize", "strong"],
                    },
                    {
                        "name": "weak",
                        "model": "echo:weak",
                        "capabilities": ["summarize", "weak"],
                        "options": {"words": 2},
                    },
                ],
                "merge": {"method": "vote"},
                "partition": {"max_records": 3},
                "output": {"path": str(tmp_path / "runs")},
                "cluster": {"wait_s": 30},
                **sections,
            }
        )

    return make
