"""What `docs/extending.md` shows works from outside the package, as it stands there."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from distributed import Client, Worker

import mas_batch
from mas_batch import merging, pipeline
from mas_batch.aggregate.method import METHODS, Method
from mas_batch.errors import JobError
from mas_batch.evaluation.specs import other_specs, run_spec
from tests.clusters import cluster_of
from tests.extending import blocks, installed

ROWS = [
    {"id": f"r{i}", "text": f"text number {i} of the corpus", "reference": f"text number {i}"}
    for i in range(4)
]


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The page's package, installed for the time, and its part of a job."""
    with installed(tmp_path / "site", monkeypatch):
        yield yaml.safe_load(blocks("yaml")[0])


def test_a_task_and_a_merge_of_another_package_run(outside: dict[str, Any], make_job: Any) -> None:
    job = make_job(ROWS, **outside)
    workers = {
        f"w-{i}": {"cls": Worker, "options": {"nthreads": 3, "resources": {"title": 1}}}
        for i in range(3)
    }
    with cluster_of(workers) as cluster, Client(cluster) as client:
        client.wait_for_workers(len(workers))
        run = mas_batch.open_run(pipeline.run(job, client=client).run)
    rows = run.arrow().to_pylist()
    assert [row["answer"] for row in rows] == ["text number"] * len(ROWS)
    assert {row["method"] for row in rows} == {"shortest"}
    assert {row["confidence"] for row in rows} == {0.5}, "of two: the third had too many words"
    answers = run.arrow("answers").to_pylist()
    assert {row["agent_id"] for row in answers if row["reason"]} == {"endless"}
    specs, _ = other_specs(run, run_spec(run, job), job, None)
    assert {"vote", "mbr", "rover"} <= set(specs), "merges that evaluation tries beside it"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_words": 0}, r"task\.options\.max_words: must be 1 or more"),
        ({"max_words": "many"}, r"task\.options\.max_words: 'many' .* of type int"),
        ({"max_word": 3}, r"task\.options\.max_word: unknown key; allowed: max_words"),
    ],
)
def test_its_options_are_checked_at_the_door(
    outside: dict[str, Any], make_job: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(JobError, match=message):
        make_job(ROWS, **{**outside, "task": {"kind": "title", "options": changes}})


def test_its_names_are_allowed_where_it_is_installed(
    outside: dict[str, Any], make_job: Any
) -> None:
    with pytest.raises(JobError, match=r"merge\.method: .* allowed: vote, .*, auto, shortest$"):
        make_job(ROWS, **{**outside, "merge": {"method": "longest"}})
    job = make_job(ROWS, **{**outside, "routing": {"adaptive": {"confidence": 0.9}}})
    with pytest.raises(JobError, match="cannot stop early: a shorter answer may still come"):
        merging.stopping_rule(job)


def test_options_are_refused_where_the_task_has_none(make_job: Any) -> None:
    with pytest.raises(JobError, match=r"task\.options\.max_words: unknown key; allowed: none"):
        make_job(ROWS, task={"kind": "summarize", "options": {"max_words": 3}})


def test_a_package_that_cannot_be_imported_is_named(outside: dict[str, Any], make_job: Any) -> None:
    site = Path(next(path for path in sys.path if path.endswith("/site")))
    (site / "titles.py").write_text("import nowhere_to_be_found")
    with pytest.raises(JobError, match=r"task\.kind: 'title' of the package 'titles' cannot be"):
        make_job(ROWS, **outside)


def test_a_method_that_does_not_say_whether_it_can_stop_cannot_be_built() -> None:
    vote = METHODS["vote"]
    with pytest.raises(TypeError, match="stopping"):
        Method(  # type: ignore[call-arg]
            verdict=vote.verdict,
            columns=vote.columns,
            exact=False,
            confidence_kinds=("agreement",),
            not_escalated=None,
        )


def test_the_page_of_merges_names_every_method_and_its_confidence() -> None:
    page = (Path(__file__).parent.parent / "docs/merging.md").read_text()
    for name, method in METHODS.items():
        (line,) = re.findall(rf"^\| `{name}` \|.*$", page, re.MULTILINE)
        for kind in method.confidence_kinds:
            assert f"`{kind}`" in line, (name, kind)
