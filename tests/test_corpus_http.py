"""A corpus behind HTTP or another store that fails, and URLs whose queries are secrets."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from click.testing import CliRunner
from distributed import Client

from mas_batch import pipeline
from mas_batch.cli import main
from mas_batch.corpus import CorpusReader
from mas_batch.errors import ExitCode, JobError, MasBatchError, RunError
from mas_batch.job import Corpus, Job
from tests.recipes import write_job
from tests.test_security import CANARY, assert_nowhere

MakeJob = Callable[..., Job]
GOOD, BAD = b'{"text": "good words"}\n', b"not JSON\n"


class Shop(BaseHTTPRequestHandler):
    """Serves one file, or fails with the status that the path or the query names."""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        status = int(parse_qs(url.query).get("status", ["200"])[0])
        content = GOOD + BAD + GOOD if status == 200 and url.path.endswith("/c.jsonl") else b""
        self.send_response(status if content or status != 200 else 404)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Last-Modified", self.server.modified)  # type: ignore[attr-defined]
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *args: Any) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Shop)
    server.modified = "Mon, 02 Nov 2026 10:00:00 GMT"  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def shop(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def read(*paths: str, **options: Any) -> CorpusReader:
    return CorpusReader(Corpus(path=paths, storage_options=options))


# --- A store that cannot be listed


FAILURES = {
    "503": ("/c.jsonl?status=503", RunError, "cannot be listed: .*503"),
    "429": ("/c.jsonl?status=429", RunError, "cannot be listed: .*429"),
    "403": ("/c.jsonl?status=403", JobError, "cannot be listed: .*403"),
    "404": ("/d.jsonl", JobError, "no such file"),
    "404 of a pattern": ("/[cd].jsonl?sig=1", JobError, "matches no data file"),
}


@pytest.mark.parametrize(("path", "kind", "words"), FAILURES.values(), ids=FAILURES)
def test_a_server_that_fails_may_come_back(
    shop: str, path: str, kind: type[MasBatchError], words: str
) -> None:
    with pytest.raises(kind, match=words) as failed:
        read(shop + path)
    assert failed.value.exit_code == (2 if kind is JobError else 1)
    assert path.partition("?")[0] in str(failed.value)


def test_a_server_that_is_not_there_may_come_back(s3_options: dict[str, Any]) -> None:
    with pytest.raises(RunError, match=r"127\.0\.0\.1:9/c\.jsonl' cannot be listed: .*Cannot conn"):
        read("http://127.0.0.1:9/c.jsonl")
    client = {**s3_options["client_kwargs"], "endpoint_url": "http://127.0.0.1:9"}
    options = {**s3_options, "client_kwargs": client}
    quick = {"config_kwargs": {"retries": {"max_attempts": 0}}}
    with pytest.raises(RunError, match=r"'s3://bucket/\*\.csv' cannot be listed: EndpointConn"):
        read("s3://bucket/*.csv", **options, **quick)
    with pytest.raises(RunError, match="cannot be opened: ConnectionRefusedError"):
        read("ftp://127.0.0.1:9/c.csv")


@contextmanager
def answering(status: int, code: str) -> Iterator[str]:
    """Yield the URL of an S3 that says so to every request."""

    class Refusing(Shop):
        def do_GET(self) -> None:
            body = f"<Error><Code>{code}</Code><Message>words</Message></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


S3_FAILURES = [(500, "InternalError", RunError), (403, "AccessDenied", JobError)]


@pytest.mark.parametrize(("status", "code", "kind"), S3_FAILURES)
def test_an_s3_that_fails_may_come_back(
    s3_options: dict[str, Any], status: int, code: str, kind: type[MasBatchError]
) -> None:
    with answering(status, code) as url:
        options = {
            **s3_options,
            "client_kwargs": {"endpoint_url": url, "region_name": "eu-west-1"},
            "config_kwargs": {"retries": {"max_attempts": 0}},
        }
        with pytest.raises(kind, match=r"s3://bucket/c' cannot be listed: "):
            read("s3://bucket/c", **options)


def test_a_file_that_cannot_be_opened_now_may_come_back(server: ThreadingHTTPServer) -> None:
    reader = read(f"http://127.0.0.1:{server.server_port}/c.jsonl?t=sesame")
    server.shutdown()
    server.server_close()
    with pytest.raises(RunError, match=r"c\.jsonl\?t=\*\*\* cannot be opened: .*Cannot connect"):
        list(reader)


def test_a_store_that_is_down_is_exit_code_1(tmp_path: Path) -> None:
    job = str(write_job(tmp_path))
    words = ["submit", job, "--set", "corpus.path=http://127.0.0.1:9/c.csv"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == ExitCode.RUN_FAILED, result.output
    assert "the same command tries again" in result.output


# --- Queries


def test_a_file_that_is_signed_anew_is_the_same_file(server: ThreadingHTTPServer) -> None:
    url = f"http://127.0.0.1:{server.server_port}/a/c.jsonl?"
    once = read(f"{url}X-Amz-Signature=monday/1&X-Amz-Date=1&versionId=7")
    again = read(f"{url}versionId=7&X-Amz-Date=2&X-Amz-Signature=tuesday/&X-Amz-Expires=9")
    assert [file.relative for file in once.files] == ["c.jsonl?versionId=7"]
    assert once.fingerprint == again.fingerprint
    assert [r.record_id for r in once] == [r.record_id for r in again]
    assert [r.message for r in once][
        1
    ] == "c.jsonl?versionId=7, row 2: not JSON: Expecting value at character 1"
    other = read(f"{url}versionId=8")
    assert {r.record_id for r in once}.isdisjoint(r.record_id for r in other)
    server.modified = "Tue, 03 Nov 2026 10:00:00 GMT"  # type: ignore[attr-defined]
    assert read(f"{url}versionId=7").fingerprint != once.fingerprint


def test_files_that_only_their_queries_tell_apart_are_all_read(shop: str) -> None:
    several = read(*(f"{shop}/c.jsonl?id={number}" for number in (7, 8)), f"{shop}/x/c.jsonl")
    names = [file.relative for file in several.files]
    host = shop.removeprefix("http://")
    assert names == [f"1/{shop}/c.jsonl", f"2/{shop}/c.jsonl", "x/c.jsonl"], host
    assert len({record.record_id for record in several}) == 9


def test_the_query_is_nowhere(
    cluster_client: Client, make_job: MakeJob, tmp_path: Path, shop: str
) -> None:
    keys = ("X-Amz-Signature", "t", "code", "pass", "jwt", "session", "hdnea", "Policy")
    url = f"{shop}/c.jsonl?format=x" + "".join(f"&{key}={CANARY}" for key in keys)
    job = make_job(corpus={"path": url})
    summary = pipeline.run(job, client=cluster_client)
    assert summary.manifest["counts"]["failures"] == 1
    Path(tmp_path / "corpus.jsonl").unlink(missing_ok=True)
    assert_nowhere(tmp_path)
    run = Path(summary.run)
    assert (run / "report.html").exists()
    shown = "c.jsonl?format=x" + "".join(f"&{key}=***" for key in keys)
    assert shown in (run / "job.yaml").read_text()
    assert CANARY not in job._repr_html_() + json.dumps(summary.manifest)
    with pytest.raises(JobError) as refused:
        list(CorpusReader(job.corpus.with_changes(text="body")))
    assert CANARY not in str(refused.value)
