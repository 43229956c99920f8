"""A run's folder in, an evaluation out: what is counted, what is said, what is kept."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from distributed import Client
from rich.console import Console

from mas_batch import pipeline
from mas_batch.aggregate.merge import merge_answers
from mas_batch.corpus import CorpusReader
from mas_batch.errors import Reason, RunError
from mas_batch.evaluation import Calibration, Worth, evaluate, print_evaluation, write
from mas_batch.evaluation.specs import other_specs, run_spec
from mas_batch.job import Job
from mas_batch.job_file import check_job
from mas_batch.partition import partition
from mas_batch.quality import Kind
from mas_batch.records import ANSWERS, Answer
from mas_batch.run_folder.commits import commit_results
from mas_batch.run_folder.kept_job import read_job
from mas_batch.run_folder.manifest import write_job, write_manifest
from mas_batch.run_folder.names import FORMAT, answers_name
from mas_batch.run_folder.plan import read_records, stage
from mas_batch.run_folder.read import Run, open_run
from mas_batch.run_folder.storage import Store

Replies = Mapping[str, Sequence[str | tuple[str, ...] | None]]
MakeRun = Callable[..., Run]
LABELS = ["x", "y", "z"]
COUNTED = {
    **{"answers": 7, "failed_answers": 1, "wins": 3, "agreement": 0.5},
    **{"prompt_tokens": 80, "completion_tokens": 32, "compute_s": 4.0},
}
"""What a manifest says of an agent."""


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Build a run's folder from what each agent replied: None failed, "" was never asked; a tuple
    holds its samples."""

    def make(
        references: Sequence[str | None],
        replies: Replies,
        kind: str = "classify",
        folder: str = "run",
        max_records: int = 3,
        **sections: Any,
    ) -> Run:
        rows = [
            {"id": f"r{i}", "text": f"text {i}", "gold": reference}
            for i, reference in enumerate(references)
        ]
        corpus = tmp_path / "corpus.jsonl"
        corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
        labels = {"labels": LABELS} if kind == "classify" else {}
        job = check_job(
            {
                "name": "judged",
                "corpus": {"path": str(corpus), "id": "id"},
                "task": {"kind": kind, **labels},
                "agents": [{"name": name, "model": f"echo:{name}"} for name in replies],
                "output": {"path": str(tmp_path)},
                **sections,
            }
        )
        store = Store(str(tmp_path / folder))
        reader = CorpusReader(job.corpus)
        write_job(store, job)
        cut = partition(reader, max_tokens=10_000, max_records=max_records, tokens_per_record=8)
        plan = stage(store, reader, cut)
        method = job.merge.method or {"classify": "vote", "score": "mean"}.get(kind, "mbr")
        facts = {"method": method, "accuracies": job.merge.accuracies, "utility": "chrf"}
        ranges = [[0, plan.num_partitions]]
        manifest = {
            "format": FORMAT,
            "run": "judged-1",
            "counts": {"results": len(rows), "failures": 0},
            "agents": [{"agent_id": name, **COUNTED} for name in replies],
            "merge": facts,
            "files": {"results": ranges, "failures": [], "answers": dict.fromkeys(replies, ranges)},
        }
        write_manifest(store, manifest)
        spec = run_spec(Run(store, manifest), job)
        for index in range(plan.num_partitions):
            records = read_records(store, index, plan.passthrough)
            tables = [
                _answers(store, index, records, agent, given, kind)
                for agent, given in replies.items()
            ]
            merged = merge_answers(records, pa.concat_tables(tables), spec)
            commit_results(store, index, *merged, list(replies))
        return open_run(store.url)

    return make


def _answers(
    store: Store,
    index: int,
    records: pa.Table,
    agent: str,
    replies: Sequence[str | tuple[str, ...] | None],
    kind: str,
) -> pa.Table:
    rows = []
    for record_id in records["record_id"].to_pylist():
        reply = replies[int(record_id[1:])]
        if reply == "":
            continue
        samples = reply if isinstance(reply, tuple) else (reply,)
        for sample_id, said in enumerate(samples):
            answer = Answer(
                record_id,
                agent,
                agent,
                sample_id,
                said,
                label=said if kind == "classify" else None,
                value=float(said) if kind == "score" and said else None,
                prompt_tokens=10,
                completion_tokens=4,
                t_compute_s=0.5,
                reason=Reason.UNPARSABLE_ANSWER if said is None else None,
            )
            times = {"attempt": 1, "t_transfer_s": 0.1, "t_processing_s": 0.4}
            rows.append({**asdict(answer), **times})
    table = pa.Table.from_pylist(rows, ANSWERS)
    store.commit_table(answers_name(index, agent), table)
    return table


def accuracies(evaluation: Any) -> dict[str, float]:
    return {q.name: q.score("accuracy").value for q in evaluation.qualities}


def printed(evaluation: Any, width: int = 100) -> str:
    console = Console(file=io.StringIO(), record=True, width=width)
    print_evaluation(console, evaluation)
    return console.export_text()


REFERENCES = ["x", "y", "z", "x", "y", "z", "x", "y"]
REPLIES: dict[str, list[str | None]] = {
    "good": ["x", "y", "z", "x", "y", "z", None, "z"],  # 6 of 8
    "bad": ["y", "y", "y", "x", "z", "x", None, "z"],  # 2
    "worse": ["y", "z", "y", "y", "z", "x", None, "y"],  # 1
}


def test_every_system_is_judged(make_run: MakeRun) -> None:
    found = evaluate(make_run(REFERENCES, REPLIES), "gold", num_resamples=50)
    assert accuracies(found) == {
        "good": 6 / 8,
        "bad": 2 / 8,
        "worse": 1 / 8,
        "random agent": pytest.approx(9 / 24),
        "vote": 2 / 8,  # y, y, y, x, z, x, none, z
        "reliability": 2 / 8,  # eight records teach nothing: it votes
        "best": 6 / 8,  # prefers the agent that the job names first
        "oracle": 7 / 8,
    }
    assert (found.best_agent, found.goal, found.num_records) == ("good", "accuracy", 8)
    assert {q.name: q.num_missing for q in found.qualities if q.kind is Kind.AGENT} == {
        "good": 1,
        "bad": 1,
        "worse": 1,
    }
    assert set(found.skipped) == {"weighted"}
    assert "'bad' has none" in found.skipped["weighted"]


def test_weighted_is_tried_where_accuracies_are_known(make_run: MakeRun) -> None:
    known = {"good": 0.8, "bad": 0.3, "worse": 0.2}
    run = make_run(REFERENCES, REPLIES, merge={"method": "vote", "accuracies": known})
    found = evaluate(run, "gold", num_resamples=50, methods=["weighted"])
    assert accuracies(found)["weighted"] == 6 / 8
    assert "best" not in accuracies(found)
    assert found.skipped == {}


def texts_run(make_run: MakeRun, **merge: Any) -> Run:
    references = ["the cat sat on the mat", "a dog ran in the park"]
    replies = {"a": references, "b": ["the cat sat", "a dog ran"], "c": ["one bird", "two fish"]}
    return make_run(references, replies, kind="translate", merge=merge)


def test_learned_weights_are_no_accuracies_of_other_methods(make_run: MakeRun) -> None:
    """`mbr` with learned weights publishes them where other merges have accuracies."""
    run = texts_run(make_run, method="mbr", weights="learned")
    run.manifest["merge"] |= {"weights": "learned", "accuracies": {"a": 0.4, "b": 1.0, "c": 0.1}}
    job = read_job(run)
    specs, _ = other_specs(run, run_spec(run, job), job, None)
    assert specs.keys() == {"vote", "weighted", "reliability", "rover", "best", "auto"}
    assert not any(spec.accuracies for name, spec in specs.items() if name != "auto")
    found = evaluate(run, "gold", num_resamples=10)
    assert "'a' has none" in found.skipped["weighted"]
    (best,) = (quality for quality in found.qualities if quality.name == "best")
    assert best.score("chrF").value == 100, "it prefers the agent that the job names first"


@pytest.mark.parametrize(
    ("methods", "learns"), [(None, True), (["mbr"], True), (["vote"], False), (["rover"], False)]
)
def test_weights_are_learned_only_where_mbr_is_asked_for(
    make_run: MakeRun, methods: list[str] | None, learns: bool
) -> None:
    run = texts_run(make_run, method="mbr")
    job = read_job(run)
    specs, _ = other_specs(run, run_spec(run, job), job, methods)
    assert ("mbr, learned" in specs) is learns


def test_the_job_of_a_run_that_still_has_a_routing_mode_is_read(make_run: MakeRun) -> None:
    run = texts_run(make_run)
    expected = read_job(run)
    kept = run.store.read_bytes("job.yaml").decode()
    run.store.replace("job.yaml", kept.replace("routing:\n", "routing:\n  mode: native\n").encode())
    assert read_job(run) == expected


def test_a_merge_that_is_worse_is_said_loudly(make_run: MakeRun) -> None:
    references = ["x", "y", "z"] * 30
    liars = ["y", "z", "x"] * 30
    run = make_run(references, {"good": references, "liar": liars, "twin": liars}, max_records=50)
    found = evaluate(run, "gold", num_resamples=100)
    assert found.verdict is Worth.WORSE
    assert found.to_json()["verdict"] == "worse, beyond noise"
    line = "The merge (vote) is WORSE than the best single agent, good, beyond noise"
    assert line in printed(found)


def test_a_merge_that_is_better_is_said_too(make_run: MakeRun) -> None:
    """Three agents, each wrong in another third: the majority is always right."""
    references = ["x", "y", "z"] * 20
    replies = {
        str(agent): [
            LABELS[(LABELS.index(r) + 1) % 3] if i // 3 % 3 == agent else r
            for i, r in enumerate(references)
        ]
        for agent in range(3)
    }
    found = evaluate(make_run(references, replies, max_records=50), "gold", num_resamples=100)
    assert found.verdict is Worth.BETTER
    assert found.merge.score("accuracy").value == 1.0


def test_records_without_a_reference_are_counted_and_left_out(make_run: MakeRun) -> None:
    run = make_run(["x", None, " ", "y"], {"a": ["x", "x", "x", "x"]})
    found = evaluate(run, "gold", num_resamples=10)
    assert (found.num_records, found.num_without_reference) == (2, 2)
    assert accuracies(found)["a"] == 0.5
    assert "2 without a reference" in printed(found)


def test_an_agent_that_gave_up_a_partition_is_wrong_there(make_run: MakeRun) -> None:
    """No row at all: of an agent that is asked about everything that is a failure."""
    run = make_run(REFERENCES[:6], {"a": ["x", "y", "z", "", "", ""], "b": list("xyyxyy")})
    found = evaluate(run, "gold", num_resamples=10)
    assert accuracies(found)["a"] == 0.5
    a = next(q for q in found.qualities if q.name == "a")
    assert (a.num_records, a.num_missing) == (6, 3)


def test_an_agent_that_was_not_asked_is_not_wrong(make_run: MakeRun) -> None:
    replies = {"a": ["x", "y", "z", "", "", ""], "b": list("xyyxyy")}
    run = make_run(REFERENCES[:6], replies, routing={"answers_per_record": 1})
    found = evaluate(run, "gold", num_resamples=10)
    assert accuracies(found)["a"] == 1.0
    a = next(q for q in found.qualities if q.name == "a")
    assert (a.num_records, a.num_missing) == (3, 0)
    assert "a: not asked about every record" in found.notes[0]


def test_numbers(make_run: MakeRun) -> None:
    run = make_run(["1", "5", "9"], {"a": ["1", "5", None], "b": ["3", "7", "9"]}, kind="score")
    found = evaluate(run, "gold", num_resamples=10)
    scores = {q.name: q.score("MAE").value for q in found.qualities}
    assert scores["a"] == pytest.approx(3.0)  # the missing one is taken for 0
    assert scores["mean"] == pytest.approx(2 / 3)
    assert found.best_agent == "b"
    assert not found.higher_is_better
    (own, *_) = found.confidences
    assert (own.confidence_kind, own.error) == ("standard_error", None)
    assert "MAE, lower is better" in printed(found)


def test_texts(make_run: MakeRun) -> None:
    references = ["the cat sat", "a dog ran"]
    run = make_run(references, {"a": references, "b": ["cat", "dogs"]}, kind="translate")
    found = evaluate(run, "gold", num_resamples=20)
    assert found.goal == "chrF"
    assert found.qualities[0].score("chrF").value == 100
    assert "mbr chooses by chrF" in found.notes[0]
    assert found.agreement[0].utility is not None
    assert "BLEU: nrefs:1|" in printed(found)


def test_merges_that_were_made_already_are_judged(make_run: MakeRun) -> None:
    table = pa.table(
        {
            "record_id": ["r0", "r1"],
            "answer": ["x", "y"],
            "confidence": [0.9, 0.8],
            "confidence_kind": ["posterior"] * 2,
        }
    )
    run = make_run(REFERENCES[:2], {"a": ["y", "y"]})
    found = evaluate(run, "gold", merges={"second": table, "best": table}, num_resamples=10)
    assert accuracies(found)["second"] == 1.0
    assert [q.name for q in found.qualities if q.kind is Kind.MERGE].count("best") == 1
    judged = {each.name: each for each in found.confidences}
    assert judged["second"].confidence_kind == "posterior"


def test_the_same_seed_gives_the_same_figures(make_run: MakeRun) -> None:
    run = make_run(REFERENCES, REPLIES)
    first, second = (evaluate(run, "gold", num_resamples=30) for _ in range(2))
    assert first == second
    assert evaluate(run, "gold", num_resamples=30, seed=1) != first


def test_a_run_without_its_plan_is_told_so(make_run: MakeRun) -> None:
    run = texts_run(make_run, method="mbr")
    Path(run.store.path("plan.parquet")).unlink()
    with pytest.raises(RunError, match=r"plan\.parquet is missing"):
        evaluate(run, "gold", num_resamples=10)


@pytest.mark.parametrize(
    ("module", "kind", "given"),
    [
        ("sklearn.metrics", "classify", ["x", "y"] * 30),
        ("scipy.stats", "score", ["1", "2"] * 30),
        ("rouge_score", "translate", ["one", "two"]),
    ],
)
def test_a_missing_package_says_what_to_install(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, module: str, kind: str, given: list[str]
) -> None:
    run = make_run(given, {"a": given, "b": given}, kind=kind, max_records=60)
    names = [module, *(name for name in sys.modules if name.startswith(f"{module}."))]
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RunError, match=r"not installed: pip install 'mas_batch\[evaluate\]'"):
        evaluate(run, "gold", num_resamples=10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reference": "golden"}, r"no column 'golden'.*allowed: record_id.*gold"),
        ({"reference": "reference"}, r"no usable record has a reference.*8 have none"),
        ({"reference": "gold", "methods": ["magic"]}, r"no merge method 'magic'.*vote"),
        ({"reference": "gold", "num_resamples": 0}, r"num_resamples is 0"),
    ],
)
def test_wrong_arguments_are_named(
    make_run: MakeRun, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(RunError, match=message):
        evaluate(make_run(REFERENCES, REPLIES), **arguments)


# What is kept


def test_the_files_hold_what_was_found(make_run: MakeRun) -> None:
    references = REFERENCES * 8
    replies = {name: [*given] * 8 for name, given in REPLIES.items()}
    run = make_run(references, replies, max_records=50)
    for seed in (0, 1):  # the second replaces the first
        found = evaluate(run, "gold", num_resamples=30, seed=seed)
        write(found, run.store)
    quality = run.store.read_table("evaluation/quality.parquet").to_pylist()
    assert len(quality) == 2 * len(found.qualities)
    good = quality[0]
    assert (good["kind"], good["name"], good["metric"]) == ("agent", "good", "accuracy")
    assert good["low"] <= good["value"] <= good["high"]
    assert good["difference"] is None
    assert quality[2]["difference"] == pytest.approx(-0.5)
    assert [(cost.agent_id, cost.answers, cost.tokens_per_s) for cost in found.costs] == [
        ("bad", 7, 8.0), ("good", 7, 8.0), ("worse", 7, 8.0),
    ]  # fmt: skip
    assert run.store.read_table("evaluation/agreement.parquet").num_rows == 3
    kept = json.loads(run.store.read_bytes("evaluation/calibration.json"))
    own = next(each for each in kept if each["kind"] == "run")
    assert Calibration.from_json(own["calibration"]).apply(1.0) == pytest.approx(
        found.confidences[0].calibration.apply(1.0)
    )
    json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.parametrize("width", [80, 100])
def test_the_page_fits_a_terminal(make_run: MakeRun, width: int) -> None:
    page = printed(evaluate(make_run(REFERENCES, REPLIES), "gold", num_resamples=30), width)
    titles = ["Quality", "Other metrics", "Agreement", "Confidence", "Cost"]
    lines = page.splitlines()
    starts = [next(i for i, line in enumerate(lines) if line.startswith(t)) for t in titles]
    assert starts == sorted(starts)
    assert max(map(len, lines)) <= width
    assert "…" not in page, "a figure is cut"
    assert "Scaling" not in page


# Scaling


def keep_events(run: Run, seconds: Sequence[float]) -> None:
    """One execution per figure, which asked at 0 and merged so many seconds later."""
    for number, wall_s in enumerate(seconds):
        start = f"2026-01-0{number + 1}T00:00:"
        lines = [
            {"time": f"{start}00.000+00:00", "event": "RunStarted"},
            {"time": f"{start}05.000+00:00", "event": "PartitionAsked"},
            {"time": f"{start}06.000+00:00", "event": "PartitionMerged"},
            {"time": f"{start}{5 + wall_s:06.3f}+00:00", "event": "PartitionMerged"},
            {"time": f"{start}59.000+00:00", "event": "RunFinished"},
        ]
        content = "".join(json.dumps(line) + "\n" for line in lines)
        run.store.commit(f"events/2026010{number + 1}T000000-0000.jsonl", content.encode())


def agents_of(count: int) -> list[dict[str, Any]]:
    return [{"name": "a", "model": "echo:a", "count": count}]


def test_runs_with_other_numbers_of_hosts_are_compared(make_run: MakeRun) -> None:
    replies = {"a": ["x", "y", "z", "x"]}
    four = make_run(REFERENCES[:4], replies, folder="four", agents=agents_of(4))
    one = make_run(REFERENCES[:4], replies, folder="one", agents=agents_of(1))
    keep_events(four, [10.0])
    keep_events(one, [12.0, 8.0])  # resumed once
    found = evaluate(four, "gold", compare=[one], num_resamples=10)
    first, second = found.scaling
    assert (first.num_hosts, first.wall_s, first.num_executions) == (1, 20.0, 2)
    assert (second.num_hosts, second.records_per_s) == (4, 0.4)
    assert (second.speed_up, second.efficiency) == (2.0, 0.5)
    assert "a 1 (2 executions)" in printed(found)


def test_other_jobs_and_runs_without_events_are_not_compared(make_run: MakeRun) -> None:
    run = make_run(REFERENCES, REPLIES)
    other = Run(run.store, {**run.manifest, "run": "judged-2"})
    with pytest.raises(RunError, match=r"only runs of one job.*judged-1.*judged-2"):
        evaluate(run, "gold", compare=[other], num_resamples=10)
    with pytest.raises(RunError, match="no event of a partition asked"):
        evaluate(run, "gold", compare=[run], num_resamples=10)


# A real run


def test_a_real_run_is_judged(cluster_client: Client, make_job: Callable[..., Job]) -> None:
    rows = [{"id": f"r{i}", "text": f"text {i}", "gold": LABELS[i % 3]} for i in range(12)]
    agents = [
        {"name": name, "model": f"echo:{name}", "options": {"labels": LABELS, "error_rate": rate}}
        for name, rate in (("a", 0.0), ("b", 0.5))
    ]
    task = {"kind": "classify", "labels": LABELS}
    job = make_job(rows, agents=agents, task=task)
    run = open_run(pipeline.run(job, client=cluster_client).run)
    found = evaluate(run, "gold", compare=[run], num_resamples=20)
    published = run.arrow().to_pylist()
    right = sum(row["answer"] == row["gold"] for row in published)
    assert found.merge.score("accuracy").value == pytest.approx(right / 12)
    assert [cost.answers for cost in found.costs] == [12, 12]
    assert found.scaling[0].wall_s > 0
    write(found, run.store)
    assert "quality.parquet" in run.store.list("evaluation")


def test_the_best_agent_s_own_samples_stand_beside_the_mix(make_run: MakeRun) -> None:
    agents = [
        {"name": "good", "model": "echo:good", "samples": 3},
        {"name": "bad", "model": "echo:bad"},
    ]
    replies: Replies = {
        "good": [("x", "x", "y"), ("y", "y", "y"), ("z", "x", "z")],
        "bad": ["z", "x", "y"],
    }
    found = evaluate(make_run(["x", "y", "z"], replies, agents=agents), "gold", num_resamples=50)
    assert accuracies(found)["good × 3 samples"] == 1
    assert any("good × 3 samples, without the other agents" in note for note in found.notes)
    assert "bad × 1 samples" not in accuracies(found)
    assert found.confusion is not None
    assert [row[i] for i, row in enumerate(found.confusion.counts)] == [1, 1, 1]
    assert "a row per right label" in printed(found)
