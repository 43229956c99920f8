"""The engine of `docs/extending.md` works from outside the package, as it stands there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from distributed import Client

import mas_batch
from mas_batch import pipeline
from mas_batch.errors import JobError, ModelError
from mas_batch.job import Job
from tests.extending import installed

MakeJob = Callable[..., Job]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the page's package is installed, for the time."""
    with installed(tmp_path / "site", monkeypatch):
        yield tmp_path / "site"


def lead_job(make_job: MakeJob, **agent: object) -> Job:
    agents = [{"name": "strong", "model": "lead:three", "options": {"words": 3}, **agent}]
    return make_job(agents=agents, routing={})


def test_an_engine_of_another_package_answers(
    site: Path, make_job: MakeJob, cluster_client: Client
) -> None:
    run = mas_batch.open_run(pipeline.run(lead_job(make_job), client=cluster_client).run)
    assert set(run.pandas()["answer"]) == {f"text number {i}" for i in range(20)}
    assert run.manifest["engines"]["strong"]["engine"] == "lead"


def test_its_name_is_allowed_where_it_is_installed(
    make_job: MakeJob, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(JobError, match=r"'lead:three' is not a model; allowed: echo\[:LABEL\]"):
        lead_job(make_job)
    request.getfixturevalue("site")
    assert lead_job(make_job, engine="lead").agents[0].engine == "lead"
    with pytest.raises(JobError, match=r"'led' is not allowed; allowed: auto, echo, .*, lead\b"):
        lead_job(make_job, engine="led")


def test_what_it_says_of_itself_is_heeded(site: Path, make_job: MakeJob) -> None:
    with pytest.raises(JobError, match="greedy answers would be the same answer"):
        lead_job(make_job, samples=2)
    (agent,) = lead_job(make_job).agents
    assert agent.engine_info is not None
    assert agent.engine_info.holds == "nothing"


def test_an_option_it_does_not_know_is_an_error(
    site: Path, make_job: MakeJob, cluster_client: Client
) -> None:
    job = lead_job(make_job, options={"word": 3})
    with pytest.raises((JobError, ModelError), match=r"options\.word: .*allows: words"):
        pipeline.run(job, client=cluster_client)


def test_a_package_that_cannot_be_imported_is_named(site: Path, make_job: MakeJob) -> None:
    (site / "lead.py").write_text("import nowhere_to_be_found")
    with pytest.raises(JobError, match="'lead' of the package 'titles' cannot be imported"):
        lead_job(make_job)
