"""Outputs that cannot be written: a clear end, and the same command completes when it is mended.

The faults are real: small and read-only mounts in a namespace of their own, a limit of the
kernel, a process without permission, files in the way, a bucket that is not there.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import mas_batch
from mas_batch import pipeline
from mas_batch.errors import OutputError
from mas_batch.job import Job
from mas_batch.job_file import load_job
from tests.clusters import run_in_process
from tests.waiting import PATIENCE_S

NUM_WORKERS = 2
JOB: dict[str, Any] = {
    "name": "faults",
    "corpus": {"path": "corpus.jsonl", "id": "id"},
    "task": {"kind": "summarize", "max_new_tokens": 4},
    "agents": [{"name": "a", "model": "echo:a", "count": NUM_WORKERS}],
    "merge": {"method": "vote"},
    "partition": {"max_records": 3},
    "output": {"path": "runs"},
    "cluster": {"dashboard_address": None},
}
SUBMIT = (sys.executable, "-m", "mas_batch.submit", "job.yaml", "--json")
NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-ec")


@dataclass(frozen=True, slots=True)
class Ended:
    """How a submission ended."""

    code: int
    stderr: str

    def assert_one_clear_line(self, pattern: str) -> None:
        assert self.code == 1, self.stderr
        *before, last = self.stderr.splitlines()
        assert re.fullmatch(f"mas-batch: {pattern}", last), self.stderr
        assert not [line for line in before if line.startswith("mas-batch:")]
        assert "Traceback (most" not in self.stderr


class Site:
    """A folder with a job whose output goes to `runs/`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = folder / "runs"
        self.runs.mkdir()
        noise = random.Random(0)  # it cannot be compressed: partitions have 6 kB, answers 10, ...
        rows = [
            {"id": f"r{i:02d}", "text": f"record {i} has {noise.randbytes(400).hex()}"}
            for i in range(24)
        ]
        (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "job.yaml").write_text(yaml.safe_dump(JOB))

    def run(self, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
            **options,
        )

    def submit(self, *prefix: str, **options: Any) -> Ended:
        done = self.run(*prefix, *SUBMIT, **options)
        return Ended(done.returncode, done.stderr)

    def complete(self) -> None:
        """Run the job to its end in this process: now nothing is in its way."""
        run_in_process(self.folder / "job.yaml")

    def run_folder(self) -> Path:
        """Return where the run goes, before it is there."""
        return Path(pipeline.preview(load_job(str(self.folder / "job.yaml"))).run)

    def submit_after_each(self, *steps: str) -> list[Ended]:
        """Submit after each of these shell commands, all in one namespace with its own mounts."""
        submit = f"{shlex.join(SUBMIT)} 2>err-$n || code=$?; echo $code >code-$n"
        script = "".join(
            f"n={n}; code=0; {step}\n{submit}; find runs -name '.tmp-*' >temporary-$n\n"
            for n, step in enumerate(steps)
        )
        done = self.run(*NAMESPACE, f"{script}cp -r runs kept")
        assert done.returncode == 0, done.stderr
        texts = [
            [(self.folder / f"{name}-{n}").read_text() for name in ("code", "err", "temporary")]
            for n in range(len(steps))
        ]
        for _, _, temporary in texts:  # at most of a worker that was ended while it wrote
            assert len(temporary.splitlines()) <= NUM_WORKERS
        return [Ended(int(code), stderr) for code, stderr, _ in texts]

    def tables(self, runs: str = "runs") -> dict[str, bytes]:
        """Return the only run's valid files, once it is complete and nothing else is left."""
        (folder,) = (self.folder / runs).iterdir()
        run = mas_batch.open_run(str(folder))
        assert not list(folder.rglob(".tmp-*"))
        names = [name for table in ("results", "failures") for name in run.files(table)]
        assert len(names) == 8
        return {name: run.store.read_bytes(name) for name in names}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    site = Site(tmp_path_factory.mktemp("undisturbed"))
    site.complete()
    return site.tables()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture(scope="module")
def _mounts() -> None:
    trial = [*NAMESPACE, "mount -t tmpfs none /mnt"]
    if subprocess.run(trial, capture_output=True, check=False).returncode:
        pytest.skip("this system lets no process mount filesystems in a namespace of its own")


@pytest.mark.usefixtures("_mounts")
def test_a_full_disk(site: Site, undisturbed: dict[str, bytes]) -> None:
    start, staging, answering, end = site.submit_after_each(
        "mount -t tmpfs -o size=4k none runs",
        "mount -o remount,size=48k runs",
        "mount -o remount,size=140k runs",
        "mount -o remount,size=16m runs",
    )
    full = "cannot be written: No space left on device"
    start.assert_one_clear_line(rf"\S+/job.yaml {full}")
    staging.assert_one_clear_line(rf"\S+/partitions/part-00000\d.parquet {full}")
    answering.assert_one_clear_line(rf"\S+/(answers/agent=a|results)/part-00000\d.parquet {full}")
    assert end.code == 0, end.stderr
    assert site.tables("kept") == undisturbed


@pytest.mark.usefixtures("_mounts")
def test_a_read_only_disk(site: Site, undisturbed: dict[str, bytes]) -> None:
    run = site.run_folder()
    folders = [site.runs, run / "results", run / "events"]
    folders[1].mkdir(parents=True)
    folders[2].mkdir()
    make = "mount --bind {0} {0}; mount -o remount,bind,ro {0}"
    *broken, whole = site.submit_after_each(
        make.format(folders[0]),
        f"umount {folders[0]}; {make.format(folders[1])}",
        f"umount {folders[1]}; {make.format(folders[2])}",
        f"umount {folders[2]}",
    )
    for folder, ended in zip(folders, broken, strict=True):
        ended.assert_one_clear_line(rf"{folder}/\S+ cannot be written: Read-only file system")
    assert whole.code == 0, whole.stderr
    assert site.tables("kept") == undisturbed


def test_a_limit_of_the_size_of_files(site: Site, undisturbed: dict[str, bytes]) -> None:
    limit = (5000, 5000)
    ended = site.submit(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    ended.assert_one_clear_line(
        r"\S+/partitions/part-000000.parquet cannot be written: File too l.*"
    )
    assert not list(site.runs.rglob(".tmp-*"))
    site.complete()
    assert site.tables() == undisturbed


def test_no_permission(site: Site, undisturbed: dict[str, bytes]) -> None:
    # In a namespace that maps nobody, root is an ordinary owner of its files.
    prefix = ("unshare", "--user") if os.geteuid() == 0 else ()
    if prefix and site.run(*prefix, "true").returncode:
        pytest.skip("this system lets root not drop its privileges")
    site.runs.chmod(0o555)
    ended = site.submit(*prefix)
    ended.assert_one_clear_line(r"\S+/locks/000001.json cannot be written: Permission denied")
    site.runs.chmod(0o755)
    site.complete()
    assert site.tables() == undisturbed


def test_a_file_in_the_way(site: Site, undisturbed: dict[str, bytes]) -> None:
    run = site.run_folder()
    site.runs.rmdir()
    for file, words in (
        (site.runs, rf"{site.runs} is in the way: a folder must be there"),
        (run / "results", rf"{run}/results is in the way: a folder must be there"),
        (run / "answers", rf"{run}/answers/agent=a cannot be listed: Not a directory"),
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("something else")
        site.submit().assert_one_clear_line(words)
        assert file.read_text() == "something else"
        file.unlink()
    site.complete()
    assert site.tables() == undisturbed


def test_a_bucket_that_is_not_there(
    make_job: Callable[..., Job], s3_options: dict[str, Any]
) -> None:
    job = make_job(output={"path": "s3://missing/runs", "storage_options": s3_options})
    with pytest.raises(OutputError, match=r"^s3://missing/runs/\S+ cannot be written: .*bucket"):
        pipeline.run(job)
