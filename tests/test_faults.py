"""Real processes that end in order, and a cluster of the user's own; `test_chaos` kills them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import yaml

import mas_batch
from tests.chaos import started, workers_of
from tests.waiting import PATIENCE_S, wait_until

pytestmark = pytest.mark.faults

NUM_RECORDS = 60
JOB = {
    "name": "faults",
    "corpus": {"path": "corpus.jsonl", "id": "id"},
    "task": {"kind": "summarize", "max_new_tokens": 4},
    "agents": [
        {"name": "a", "model": "echo:a", "count": 2, "options": {"seconds_per_batch": 0.3}},
        {"name": "b", "model": "echo:b", "options": {"seconds_per_batch": 0.1}},
    ],
    "merge": {"method": "vote"},
    "partition": {"max_records": 3},
    "output": {"path": "runs"},
    "cluster": {"dashboard_address": None},
}


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    rows = [{"id": f"r{i:02d}", "text": f"record {i} has a few words"} for i in range(NUM_RECORDS)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(JOB))
    return file


def process(
    *command: str, log: Path, **options: Any
) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """Start a module as a command; at the end end it and all its children."""
    return started(["-m", *command], log, **options)


def wait_for(condition: Callable[[], object], child: subprocess.Popen[bytes], log: Path) -> None:
    wait_until(lambda: child.poll() is not None or condition(), log.read_text)
    assert condition(), log.read_text()


def num_committed(folder: Path, pattern: str = "runs/*/results/part-*.parquet") -> int:
    return len(list(folder.glob(pattern)))


def assert_complete(run: str, reference: dict[str, str]) -> None:
    opened = mas_batch.open_run(run)
    results = opened.arrow().to_pylist()
    assert [row["record_id"] for row in results] == list(reference)
    assert {row["record_id"]: row["answer"] for row in results} == reference
    answers = opened.arrow("answers").select(["record_id", "agent_id", "sample_id"]).to_pylist()
    assert len({tuple(row.values()) for row in answers}) == len(answers) == 2 * NUM_RECORDS
    assert not list(Path(run).rglob(".tmp-*"))


REFERENCE = {f"r{i:02d}": f"record {i} has a" for i in range(NUM_RECORDS)}


def test_a_terminated_run_ends_its_workers_and_says_how_to_go_on(
    job_file: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with process("mas_batch.submit", str(job_file), log=log) as child:
        wait_for(lambda: num_committed(tmp_path) >= 1, child, log)
        workers = workers_of(child.pid)
        assert workers
        child.terminate()
        assert child.wait(PATIENCE_S) == 1, log.read_text()
    assert "the same command resumes" in log.read_text()
    wait_until(lambda: not [pid for pid in workers if Path(f"/proc/{pid}").exists()])


def copy_of_the_package(folder: Path) -> Path:
    """Return a folder for PYTHONPATH with a copy of mas_batch in which one line is changed."""
    package = folder / "mas_batch"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(mas_batch.__file__).parent, package, ignore=ignored)
    file = package / "tasks" / "summarize.py"
    before = file.read_text()
    file.write_text(before.replace("Summarize this", "Sum up this"))
    assert file.read_text() != before
    return folder


def test_a_users_cluster_of_unlike_workers_started_by_hand(job_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "scheduler.json"
    scheduler = ["dask", "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    worker = ["dask", "worker", "--scheduler-file", str(file), "--no-dashboard", "--nthreads", "2"]
    changed = copy_of_the_package(tmp_path / "changed")
    logs = [tmp_path / f"log-{i}" for i in range(4)]
    with (
        process(*scheduler, "--scheduler-file", str(file), log=logs[0]),
        process(*worker, "--name", "one", "--resources", "summarize=1,big=1", log=logs[1]) as one,
        process(*worker, "--name", "two", "--resources", "summarize=1", log=logs[2]) as two,
        process(
            *worker, "--name", "changed", "--resources", "summarize=1", log=logs[3],
            cwd=changed, env={**os.environ, "PYTHONPATH": str(changed)},
        ) as other,
    ):  # fmt: skip
        wait_for(
            lambda: all("Registered to" in log.read_text() for log in logs[1:]), other, logs[3]
        )
        command = [sys.executable, "-m", "mas_batch.submit", str(job_file), "--json"]
        wants_big = ["--set", "agents.0.capabilities=[summarize, big]"]
        done = subprocess.run(
            [*command, "--scheduler-file", str(file), *wants_big],
            capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert_complete(json.loads(done.stdout)["run"], REFERENCE)
        answers = mas_batch.open_run(json.loads(done.stdout)["run"]).pandas("answers")
        assert dict(answers.groupby("agent_id")["worker"].unique().str[0]) == {
            "a": "one",
            "b": "two",
        }, "not `changed`, which is the first that b would get: it has other code"
        assert "changed (tcp://" in done.stderr, "it is refused by name"
        refused = subprocess.run(
            [*command, "--scheduler-file", str(file), "--set", "agents.0.resources={GPU: 1}",
             "--set", "cluster.wait_s=1", "--output", str(tmp_path / "other")],
            capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
        assert refused.returncode == 2
        assert "one (tcp://" in refused.stderr
        assert one.poll() is None
        assert two.poll() is None
        assert other.poll() is None, "workers of a user's cluster must live on"
