"""A run over an endpoint that is away for a while: waited for, nothing committed, nothing lost."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from distributed import Client

from mas_batch import open_run, pipeline
from mas_batch.errors import ExitCode, RunError
from mas_batch.events import AnswerFailed, PartitionAnswered, ServerAway
from mas_batch.job import Job
from tests.test_engine_openai import Server
from tests.test_run import Recorder

MakeJob = Callable[..., Job]


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=[0.01])
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def hosted(server: Server, **options: Any) -> dict[str, Any]:
    return {
        "name": "hosted",
        "model": "openai:m",
        "prompt": "{text}",
        "capabilities": ["summarize", "strong"],
        "options": {"base_url": server.url, "max_retries": 0, "concurrency": 2, **options},
    }


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probe soon: no test says how long a server is away."""
    monkeypatch.setattr("mas_batch.routing.dask._CHECK_EVERY_S", 0.05)
    monkeypatch.setattr("mas_batch.routing.host.Breaker.FIRST_S", 0.05)


LOCAL = {"name": "local", "model": "echo:local", "capabilities": ["summarize", "weak"]}


def test_a_run_waits_for_a_server_and_loses_nothing(
    cluster_client: Client, make_job: MakeJob, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    asked = 0

    def falls_twice(text: str) -> tuple[int, dict[str, str]] | None:
        nonlocal asked
        asked += 1
        if asked < 5 or 8 < asked < 12 or asked > 13:
            return None
        return [(503, {}), (0, {}), (429, {"Retry-After-Ms": "30"})][asked % 3]

    server.fault = falls_twice
    events = Recorder()
    job = make_job(agents=[hosted(server), LOCAL], partition={"max_records": 4})
    summary = pipeline.run(job, client=cluster_client, emit=events)
    assert [summary.manifest["counts"][k] for k in ("results", "failures")] == [20, 0]
    answers = open_run(summary.run).arrow("answers").to_pylist()
    assert [a for a in answers if a["reason"] is not None] == []
    assert len(answers) == 40
    away = events.of(ServerAway)
    assert {event.agent_id for event in away} == {"hosted"}
    assert all(server.url in event.message for event in away)
    assert events.of(AnswerFailed) == []
    assert "Traceback" not in caplog.text


def test_after_wait_s_the_run_ends_and_the_same_command_resumes_it(
    cluster_client: Client, make_job: MakeJob, server: Server
) -> None:
    asked = 0

    def falls(text: str) -> tuple[int, dict[str, str]] | None:
        nonlocal asked
        asked += 1
        return (503, {}) if asked > 6 else None

    server.fault = falls
    job = make_job(agents=[hosted(server, wait_s=0.0), LOCAL], partition={"max_records": 4})
    events = Recorder()
    with pytest.raises(RunError, match=r"'hosted' has waited .*503.*the same command") as caught:
        pipeline.run(job, client=cluster_client, emit=events)
    assert caught.value.exit_code == ExitCode.RUN_FAILED
    num_kept = sum(e.agent_id == "hosted" for e in events.of(PartitionAnswered))
    assert num_kept >= 1
    server.fault = lambda text: None
    events = Recorder()
    summary = pipeline.run(job, client=cluster_client, emit=events)
    assert [summary.manifest["counts"][k] for k in ("results", "failures")] == [20, 0]
    assert sum(e.agent_id == "hosted" for e in events.of(PartitionAnswered)) == 5 - num_kept
