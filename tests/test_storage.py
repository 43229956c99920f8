"""Exactly-once commits, on a local disk and on an S3-compatible server."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from mas_batch.errors import JobError, RunError
from mas_batch.storage import Store, parquet_bytes


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "local":
        yield Store(str(tmp_path / "run"))
    else:
        options = request.getfixturevalue("s3_options")
        yield Store("s3://bucket/run", options)


def test_the_first_commit_wins(store: Store) -> None:
    assert not store.exists("results/part-0.parquet")
    assert store.commit("results/part-0.parquet", b"first")
    assert not store.commit("results/part-0.parquet", b"second")
    assert store.read_bytes("results/part-0.parquet") == b"first"
    assert store.exists("results/part-0.parquet")
    assert store.list("results") == {"part-0.parquet"}
    assert store.list("nothing") == set()


def test_of_many_writers_one_wins(store: Store) -> None:
    won: list[bytes] = []

    def write(content: bytes) -> None:
        if Store(store.url, store.options).commit("a/b", content):
            won.append(content)

    threads = [threading.Thread(target=write, args=(bytes([i]) * 1000,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read_bytes("a/b") == won[0]
    assert store.list("a") == {"b"}


def test_replace_overwrites_and_folders_can_be_removed(store: Store) -> None:
    store.replace("manifest.json", b"1")
    store.replace("manifest.json", b"2")
    assert store.read_bytes("manifest.json") == b"2"
    store.commit("folder/x", b"1")
    store.remove_folder("folder")
    store.remove_folder("folder")
    assert not store.exists("folder/x")


def test_tables_come_back_and_equal_tables_are_equal_bytes(store: Store) -> None:
    table = pa.table({"a": [1, 2], "b": ["x", None]})
    store.commit_table("t.parquet", table)
    assert store.read_table("t.parquet").equals(table)
    assert parquet_bytes(table) == parquet_bytes(pa.table({"a": [1, 2], "b": ["x", None]}))


def test_a_store_travels_to_workers(store: Store) -> None:
    store.commit("x", b"1")
    assert pickle.loads(pickle.dumps(store)).read_bytes("x") == b"1"


def test_temporary_files_of_killed_writers_are_not_seen_and_are_collected(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.commit("results/part-0", b"1")
    (tmp_path / "results/.tmp-dead").write_bytes(b"half")
    assert store.list("results") == {"part-0"}
    assert store.remove_orphans() == 1
    assert [p.name for p in (tmp_path / "results").iterdir()] == ["part-0"]


def test_an_output_that_is_no_folder_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RunError, match="cannot be written"):
        Store(str(tmp_path / "file")).commit("x", b"1")


def test_an_unknown_protocol_is_a_bad_job() -> None:
    with pytest.raises(JobError, match="nonsense"):
        Store("nonsense://x").exists("y")
