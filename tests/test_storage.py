"""Exactly-once commits, on a local disk and on an S3-compatible server."""

from __future__ import annotations

import errno
import os
import pickle
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mas_batch.errors import JobError, OutputError, RunError
from mas_batch.run_folder.storage import Store, parquet_bytes
from mas_batch.safe_text import without_credentials


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


def test_files_can_be_removed_twice(store: Store) -> None:
    store.commit("a/x", b"1")
    store.commit("a/y", b"1")
    store.remove("a/x")
    store.remove("a/x")
    assert store.list("a") == {"y"}


def test_what_is_not_there_is_named(store: Store) -> None:
    for read in (store.read_bytes, store.read_table, store.read_schema):
        with pytest.raises(FileNotFoundError) as raised:
            read("a/b.parquet")
        assert raised.value.filename == store.location("a/b.parquet")
    assert not store.exists("a/b.parquet")


def test_a_damaged_table_is_named(store: Store) -> None:
    store.commit("t.parquet", parquet_bytes(pa.table({"a": [1]}))[:-9])
    for read in (store.read_table, store.read_schema):
        with pytest.raises(RunError, match=r"run/t\.parquet cannot be read: ArrowInvalid: "):
            read("t.parquet")


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    store = Store(str(tmp_path / "file"))
    for write in (store.commit, store.replace):
        with pytest.raises(OutputError, match=r"/file/x cannot be written: (File ex|Not a dir)"):
            write("x", b"1")
    with pytest.raises(RunError, match="/file is in the way: a folder must be there"):
        store.list("")
    assert not store.exists("x")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_in_the_way_of_a_file_is_named_and_no_temporary_file_stays(tmp_path: Path) -> None:
    (tmp_path / "x/y").mkdir(parents=True)
    store = Store(str(tmp_path))
    with pytest.raises(OutputError, match="/x cannot be written: "):
        store.replace("x", b"1")
    with pytest.raises(OutputError, match="/x cannot be removed: "):
        store.remove("x")
    with pytest.raises(RunError, match="/x cannot be read: Is a directory"):
        store.read_bytes("x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_filesystem_without_hard_links_is_named_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: object, target: object) -> None:  # as vfat does, which needs root to mount
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), source)

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(OutputError, match=r"/x cannot be written: .* makes no hard link") as raised:
        Store(str(tmp_path)).commit("x", b"1")
    assert "output.path" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_to_be_unable_to_look_is_not_to_be_absent(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    store = Store(str(tmp_path))
    with pytest.raises(RunError, match="/loop/x cannot be looked up: Too many levels of sym"):
        store.exists("loop/x")
    with pytest.raises(RunError, match="/loop/x cannot be listed: Too many levels of sym"):
        store.list("loop/x")


def actions(store: Store) -> list[tuple[type[Exception], Callable[[], object]]]:
    return [
        (RunError, lambda: store.read_bytes("a")),
        (RunError, lambda: store.exists("a")),
        (RunError, lambda: store.list("a")),
        (OutputError, lambda: store.commit("a", b"")),
        (OutputError, lambda: store.replace("a", b"")),
        (OutputError, lambda: store.remove("a")),
    ]


def test_a_server_that_cannot_be_reached_is_a_clear_error(s3_options: dict[str, Any]) -> None:
    options = {
        **s3_options,
        "client_kwargs": {**s3_options["client_kwargs"], "endpoint_url": "http://127.0.0.1:9"},
        "config_kwargs": {"retries": {"max_attempts": 0}},
    }
    store = Store("s3://bucket/run", options)
    for kind, action in actions(store):
        with pytest.raises(kind, match=r"^s3://bucket/run/a cannot be .*: .*127\.0\.0\.1:9"):
            action()


SHOWN = {
    "s3://key:secret@bucket/run": "s3://bucket/run",
    "s3://key:sec/ret+=@bucket/run": "s3://bucket/run",
    "https://user:pw@host:8080/x@y": "https://host:8080/x@y",
    "https://token@host/x": "https://host/x",
    "sftp://user@host:22/x": "sftp://host:22/x",
    "simplecache::s3://key:secret@bucket/run": "simplecache::s3://bucket/run",
    "http://host:9000/a@b": "http://host:9000/a@b",
    "s3://bucket/user@example.org": "s3://bucket/user@example.org",
    "/home/user:me@here/runs": "/home/user:me@here/runs",
}


@pytest.mark.parametrize(("url", "shown"), SHOWN.items())
def test_credentials_are_stripped_and_nothing_else(url: str, shown: str) -> None:
    assert without_credentials(url) == shown
    assert repr(Store(url, {"secret": "sesame"})) == f"Store({shown!r})"


@pytest.mark.parametrize("secret", ["opensesame", "open/sesame"])
def test_credentials_of_a_url_are_in_no_error(secret: str, s3_options: dict[str, Any]) -> None:
    store = Store(f"s3://aladdin:{secret}@bucket/run", s3_options)
    for kind, action in actions(store):
        with pytest.raises(kind) as raised:
            action()
        text = "".join(traceback.format_exception(raised.value))
        assert "s3://bucket/run/a cannot be" in text
        assert "Invalid bucket name" in text, "what the server or its client says is kept"
        for secret_part in ("aladdin", "sesame", "open/", "opens"):
            assert secret_part not in text
    with pytest.raises(JobError) as bad:
        Store(f"nonsense://aladdin:{secret}@x").exists("y")
    assert "sesame" not in "".join(traceback.format_exception(bad.value))


def test_an_unknown_protocol_is_a_bad_job() -> None:
    with pytest.raises(JobError, match="nonsense"):
        Store("nonsense://x").exists("y")
