"""The engine of `docs/extending.md` works from outside the package, as it stands there."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from distributed import Client

import mas_batch
from mas_batch import pipeline
from mas_batch.errors import JobError, ModelError
from mas_batch.job import Job
from mas_batch.registries import ENGINES

PAGE = (Path(__file__).parent.parent / "docs/extending.md").read_text()
SECTION = PAGE.partition("## An engine\n")[2].partition("\n## ")[0]
MakeJob = Callable[..., Job]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Install the page's package: its module, and the entry points of its metadata."""
    info = tmp_path / "site" / "lead-1.0.dist-info"
    info.mkdir(parents=True)
    (module,) = re.findall(r"```python\n(# lead\.py\n.*?)```", SECTION, re.DOTALL)
    (entry_points,) = re.findall(r"```ini\n(.*?)```", SECTION, re.DOTALL)
    (info.parent / "lead.py").write_text(module)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lead\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)
    monkeypatch.syspath_prepend(str(info.parent))
    _forget_other_packages()
    yield info.parent
    _forget_other_packages()
    sys.modules.pop("lead", None)


def _forget_other_packages() -> None:
    """Let the registry look for packages again, which it does once in a process."""
    vars(ENGINES).pop("_added", None)
    ENGINES._loaded.pop("lead", None)


def lead_job(make_job: MakeJob, **agent: object) -> Job:
    agents = [{"name": "strong", "model": "lead:three", "options": {"words": 3}, **agent}]
    return make_job(agents=agents, routing={})


def test_an_engine_of_another_package_answers(
    installed: Path, make_job: MakeJob, cluster_client: Client
) -> None:
    run = mas_batch.open_run(pipeline.run(lead_job(make_job), client=cluster_client).run)
    assert set(run.pandas()["answer"]) == {f"text number {i}" for i in range(20)}
    assert run.manifest["engines"]["strong"]["engine"] == "lead"


def test_its_name_is_allowed_where_it_is_installed(
    make_job: MakeJob, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(JobError, match=r"'lead:three' is not a model; allowed: echo\[:LABEL\]"):
        lead_job(make_job)
    request.getfixturevalue("installed")
    assert lead_job(make_job, engine="lead").agents[0].engine == "lead"
    with pytest.raises(JobError, match=r"'led' is not allowed; allowed: auto, echo, .*, lead\b"):
        lead_job(make_job, engine="led")


def test_what_it_says_of_itself_is_heeded(installed: Path, make_job: MakeJob) -> None:
    with pytest.raises(JobError, match="greedy answers would be the same answer"):
        lead_job(make_job, samples=2)
    (agent,) = lead_job(make_job).agents
    assert agent.engine_info is not None
    assert agent.engine_info.holds == "nothing"


def test_an_option_it_does_not_know_is_an_error(
    installed: Path, make_job: MakeJob, cluster_client: Client
) -> None:
    job = lead_job(make_job, options={"word": 3})
    with pytest.raises((JobError, ModelError), match=r"options\.word: .*allows: words"):
        pipeline.run(job, client=cluster_client)


def test_a_package_that_cannot_be_imported_is_named(installed: Path, make_job: MakeJob) -> None:
    (installed / "lead.py").write_text("import nowhere_to_be_found")
    with pytest.raises(JobError, match="'lead' of the package 'lead' cannot be imported"):
        lead_job(make_job)
