"""What a notebook shows of runs, summaries and jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mas_batch.cards import MAX_CHARS, card
from mas_batch.pipeline import Summary
from tests.report_runs import made_run, result

SCRIPT = "<script>alert(1)</script>"


def test_values_are_escaped_stripped_of_credentials_and_clipped() -> None:
    shown = card(
        SCRIPT, SCRIPT, {SCRIPT: SCRIPT, "url": "s3://key:SECRET@bucket", "long": "x" * 999}
    )
    assert "<script" not in shown
    assert "SECRET" not in shown
    assert "s3://bucket" in shown
    assert "x" * MAX_CHARS not in shown
    assert shown.count("<td") == 3


def test_a_run_and_its_summary(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run-1", [[result(f"r{i}") for i in range(1200)]])
    shown = run._repr_html_()
    assert "1,200" in shown
    assert "run-1" in shown
    summary = Summary(run.store.url, run.manifest, 1.25, already_complete=True, exit_code=3)
    shown = summary._repr_html_()
    assert "3: more records failed" in shown
    assert "no agent was asked" in shown


def test_a_job_shows_no_storage_options(make_job: Any) -> None:
    job = make_job()
    job = job.model_copy(
        update={"output": job.output.model_copy(update={"storage_options": {"key": "SECRET"}})}
    )
    shown = job._repr_html_()
    assert "strong" in shown
    assert "SECRET" not in shown
