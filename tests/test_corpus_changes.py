"""A corpus that is rewritten while it is read: an error that names the file, never a mixture."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest

from mas_batch import pipeline
from mas_batch.corpus import CorpusReader
from mas_batch.errors import CorpusChangedError, ExitCode
from mas_batch.job import Corpus, Job
from mas_batch.records import Record

MakeJob = Callable[..., Job]


def lines(word: str, count: int = 3000) -> bytes:
    return b"".join(
        json.dumps({"id": f"{i}", "text": f"{word} {i}"}).encode() + b"\n" for i in range(count)
    )


def read_and(change: Callable[[], object], reader: CorpusReader) -> list[Record]:
    """Read the corpus, and change it once its first record is there."""
    records: Iterator[Record] = iter(reader)
    first = next(records)
    change()
    return [first, *records]


@pytest.mark.parametrize("limit", [None, 5], ids=["whole", "limit"])
@pytest.mark.parametrize("codec", ["", ".gz"])
def test_a_file_that_is_rewritten_in_place(tmp_path: Path, codec: str, limit: int | None) -> None:
    pack = gzip.compress if codec else bytes
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl{codec}").write_bytes(pack(lines("old")))
    changed = tmp_path / f"a.jsonl{codec}"
    reader = CorpusReader(Corpus(path=str(tmp_path), id="id" if limit else None, limit=limit))
    with pytest.raises(CorpusChangedError, match=rf"{changed} was changed while .*\(size was \d+"):
        read_and(lambda: changed.write_bytes(pack(lines("newer"))), reader)


def test_a_file_of_the_same_size_and_one_that_is_not_read_yet(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines("old", 3))
    later = tmp_path / "b.jsonl"
    with pytest.raises(CorpusChangedError, match=r"b\.jsonl was changed .*\(mtime was"):
        read_and(lambda: os.utime(later, (1, 1)), CorpusReader(Corpus(path=str(tmp_path))))
    with pytest.raises(CorpusChangedError, match=r"b\.jsonl was removed while"):
        read_and(later.unlink, CorpusReader(Corpus(path=str(tmp_path))))


def test_a_file_that_is_touched_after_the_limit_does_not_matter(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines("old", 3))
    reader = CorpusReader(Corpus(path=str(tmp_path), limit=2))
    assert len(read_and((tmp_path / "b.jsonl").unlink, reader)) == 2


def test_an_object_that_is_rewritten(s3_options: dict[str, Any]) -> None:
    bucket = fsspec.filesystem("s3", **s3_options)
    bucket.pipe_file("bucket/c/a.jsonl", lines("old"))
    for path in ("s3://bucket/c", "s3://bucket/c/a.jsonl"):
        reader = CorpusReader(Corpus(path=path, storage_options=s3_options))
        assert len(list(reader)) == 3000
        word = "new" if path.endswith("c") else "old"
        with pytest.raises(CorpusChangedError, match=r"s3://bucket/c/a\.jsonl was .*\(ETag was"):
            read_and(partial(bucket.pipe_file, "bucket/c/a.jsonl", lines(word)), reader)


def test_a_run_is_not_published_and_the_same_command_reads_anew(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job()
    corpus = Path(job.corpus.path[0])
    stage = pipeline.stage

    def rewritten_meanwhile(*arguments: Any) -> Any:
        corpus.write_bytes(lines("new", 5))
        return stage(*arguments)

    monkeypatch.setattr(pipeline, "stage", rewritten_meanwhile)
    with pytest.raises(CorpusChangedError, match=str(corpus)) as changed:
        pipeline.run(job)
    assert changed.value.exit_code == ExitCode.RUN_FAILED
    assert list(Path(job.output.path).iterdir()) == [], "its name is of a corpus that is no more"
