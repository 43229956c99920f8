"""Paths mean themselves, on every filesystem; what a run writes is never its corpus."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from mas_batch import explain, pipeline
from mas_batch.corpus import CorpusReader
from mas_batch.errors import JobError
from mas_batch.job import Corpus, Job
from mas_batch.partition import partition
from mas_batch.run_folder.manifest import write_job
from mas_batch.run_folder.plan import stage
from mas_batch.run_folder.storage import Store

MakeJob = Callable[..., Job]
ODD = {"runs[1]": "runs1", "run?": "runs", "r*s": "rabbits"}
"""Name of a folder to a neighbour that it would match as a pattern."""
ROW = json.dumps({"text": "a"}).encode() + b"\n"


@pytest.fixture(params=["local", "file", "memory", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "s3":
        yield Store("s3://bucket/G", request.getfixturevalue("s3_options"))
    elif request.param == "memory":
        yield Store("memory://test_paths")
        fsspec.filesystem("memory").rm("/test_paths", recursive=True)
    else:
        yield Store(f"{'file://' if request.param == 'file' else ''}{tmp_path}")


def test_a_stores_path_is_no_pattern(root: Store) -> None:
    for name, neighbour in ODD.items():
        check_that_no_neighbour_is_touched(root.child(name), root.child(neighbour))


def check_that_no_neighbour_is_touched(odd: Store, other: Store) -> None:
    for store in (other, odd):
        for file in ("a/x", "a/y", "z"):
            assert store.commit(file, b"1")
    assert odd.list("") == {"a", "z"}
    odd.remove("z")
    assert not odd.exists("z")
    odd.remove_folder("a")
    assert not odd.exists("a/x")
    odd.commit("b/x", b"2")
    assert odd.read_bytes("b/x") == b"2"
    odd.remove_folder("")
    assert (odd.list(""), odd.exists("b/x"), odd.exists("")) == (set(), False, False)
    assert (other.list(""), other.list("a")) == ({"a", "z"}, {"x", "y"})


def test_a_corpus_path_that_is_there_is_no_pattern(root: Store) -> None:
    def listed(*parts: str) -> list[str]:
        path = "/".join((root.url, *parts))
        files = CorpusReader(Corpus(path=path, storage_options=dict(root.options))).files
        return [file.url.partition(f"{root.path('')}/")[2] for file in files]

    for name, neighbour in ODD.items():
        root.commit(f"{neighbour}/plain.jsonl", ROW)
        assert f"{neighbour}/plain.jsonl" in listed(name, "plain.jsonl"), "a pattern, so far"
        own, plain = f"{name}/{name}.jsonl", f"{name}/plain.jsonl"
        root.commit(own, ROW)
        root.commit(plain, ROW)
        assert listed(name) == sorted([own, plain])
        assert listed(name, f"{name}.jsonl") == [own]
        assert listed(name, "p*.jsonl") == [plain], "the folder is meant, the file is a pattern"


def test_colons_in_local_names_are_not_cut_off(tmp_path: Path) -> None:
    Store(f"{tmp_path}/a::b").commit("x", b"1")
    assert [path.name for path in tmp_path.iterdir()] == ["a::b"]
    with pytest.raises(JobError, match="`::` chains filesystems"):
        Store("s3://bucket/a::b").exists("x")
    with pytest.raises(JobError, match="`::` chains filesystems"):
        CorpusReader(Corpus(path="memory://a::b"))


def test_a_wrong_job_deletes_no_other_run(make_job: MakeJob, s3_options: dict[str, Any]) -> None:
    rows = [{"id": "a", "text": "x"}, {"id": "a", "text": "y"}]
    output = {"path": "s3://bucket/G/runs[1]", "storage_options": s3_options}
    job = make_job(rows, output=output)
    _, name = pipeline.open_store(job, CorpusReader(job.corpus))
    published = Store(f"s3://bucket/G/runs1/{name}", s3_options)
    files = ("job.yaml", "locks/000001.json", "locks/000001.beat.json", "manifest.json")
    files += ("partitions/part-000000.parquet", "results/part-000000.parquet")
    for file in files:
        published.commit(file, b"{}")
    with pytest.raises(JobError, match="occurs twice"):
        pipeline.run(job)
    assert [file for file in files if not published.exists(file)] == []
    assert Store("s3://bucket/G", s3_options).list("") == {"runs1"}


def test_a_record_is_found_in_a_run_of_any_name(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job()
    corpus, store = CorpusReader(job.corpus), Store(f"{tmp_path}/a::b[1]")
    cut = partition(corpus, max_tokens=999, max_records=3, tokens_per_record=1)
    stage(store, corpus, cut)
    assert explain.find_record(store, "r7") == 2


# --- Output and corpus


IN_THE_CORPUS = {
    "c/**/*.jsonl": "c/out",
    "c": "c/out",
    "c/": "c",
    "c/*": "c/out",
    "c/*/*": "c",
    "*": "c/out",
    "c/./x/..": "c/y/../out",
    "link": "c/out",
    "c/*/**": "link/d/out",
    "c/*/*.jsonl": "c",
}
OUTSIDE = {
    "c/*.jsonl": "c/out",
    "c/a.jsonl": "c",
    "c/d": "c/out",
    "c/d/*": "c",
    "c": "out",
    "c/**": "c/_out",
    "c/[d]": "c/.out",
}


@pytest.mark.parametrize(("pattern", "output"), IN_THE_CORPUS.items())
def test_an_output_in_the_corpus_is_refused(
    make_job: MakeJob, tmp_path: Path, pattern: str, output: str
) -> None:
    (tmp_path / "c/d").mkdir(parents=True)
    (tmp_path / "c/x").mkdir()
    (tmp_path / "link").symlink_to("c")
    for name in ("c/a", "c/d/b"):
        (tmp_path / f"{name}.jsonl").write_bytes(ROW)
    corpus, folder = f"{tmp_path}/{pattern}", f"{tmp_path}/{output}"
    job = make_job(corpus={"path": corpus}, output={"path": f"{tmp_path}/_elsewhere"})
    merge = job.merge.model_copy(update={"history": folder})  # whatever the method
    for key, wrong in {
        "output.path": job.with_changes(output=job.output.with_changes(path=folder)),
        "merge.history": job.model_copy(update={"merge": merge}),
    }.items():
        with pytest.raises(JobError) as refused:
            pipeline.preview(wrong)
        assert refused.value.key == key
        assert f"{folder!r} lies in the corpus {corpus!r}" in str(refused.value)


@pytest.mark.parametrize(("pattern", "output"), OUTSIDE.items())
def test_an_output_beside_the_corpus_is_not(
    make_job: MakeJob, tmp_path: Path, pattern: str, output: str
) -> None:
    (tmp_path / "c/d").mkdir(parents=True)
    for name in ("c/a", "c/d/b"):
        (tmp_path / f"{name}.jsonl").write_bytes(ROW)
    job = make_job(
        corpus={"path": f"{tmp_path}/{pattern}"}, output={"path": f"{tmp_path}/{output}"}
    )
    assert pipeline.preview(job).num_records in (1, 2)


def test_the_same_holds_on_object_storage(make_job: MakeJob, s3_options: dict[str, Any]) -> None:
    Store("s3://bucket/c", s3_options).commit("a.jsonl", ROW)
    corpus = {"path": "s3://bucket/c", "storage_options": s3_options}
    output = {"path": "s3://bucket/c/out", "storage_options": s3_options}
    with pytest.raises(JobError, match="'s3://bucket/c/out' lies in the corpus 's3://bucket/c'"):
        pipeline.preview(make_job(corpus=corpus, output=output))
    beside = {"path": "s3://bucket/out", "storage_options": s3_options}
    assert pipeline.preview(make_job(corpus=corpus, output=beside)).num_records == 1


def test_the_files_of_runs_are_no_corpus_unless_they_are_asked_for(
    make_job: MakeJob, tmp_path: Path
) -> None:
    job = make_job()
    store, name = pipeline.open_store(job, CorpusReader(job.corpus))
    for run in (store, Store(f"{store.url}-retry-1")):
        write_job(run, job)
        for file in ("results/part-000000.parquet", "events/a-0000.jsonl", "learned.json"):
            run.commit(file, b"")
    Store(f"{tmp_path}/like-0123456789abcdef").commit("a.jsonl", ROW)  # by its name alone

    def names(path: object) -> list[str]:
        return [file.relative for file in CorpusReader(Corpus(path=str(path))).files]

    corpus = ["corpus.jsonl", "like-0123456789abcdef/a.jsonl"]
    assert names(tmp_path) == corpus
    assert names(f"{tmp_path}/**/*.jsonl") == corpus
    with pytest.raises(JobError, match=r"matches no data file .* 6 files of runs are left out"):
        names(tmp_path / "runs")
    assert names(tmp_path / "runs" / name / "results") == ["part-000000.parquet"]


def test_a_file_that_a_link_names_again_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/b.jsonl").write_bytes(ROW)
    (tmp_path / "a.jsonl").symlink_to("real/b.jsonl")
    (tmp_path / "real/c.jsonl").symlink_to("b.jsonl")
    os.link(tmp_path / "real/b.jsonl", tmp_path / "real/hard.jsonl")  # a file of its own
    (tmp_path / "linked").symlink_to("real")

    def names(path: Any) -> list[str]:
        return [file.relative for file in CorpusReader(Corpus(path=path)).files]

    assert names(str(tmp_path)) == ["real/b.jsonl", "real/hard.jsonl"]
    assert names(f"{tmp_path}/*/b.jsonl") == ["real/b.jsonl"]
    assert names([f"{tmp_path}/a.jsonl", f"{tmp_path}/real/b.jsonl"]) == ["b.jsonl"]
    assert names(f"{tmp_path}/a.jsonl") == ["a.jsonl"], "a link by itself is read as ever"
