"""What a run's reader is told first: in the report's head, and in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from rich.console import Console

from mas_batch import report, show
from mas_batch.evaluation.write import QUALITY
from mas_batch.run_folder.read import Run
from mas_batch.run_folder.storage import parquet_bytes
from tests.report_runs import answer, made_run, result
from tests.test_report import page_of

LABELS = ["yes", "no", "none"]
LABEL_JOB: dict[str, Any] = {
    "name": "made",
    "corpus": {"reference": "gold"},
    "task": {"kind": "classify", "labels": LABELS},
    "routing": {"policy": "least-loaded"},
    "output": {"max_failed_fraction": 0.05},
}


def label_run(folder: Path, says: Mapping[str, str], **manifest: Any) -> Run:
    """A run of agents that answer 24 records in turn with the letters' labels."""
    names = {"y": "yes", "n": "no", "-": "none"}
    given = {agent: [names[letters[i % len(letters)]] for i in range(24)]
             for agent, letters in says.items()}  # fmt: skip
    first = next(iter(given.values()))
    rows = [result(f"r{i}", first[i], reference=LABELS[i % 3]) for i in range(24)]
    answers = [
        answer(f"r{i}", agent, label=said[i], text=said[i])
        for agent, said in given.items()
        for i in range(24)
    ]
    return made_run(folder, [rows], [answers], LABEL_JOB, **manifest)


def quality(kind: str, name: str, value: float, difference: float | None = None) -> dict[str, Any]:
    row = {"kind": kind, "name": name, "num_records": 24, "num_missing": 0, "metric": "accuracy"}
    if difference is None:
        return {**row, "value": value}
    low, high = sorted((difference * 0.5, difference * 1.5))
    return {**row, "value": value, "difference": difference, "difference_low": low,
            "difference_high": high, "p": 0.01}  # fmt: skip


def said_of(run: Run) -> list[tuple[str, bool]]:
    return [(finding.text, finding.is_bad) for finding in report.findings(run)]


def terminal_of(run: Run) -> str:
    console = Console(record=True, width=200)
    show.print_run(console, run, 0)
    return console.export_text()


def test_a_merge_that_is_worse_than_its_best_agent_is_said_first(tmp_path: Path) -> None:
    run = label_run(tmp_path, {"a": "yn-", "b": "yn-"})
    assert "Not judged yet" in said_of(run)[0][0]
    rows = [quality("agent", "a", 0.9), quality("agent", "b", 0.5, -0.4),
            quality("run", "vote", 0.7, -0.2)]  # fmt: skip
    table = pa.Table.from_pylist(rows, QUALITY)
    run.store.replace("evaluation/quality.parquet", parquet_bytes(table))
    (text, is_bad), *_ = said_of(run)
    assert is_bad
    assert text.startswith(
        "The merge (vote, accuracy 0.700) is WORSE than its best agent, a, beyond"
    )
    page = page_of(run)
    assert page.text.index("WORSE than its best agent") < page.text.index("Exit 0")
    assert "WORSE" in terminal_of(run).splitlines()[0]


def test_an_agent_that_says_one_label_too_often_is_named(tmp_path: Path) -> None:
    run = label_run(tmp_path, {"a": "yn-", "b": "yn-", "yes-man": "yyyyyyyn"})
    (text,) = (text for text, is_bad in said_of(run) if is_bad)
    assert "yes-man says 'yes' too often: in 21 of 24 answers (88%)" in text
    assert "the other agents in 33%" in text
    table = terminal_of(run)
    assert "yes-man" in table
    (row,) = (line.split() for line in table.splitlines() if line.startswith("yes-man  "))
    assert row == ["yes-man", "21", "3", "0"]
    assert "How often each agent said each label" in page_of(run).text


def test_agents_that_agree_on_a_frequent_label_are_not(tmp_path: Path) -> None:
    run = label_run(tmp_path, {"a": "yyyyyyyn", "b": "yyyyyyyy", "c": "yyyyyy-n"})
    assert not [text for text, is_bad in said_of(run) if is_bad]


def test_what_was_published_stands_beside_the_references(tmp_path: Path) -> None:
    run = label_run(tmp_path / "shown", {"a": "yn"})
    found = report.collect(run).confusion
    assert found is not None
    assert (found.labels, found.counts) == (tuple(LABELS), ((4, 4, 0), (4, 4, 0), (4, 4, 0)))
    assert "Published against the reference" in page_of(run).text
    hidden = {**LABEL_JOB, "output": {"keep_text": False}}
    kept = made_run(tmp_path / "hidden", [[result("r", "yes", reference="yes")]], job=hidden)
    assert report.collect(kept).confusion is None, "references are not shown without keep_text"


def test_warnings_of_a_merge_and_cut_answers_are_said(tmp_path: Path) -> None:
    merge = {"method": "vote", "warnings": ["class 'none' has vanished"]}
    rows = [result("r0"), result("r1", finish_reason="length")]
    run = made_run(tmp_path, [rows], merge=merge, warnings=["class 'none' has vanished"])
    bad = [text for text, is_bad in said_of(run) if is_bad]
    assert bad == [
        "class 'none' has vanished",
        "1 published answers (50%) are cut off at task.max_new_tokens.",
    ]


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        (
            {"merge": {"method": "mbr", "chosen_by": "auto", "why": "mbr: a reason"}},
            "merge.method auto has chosen mbr: a reason.",
        ),
        (
            {"escalation": {"agent_id": "b", "picked": 3, "of": 48, "labels": 8,
                            "target": 0.9, "delta": 0.05}},
            "b was asked about 24 of 48 records (50%), a sample of 8 among them: with probability "
            "0.95, published answers agree with its own on 90% of all records",
        ),
    ],
)  # fmt: skip
def test_what_was_decided_for_the_reader_is_said(
    manifest: dict[str, Any], words: str, tmp_path: Path
) -> None:
    run = label_run(tmp_path, {"a": "yn-", "b": "yn-"}, **manifest)
    assert words in page_of(run).text
    assert not [text for text, is_bad in said_of(run) if is_bad]


LEARNED = {"method": "reliability", "reliability": {"method": "dawid-skene", "agents": {}}}


@pytest.mark.parametrize(
    ("merge", "words"),
    [
        (LEARNED, "reliability is better than the vote on this corpus: rows from `mas-batch label"),
        ({"method": "mbr", "weights": "learned"}, "learned weights are better than equal ones"),
        ({**LEARNED, "calibration": {"chosen": "labels weigh the agents"}}, None),
        ({"method": "reliability", "reliability": {"method": "vote", "agents": {}}}, None),
        ({"method": "mbr", "weights": "learned", "chosen_by": "auto", "why": "mbr"}, None),
        ({"method": "vote"}, None),
    ],
)
def test_what_is_not_proven_without_labels_is_said(
    merge: dict[str, Any], words: str | None, tmp_path: Path
) -> None:
    run = made_run(tmp_path, [[result("r0")]], merge=merge)
    said = [text for text, is_bad in said_of(run) if "not proven" in text and not is_bad]
    assert len(said) == (words is not None)
    if words is not None:
        assert words in said[0]
        assert said[0] in " ".join(terminal_of(run).split())
