"""Reading from S3: a real HTTP server on this machine, with the real client."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from moto.server import ThreadedMotoServer

from mas_batch.corpus import CorpusReader
from mas_batch.errors import JobError
from mas_batch.job import Corpus


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A bucket with data; yields the job's storage_options."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="corpus")
    for name in ("b", "a"):
        table = io.BytesIO()
        pq.write_table(pa.table({"text": [f"{name}1", f"{name}2"], "n": [1, 2]}), table)
        client.put_object(Bucket="corpus", Key=f"dir/{name}.parquet", Body=table.getvalue())
    lines = b"".join(json.dumps({"text": f"line {i}"}).encode() + b"\n" for i in range(5000))
    client.put_object(Bucket="corpus", Key="logs/day/a.jsonl.gz", Body=gzip.compress(lines))
    client.put_object(Bucket="corpus", Key="logs/plain.jsonl", Body=lines)
    yield {"client_kwargs": {"endpoint_url": endpoint}}
    client.close()
    s3fs.S3FileSystem.clear_instance_cache()


def read(path: str, options: dict[str, Any]) -> CorpusReader:
    return CorpusReader(Corpus(path=path, storage_options=options))


def test_parquet_by_glob(bucket: dict[str, Any]) -> None:
    reader = read("s3://corpus/dir/*.parquet", bucket)
    assert [file.relative for file in reader.files] == ["a.parquet", "b.parquet"]
    assert reader.files[0].url == "s3://corpus/dir/a.parquet"
    assert all(file.size_bytes and len(file.version) == 32 for file in reader.files)
    assert [(r.text, r.passthrough["n"]) for r in reader] == [
        ("a1", 1),
        ("a2", 2),
        ("b1", 1),
        ("b2", 2),
    ]
    assert reader.passthrough_schema() == pa.schema([("n", pa.int64())])


def test_jsonl_by_folder(bucket: dict[str, Any]) -> None:
    reader = read("s3://corpus/logs/", bucket)
    assert [file.relative for file in reader.files] == ["day/a.jsonl.gz", "plain.jsonl"]
    records = list(reader)
    assert [r.text for r in records] == [f"line {i}" for i in range(5000)] * 2
    assert len({r.record_id for r in records}) == 10_000


def test_a_rewritten_object_changes_the_fingerprint(bucket: dict[str, Any], endpoint: str) -> None:
    before = read("s3://corpus/logs", bucket).fingerprint
    assert read("s3://corpus/logs", bucket).fingerprint == before
    client = boto3.client("s3", endpoint_url=endpoint)
    same_size = client.get_object(Bucket="corpus", Key="logs/plain.jsonl")["Body"].read()[::-1]
    client.put_object(Bucket="corpus", Key="logs/plain.jsonl", Body=same_size)
    client.close()
    assert read("s3://corpus/logs", bucket).fingerprint != before


@pytest.mark.parametrize(
    "path", ["s3://corpus/none.jsonl", "s3://nobucket/x/", "s3://corpus/dir/*.csv"]
)
def test_what_is_not_there_is_named(bucket: dict[str, Any], path: str) -> None:
    with pytest.raises(JobError) as caught:
        read(path, bucket)
    assert caught.value.key == "corpus.path"
    assert path in str(caught.value)
