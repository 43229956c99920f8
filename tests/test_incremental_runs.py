"""`since: last` on a real cluster: what comes out is what asking about everything gives."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from distributed import Client

import mas_batch
from mas_batch import pipeline
from mas_batch.errors import ExitCode, RunError
from mas_batch.events import AnswersReused, HostReady, PartitionAnswered
from mas_batch.explain import explain
from mas_batch.job import Job
from mas_batch.job_file import check_job
from mas_batch.registries import ENGINES
from mas_batch.run_folder.read import Run
from tests.test_run import Recorder

Row = dict[str, Any]
SAID = ["record_id", "agent_id", "sample_id", "text", "label", "value", "finish_reason", "reason"]


def row(number: int, version: str = "") -> Row:
    return {"id": f"r{number:03d}", "text": f"text number {number} of the corpus {version}".strip()}


V1 = [row(i) for i in range(30)]
ANSWER_RARELY = {"faults": {"number 7 ": "error", "number 13 ": "unparsable"}}


def changed(rows: list[Row], seed: int = 0) -> list[Row]:
    """A corpus a night later: rows removed, changed, moved and added."""
    rng = random.Random(seed)
    kept = [each for each in rows if rng.random() > 0.15]
    kept = [{**r, "text": r["text"] + " edited"} if rng.random() < 0.15 else r for r in kept]
    new = [row(1000 + 10 * seed + i) for i in range(4)]
    for each in new:
        kept.insert(rng.randrange(len(kept) + 1), each)
    if seed % 2:
        rng.shuffle(kept)
    return kept


def _merged(raw: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Override sections; `corpus` and `output` key by key."""
    merged = {**raw, **changes}
    for name in ("corpus", "output"):
        merged[name] = {**raw[name], **changes.get(name, {})}
    return merged


class Nights:
    """A job that is run night after night, and the same job that asks about everything."""

    def __init__(self, folder: Path, client: Client | None, **sections: Any) -> None:
        self.folder = folder
        self.client = client
        self.sections = sections
        self.events = Recorder()

    def job(self, rows: list[Row] | None, **changes: Any) -> Job:
        corpus = self.folder / "corpus.jsonl"
        if rows is not None:
            corpus.write_text("".join(json.dumps(each) + "\n" for each in rows))
        agents = [
            {"name": "strong", "model": "echo:strong", "capabilities": ["classify", "strong"]},
            {"name": "weak", "model": "echo:weak", "capabilities": ["classify", "weak"]},
        ]
        for agent, rate in zip(agents, (0.2, 0.4), strict=True):
            agent["options"] = {"labels": ["x", "y", "z"], "error_rate": rate}  # type: ignore
        raw = {
            "name": "nightly",
            "corpus": {"path": str(corpus), "id": "id"},
            "task": {"kind": "classify", "labels": ["x", "y", "z"]},
            "agents": agents,
            "merge": {"method": "vote"},
            "partition": {"max_records": 4},
            "output": {"path": str(self.folder / "runs")},
            "cluster": {"wait_s": 30, "dashboard_address": None},
            "since": "last",
        }
        return check_job(_merged(_merged(raw, self.sections), changes))

    def run(self, rows: list[Row] | None, *, retry_failed: bool = False, **changes: Any) -> Run:
        self.events = Recorder()
        summary = pipeline.run(
            self.job(rows, **changes),
            client=self.client,
            emit=self.events,
            retry_failed=retry_failed,
        )
        return mas_batch.open_run(summary.run)

    def full(self, rows: list[Row] | None, **changes: Any) -> Run:
        job = self.job(rows, output={"path": str(self.folder / "full")}, since=None, **changes)
        return mas_batch.open_run(pipeline.run(job, client=self.client).run)

    @property
    def num_asked(self) -> dict[str, int]:
        """Agent → records that it was asked about in the last run."""
        counts: dict[str, int] = {}
        for event in self.events.of(PartitionAnswered):
            counts[event.agent_id] = counts.get(event.agent_id, 0) + event.num_records
        return {agent: count for agent, count in counts.items() if count}


@pytest.fixture
def nights(tmp_path: Path, cluster_client: Client) -> Callable[..., Nights]:
    return lambda **sections: Nights(tmp_path, cluster_client, **sections)


def said(run: Run) -> pa.Table:
    keys = [(name, "ascending") for name in SAID[:3]]
    return run.arrow("answers").select(SAID).sort_by(keys).combine_chunks()


def assert_same(run: Run, full: Run) -> None:
    assert run.arrow().equals(full.arrow())
    assert (
        run.arrow("failures")
        .drop_columns(["attempt"])
        .equals(full.arrow("failures").drop_columns(["attempt"]))
    )
    assert said(run).equals(said(full))
    for count in ("records", "results", "failures", "ties", "confidence_histogram"):
        assert run.manifest["counts"][count] == full.manifest["counts"][count]


@pytest.mark.parametrize("seed", range(4))
def test_the_outcome_is_that_of_asking_about_everything(
    nights: Callable[..., Nights], seed: int
) -> None:
    job = nights()
    job.run(V1)
    v2 = changed(V1, seed)
    second = job.run(v2)
    assert_same(second, job.full(v2))
    known = {each["id"]: each["text"] for each in V1}
    num_new = sum(known.get(each["id"]) != each["text"] for each in v2)
    assert job.num_asked == {"strong": num_new, "weak": num_new}
    third = job.run(changed(v2, seed + 10))
    assert_same(third, job.full(None))
    assert third.manifest["since"]["run"] == second.manifest["run"]


METHODS: dict[str, dict[str, Any]] = {
    "reliability": {"merge": {"method": "reliability"}},
    "weighted": {"merge": {"method": "weighted", "accuracies": {"strong": 0.8, "weak": 0.6}}},
    "escalation": {"routing": {"escalate": {"agent": "strong", "below": 1.0}}},
    "no text": {"output": {"keep_text": False}},
}


@pytest.mark.parametrize("sections", METHODS.values(), ids=METHODS)
def test_whatever_the_merge(nights: Callable[..., Nights], sections: dict[str, Any]) -> None:
    job = nights(**sections)
    job.run(V1)
    v2 = changed(V1)
    assert_same(job.run(v2), job.full(v2))
    assert sum(job.num_asked.values()) < len(v2)


def writers(**sampling: Any) -> dict[str, Any]:
    agents = [
        {"name": name, "model": f"echo:{name}", "capabilities": ["summarize", name], **sampling}
        for name in ("strong", "weak")
    ]
    task = {"kind": "summarize", "max_new_tokens": 8}
    return {"task": task, "agents": agents, "merge": {"method": "mbr", "utility": "chrf"}}


def test_sampled_answers_belong_to_a_record_not_to_a_text(nights: Callable[..., Nights]) -> None:
    job = nights(**writers(samples=2, sampling={"temperature": 0.9}))
    job.run(V1)
    renamed = [{**each, "id": f"new-{each['id']}"} for each in V1[:5]]
    v2 = [*renamed, *changed(V1[5:])]
    second = job.run(v2)
    assert_same(second, job.full(v2))
    assert job.num_asked["weak"] >= len(renamed)
    assert second.manifest["since"]["records"]["unchanged"] >= len(renamed)


def test_greedy_answers_belong_to_a_text(nights: Callable[..., Nights]) -> None:
    """Without a column of ids, a row that is put before the others gives all of them new ids."""
    job = nights(**writers(), corpus={"id": None})
    texts = [{"text": each["text"]} for each in V1]
    job.run(texts)
    v2 = [{"text": "the first"}, *texts, {"text": "the last"}, texts[3]]
    second = job.run(v2)
    assert job.num_asked == {"strong": 2, "weak": 2}
    assert_same(second, job.full(v2))


def test_an_agent_that_is_added_alone_is_asked(nights: Callable[..., Nights]) -> None:
    job = nights()
    both = job.job(V1).model_dump(mode="json")["agents"]
    job.run(V1, agents=both[:1])
    second = job.run(V1, agents=both, merge={"method": "reliability"})
    assert job.num_asked == {"weak": len(V1)}
    assert {agent for event in job.events.of(HostReady) for agent in event.agents} == {"weak"}, (
        "nor loaded"
    )
    assert second.manifest["since"]["refused"] == {
        "weak": "that run did not ask it, or does not say how"
    }
    full = job.full(V1, agents=both, merge={"method": "reliability"})
    assert_same(second, full)
    assert second.manifest["engines"] == full.manifest["engines"]


def test_an_agent_that_is_asked_otherwise_is_asked_everything(
    nights: Callable[..., Nights],
) -> None:
    job = nights()
    agents = job.job(V1).model_dump(mode="json")["agents"]
    first = job.run(V1)
    agents[0]["prompt"] = "Which label? {text}"
    second = job.run(V1, agents=agents)
    assert job.num_asked == {"strong": len(V1)}
    (event,) = job.events.of(AnswersReused)
    assert (event.run, event.refused) == (
        first.manifest["run"],
        {"strong": "changed since: prompt"},
    )
    assert event.answers == {"weak": len(V1)}
    assert_same(second, job.full(V1, agents=agents))


def test_where_all_is_known_no_agent_is_loaded(tmp_path: Path, cluster_client: Client) -> None:
    job = Nights(tmp_path, cluster_client)
    job.run(V1)
    agents = job.job(V1).model_dump(mode="json")["agents"]
    for agent in agents:
        agent["resources"] = {"a machine that nobody has": 1}
    second = job.run(V1[5:], agents=agents)
    assert job.events.of(HostReady) == []
    assert job.num_asked == {}
    assert second.manifest["since"]["records"] == {
        "unchanged": 25, "changed": 0, "new": 0, "gone": 5
    }  # fmt: skip
    assert_same(second, job.full(V1[5:]))
    assert "reused" not in second.store.list("")
    told = explain(second.store, 0)
    assert set(told.reused) == {"strong", "weak"}
    assert told.problems == ()


@pytest.mark.parametrize("method", ["vote", "reliability"])
def test_without_a_scheduler_no_worker_is_started(
    tmp_path: Path, cluster_client: Client, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Nights(tmp_path, cluster_client, merge={"method": method})
    job.run(V1)
    monkeypatch.setattr("mas_batch.cluster.current_client", lambda: None)
    job.client = None
    second = job.run(V1[5:])
    job.client = cluster_client
    assert_same(second, job.full(V1[5:]))


def test_rows_say_which_run_asked_for_them(nights: Callable[..., Nights]) -> None:
    job = nights()
    runs = [job.run(V1[: 10 + 5 * i]) for i in range(3)]
    rows = runs[2].arrow("answers").to_pylist()
    names = [runs[0].manifest["run"], runs[1].manifest["run"], None]
    numbers = {row["record_id"]: int(row["record_id"][1:]) for row in rows}
    for each in rows:
        night = max(0, numbers[each["record_id"]] - 5) // 5
        assert each["reused_from"] == names[night], each["record_id"]
    figures = {agent["agent_id"]: agent for agent in runs[2].manifest["agents"]}
    assert figures["weak"]["reused"] == 15
    asked = runs[2].arrow("answers").filter(pc.field("reused_from").is_null())
    assert sum(agent["prompt_tokens"] for agent in figures.values()) == sum(
        asked["prompt_tokens"].to_pylist()
    ), "what the others took, an earlier run has paid"
    count = sum(part["count"] for part in _per_answer(runs[2]))
    assert count == asked.num_rows


def _per_answer(run: Run) -> list[dict[str, Any]]:
    rows = run.manifest["latency"]["per_record"]
    return [each for each in rows if each["part"] == "total"]


def test_failed_records_are_asked_again(nights: Callable[..., Nights]) -> None:
    """Also where nothing else is asked: that they all fail is then no sign of a broken engine."""
    job = nights(output={"max_failed_fraction": 1.0})
    agents = job.job(V1).model_dump(mode="json")["agents"]
    for agent in agents:
        agent["options"]["faults"] = {"number 8 ": "error", "number 9 ": "error",
                                      "number 17 ": "unparsable"}  # fmt: skip
    first = job.run(V1, agents=agents)
    assert first.arrow("failures").num_rows == 3
    second = job.run(V1[4:], agents=agents)
    assert job.num_asked == {"strong": 3, "weak": 3}
    assert_same(second, job.full(V1[4:], agents=agents))


def test_a_broken_engine_does_not_become_a_result(
    nights: Callable[..., Nights], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = nights(output={"max_failed_fraction": 1.0})
    agents = job.job(V1).model_dump(mode="json")["agents"]
    job.run(V1, agents=agents)
    # A key that has run out, say: nothing that makes the agent another one.
    agents[0]["options"]["fail_after"] = agents[1]["options"]["fail_after"] = 0
    echo = replace(ENGINES["echo"], operational=("fail_after",))
    monkeypatch.setitem(ENGINES._loaded, "echo", echo)
    with pytest.raises(RunError, match="failed on all that it was asked"):
        job.run([*V1, *(row(100 + i) for i in range(9))], agents=agents)


def test_an_earlier_run_without_since_will_do_and_so_will_none(
    nights: Callable[..., Nights],
) -> None:
    job = nights()
    first = job.run(V1[:20])
    (event,) = job.events.of(AnswersReused)
    assert event.run is None
    assert first.manifest["since"] == {"run": None, "records": {}, "refused": {}}
    plain = job.run(V1[:22], since=None)
    assert "since" not in plain.manifest
    assert job.num_asked["weak"] == 22
    job.run(V1[:24])
    assert job.num_asked["weak"] == 2


def test_what_is_complete_stays_so(nights: Callable[..., Nights]) -> None:
    job = nights()
    first = job.run(V1)
    summary = pipeline.run(job.job(None), emit=job.events)
    assert (summary.run, summary.already_complete) == (first.store.url, True)
    assert summary.exit_code == ExitCode.ANSWERED


@pytest.mark.parametrize(
    "damage", ["manifest.json", "plan.parquet", "partitions/part-000002.parquet",
               "answers/agent=weak/part-000002.parquet"],
)  # fmt: skip
def test_an_earlier_run_that_cannot_be_read_is_no_reason_to_ask_everything(
    nights: Callable[..., Nights], damage: str
) -> None:
    job = nights()
    first = job.run(V1)
    Path(first.store.path(damage)).write_bytes(b"{")
    with pytest.raises(RunError, match=r"cannot read an earlier run.*--set since=null"):
        job.run(V1[1:])
    assert job.num_asked == {}


def test_files_and_context_and_other_columns(nights: Callable[..., Nights]) -> None:
    """Rows that move between files, and a context that changes."""
    job = nights(**writers(), corpus={"context": "about", "id": "id"}, partition={"max_records": 3})
    folder = job.folder / "corpus"
    folder.mkdir()

    def night(files: dict[str, list[Row]]) -> dict[str, Any]:
        for old in folder.iterdir():
            old.unlink()
        for name, rows in files.items():
            lines = (json.dumps(each) + "\n" for each in rows)
            (folder / f"{name}.jsonl").write_text("".join(lines))
        return {"corpus": {"path": str(folder), "context": "about"}}

    rows = [{**row(i), "about": f"topic {i % 3}", "n": i} for i in range(12)]
    job.run(None, **night({"a": rows[:6], "b": rows[6:]}))
    moved = [{**rows[11], "about": "another"}, *rows[3:9], {**rows[0], "n": 99}]
    sections = night({"c": moved[4:], "a": moved[:4]})
    second = job.run(None, **sections)
    assert job.num_asked == {"strong": 1, "weak": 1}
    assert_same(second, job.full(None, **sections))


SPARING: dict[str, dict[str, Any]] = {
    "adaptive": {
        "merge": {"method": "weighted", "accuracies": {"strong": 0.9, "weak": 0.6}},
        "routing": {"adaptive": {"first": 1, "confidence": 0.85}},
    },
    "one of two": {"routing": {"answers_per_record": 1, "speculate": False}},
}


@pytest.mark.parametrize("sections", SPARING.values(), ids=SPARING)
def test_where_not_all_agents_answer_what_is_known_is_still_enough(
    nights: Callable[..., Nights], sections: dict[str, Any]
) -> None:
    """Who was asked first is a matter of time, so a run is compared with that of the night before.

    In the adaptive one the strong agent's answer is that of both, whoever was asked first.
    """
    job = nights(**sections)
    first = job.run(V1).pandas().set_index("record_id")["answer"]
    kept = V1[4:]  # whole partitions of four
    second = job.run(kept).pandas().set_index("record_id")["answer"]
    assert job.num_asked == {}
    assert second.equals(first.loc[[each["id"] for each in kept]])
    third = job.run([row(100), *kept, row(101)])
    results = third.pandas().set_index("record_id")
    assert len(results) == len(kept) + 2
    if "adaptive" in sections["routing"]:
        assert set(results[results["confidence"] < 0.85]["num_answers"]) <= {2}
    else:
        assert set(results["num_answers"]) == {1}
    assert third.manifest["since"]["records"]["new"] == 2


def test_a_run_that_is_cut_short_while_it_takes_over_goes_on(
    nights: Callable[..., Nights], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = nights()
    job.run(V1)
    v2 = changed(V1)
    monkeypatch.setattr("mas_batch.incremental.taking._RECORDS_AT_ONCE", 8)
    checks = iter([None, None])
    with monkeypatch.context() as cut:
        cut.setattr("mas_batch.run_folder.lock.RunLock.check", lambda lock: _next(checks))
        with pytest.raises(RuntimeError, match="cut short"):
            job.run(v2)
    second = job.run(None)
    assert second.manifest["since"]["records"]["new"] == 4
    assert_same(second, job.full(None))
    assert job.num_asked["weak"] <= len(v2) // 2


def _next(checks: Iterator[None]) -> None:
    try:
        next(checks)
    except StopIteration:
        raise RuntimeError("cut short") from None


def test_on_an_object_store(nights: Callable[..., Nights], s3_options: dict[str, Any]) -> None:
    output = {"path": "s3://bucket/runs", "storage_options": s3_options}
    job = nights(output=output)

    def run(rows: list[Row]) -> Run:
        job.events = Recorder()
        summary = pipeline.run(job.job(rows), client=job.client, emit=job.events)
        return mas_batch.open_run(summary.run, s3_options)

    run(V1[:8])
    v2 = [*V1[3:8], row(100)]
    second = run(v2)
    assert job.num_asked == {"strong": 1, "weak": 1}
    local = {"path": str(job.folder / "local"), "storage_options": {}}
    job.sections = {}
    full = mas_batch.open_run(pipeline.run(job.job(v2, output=local), client=job.client).run)
    assert_same(second, full)
