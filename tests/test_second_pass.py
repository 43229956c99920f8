"""Merges that need the whole corpus: learned reliability, escalation, merging again."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from click.testing import CliRunner
from distributed import Client, Worker
from rich.console import Console

import mas_batch
from mas_batch import pipeline
from mas_batch.aggregate.method import MergeSpec
from mas_batch.cli import main
from mas_batch.errors import JobError, RunError
from mas_batch.events import Escalated, EscalationSampled, Event, Learned, PartitionAnswered
from mas_batch.job import Job
from mas_batch.monitor.progress import sentence
from mas_batch.remerge import merge_again
from mas_batch.run_folder.names import FIRST_PASS, SAMPLE_PASS, SECOND_PASS
from mas_batch.run_folder.read import Run
from mas_batch.run_folder.storage import Store
from mas_batch.show import print_run
from tests.clusters import cluster_of
from tests.test_routing_run import contents, labelling
from tests.test_run import Recorder

MakeJob = Callable[..., Job]
UNEQUAL = {"good": 0.05, "poor": 0.45, "bad": 0.5, "worse": 0.55}
ROWS = [{"id": f"r{i:03d}", "text": f"text number {i} of the corpus"} for i in range(240)]


@pytest.fixture(scope="module")
def four_workers() -> Any:
    """Enough workers for four or five agents."""
    workers = {
        f"w-{i}": {"cls": Worker, "options": {"nthreads": 3, "resources": {"classify": 1}}}
        for i in range(5)
    }
    with cluster_of(workers) as cluster, Client(cluster) as client:
        client.wait_for_workers(len(workers))
        yield client


def job_of(make_job: MakeJob, merge: dict[str, Any], **sections: Any) -> Job:
    agents = labelling(sections.pop("error_rates", UNEQUAL))
    return make_job(
        ROWS, **{**agents, "merge": merge, "partition": {"max_records": 24}, **sections}
    )


FEW = {"partition": {"max_records": 120}}
"""What needs no more than two partitions is over sooner."""
_right: dict[str, str] = {}


def right_answers(make_job: MakeJob, client: Any) -> dict[str, str]:
    """What an agent that never errs says: the echo's labels depend on the text alone."""
    if not _right:
        job = job_of(
            make_job, {"method": "vote"}, error_rates={"oracle": 0.0}, name="oracle", **FEW
        )
        table = mas_batch.open_run(pipeline.run(job, client=client).run).arrow()
        pairs = zip(*(table[c].to_pylist() for c in ("record_id", "answer")), strict=True)
        _right.update(pairs)
    return _right


def accuracy(run: Run, right: dict[str, str]) -> float:
    rows = run.arrow().select(["record_id", "answer"]).to_pylist()
    return sum(right[row["record_id"]] == row["answer"] for row in rows) / len(rows)


def answers_of(run: Run) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = run.arrow("answers").select(["record_id", "agent_id"]).to_pylist()
    return rows


def test_reliability_is_learned_without_labels_and_beats_the_vote(
    make_job: MakeJob, four_workers: Any
) -> None:
    recorder = Recorder()
    job = job_of(make_job, {"method": "reliability"})
    run = mas_batch.open_run(pipeline.run(job, client=four_workers, emit=recorder).run)
    right = right_answers(make_job, four_workers)
    voted = merge_again(run, {"method": "vote"}, client=four_workers)
    assert accuracy(run, right) > accuracy(voted, right) + 0.05
    (learned,) = (event for event in recorder.events if isinstance(event, Learned))
    assert learned.weights["good"] == max(learned.weights.values())
    assert run.manifest["merge"]["reliability"] == json.loads(run.store.read_bytes("learned.json"))
    assert not run.store.list(FIRST_PASS), "the provisional merges are gone"
    assert set(run.arrow()["confidence_kind"].to_pylist()) == {"uncalibrated"}


def test_a_resumed_run_learns_the_same(
    make_job: MakeJob, four_workers: Any, tmp_path: Path
) -> None:
    job = job_of(make_job, {"method": "reliability"})
    whole = mas_batch.open_run(pipeline.run(job, client=four_workers).run)
    expected = contents(whole)
    for name in ("manifest.json", "results/part-000003.parquet", "results/part-000007.parquet"):
        Path(whole.store.path(name)).unlink()
    resumed = mas_batch.open_run(pipeline.run(job, client=four_workers).run)
    assert contents(resumed) == expected


def test_partitions_and_workers_change_no_byte_of_a_record(
    make_job: MakeJob, four_workers: Any
) -> None:
    answers = []
    for size in (24, 31):
        job = job_of(make_job, {"method": "reliability"}, name=f"of-{size}")
        job = job.model_copy(update={"partition": job.partition.model_copy(
            update={"max_records": size})})  # fmt: skip
        run = mas_batch.open_run(pipeline.run(job, client=four_workers).run)
        answers.append(run.arrow().to_pylist())
    assert answers[0] == answers[1]


@pytest.mark.parametrize("limit", [{"fraction": 0.2}, {"below": 0.7}])
def test_the_least_confident_go_to_one_more_agent(
    limit: dict[str, float], make_job: MakeJob, four_workers: Any
) -> None:
    recorder = Recorder()
    rates = {"a": 0.3, "b": 0.3, "c": 0.3, "expert": 0.0}
    sections = {"error_rates": rates, "routing": {"escalate": {"agent": "expert", **limit}}}
    job = job_of(make_job, {"method": "vote"}, **sections)
    run = mas_batch.open_run(pipeline.run(job, client=four_workers, emit=recorder).run)
    asked = {row["record_id"] for row in answers_of(run) if row["agent_id"] == "expert"}
    (event,) = (event for event in recorder.events if isinstance(event, Escalated))
    assert event.num_records == pytest.approx(len(asked), abs=len(ROWS) * 0.05)
    if "fraction" in limit:
        assert 0 < len(asked) <= len(ROWS) * 0.25
    without = merge_again(run, {"method": "vote"}, client=four_workers)
    assert without.arrow()["answer"].to_pylist() == run.arrow()["answer"].to_pylist()
    right = right_answers(make_job, four_workers)
    plain = job_of(
        make_job, {"method": "vote"}, name="plain", error_rates={"a": 0.3, "b": 0.3, "c": 0.3}
    )
    unaided = mas_batch.open_run(pipeline.run(plain, client=four_workers).run)
    assert accuracy(run, right) > accuracy(unaided, right)
    sure = {
        row["record_id"]: row["answer"]
        for row in unaided.arrow().to_pylist()
        if row["record_id"] not in asked
    }
    now = {row["record_id"]: row["answer"] for row in run.arrow().to_pylist()}
    assert {record: now[record] for record in sure} == sure
    assert not run.store.list(SECOND_PASS)


def test_a_run_killed_while_it_escalates_goes_on(make_job: MakeJob, four_workers: Any) -> None:
    sections = {
        "error_rates": {"a": 0.3, "b": 0.3, "c": 0.3, "expert": 0.0},
        "routing": {"escalate": {"agent": "expert", "fraction": 0.5}},
    }
    job = job_of(make_job, {"method": "reliability"}, **sections)
    whole = mas_batch.open_run(pipeline.run(job, client=four_workers).run)
    expected = contents(whole)
    again = job_of(make_job, {"method": "reliability"}, name="again", **sections)

    class StopError(Exception):
        pass

    def stop(event: Event) -> None:
        if type(event).__name__ == "PartitionAnswered" and event.agent_id == "expert":  # type: ignore[attr-defined]
            raise StopError

    with pytest.raises(StopError):
        pipeline.run(again, client=four_workers, emit=stop)
    resumed = mas_batch.open_run(pipeline.run(again, client=four_workers).run)
    assert contents(resumed) == expected


def test_doubtful_records_go_to_review_with_all_their_candidates(
    make_job: MakeJob, four_workers: Any
) -> None:
    job = job_of(make_job, {"method": "vote", "abstain_below": 0.6})
    run = mas_batch.open_run(pipeline.run(job, client=four_workers).run)
    doubtful = [r for r in run.arrow().to_pylist() if r["tie"] or r["abstain"]]
    assert run.arrow("review").to_pylist() == doubtful
    assert doubtful
    assert all(len(row["support"]) > 1 for row in doubtful)
    counts = run.manifest["counts"]
    assert counts["abstained"] == sum(row["abstain"] for row in doubtful)


def test_merging_again_asks_nobody_and_leaves_the_run_as_it_is(
    make_job: MakeJob, four_workers: Any
) -> None:
    job = job_of(make_job, {"method": "vote"})
    run = mas_batch.open_run(pipeline.run(job, client=four_workers).run)
    before = contents(run)
    accuracies = {name: 1 - rate for name, rate in UNEQUAL.items()}
    changes = {"method": "weighted", "accuracies": accuracies}
    merged = merge_again(run, changes, name="by-weight", client=four_workers)
    assert merged.manifest["merge"]["method"] == "weighted"
    assert merged.arrow().num_rows == len(ROWS)
    assert contents(run) == before
    assert run.merges() == ["by-weight"]
    assert merge_again(run, changes, name="by-weight").arrow() == merged.arrow(), "as it is"
    right = right_answers(make_job, four_workers)
    assert accuracy(merged, right) > accuracy(run, right)


def test_a_merge_that_does_not_fit_is_refused_by_its_key(
    make_job: MakeJob, four_workers: Any
) -> None:
    run = mas_batch.open_run(
        pipeline.run(job_of(make_job, {"method": "vote"}), client=four_workers).run
    )
    with pytest.raises(JobError, match=r"merge\.method"):
        merge_again(run, {"method": "mbr"}, client=four_workers)
    with pytest.raises(JobError, match="every agent"):
        merge_again(run, {"method": "weighted"}, client=four_workers)
    for name in ("..", "../..", "a/b"):
        with pytest.raises(JobError, match="it names a folder"):
            merge_again(run, {"method": "vote"}, name=name, client=four_workers)
    with pytest.raises(RunError, match="no merge 'x'; allowed: there is none"):
        run.merge("x")


def test_what_was_learned_is_a_prior_for_the_next_run(
    make_job: MakeJob, four_workers: Any, tmp_path: Path
) -> None:
    merge = {"method": "reliability", "history": str(tmp_path / "history")}
    first = job_of(make_job, merge)
    pipeline.run(first, client=four_workers)
    files = list((tmp_path / "history").rglob("*.json"))
    assert len(files) == 1
    recorder = Recorder()
    few = job_of(make_job, merge, corpus={**first.corpus.model_dump(), "limit": 60}, name="few")
    pipeline.run(few, client=four_workers, emit=recorder)
    alone = job_of(
        make_job, {"method": "reliability"}, corpus=few.corpus.model_dump(), name="alone"
    )
    pipeline.run(alone, client=four_workers, emit=recorder)
    informed, uninformed = (event.weights for event in recorder.of(Learned))

    def error(weights: dict[str, float]) -> float:
        return sum(abs(weights[agent] - (1 - rate)) for agent, rate in UNEQUAL.items())

    assert error(informed) < error(uninformed), "60 records alone tell little"
    assert len(list((tmp_path / "history").rglob("*.json"))) == 2


def test_what_could_not_be_learned_is_said_wherever_people_look(
    make_job: MakeJob, four_workers: Any
) -> None:
    recorder = Recorder()
    job = job_of(make_job, {"method": "reliability"}, error_rates={"a": 0.2, "b": 0.3})
    run = mas_batch.open_run(pipeline.run(job, client=four_workers, emit=recorder).run)
    said = "The vote is published, since 2 agents have answered, and learning takes 3."
    assert run.manifest["merge"]["warnings"] == [said]
    (learned,) = recorder.of(Learned)
    assert said in (sentence(learned) or "")
    out = Console(file=io.StringIO(), width=200)
    print_run(out, run, 0)
    assert said in out.file.getvalue()  # type: ignore[attr-defined]
    assert said in run.store.read_bytes("report.html").decode()
    assert set(run.arrow()["confidence_kind"].to_pylist()) == {"agreement"}


def ids_below(table: pa.Table, confidence: float) -> set[str]:
    rows = table.select(["record_id", "confidence"]).to_pylist()
    return {row["record_id"] for row in rows if row["confidence"] < confidence}


def labels_file(path: Path, right: dict[str, str], ids: list[str]) -> str:
    rows = [{"record_id": i, "label": right[i]} for i in ids]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_labels_make_confidences_probabilities(
    make_job: MakeJob, four_workers: Any, tmp_path: Path
) -> None:
    run = mas_batch.open_run(
        pipeline.run(job_of(make_job, {"method": "vote"}), client=four_workers).run
    )
    right = right_answers(make_job, four_workers)
    file = str(tmp_path / "labels.csv")
    asked = ["label", run.store.location(""), "--output", file]
    told = CliRunner().invoke(main, asked)
    assert told.exit_code == 0, told.output
    assert f"--set calibrate.labels={file}" in told.output
    assert "may hold labels" in CliRunner().invoke(main, asked).output, "work is not overwritten"
    rows = pd.read_csv(file)
    assert list(rows) == ["record_id", "text", "answer", "confidence", "answers", "label"]
    assert len(rows) == 100
    assert len(set(rows["confidence"])) > 2, "sure ones too"
    rows["label"] = [right[record_id] for record_id in rows["record_id"]]
    rows.to_csv(file, index=False)
    recorder = Recorder()
    changes = {"method": "reliability", "calibrate": {"labels": file}, "abstain_below": 0.5}
    merged = merge_again(run, changes, client=four_workers, emit=recorder)
    table = merged.arrow()
    assert set(table["confidence_kind"].to_pylist()) == {"calibrated"}
    facts = merged.manifest["merge"]["calibration"]
    assert facts == json.loads(merged.store.read_bytes("calibration.json"))
    assert facts["num_records"] == 100
    assert facts["weights"]["agents"].keys() == UNEQUAL.keys()
    assert "labels weigh the agents: of 100 labelled records" in recorder.of(Learned)[-1].why
    assert "calibrated by 100 labelled records" in recorder.of(Learned)[-1].why
    out = Console(file=io.StringIO(), width=400)
    print_run(out, merged, 0)
    shown = out.file.getvalue()  # type: ignore[attr-defined]
    assert "Labels weigh the agents: of 100 labelled records" in shown
    unlabelled = merge_again(run, {"method": "reliability"}, client=four_workers)
    assert accuracy(merged, right) >= accuracy(unlabelled, right)
    mean = sum(table["confidence"].to_pylist()) / table.num_rows
    assert mean == pytest.approx(accuracy(merged, right), abs=0.08)
    doubted = [row["confidence"] < 0.5 for row in table.select(["confidence"]).to_pylist()]
    assert table["abstain"].to_pylist() == doubted, "what is marked follows the calibrated one"
    rows[:60].to_csv(file, index=False)
    again = merge_again(run, changes, client=four_workers)
    assert again.manifest["run"] != merged.manifest["run"], "other labels are another merge"


def test_labels_replace_the_vote_where_agreement_teaches_nothing(
    make_job: MakeJob, four_workers: Any, tmp_path: Path
) -> None:
    rates = {"a": 0.5, "good": 0.02}
    right = right_answers(make_job, four_workers)
    file = labels_file(tmp_path / "labels.jsonl", right, [row["id"] for row in ROWS[::3]])
    merge = {"method": "reliability", "calibrate": {"labels": file}}
    recorder = Recorder()
    job = job_of(make_job, merge, error_rates=rates)
    run = mas_batch.open_run(pipeline.run(job, client=four_workers, emit=recorder).run)
    assert accuracy(run, right) > 0.95, "two answers are a tie to agreement"
    assert "warnings" not in run.manifest["merge"]
    assert not any("The vote is published" in (sentence(e) or "") for e in recorder.of(Learned))
    assert "The vote is published" not in run.store.read_bytes("report.html").decode()
    expected = contents(run)
    Path(run.store.path("manifest.json")).unlink()
    Path(run.store.path("results/part-000003.parquet")).unlink()
    again = mas_batch.open_run(pipeline.run(job, client=four_workers).run)
    assert contents(again) == expected


def test_a_job_may_be_calibrated_from_the_start(
    make_job: MakeJob, four_workers: Any, tmp_path: Path
) -> None:
    right = right_answers(make_job, four_workers)
    file = labels_file(tmp_path / "labels.jsonl", right, [row["id"] for row in ROWS[::3]])
    job = job_of(make_job, {"method": "vote", "calibrate": {"labels": file}})
    run = mas_batch.open_run(pipeline.run(job, client=four_workers).run)
    assert set(run.arrow()["confidence_kind"].to_pylist()) == {"calibrated"}
    assert not run.store.list(FIRST_PASS)


def test_escalated_are_the_least_sure_by_the_calibrated_figure(
    make_job: MakeJob, four_workers: Any, tmp_path: Path
) -> None:
    right = right_answers(make_job, four_workers)
    file = labels_file(tmp_path / "labels.jsonl", right, [row["id"] for row in ROWS[::3]])
    merge, rates = {"method": "vote", "calibrate": {"labels": file}}, {"a": 0.3, "b": 0.3, "c": 0.3}
    plain = job_of(make_job, merge, error_rates=rates, name="plain", **FEW)
    without = mas_batch.open_run(pipeline.run(plain, client=four_workers).run)
    unaided = without.arrow()
    own = merge_again(without, {"calibrate": None}, client=four_workers).arrow()
    figures = {*unaided["confidence"].to_pylist(), *own["confidence"].to_pylist()}
    between = [sum(pair) / 2 for pair in pairwise(sorted(figures))]
    least = next(c for c in between if ids_below(unaided, c) != ids_below(own, c))
    expected = ids_below(unaided, least)
    routing = {"escalate": {"agent": "expert", "below": least}}
    rates |= {"expert": 0.0}
    job = job_of(make_job, merge, error_rates=rates, routing=routing, **FEW)
    run = mas_batch.open_run(pipeline.run(job, client=four_workers).run)
    assert {r["record_id"] for r in answers_of(run) if r["agent_id"] == "expert"} == expected
    assert set(run.arrow()["confidence_kind"].to_pylist()) == {"calibrated"}


def test_calibrated_confidences_keep_a_cascades_guarantee(
    make_job: MakeJob, four_workers: Any, tmp_path: Path
) -> None:
    right = right_answers(make_job, four_workers)
    file = labels_file(tmp_path / "labels.jsonl", right, [row["id"] for row in ROWS[::3]])
    merge = {"method": "reliability", "calibrate": {"labels": file}}
    job = job_of(make_job, merge, **GUARANTEED, **FEW)
    run = mas_batch.open_run(pipeline.run(job, client=four_workers).run)
    expert = {r["record_id"]: r["label"] for r in run.arrow("answers").to_pylist()
              if r["agent_id"] == "expert"}  # fmt: skip
    rows = {row["record_id"]: row for row in run.arrow().to_pylist()}
    assert 80 <= len(expert) < len(ROWS)
    assert {r: rows[r]["answer"] for r in expert} == expert, "its answer is the last word"
    assert {rows[r]["confidence_kind"] for r in rows} == {"calibrated", "preference"}
    assert {r for r in rows if rows[r]["confidence_kind"] == "preference"} == expert.keys()
    assert accuracy(run, right) >= 0.9, "the expert never errs"
    weighed = run.manifest["merge"]["calibration"]["weights"]["agents"]
    assert "expert" not in weighed, "of its answers nothing is learned"
    for name in ("learned.json", "calibration.json", "escalation-sample.json", "escalation.json"):
        refused_when_cut(job, run, name, four_workers)


def refused_when_cut(job: Job, run: Run, name: str, client: Any) -> None:
    """What a bad disk has cut is named, and nothing is published by half of it."""
    Path(run.store.path("manifest.json")).unlink(missing_ok=True)
    file = Path(run.store.path(name))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match=rf"/{name} is damaged: .*; restore it, or remove"):
        pipeline.run(job, client=client)
    file.write_bytes(whole)


def test_an_expected_utility_is_not_calibrated() -> None:
    with pytest.raises(JobError, match=r"allowed: with merge\.method vote, weighted, reliability"):
        MergeSpec(
            method="mbr", utility="chrf", accuracies={}, weights=None, abstain_below=0.0,
            answer_kind="text", num_labels=None, calibrate="labels.csv",
        )  # fmt: skip


GUARANTEED = {
    "error_rates": {"a": 0.05, "b": 0.1, "c": 0.15, "expert": 0.0},
    "routing": {"escalate": {"agent": "expert", "target": 0.9, "delta": 0.1, "labels": 80}},
}


class StopError(Exception):
    pass


def stop_at_expert(event: Event) -> None:
    """Die at the expert's first answers of an execution."""
    if isinstance(event, PartitionAnswered) and event.agent_id == "expert":
        raise StopError


def test_a_guaranteed_cascade_asks_a_sample_and_what_it_must_and_goes_on_when_killed(
    make_job: MakeJob, four_workers: Any
) -> None:
    recorder = Recorder()
    job = job_of(make_job, {"method": "reliability"}, **GUARANTEED, **FEW)
    run = mas_batch.open_run(pipeline.run(job, client=four_workers, emit=recorder).run)
    asked = [row["record_id"] for row in answers_of(run) if row["agent_id"] == "expert"]
    assert len(asked) == len(set(asked)), "the sample is not asked about again"
    (sampled,) = recorder.of(EscalationSampled)
    (escalated,) = recorder.of(Escalated)
    assert (sampled.num_records, sampled.num_records_of_all) == (80, len(ROWS))
    assert 80 <= len(asked) < len(ROWS)
    assert "with probability 0.9" in escalated.why
    answered = [e for e in recorder.of(PartitionAnswered) if e.agent_id == "expert"]
    assert sum(event.num_answers for event in answered) == len(asked), "each is counted once"
    rows = {row["record_id"]: row for row in run.arrow().to_pylist()}
    expert = {r["record_id"]: r["label"] for r in run.arrow("answers").to_pylist()
              if r["agent_id"] == "expert"}  # fmt: skip
    assert {r: rows[r]["answer"] for r in asked} == expert, "its answer is the last word"
    assert {rows[r]["confidence"] for r in asked} == {None}
    assert run.manifest["escalation"]["labels"] == 80
    assert not run.store.list(SAMPLE_PASS)
    again = job.with_changes(output=job.output.with_changes(path=f"{job.output.path}-again"))
    stages: list[bool] = []
    store = Store(f"{again.output.path}/{run.manifest['run']}")
    while not store.exists("manifest.json"):
        with suppress(StopError):
            pipeline.run(again, client=four_workers, emit=stop_at_expert)
        stages.append(store.exists("escalation.json"))
    assert {*stages} == {False, True}, "killed while the sample is asked, and after"
    assert contents(mas_batch.open_run(store.url)) == contents(run)
