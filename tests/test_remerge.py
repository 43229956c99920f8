"""Merging again: what is kept of the job, what a name stands for, whose answers count."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client, Worker

import mas_batch
from mas_batch import pipeline, remerge
from mas_batch.errors import JobError, RunError
from mas_batch.evaluation.gather import answers_by_partition
from mas_batch.events import Event, PartitionMerged
from mas_batch.job import Job
from mas_batch.merging import merge_spec
from mas_batch.records import ANSWERS
from mas_batch.remerge import merge_again
from mas_batch.run_folder.names import MERGE_SECTION, MERGES, answers_name
from mas_batch.run_folder.plan import read_plan
from mas_batch.run_folder.read import Run
from mas_batch.run_folder.storage import Store
from tests.clusters import cluster_of
from tests.test_routing_run import contents, labelling

MakeJob = Callable[..., Job]
RATES = {"good": 0.05, "poor": 0.4, "bad": 0.5, "worse": 0.55}
ROWS = [{"id": f"r{i:03d}", "text": f"text number {i} of the corpus"} for i in range(48)]


@pytest.fixture(scope="module")
def client() -> Any:
    tasks = {"classify": 1, "summarize": 1}
    workers = {
        f"w-{i}": {"cls": Worker, "options": {"nthreads": 3, "resources": tasks}} for i in range(4)
    }
    with cluster_of(workers) as cluster, Client(cluster) as connected:
        connected.wait_for_workers(len(workers))
        yield connected


def answered(make_job: MakeJob, client: Client, merge: dict[str, Any], **sections: Any) -> Run:
    """A published run of labelling agents."""
    emit = sections.pop("emit", lambda event: None)
    rates = sections.pop("error_rates", RATES)
    partition = {"max_records": 12}
    job = make_job(ROWS, **{**labelling(rates), "merge": merge, "partition": partition, **sections})
    return mas_batch.open_run(pipeline.run(job, client=client, emit=emit).run)


def summarized(make_job: MakeJob, client: Client, merge: dict[str, Any]) -> Run:
    """A published run of agents that write."""
    agents = [
        {"name": name, "model": f"echo:{name}", "options": {"words": words}}
        for name, words in (("long", 5), ("short", 3))
    ]
    job = make_job(ROWS[:12], agents=agents, merge=merge)
    return mas_batch.open_run(pipeline.run(job, client=client).run)


# A name stands for one way of merging


def test_a_merge_that_was_cut_short_goes_on_as_it_began_or_not_at_all(
    make_job: MakeJob, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = answered(make_job, client, {"method": "vote"})

    class KilledError(Exception):
        pass

    def killed(*arguments: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(remerge, "publish", killed)
        with pytest.raises(KilledError):
            merge_again(run, {"method": "reliability"}, name="again", client=client)
    assert run.store.list(f"{MERGES}/again/results"), "it had got so far"
    wrong = r"the merge 'again' is another one: method is 'reliability', asked for is 'best'; allow"
    with pytest.raises(RunError, match=wrong):
        merge_again(run, {"method": "best"}, name="again", client=client)
    merged = merge_again(run, {"method": "reliability"}, name="again", client=client)
    assert set(merged.arrow()["method"].to_pylist()) == {"reliability"}


def test_a_complete_merge_is_not_taken_for_another(make_job: MakeJob, client: Client) -> None:
    run = answered(make_job, client, {"method": "vote"})
    accuracies = {name: 1 - rate for name, rate in RATES.items()}
    changes = {"method": "weighted", "accuracies": accuracies}
    merged = merge_again(run, changes, name="mine", client=client)
    assert contents(merge_again(run, changes, name="mine")) == contents(merged)
    kept = json.loads(run.store.read_bytes(f"{MERGES}/mine/{MERGE_SECTION}"))
    assert (kept["method"], kept["accuracies"]) == ("weighted", accuracies)
    other = {**changes, "accuracies": {**accuracies, "good": 0.6}}
    with pytest.raises(RunError, match=r"accuracies is .*'good': 0\.95.*asked for is .*: 0\.6"):
        merge_again(run, other, name="mine")
    with pytest.raises(RunError, match="allowed: the same section again, or another --name"):
        merge_again(run, {"method": "vote"}, name="mine")


def test_a_merge_that_does_not_say_how_it_was_made_is_left_alone(
    make_job: MakeJob, client: Client
) -> None:
    run = answered(make_job, client, {"method": "vote"})
    merge_again(run, {"method": "best"}, name="old", client=client)
    run.store.remove(f"{MERGES}/old/{MERGE_SECTION}")
    with pytest.raises(RunError, match=r"merge\.json is missing: an earlier version made .*'old'"):
        merge_again(run, {"method": "best"}, name="old")
    assert run.merge("old").arrow().num_rows == len(ROWS)


# What is kept of the job


def test_the_tasks_default_method_is_a_method_like_any_other(
    make_job: MakeJob, client: Client
) -> None:
    """The job says `utility` and leaves `method` to the task: auto, for summaries."""
    run = summarized(make_job, client, {"utility": "bleu"})
    explicit = merge_again(run, {"method": "auto"}, client=client)
    assert explicit.manifest["merge"]["utility"] == "bleu"
    default = merge_again(run, {"method": None}, client=client)
    assert default.store.url == explicit.store.url, "the same merge has the same name"
    changed = merge_again(run, {"weights": "learned"}, client=client)
    assert changed.manifest["merge"]["utility"] == "bleu"
    assert changed.manifest["merge"]["weights"] == "learned"
    plain = merge_again(run, {"utility": None}, client=client)
    assert plain.manifest["merge"]["utility"] == "rouge-l"


def test_another_method_keeps_facts_about_agents_only(make_job: MakeJob, client: Client) -> None:
    run = summarized(make_job, client, {"utility": "bleu", "accuracies": {"short": 0.9}})
    merged = merge_again(run, {"method": "rover"}, client=client)
    section = json.loads(merged.store.read_bytes(MERGE_SECTION))
    assert (section["utility"], section["accuracies"]) == (None, {"short": 0.9})


def test_one_agents_accuracy_is_changed_alone(make_job: MakeJob, client: Client) -> None:
    accuracies = {name: 1 - rate for name, rate in RATES.items()}
    run = answered(make_job, client, {"method": "weighted", "accuracies": accuracies})
    merged = merge_again(run, {"accuracies": {"poor": 0.7}}, client=client)
    assert merged.manifest["merge"]["accuracies"] == {**accuracies, "poor": 0.7}
    with pytest.raises(JobError, match=r"merge\.accuracies: 0\.5 is not allowed: must be a map"):
        merge_again(run, {"accuracies": 0.5}, client=client)


def test_a_merges_section_is_stripped_value_by_value(make_job: MakeJob) -> None:
    """As one JSON text, what is stripped could take the backslash before a quote with it."""
    merge = {"method": "reliability", "history": 'memory://user:pass@bucket/x?key=ab"c'}
    job = make_job(ROWS, **{**labelling(RATES), "merge": merge})
    section = remerge._effective_section(job, merge_spec(job))
    assert section["history"] == 'memory://bucket/x?key=***"c'


# Whose answers count


def intrude(run: Run, partition: int) -> None:
    """Commit answers of the agents that were not asked, as a slow copy of a task may."""
    there = {agent: answers_name(partition, agent) for agent in RATES}
    asked = [name for name in there.values() if run.store.exists(name)]
    for agent, name in there.items():
        if name not in asked:
            table = run.store.read_table(asked[0])
            names = pa.array([agent] * table.num_rows)
            place = table.schema.get_field_index("agent_id")
            run.store.commit_table(name, table.set_column(place, table.schema.field(place), names))


@pytest.mark.parametrize("method", ["vote", "reliability"])
def test_answers_that_come_after_the_merge_change_nothing(
    method: str, make_job: MakeJob, client: Client
) -> None:
    stores: list[Run] = []

    def emit(event: Event) -> None:
        if type(event).__name__ == "RunStarted":
            stores.append(Run(Store(event.run), {}))  # type: ignore[attr-defined]
        if isinstance(event, PartitionMerged):
            intrude(stores[0], event.partition)

    routing = {"answers_per_record": 3, "speculate": False}
    run = answered(make_job, client, {"method": method}, routing=routing, emit=emit)
    assert len(run.store.list("answers/agent=worse")) == 4, "all have answers to all by now"
    assert set(run.arrow()["num_answers"].to_pylist()) == {3}
    assert run.arrow("answers").num_rows == 3 * len(ROWS)
    assert sum(agent["answers"] for agent in run.manifest["agents"]) == 3 * len(ROWS)
    again = merge_again(run, {"method": "best"}, client=client)
    assert set(again.arrow()["num_answers"].to_pylist()) == {3}


def test_escalated_answers_count_too(make_job: MakeJob, client: Client) -> None:
    routing = {"escalate": {"agent": "good", "fraction": 0.25}}
    run = answered(make_job, client, {"method": "vote"}, routing=routing)
    assert set(run.arrow()["num_answers"].to_pylist()) == {3, 4}
    again = merge_again(run, {"method": "vote"}, client=client)
    assert again.arrow()["support"].to_pylist() == run.arrow()["support"].to_pylist()


def test_a_run_of_an_earlier_format_is_merged_from_what_is_there(
    make_job: MakeJob, client: Client
) -> None:
    run = answered(make_job, client, {"method": "vote"})
    for name in run.files("results"):
        plain = run.store.read_table(name).replace_schema_metadata(None)
        run.store.remove(name)
        run.store.commit_table(name, plain)
    merged = merge_again(run, {"method": "best"}, client=client)
    assert set(merged.arrow()["num_answers"].to_pylist()) == {4}


# History


def test_a_runs_own_history_is_no_prior_of_its_merges(
    make_job: MakeJob, client: Client, tmp_path: Path
) -> None:
    """It would count its answers twice."""
    history = {"method": "reliability", "history": str(tmp_path / "history")}
    run = answered(make_job, client, history)
    merged = merge_again(run, history, name="again", client=client)
    assert merged.store.read_bytes("learned.json") == run.store.read_bytes("learned.json")
    corpus = make_job().corpus.model_copy(update={"limit": 40}).model_dump()
    answered(make_job, client, history, corpus=corpus, name="other")
    informed = merge_again(run, history, name="informed", client=client)
    assert informed.store.read_bytes("learned.json") != run.store.read_bytes("learned.json")


def test_a_history_in_the_runs_object_store_is_read_with_its_options(
    make_job: MakeJob, client: Client, tmp_path: Path, s3_options: dict[str, Any]
) -> None:
    history = {"method": "reliability", "history": "s3://bucket/history"}
    output = {"path": str(tmp_path / "runs"), "storage_options": s3_options}
    answered(make_job, client, history, output=output, name="earlier")
    run = answered(make_job, client, {"method": "vote"})
    alone = merge_again(run, {"method": "reliability"}, client=client)
    with_options = Run(Store(run.store.url, s3_options), run.manifest)
    informed = merge_again(with_options, history, client=client)
    assert informed.store.read_bytes("learned.json") != alone.store.read_bytes("learned.json")


def test_answers_of_a_version_with_fewer_columns_are_merged(
    make_job: MakeJob, client: Client
) -> None:
    run = answered(make_job, client, {"method": "vote"})
    expected = contents(merge_again(run, {"method": "reliability"}, name="now", client=client))
    for file in (Path(run.store.url) / "answers").rglob("*.parquet"):
        table = pq.read_table(file, partitioning=None)
        pq.write_table(table.drop_columns(["reused_from", "t_prefill_s"]), file)
    again = merge_again(run, {"method": "reliability"}, name="then", client=client)
    assert contents(again) == expected
    assert "latency" not in again.manifest


def test_a_run_that_two_versions_have_answered_is_read_for_evaluation(
    make_job: MakeJob, client: Client
) -> None:
    run = answered(make_job, client, {"method": "vote"})
    plan = read_plan(run.store)
    assert plan is not None
    expected = sum(table.num_rows for table in answers_by_partition(run, plan))
    for file in (Path(run.store.url) / "answers/agent=good").glob("*.parquet"):
        table = pq.read_table(file, partitioning=None)
        pq.write_table(table.drop_columns(["reused_from", "t_prefill_s"]), file)
    found = list(answers_by_partition(run, plan))
    assert sum(table.num_rows for table in found) == expected
    assert {table.schema for table in found} == {ANSWERS}
