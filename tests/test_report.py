"""report.html: what it says is true, what it must not say is not there, and it opens anywhere."""

from __future__ import annotations

import logging
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from click.testing import CliRunner
from distributed import Client

from mas_batch import pipeline, report
from mas_batch.cli import main
from mas_batch.evaluation.write import QUALITY
from mas_batch.report import record_facts, scan, walk
from mas_batch.report.page import count, figure, seconds, share
from mas_batch.run_folder.kept_job import job_facts
from mas_batch.run_folder.read import Run, open_run
from mas_batch.run_folder.storage import parquet_bytes
from tests.report_runs import answer, failure, made_run, result

SCRIPT = "<script>alert('canary')</script>"


class Page(HTMLParser):
    """All elements of a page, and its text."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(content.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, attribute: str) -> list[str]:
        return [attrs[attribute] or "" for _, attrs in self.elements if attribute in attrs]

    def num(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def page_of(run: Run) -> Page:
    return Page(report.render(report.collect(run)))


@pytest.fixture(scope="module")
def real_run(cluster_client: Client, tmp_path_factory: pytest.TempPathFactory) -> pipeline.Summary:
    """A real run of two agents that differ, with hostile and unusable records."""
    from mas_batch.job_file import check_job

    folder = tmp_path_factory.mktemp("real")
    lines = [f'{{"id": "r{i}", "text": "word {i} and a few more words"}}' for i in range(12)]
    lines += [f'{{"id": "z{SCRIPT}", "text": "{SCRIPT} is a text"}}', '{"id": "void", "text": " "}']
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    secret = {"storage_options": {"password": "CANARY-OPTION"}}
    job = check_job(
        {
            "name": "real",
            "corpus": {"path": str(folder / "corpus.jsonl"), "id": "id", **secret},
            "task": {"kind": "summarize", "max_new_tokens": 8, "system": "unbroken" * 40},
            "agents": [
                {"name": "whole", "model": "echo:a"},
                {"name": "brief", "model": "echo:b", "options": {"words": 1}},
            ],
            "merge": {"method": "vote"},
            "partition": {"max_records": 4},
            "output": {"path": str(folder / "runs"), **secret, "max_failed_fraction": 0.5},
        }
    )
    return pipeline.run(job, client=cluster_client)


def test_every_run_has_its_report(real_run: pipeline.Summary) -> None:
    run = open_run(real_run.run)
    page = Page(run.store.read_bytes(report.NAME))
    assert "13" in page.text  # answered
    assert "whitespace" in page.text  # why one failed
    assert "whole" in page.text
    facts = report.collect(run)
    assert (facts.totals.records, facts.totals.results, facts.totals.failures) == (14, 13, 1)
    assert facts.time is not None
    assert facts.totals.wall_s is not None
    assert all(agent.latency is not None for agent in facts.agents)
    assert {each.agents for each in facts.time.activity} == {("whole",), ("brief",)}
    assert all(each.num_hosts == 1 for each in facts.time.activity)


def test_what_comes_out_of_the_corpus_cannot_become_markup(
    real_run: pipeline.Summary,
) -> None:
    content = open_run(real_run.run).store.read_bytes(report.NAME)
    assert b"<script" not in content
    assert b"&lt;script&gt;alert" in content  # it is shown, as text
    assert Page(content).num("script") == 0


def test_it_needs_nothing_from_outside(real_run: pipeline.Summary) -> None:
    page = Page(open_run(real_run.run).store.read_bytes(report.NAME))
    assert page.num("script") == page.num("img") == page.num("iframe") == 0
    assert page.values("src") == []
    policies = [a["content"] for tag, a in page.elements if a.get("http-equiv")]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    targets = [href for href in page.values("href") if href != "data:,"]
    assert targets
    assert {href.removeprefix("#") for href in targets} <= set(page.values("id"))


def test_it_can_be_read_aloud(real_run: pipeline.Summary) -> None:
    page = Page(open_run(real_run.run).store.read_bytes(report.NAME))
    assert page.num("table") == page.num("caption") > 3
    assert page.num("h1") == 1
    levels = [int(tag[1]) for tag, _ in page.elements if tag in ("h1", "h2", "h3")]
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))
    assert all(attrs.get("aria-label") for tag, attrs in page.elements if tag == "svg")
    assert all(attrs.get("scope") for tag, attrs in page.elements if tag == "th")
    assert len(set(page.values("id"))) == len(page.values("id"))


def test_secrets_stay_out(real_run: pipeline.Summary, tmp_path: Path) -> None:
    run = open_run(real_run.run)
    assert b"CANARY" not in run.store.read_bytes(report.NAME)
    job = run.store.read_bytes("job.yaml").decode()
    leaky = made_run(tmp_path / "leaky", [[result("a")]], [[answer("a")]])
    # Were one to slip into the run's own files, the report still does not pass it on.
    url = "s3://CANARYKEY:CANARYSECRET@bucket/x"
    leaky.store.replace("job.yaml", job.replace("name: real", f"name: {url}").encode())
    leaky.manifest["engines"] = {
        "one": {"engine": "openai", "model": url, "options": {"extra": "CANARY-OPTION"}}
    }
    assert b"CANARY" not in report.render(report.collect(leaky))


def test_a_job_that_keeps_no_texts_shows_none(tmp_path: Path) -> None:
    doubtful = result("a", confidence=0.5)
    del doubtful["text"]
    page = page_of(made_run(tmp_path / "run", [[doubtful]], [[answer("a", t_compute_s=1.0)]]))
    assert "text of a" not in page.text
    assert "agreement 0.50" in page.text


@pytest.mark.parametrize("keep_text", [True, False])
def test_references_are_shown_only_where_texts_are_kept(tmp_path: Path, keep_text: bool) -> None:
    job = {
        "task": {"kind": "classify"},
        "routing": {"policy": "random"},
        "output": {"keep_text": keep_text},
    }
    row = result("a", confidence=0.5, reference="CANARY")
    page = page_of(made_run(tmp_path / "run", [[row]], job=job))
    assert ("CANARY" in page.text) == keep_text


def test_a_prompt_is_shown_as_it_is_and_other_credentials_are_not(tmp_path: Path) -> None:
    prompt = "https://x.org/?key=abc and {text}"
    job = {
        "task": {"kind": "classify", "prompt": prompt},
        "routing": {"policy": "random"},
        "output": {"path": "s3://CANARY:CANARY@bucket/x"},  # as an earlier version may have left
    }
    run = made_run(tmp_path / "run", [[result("a")]], job=job)
    shown = job_facts(run)
    assert shown["task"]["prompt"] == prompt
    assert shown["output"]["path"] == "s3://bucket/x"


def test_a_report_that_cannot_be_written_costs_no_run(
    cluster_client: Client, make_job: Any, caplog: pytest.LogCaptureFixture
) -> None:
    job = make_job()
    run = Path(pipeline.preview(job).run)
    (run / report.NAME).mkdir(parents=True)  # where the file should go
    with caplog.at_level(logging.WARNING, logger="mas_batch.pipeline"):
        summary = pipeline.run(job, client=cluster_client)
    assert summary.exit_code == 0
    assert open_run(summary.run).manifest["counts"]["results"] == 20
    (line,) = [r.getMessage() for r in caplog.records if r.name == "mas_batch.pipeline"]
    assert "report.html is not written" in line


# What it says


def test_the_least_certain_come_first(tmp_path: Path) -> None:
    confidences = {f"r{i:02}": c for i, c in enumerate([1.0, 0.5, 0.9, 0.5, None, 0.7] * 6)}
    rows = [
        result(key, confidence=c, entropy=0.1 * (key == "r03"), tie=c == 0.5)
        for key, c in confidences.items()
    ]
    run = made_run(tmp_path / "run", [rows[:7], rows[7:20], rows[20:]])
    shown = [record.record_id for record in report.collect(run).doubtful]
    known = {key: c for key, c in confidences.items() if c is not None and c < 1}
    expected = sorted(known, key=lambda key: (known[key], -0.1 * (key == "r03"), -int(key[1:])))
    assert shown == expected[: scan.NUM_SHOWN]


def test_among_equally_doubtful_records_entropy_decides(tmp_path: Path) -> None:
    """Also where one partition has more of them than are shown."""
    rows = [result(f"r{i:02}", confidence=0.5, entropy=i / 100) for i in range(30)]
    facts = report.collect(made_run(tmp_path / "run", [rows]))
    expected = [f"r{i:02}" for i in range(29, 29 - scan.NUM_SHOWN, -1)]
    assert [record.record_id for record in facts.doubtful] == expected


def test_of_standard_errors_the_largest_come_first(tmp_path: Path) -> None:
    mean = {"method": "mean", "confidence_kind": "standard_error", "answer": "1.23456789"}
    rows = [result(f"r{i}", **mean, confidence=e, value=1.23456789) for i, e in enumerate([0.2, 3])]
    facts = report.collect(made_run(tmp_path / "run", [rows]))
    assert [record.record_id for record in facts.doubtful] == ["r1", "r0"]
    assert facts.doubtful[0].answer == "1.235"
    assert facts.confidence == ()


def test_failures_have_examples(tmp_path: Path) -> None:
    rows = [[failure(f"e{i}", message=f"row {i}") for i in range(5)], [result("a")]]
    rows.append([failure("x", "worker_died", agent_id="one", message="killed")])
    given_up = answer("a", text=None, label=None, reason="engine_error")
    run = made_run(tmp_path / "run", rows, [[], [given_up], []])
    facts = report.collect(run)
    assert [(group.reason, group.count) for group in facts.failures] == [
        ("empty", 5),
        ("worker_died", 1),
    ]
    assert [example.record_id for example in facts.failures[0].examples] == ["e0", "e1", "e2"]
    assert facts.failures[1].examples[0].message == "killed"
    assert facts.failed_answers == (record_facts.FailedAnswers("one", "engine_error", 1),)
    assert facts.outcome.exit_code == 3


def test_an_evaluated_run_shows_its_quality_without_the_libraries_that_found_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("sklearn", "sklearn.metrics", "scipy", "scipy.stats", "sacrebleu"):
        monkeypatch.setitem(sys.modules, module, None)
    run = made_run(tmp_path / "run", [[result("a")]], [[answer("a")]])
    about = {"num_records": 1, "num_missing": 0, "low": 0.25, "high": 0.75}
    rows = [
        {"kind": "agent", "name": "one", "metric": "accuracy", "value": 0.5, **about},
        {"kind": "agent", "name": "one", "metric": "macro-F1", "value": 0.375, **about},
        {
            **{"kind": "run", "name": "vote", "metric": "accuracy", "value": 0.25, **about},
            **{"difference": -0.25, "difference_low": -0.5, "difference_high": 0.0, "p": 0.125},
        },
        {"kind": "run", "name": "vote", "metric": "macro-F1", "value": None, **about},
    ]
    table = pa.Table.from_pylist(rows, QUALITY)
    run.store.replace("evaluation/quality.parquet", parquet_bytes(table))
    shown = " ".join(page_of(run).text.split())
    assert "onebest agent 0.500 0.250 – 0.750 0.375" in shown
    assert "votethis run 0.250 0.250 – 0.750 \u22120.250 0.125 –" in shown


def test_a_large_run_is_sampled_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "MAX_PARTITIONS", 2)
    rows = [[result(f"r{i}", confidence=0.5)] for i in range(5)]
    run = made_run(tmp_path / "run", rows, [[answer(f"r{i}")] for i in range(5)])
    facts = report.collect(run)
    assert (facts.scope.stride, facts.scope.num_records) == (3, 2)
    assert "mas-batch report --all" in page_of(run).text
    assert report.collect(run, whole=True).scope == record_facts.Scope(1, 5)


def test_it_stays_small_whatever_the_run_holds(tmp_path: Path) -> None:
    huge = '"&<' * 50_000
    agents = [f"{'a' * 120}{i}" for i in range(30)]
    support = [{"answer": huge + a, "weight": 1.0, "agents": agents} for a in agents]
    rows = [
        result(f"{i}{huge}", huge, text=huge, reference=huge, confidence=0.5, support=support)
        for i in range(12)
    ]
    rows += [failure(f"f{i}{huge}", f"reason{i % 14}", message=huge) for i in range(60)]
    answers = [answer(f"{i}{huge}", a, t_compute_s=1.0) for i in range(12) for a in agents]
    job = {
        "task": {"kind": "classify", "prompt": huge},
        "routing": {"policy": "random"},
        "output": {},
    }
    run = made_run(tmp_path / "run", [rows], [answers], job)
    run.manifest["engines"] = {a: {"engine": "e", "family_id": huge, "model": huge} for a in agents}
    assert len(report.render(report.collect(run))) < 1_000_000


def test_a_run_of_an_earlier_version_has_a_report_too(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", [[result("a")]], [[answer("a", t_compute_s=2.0)]], format=1)
    run.manifest["files"] = {
        "results": ["results/part-000000.parquet"],
        "answers": ["answers/agent=one/part-000000.parquet"],
    }
    del run.manifest["engines"]
    facts = report.collect(run)
    assert facts.time is None
    assert facts.totals.wall_s is None
    (agent,) = facts.agents
    assert agent.latency is None


@pytest.mark.parametrize(
    ("write", "value", "expected"),
    [
        (seconds, None, "–"),
        (seconds, 0.0, "0 s"),
        (seconds, 0.00001, "< 0.1 ms"),
        (seconds, 0.0123, "12.3 ms"),
        (seconds, 0.99999, "1 s"),
        (seconds, 75, "75 s"),
        (seconds, 119.6, "2 min 00 s"),
        (seconds, 3_599.7, "1 h 00 min"),
        (share, 0.999, "> 99 %"),
        (share, 0.0001, "< 1 %"),
        (share, 1.0, "100 %"),
        (count, 1234567, "1,234,567"),
        (count, 0.01234, "0.0123"),
        (figure, 0.5, "0.500"),
        (figure, 45.67, "45.7"),
    ],
)
def test_figures_are_written_for_people(write: Any, value: float | None, expected: str) -> None:
    assert write(value) == expected


def test_the_command_writes_it_where_it_is_told(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", [[result("a")]])
    done = CliRunner().invoke(main, ["report", run.store.url])
    assert done.output.strip() == f"report: {tmp_path / 'run' / 'report.html'}"
    other = tmp_path / "other.html"
    done = CliRunner().invoke(main, ["report", run.store.url, "--output", str(other)])
    assert done.exit_code == 0
    assert other.read_bytes() == (tmp_path / "run" / "report.html").read_bytes()


def test_no_run_no_report(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert done.exit_code == 1
    assert "no manifest.json" in done.output


# As people see it


def test_it_opens_in_a_browser_on_a_phone_and_on_paper(
    real_run: pipeline.Summary, browser_page: Any
) -> None:
    path = Path(real_run.run, report.NAME)
    for width, media in ((1280, "screen"), (360, "screen"), (800, "print")):
        browser_page.resize(width, 800)
        browser_page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media})
        browser_page.open(path)
        assert browser_page.evaluate("document.documentElement.scrollWidth") <= width
        assert browser_page.evaluate("performance.getEntriesByType('resource').length") == 0
    assert browser_page.errors == []
    paper = browser_page.driver.execute_cdp_cmd("Page.printToPDF", {})
    assert len(paper["data"]) > 10_000
