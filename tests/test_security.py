"""What `docs/security.md` promises: who can connect, what is kept, what is shown, where is written.

Elsewhere: TLS in test_tls, wheels that reach outside and pickled weights in test_models, the
credentials of a store's URL in test_storage.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import dask
import fsspec
import psutil
import pytest
import yaml
from click.testing import CliRunner
from distributed import Client
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import mas_batch
from mas_batch import cluster, pipeline, show
from mas_batch.agents.spec import agent_specs
from mas_batch.cli import main
from mas_batch.errors import JobError
from mas_batch.events import HostLost
from mas_batch.job import Job
from mas_batch.job_file import check_job, load_job
from mas_batch.monitor.progress import sentence
from mas_batch.run_folder import manifest
from mas_batch.safe_text import names_a_secret, printable, without_credentials
from tests.origins import ACCEPTED, NOT_THERE, REFUSED, handshake
from tests.recipes import JOB, write_job
from tests.test_engine_openai import Server
from tests.waiting import PATIENCE_S

CANARY = "CANARY-4711"
"""A secret: it must turn up nowhere but where it was given."""

MakeJob = Callable[..., Job]


def submit(job: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mas_batch.submit", str(job), *options],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def overrides(**values: str) -> list[str]:
    """`a__b="x"` becomes `--set a.b=x`."""
    pairs = ((key.replace("__", "."), value) for key, value in values.items())
    return [word for key, value in pairs for word in ("--set", f"{key}={value}")]


def files_with(secret: str, folder: Path) -> list[str]:
    """Name the files below a folder that hold the secret, as text or in base64."""
    forms = (secret.encode(), base64.b64encode(secret.encode()).rstrip(b"="))
    found = (file for file in folder.rglob("*") if file.is_file())
    return [str(file) for file in found if any(form in file.read_bytes() for form in forms)]


# --- Who can connect


def listening() -> set[tuple[str, int]]:
    """Return where this process and its children listen."""
    own = psutil.Process()
    connections = [c for p in (own, *own.children(recursive=True)) for c in p.net_connections()]
    return {c.laddr[:2] for c in connections if c.status == psutil.CONN_LISTEN}


def test_the_embedded_cluster_listens_on_loopback_only_and_to_its_own_pages(
    tmp_path: Path,
) -> None:
    job = load_job(write_job(tmp_path), ["cluster.dashboard_address=127.0.0.1:0"])
    before = listening()
    with cluster.connect(job, agent_specs(job, embedded=True, num_cores=2), "test") as connection:
        client = connection.client
        ((worker, facts),) = client.scheduler_info()["workers"].items()
        new = listening() - before
        port = urlsplit(client.dashboard_link).port
        ask = partial(handshake, client, f"http://127.0.0.1:{port}", "agents")
        for own in ("127.0.0.1", "localhost"):
            assert ask(f"http://{own}:{port}") == ACCEPTED
        for other in ("http://evil.example", f"http://evil.example:{port}", "http://127.0.0.1:1"):
            assert ask(other) == REFUSED
        of_worker = f"http://127.0.0.1:{facts['services']['dashboard']}"
        assert handshake(client, of_worker, "status", of_worker) == NOT_THERE
    assert len(new) >= 5, "scheduler, nanny, worker, and the pages of two of them"
    assert {host for host, _ in new} == {"127.0.0.1"}
    assert worker.startswith("tcp://127.0.0.1:")
    assert check_job({**JOB, "cluster": {}}).cluster.dashboard_address == "127.0.0.1:8787"


def test_dasks_own_looks_are_rare_in_an_embedded_cluster_unless_somebody_wants_them(
    tmp_path: Path,
) -> None:
    job = load_job(write_job(tmp_path))
    keys = ("distributed.worker.profile.interval", "distributed.admin.tick.interval")
    specs = agent_specs(job, embedded=True, num_cores=2)
    with dask.config.set({keys[1]: "40ms"}), cluster.connect(job, specs, "test") as connection:
        found = connection.client.run(lambda: [dask.config.get(key) for key in keys])
    assert list(found.values()) == [["500ms", "40ms"]]


@pytest.mark.parametrize("kind", ["threads", "processes", "of a merge made again"])
def test_the_clusters_of_a_merge_listen_on_loopback_only(tmp_path: Path, kind: str) -> None:
    job = load_job(write_job(tmp_path))
    before = listening()
    with (
        cluster.local_workers(processes=True)
        if kind == "of a merge made again"
        else cluster.connect_to_merge(job, 1 if kind == "threads" else 1000)
    ):
        new = listening() - before
    assert {host for host, _ in new} == {"127.0.0.1"}


# --- Secrets: wrong jobs, whose messages tend to quote


WRONG = {
    "options that are no mapping": overrides(output__storage_options=CANARY),
    "options that are a list": overrides(corpus__storage_options=f"[{CANARY}]"),
    "agent's options that are no mapping": overrides(agents__plain__options=CANARY),
    "not YAML": overrides(output__storage_options=f"{{secret: {CANARY}"),
    "YAML's alias": overrides(output__storage_options=f"{{secret: *{CANARY}}}"),
    "YAML's tag": overrides(output__storage_options=f"{{secret: !{CANARY}}}"),
    "a key among the options": overrides(agents__plain__options=f"{{api_key: {CANARY}}}"),
    "unknown section": overrides(outputs=CANARY),
    "corpus behind a password": overrides(corpus__path=f"http://user:{CANARY}@127.0.0.1:9/x.csv"),
    "corpus on FTP": overrides(corpus__path=f"ftp://user:{CANARY}@127.0.0.1:9/x.csv"),
    "corpus on S3": overrides(corpus__path=f"s3://key:{CANARY}@bucket/x.csv"),
    "corpus of an unknown kind": overrides(corpus__path=f"nonsense://user:{CANARY}@host/x.csv"),
    "corpus with a token": overrides(corpus__path=f"nonsense://{CANARY}@host/x.csv"),
    "signed URL": overrides(corpus__path=f"https://127.0.0.1:9/x.csv?X-Amz-Signature={CANARY}"),
    "option that the filesystem lacks": overrides(
        corpus__path="s3://bucket/x.csv",
        corpus__storage_options=f"{{key: k, secret: {CANARY}, client_kwargs: {{endpoint_url: 1}}}}",
    ),
    "output that is a list": overrides(output__path=f"[s3://key:{CANARY}@bucket]"),
    "output of an unknown kind": overrides(output__path=f"nonsense://user:{CANARY}@host/x"),
    "model that is a URL": overrides(agents__plain__model=f"https://user:{CANARY}@host/x"),
    "scheduler of an unknown kind": ["--scheduler", f"nonsense://user:{CANARY}@host:1"],
    "scheduler of no port": ["--scheduler", f"tcp://user:{CANARY}@127.0.0.1:x"],
    "scheduler that is not there": ["--scheduler", f"tcp://user:{CANARY}@127.0.0.1:9"],
    "scheduler without a protocol": ["--scheduler", f"user:{CANARY}@127.0.0.1:9"],
}
MAY_PASS = ("corpus behind a password", "corpus on FTP", "signed URL")


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("dry_run", [False, True], ids=["run", "dry run"])
def test_a_wrong_job_does_not_quote_secrets(
    tmp_path: Path, short_connect: None, what: str, dry_run: bool
) -> None:
    options = WRONG[what]
    job = write_job(tmp_path)
    words = ["submit", str(job), *options, *(["--dry-run"] if dry_run else [])]
    result = CliRunner().invoke(main, words)
    code = 1 if what in MAY_PASS else 2  # who does not answer now may answer later
    # A dry run does not look for the scheduler.
    assert result.exit_code == (0 if dry_run and "--scheduler" in options else code), result.output
    assert CANARY not in result.output
    assert CANARY not in "".join(map(str, (result.exception, result.exc_info)))
    assert files_with(CANARY, tmp_path) == []


def test_a_wrong_job_file_does_not_quote_secrets(tmp_path: Path) -> None:
    job = write_job(tmp_path, output={"path": "runs", "storage_options": "SECRET"})
    for value in (f"*{CANARY}", f"!{CANARY}", f"&{CANARY} &x", f"{{secret: {CANARY}", CANARY):
        text = job.read_text().replace("SECRET", value)
        (tmp_path / "wrong.yaml").write_text(text)
        result = CliRunner().invoke(main, ["submit", str(tmp_path / "wrong.yaml")])
        assert result.exit_code == 2, value
        assert CANARY not in result.output


# --- Secrets: real runs


def assert_nowhere(folder: Path, *done: subprocess.CompletedProcess[str]) -> None:
    for each in done:
        assert CANARY not in each.stdout
        assert CANARY not in each.stderr
    assert files_with(CANARY, folder) == []


@pytest.fixture
def endpoint() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("first_word", "exit_code"), [("record", 0), ("401", 1)])
def test_an_endpoints_key_is_nowhere(
    endpoint: Server, tmp_path: Path, first_word: str, exit_code: int
) -> None:
    """Also where the server quotes it in its refusal."""
    agent = {
        "name": "hosted",
        "model": "openai:m",
        "engine": "openai",
        "prompt": f"{first_word} {{text}}",
        "options": {
            "base_url": endpoint.url,
            "api_key_env": "CANARY_KEY",
            "max_retries": 0,
            "extra_body": {"user": f"also-{CANARY}"},
        },
    }
    job = write_job(tmp_path, agents=[agent])
    once = ("--set", "routing.max_attempts=1")  # the breaker's patience is another test's
    done = submit(job, "--json", *once, CANARY_KEY=CANARY)
    assert done.returncode == exit_code, done.stderr
    assert endpoint.keys == {f"Bearer {CANARY}"}
    job.unlink()  # the only place where it is: what was given
    assert_nowhere(tmp_path, done)
    assert list(tmp_path.glob("runs/*/job.yaml"))


class Guarded(SimpleHTTPRequestHandler):
    """Files for whoever knows the password."""

    def do_GET(self) -> None:
        given = self.headers.get("Authorization", "").removeprefix("Basic ")
        if base64.b64decode(given) == f"user:{CANARY}".encode():
            super().do_GET()
        else:
            self.send_error(401)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *args: Any) -> None:
        """Keep the test's output clean."""


def test_a_corpus_behind_a_password(tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    write_job(tmp_path / "served")
    handler = partial(Guarded, directory=str(tmp_path / "served"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://user:{CANARY}@127.0.0.1:{server.server_port}/corpus.jsonl"
        job = write_job(tmp_path)
        dry = submit(job, *overrides(corpus__path=url), "--dry-run")
        wrong = submit(job, *overrides(corpus__path=url, corpus__text="body"))
        done = submit(job, *overrides(corpus__path=url))
    finally:
        server.shutdown()
        server.server_close()
    assert [each.returncode for each in (dry, wrong, done)] == [0, 2, 0], done.stderr
    assert "corpus.jsonl" in wrong.stderr, "the file is named, without the password"
    assert_nowhere(tmp_path, dry, wrong, done)


def test_credentials_in_storage_options(tmp_path: Path, s3_options: dict[str, Any]) -> None:
    options = {**s3_options, "key": f"{CANARY}-id", "secret": CANARY}
    output = {"path": "s3://bucket/runs", "storage_options": options}
    job = write_job(tmp_path, output=output)
    dry, done = submit(job, "--dry-run", "--json"), submit(job)
    assert done.returncode == 0, done.stderr
    assert CANARY not in dry.stdout + dry.stderr + done.stdout + done.stderr
    bucket = fsspec.filesystem("s3", **s3_options)
    found = bucket.find("bucket/runs")
    assert any(name.endswith("manifest.json") for name in found)
    assert [name for name in found if CANARY.encode() in bucket.cat_file(name)] == []


def test_credentials_in_the_outputs_url(cluster_client: Client, tmp_path: Path) -> None:
    """Every command on a run whose URL holds a password; the workers do need it."""
    output = f"memory://user:{CANARY}@bucket/runs"
    agents = [{"name": name, "model": f"echo:{name}"} for name in ("a", "b")]
    job = str(write_job(tmp_path, agents=agents))
    runner = CliRunner()
    commands = [["submit", job, "--output", output, *more] for more in (["--dry-run"], [])]
    commands += [[*commands[0], "--json"], [*commands[1], "--json"]]
    said = [runner.invoke(main, command) for command in commands]
    files = fsspec.filesystem("memory").store
    (name,) = (name for name in files if name.endswith("/manifest.json"))
    run = f"memory:/{name.removesuffix('/manifest.json')}"
    assert CANARY in run
    others = (
        *(["show", run], ["explain", run, "0"], ["explain", run, "0", "--json"]),
        ["explain", run, "99"],
        ["explain", run, "--record", "r3"],
        ["merge", run, "--method", "best", "--scheduler", cluster_client.scheduler.address],
        ["merge", run, "--method", "vote", "--name", "..", "--json"],
        ["evaluate", run],
    )
    said += [runner.invoke(main, command) for command in others]
    for result in said:
        assert CANARY not in result.output
        assert not isinstance(result.exception, AssertionError)
    assert [r.exit_code for r in said[:8]] == [0, 0, 0, 0, 0, 0, 0, 1]
    kept = {name: file.getvalue() for name, file in files.items() if CANARY in name}
    assert len(kept) > 10
    assert [name for name, content in kept.items() if CANARY.encode() in content] == []


SHOWN = {
    "https://h/x?X-Amz-Signature=abc&page=1": "https://h/x?X-Amz-Signature=***&page=1",
    "az://c/x?sv=1&sig=a%2Bb": "az://c/x?sv=***&sig=***",
    "https://h/x?api_key=1": "https://h/x?api_key=***",
    "s3://b/x?versionId=7": "s3://b/x?versionId=7",
    "https://h/x?version=7;t=8&download": "https://h/x?version=7;t=***&download",
    "https://h/x?eyJhbGciOi.J9": "https://h/x?***",
    "see https://h/x?t=1, or <https://h/y?code=2>": "see https://h/x?t=*** or <https://h/y?code=***>",
    "{'u': 'https://h/x?url=http://g/?a=1&format=csv'}": "{'u': 'https://h/x?url=***&format=csv'}",
    "c.jsonl?t=1&sig=2": "c.jsonl?t=1&sig=***",
    "s3://b/what?.csv": None,
    "what is https://h/x? And a?b=c": None,
    **{
        f"x?{key}=1&a=2": f"x?{key}=***&a=2"
        for key in (
            "apikey",
            "auth",
            "passwd",
            "pwd",
            "accessKey",
            "secretKey",
            "authToken",
            "APIKey",
            "oauth",
        )
    },
    "https://me@corp.com:s3cret@host/x": "https://host/x",
    "https://user:p@ss@host/x": "https://host/x",
    "https://u:12/abc@host/x": "https://host/x",
    "https://user:p w@host/": "https://host/",
    "https://u:it's@host/": "https://host/",
    "https://u:a,b{c}?#@host/": "https://host/",
    "https://me@corp.com:s3/cret@host/x": "https://host/x",
    "s3://key:9000/abc@bucket/x": "s3://bucket/x",
    '{"u":"https://u:pw@h/","m":"ops@example.org"}': '{"u":"https://h/","m":"ops@example.org"}',
    '{"u":"http://localhost:8000","m":"ops@example.org"}': None,
    "{'u': 'http://localhost:8000/v1', 'm': 'ops@example.org'}": None,
    '{"u":"memory://bucket","m:x":"a:b@c"}': None,
    '["https://host/a","b@c"]': None,
    "cannot reach http://host:9000: told by ops@example.org": None,
    "see http://host:9000 or ops@example.org": None,
    "http://localhost:8000,ops@example.org": None,
    "https://host:80?m=a@b": "https://host:80?m=***",
}
"""Text to what is shown of it; None: all of it."""


@pytest.mark.parametrize(("url", "shown"), SHOWN.items())
def test_signatures_of_urls_are_blanked_and_nothing_else(url: str, shown: str | None) -> None:
    assert without_credentials(url) == (shown or url)


@pytest.mark.parametrize("piece", ["a://b:", "://", "a://b@c:"])
def test_a_long_text_is_stripped_in_one_pass(piece: str) -> None:
    """Were each URL's start to read the rest of the text, this would take minutes."""
    text = piece * 50_000
    assert without_credentials(text) == text.replace("://b@", "://")


def test_a_long_query_is_stripped_in_one_pass() -> None:
    assert without_credentials("http://a?&" * 50_000) == "http://a?&" + "***&" * 49_999


def test_which_options_are_secrets() -> None:
    assert all(map(names_a_secret, ("api_key", "apikey", "API-Key", "password", "auth_token")))
    camel = ("accessToken", "authToken", "secretKey", "passphrase", "auth", "bearer", "APIKey")
    assert all(map(names_a_secret, camel))
    innocent = ("api_key_env", "max_context_tokens", "labels", "keywords", "batch_tokens", "prefix")
    innocent += ("max_new_tokens", "tokenizer", "max_tokens", "separator", "also", "author")
    assert not any(map(names_a_secret, innocent))


def test_a_prompt_is_kept_as_it_is_though_it_looks_like_a_url(make_job: MakeJob) -> None:
    prompt = "Log in at https://user:pass@host/?key=1 with {text}" + " and so on" * 20
    job = make_job()
    job = job.model_copy(update={"task": job.task.model_copy(update={"prompt": prompt})})
    store, _ = pipeline.open_store(job, pipeline.CorpusReader(job.corpus))
    manifest.write_job(store, job)
    assert yaml.safe_load(store.read_bytes("job.yaml"))["task"]["prompt"] == prompt


# --- Where is written


def tree(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*")}


def test_a_corpus_cannot_lead_out_of_the_output(
    cluster_client: Client, tmp_path: Path, make_job: MakeJob
) -> None:
    rows = [{"id": name, "text": name} for name in ("../../up", "/etc/x", "a\0b", "..", "x" * 5000)]
    job = make_job(rows)
    corpus = Path(job.corpus.path[0]).parent / "corpus"
    corpus.mkdir()
    for name in ("a..%2f..%2fup.jsonl", "a\nb.jsonl", "$(touch up).jsonl", "-rf.jsonl"):
        text = json.dumps({"id": name, "text": "a text"})
        (corpus / name).write_text(text + "\n")
    (corpus / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = job.model_copy(update={"corpus": job.corpus.model_copy(update={"path": (str(corpus),)})})
    before = tree(tmp_path)
    summary = pipeline.run(job, client=cluster_client)
    assert summary.manifest["counts"]["records"] == 9
    made = tree(tmp_path) - before
    assert {path.parts[0] for path in made} == {"runs"}
    assert all(re.fullmatch(r"[\w=.-]+", part) for path in made for part in path.parts)


BAD_NAMES = ("..", "../x", "/x", "a/b", "a\\b", ".hidden", "a\0b", "a\nb", "", "a" * 129)


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("where", ["job", "agent"])
def test_names_that_become_folders_are_plain(name: str, where: str) -> None:
    raw = {**JOB, "name": name} if where == "job" else {**JOB, "agents": [{"name": name}]}
    with pytest.raises(JobError, match="it names a folder"):
        check_job(raw)


def test_a_planted_link_is_replaced_and_not_followed(
    cluster_client: Client, tmp_path: Path, make_job: MakeJob
) -> None:
    job = make_job()
    store, _ = pipeline.open_store(job, pipeline.CorpusReader(job.corpus))
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    names = ("job.yaml", "agents.parquet", "results/part-000000.parquet")
    for name in names:
        link = Path(store.path(name))
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(victim)
    with pytest.raises(mas_batch.errors.MasBatchError):  # the planted result is no result
        pipeline.run(job, client=cluster_client)
    assert victim.read_text() == "untouched"


def test_files_follow_the_umask(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    script = 'umask 077; exec "$0" -m mas_batch.submit "$1"'
    done = subprocess.run(
        ["/bin/sh", "-c", script, sys.executable, str(job)], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    made = list((tmp_path / "runs").rglob("*"))
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in made}
    assert len(modes) > 10
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}


# --- What is shown

EVIL = "\x1b]0;renamed\x07\x1b[2J\x9b31m\u202egnp.exe\r\x00[bold]not bold[/]"
"""Sequences that rename a terminal, clear it, colour it and turn text around; and rich's markup."""


def assert_harmless(text: str) -> str:
    """Return the text without the colours that rich writes; nothing else may be left but text."""
    rest = re.sub(r"\x1b\[[\d;]*m", "", text)
    assert re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", rest) is None, rest
    return rest


def console() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=True, width=900), out


def test_a_corpus_cannot_steer_the_terminal(cluster_client: Client, make_job: MakeJob) -> None:
    evil = EVIL.replace("\0", "")  # a record with a NUL is unusable
    job = make_job([{"id": f"{i}{evil}", "text": f"{i} {evil}"} for i in range(3)])
    summary = pipeline.run(job, client=cluster_client)
    run = mas_batch.open_run(summary.run)
    assert any("\x1b" in answer for answer in run.arrow()["answer"].to_pylist()), "it is kept"
    out, text = console()
    show.print_run(out, run, 10)
    assert "[bold]not bold[/]" in assert_harmless(text.getvalue())


def test_messages_cannot_steer_the_terminal(tmp_path: Path) -> None:
    out, text = console()
    event = HostLost(agents=("a",), worker=EVIL, message=EVIL)
    out.print(sentence(event))
    assert "[bold]not bold[/]" in assert_harmless(text.getvalue())
    job = write_job(tmp_path)
    missing = json.dumps(EVIL.replace("\0", "") + ".csv")
    result = CliRunner().invoke(main, ["submit", str(job), *overrides(corpus__path=missing)])
    assert result.exit_code == 2
    assert_harmless(result.stderr)


@given(st.text())
def test_printable_text_is_harmless_and_else_the_same(text: str) -> None:
    assert_harmless(printable(text))
    assert printable(printable(text)) == printable(text)
    if text.isprintable():
        assert printable(text) == text


def test_marks_of_direction_are_escaped() -> None:
    marks = "\u061c\u200e\u200f\u202a\u202e\u2066\u2069"
    assert printable(f"a{marks}b") == "a" + "".join(f"\\u{ord(mark):04x}" for mark in marks) + "b"
