"""The end of a run, cut short before, between and after its two last steps."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributed import Client
from rich.console import Console

import mas_batch
from mas_batch import pipeline, show
from mas_batch.job import Job
from mas_batch.run_folder.lock import RunLock
from mas_batch.run_folder.names import FIRST_PASS, SECOND_PASS
from mas_batch.run_folder.read import Run
from mas_batch.run_folder.storage import Store
from mas_batch.stages import publishing
from tests.test_routing_run import contents

MakeJob = Callable[..., Job]
ROUTING = {"escalate": {"agent": "strong", "fraction": 0.5}}


class KilledError(Exception):
    pass


def kill(*arguments: Any) -> None:
    raise KilledError


@pytest.fixture
def job(make_job: MakeJob) -> Job:
    """A job whose merge is made in two passes."""
    return make_job(routing=ROUTING)


@pytest.fixture
def expected(make_job: MakeJob, cluster_client: Client) -> dict[str, bytes]:
    undisturbed = pipeline.run(make_job(routing=ROUTING, name="undisturbed"), client=cluster_client)
    return contents(mas_batch.open_run(undisturbed.run))


def folders(job: Job) -> tuple[Path, set[str]]:
    (run,) = Path(job.output.path).glob(f"{job.name}-*")
    return run, {FIRST_PASS, SECOND_PASS} & {path.name for path in run.iterdir()}


def killed_at(job: Job, client: Client, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(publishing, step, kill)
        with pytest.raises(KilledError):
            pipeline.run(job, client=client)


def test_killed_before_the_manifest_it_still_has_its_passes_and_goes_on(
    job: Job, cluster_client: Client, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_at(job, cluster_client, "write_manifest", monkeypatch)
    run, left = folders(job)
    assert left == {FIRST_PASS, SECOND_PASS}
    assert not (run / "manifest.json").exists()
    summary = pipeline.run(job, client=cluster_client)
    assert not summary.already_complete
    assert contents(mas_batch.open_run(summary.run)) == expected
    assert folders(job) == (run, set())


def test_killed_after_the_manifest_it_is_complete_and_the_next_submit_cleans_up(
    job: Job, cluster_client: Client, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_at(job, cluster_client, "remove_passes", monkeypatch)
    run, left = folders(job)
    assert left == {FIRST_PASS, SECOND_PASS}
    assert contents(mas_batch.open_run(str(run))) == expected
    out = Console(file=io.StringIO(), record=True, width=100)
    show.print_run(out, mas_batch.open_run(str(run)), 3)
    assert "strong" in out.export_text()
    summary = pipeline.run(job, client=cluster_client)
    assert summary.already_complete
    assert folders(job) == (run, set())


def test_killed_before_the_report_the_next_submit_writes_it(
    make_job: MakeJob, cluster_client: Client
) -> None:
    summary = pipeline.run(make_job(), client=cluster_client)
    report = Path(summary.run, "report.html")
    written = report.read_bytes()
    report.unlink()
    assert pipeline.run(make_job(), client=cluster_client).already_complete
    assert report.read_bytes() == written


def test_what_another_process_still_removes_is_left_to_it(
    job: Job,
    cluster_client: Client,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    killed_at(job, cluster_client, "remove_passes", monkeypatch)
    run, left = folders(job)
    with RunLock(Run(Store(str(run)), {}).store):
        assert pipeline.run(job, client=cluster_client).already_complete
    assert folders(job) == (run, left)
    assert "what was left is not removed" in caplog.text
