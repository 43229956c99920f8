"""Options that an engine does not know, found before a cluster starts or a model is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mas_batch import cluster, pipeline
from mas_batch.cli import main
from mas_batch.engines.job_options import check_options
from mas_batch.errors import ExitCode, JobError
from mas_batch.job import Job
from mas_batch.registries import ENGINES
from tests.extending import installed
from tests.recipes import write_job

MakeJob = Callable[..., Job]


def job_of(make_job: MakeJob, model: str, options: dict[str, Any], engine: str = "auto") -> Job:
    agents = [{"name": "a", "model": model, "engine": engine, "options": options}]
    return make_job(agents=agents, routing={})


@pytest.mark.parametrize(
    ("engine", "model", "options", "words"),
    [
        ("auto", "echo", {"wrods": 2}, "wrods: unknown option; the engine echo allows: reply"),
        ("auto", "echo", {"words": 0}, "words: 0 is not allowed"),
        ("auto", "openai:m", {"base_urls": "http://x"}, "base_urls: unknown option; the engine op"),
        ("auto", "openai:m", {"base_url": "http://u:p@x"}, "base_url: is not allowed"),
        ("transformers", "org/m", {"beam": 2}, "beam: unknown option; the engine transformers"),
        ("marian", "org/m", {"beam": 2}, "beam: unknown option; the engine marian"),
        ("ctranslate2", "org/m", {"beam": 2}, "beam: unknown option; the engine ctranslate2"),
        ("nearest", "org/m", {"method": ["knn"]}, "method: ['knn'] is not allowed; allowed: knn"),
        ("nearest", "org/m", {"k": 3}, "examples: the engine nearest with method knn needs it"),
        ("auto", "bayes", {"examples": "x", "prior": "no"}, "prior: 'no' is not allowed"),
        ("auto", "keywords", {}, "labels: the engine keywords needs it"),
        ("auto", "overlap", {"minimum": 9.0, "maximum": 1.0}, "must be below maximum"),
    ],
)
def test_wrong_options_of_every_engine_are_named(
    make_job: MakeJob, engine: str, model: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(JobError) as caught:
        check_options(job_of(make_job, model, options, engine))
    assert (caught.value.key or "").startswith("agents.a.options")
    assert words in str(caught.value)


def test_every_built_in_engine_says_how_it_reads_options() -> None:
    assert all(engine.options for engine in ENGINES.values())


def test_of_the_engines_that_auto_may_be_one_has_to_know_the_options(
    make_job: MakeJob, tmp_path: Path
) -> None:
    check_options(job_of(make_job, "org/name", {"compute_type": "int8"}))
    with pytest.raises(JobError, match=r"beam: .*engine transformers .*; or .*engine marian"):
        check_options(job_of(make_job, "org/name", {"beam": 2}))
    (tmp_path / "model.bin").touch()
    with pytest.raises(JobError, match=r"reads: unknown option; the engine ctranslate2"):
        check_options(job_of(make_job, str(tmp_path), {"reads": "text"}))


def test_torch_and_transformers_are_not_imported() -> None:
    models = ["org/m", "pypi://a==1/b.gguf", "echo", "bayes", "keywords", "overlap"]
    code = f"""
import sys
from mas_batch.engines.job_options import _read
from mas_batch.job import Agent
from mas_batch.registries import ENGINES
for model in {models}:
    for engine in ("auto", *(name for name in ENGINES if name != "openai")):
        try:
            _read(Agent(name="a", model=model, engine=engine, options={{"x": 1}}))
        except Exception as error:
            assert "x: unknown" in str(error) or "needs it" in str(error), error
print([name for name in ("torch", "transformers", "ctranslate2", "openai") if name in sys.modules])
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"


def test_an_engine_of_another_package_may_say_how_it_reads_options(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with installed(tmp_path / "site", monkeypatch):
        with pytest.raises(JobError, match=r"a\.options\.word: .*the engine lead allows: words"):
            check_options(job_of(make_job, "lead", {"word": 3}))
        check_options(job_of(make_job, "lead", {"words": 3}))


@pytest.mark.parametrize("dry_run", [["--dry-run"], []], ids=["dry run", "run"])
def test_they_are_exit_2_without_a_cluster_and_without_a_run(
    tmp_path: Path, dry_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "connect", None)
    job_file = write_job(tmp_path)
    options = ["--set", "agents.plain.options={wrods: 2}"]
    result = CliRunner().invoke(main, ["submit", str(job_file), *options, *dry_run])
    assert result.exit_code == ExitCode.BAD_JOB
    assert "agents.plain.options.wrods: unknown option" in result.stderr
    assert not (tmp_path / "runs").exists()


def test_a_key_that_is_not_set_is_exit_2_where_the_agents_run_here(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(cluster, "connect", None)
    job = job_of(make_job, "openai:gpt", {})
    with pytest.raises(JobError, match=r"a\.options\.api_key_env: .*OPENAI_API_KEY is not set"):
        pipeline.run(job)
    assert not Path(job.output.path).exists()
    pipeline.preview(job)  # another machine may run it
    check_options(job)
    monkeypatch.setenv("OPENAI_API_KEY", json.dumps("a key"))
    check_options(job, environment=True)
