"""`since: last` in real processes: killed in the middle, started twice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

import mas_batch
from mas_batch.errors import RunLockedError
from mas_batch.run_folder.lock import job_lock
from mas_batch.run_folder.read import Run
from mas_batch.run_folder.storage import Store
from tests.chaos import started
from tests.clusters import run_in_process
from tests.test_faults import wait_for
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.faults

JOB: dict[str, Any] = {
    "name": "nightly",
    "corpus": {"path": "corpus.jsonl", "id": "id"},
    "task": {"kind": "summarize", "max_new_tokens": 4},
    "agents": [
        {"name": "a", "model": "echo:a", "options": {"seconds_per_batch": 0.2}},
        {"name": "b", "model": "echo:b", "options": {"seconds_per_batch": 0.1}},
    ],
    "merge": {"method": "vote"},
    "partition": {"max_records": 3},
    "output": {"path": "runs"},
    "cluster": {"dashboard_address": None},
    "since": "last",
}
V1 = [{"id": f"r{i:02d}", "text": f"record {i} has a few words"} for i in range(30)]
V2 = [
    *V1[2:7],
    *({**each, "text": each["text"] + " more"} for each in V1[7:12]),
    *({"id": f"n{i}", "text": f"record {i} is new"} for i in range(16)),
    *V1[12:],
]


class Site:
    """A folder with a job that runs every night."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        (folder / "job.yaml").write_text(yaml.safe_dump(JOB))

    def corpus(self, rows: list[dict[str, str]]) -> None:
        lines = (json.dumps(each) + "\n" for each in rows)
        (self.folder / "corpus.jsonl").write_text("".join(lines))

    @contextmanager
    def submitted(self, *options: str, log: Path | None = None) -> Iterator[Any]:
        command = ["-m", "mas_batch.submit", "job.yaml", "--json", *options]
        with started(command, log or self.log, cwd=self.folder) as child:
            yield child

    def run(self, *overrides: str) -> Run:
        """Run it to the end in this process: nothing happens to this one."""
        return mas_batch.open_run(run_in_process(self.folder / "job.yaml", *overrides).run)

    def submit(self, *options: str) -> Run:
        """Run it to the end; the facts are the log's last line."""
        with self.submitted(*options) as child:
            assert child.wait(PATIENCE_S) == 0, self.log.read_text()
        return mas_batch.open_run(self.facts()["run"])

    def facts(self) -> dict[str, Any]:
        lines = self.log.read_text().splitlines()
        facts: dict[str, Any] = json.loads([line for line in lines if line.startswith("{")][-1])
        return {**facts, "run": str(self.folder / facts["run"])}

    def answers(self, run: str = "*") -> list[Path]:
        return sorted(self.folder.glob(f"runs/{run}/answers/agent=*/part-*.parquet"))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = Site(tmp_path)
    site.corpus(V1)
    return site


def test_a_run_that_is_killed_goes_on_and_comes_out_the_same(site: Site) -> None:
    first = site.run()
    done = len(site.answers())
    site.corpus(V2)
    with site.submitted() as child:
        # 16 new and 5 changed records, in some partitions; the others are there at once.
        wait_for(lambda: len(site.answers()) > done + 12, child, site.log)
        child.send_signal(signal.SIGKILL)
        child.wait()
    second = site.submit()
    facts = site.facts()["since"]
    assert facts["run"] == first.manifest["run"]
    assert facts["records"] == {"unchanged": 23, "changed": 5, "new": 16, "gone": 2}
    assert (facts["reused_answers"], facts["asked_answers"]) == (46, 42)
    full = site.run("since=null", f"output.path={site.folder / 'full'}")
    assert second.arrow().equals(full.arrow())
    keys = ["record_id", "agent_id", "sample_id"]
    rows = second.arrow("answers").select(keys).to_pylist()
    assert len({tuple(each.values()) for each in rows}) == len(rows) == 88


def test_of_two_starts_of_a_job_the_second_does_nothing(site: Site, tmp_path: Path) -> None:
    """Also where the corpus has changed in between, which makes another run of it."""
    other = tmp_path / "other-log"
    with site.submitted() as child:
        wait_for(site.answers, child, site.log)
        site.corpus(V2)
        with site.submitted(log=other) as second:
            assert second.wait(PATIENCE_S) == 4, other.read_text()
        words = other.read_text()
        assert f".locks/nightly: process {child.pid} of" in words
        assert "works on this job; wait until it is done, or end it" in words
        assert "Traceback" not in words
        assert child.wait(PATIENCE_S) == 0, site.log.read_text()
    assert len(list(site.folder.glob("runs/nightly-*/manifest.json"))) == 1


def test_a_lock_is_of_one_job(tmp_path: Path) -> None:
    output = Store(str(tmp_path))
    with job_lock(output, "nightly"), job_lock(output, "another") as lock:
        lock.check()
        with pytest.raises(RunLockedError, match="works on this job"):
            job_lock(output, "nightly").__enter__()


def test_a_killed_start_does_not_keep_the_job_locked(site: Site) -> None:
    with site.submitted() as child:
        wait_for(site.answers, child, site.log)
        child.send_signal(signal.SIGKILL)
        child.wait()
    site.corpus(V2)
    run = site.run()
    assert run.manifest["since"]["run"] is None, "the first was never published"
    assert run.manifest["counts"]["results"] == len(V2)


def test_nothing_new_is_said_and_quick(site: Site) -> None:
    first = site.run()
    site.submit()
    facts = site.facts()
    assert facts["already_complete"]
    assert facts["since"] == {
        "nothing_new": True,
        "run": first.manifest["run"],
        "reused_answers": 60,
        "asked_answers": 0,
    }
    command = [sys.executable, "-m", "mas_batch.submit", "job.yaml"]
    done = subprocess.run(command, cwd=site.folder, capture_output=True, text=True, check=True)
    run = first.manifest["run"]
    words = f"Nothing new since {run}: 30 records, no agent was asked; exit code 0"
    assert words in " ".join(done.stdout.split())
