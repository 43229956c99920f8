"""Killed at any operation of its storage, a run goes on and comes out the same."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

import mas_batch
from mas_batch.run_folder.read import Run
from tests.chaos import CHAOS, Outcome, compare
from tests.killing import begin, count_operations, finish, some_kills

pytestmark = [pytest.mark.nightly, pytest.mark.faults]

ROWS = [{"id": f"r{i:02d}", "text": f"record {i} has {i % 5} words or more"} for i in range(16)]
BROKEN = [row["text"] for row in ROWS[3:14:5]]
LABELS = ["x", "y", "z"]
JOB: dict[str, Any] = {
    "name": "killed",
    "corpus": {"path": "corpus.jsonl", "id": "id"},
    "task": {"kind": "classify", "labels": LABELS},
    "agents": [
        {
            "name": name,
            "model": f"echo:{name}",
            "options": {"labels": LABELS, "error_rate": rate},
        }
        for name, rate in (("a", 0.2), ("b", 0.4), ("c", 0.1))
    ],
    "merge": {"method": "vote"},
    "partition": {"max_records": 4},
    "output": {"path": "runs", "max_failed_fraction": 1.0},
    "cluster": {"dashboard_address": None},
}
SHARED = {
    "model": "echo:a",
    "count": 2,
    "options": {"labels": LABELS, "error_rate": 0.2, "concurrent": 2},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "vote": {},
    "shared hosts, two at once": {"agents": [{**SHARED, "name": name} for name in "abc"]},
    "reliability": {"merge": {"method": "reliability"}},
    "adaptive": {"routing": {"policy": "round-robin", "adaptive": {"first": 2}}},
    "escalated": {"routing": {"escalate": {"agent": "c", "fraction": 0.3}}},
    "cascade": {"routing": {"escalate": {"agent": "c", "target": 0.5, "labels": 8}}},
    "since: last": {"since": "last"},
    "retry": {},
}


class Site:
    """A folder with a job, and what came before the run that is killed."""

    def __init__(self, folder: Path, variant: str) -> None:
        self.folder = folder
        self.retry = variant == "retry"
        self.before = folder / "before"
        self.before.mkdir(parents=True)
        (self.before / "job.yaml").write_text(yaml.safe_dump(JOB | VARIANTS[variant]))
        self._write_corpus(self.before, ROWS)
        if self.retry:
            assert finish(begin(self.before, broken=BROKEN)) == 0
        if variant == "since: last":
            self._write_corpus(self.before, ROWS[:9])
            assert finish(begin(self.before)) == 0
            self._write_corpus(self.before, ROWS)
        self.known = {path.name for path in self.before.glob("runs/*")}

    def _write_corpus(self, folder: Path, rows: list[dict[str, str]]) -> None:
        (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def copy(self, name: str) -> Path:
        return Path(shutil.copytree(self.before, self.folder / name))

    def run_of(self, folder: Path) -> Run:
        """Open the run that came after what was before; there is no other."""
        (run,) = (
            path.parent
            for path in folder.glob("runs/*/job.yaml")
            if path.parent.name not in self.known
        )
        return mas_batch.open_run(str(run))


@pytest.fixture
def tell(record_property: Callable[[str, Any], None]) -> Callable[[Outcome], None]:
    return lambda outcome: record_property(CHAOS, asdict(outcome))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_that_is_killed_anywhere_comes_out_the_same(
    variant: str,
    tmp_path: Path,
    chaos_seed: int,
    chaos_rounds: int,
    tell: Callable[[Outcome], None],
) -> None:
    site = Site(tmp_path, variant)
    undisturbed = site.copy("undisturbed")
    assert finish(begin(undisturbed, retry=site.retry)) == 0
    reference = site.run_of(undisturbed)
    assert reference.arrow().num_rows == len(ROWS)
    every = max(1, 4 // chaos_rounds)
    kills = some_kills(count_operations(undisturbed), every, random.Random(chaos_seed))
    total = Outcome(f"SIGKILL at its storage: {variant}", 0, 0, 0, True)
    for kill in kills:
        folder = site.copy("killed")
        code = finish(begin(folder, retry=site.retry, kill=kill))
        total.injected += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL), kill
        assert finish(begin(folder, retry=site.retry)) == 0, kill
        found = compare("", 1, site.run_of(folder), reference)
        assert (found.lost, found.doubled, found.identical) == (0, 0, True), kill
        shutil.rmtree(folder)
    assert total.injected >= len(kills) // 2, "an operation may come at another number, or not"
    tell(total)


def test_submitters_that_race_and_are_killed(
    tmp_path: Path, chaos_seed: int, chaos_rounds: int, tell: Callable[[Outcome], None]
) -> None:
    """Three at once, one of which is killed; who comes later takes over or finds it done."""
    site, rng = Site(tmp_path, "vote"), random.Random(chaos_seed)
    undisturbed = site.copy("undisturbed")
    assert finish(begin(undisturbed)) == 0
    reference, operations = site.run_of(undisturbed), count_operations(undisturbed)
    total = Outcome("three submitters at once, one is killed", 0, 0, 0, True)
    for _ in range(5 * chaos_rounds):
        folder = site.copy("raced")
        (kill,) = some_kills(operations, operations, rng)
        codes = [
            finish(process)
            for process in [begin(folder, kill=kill if i == 0 else None) for i in range(3)]
        ]
        assert set(codes) <= {0, 4, -signal.SIGKILL}, (kill, codes)
        assert finish(begin(folder)) == 0, kill
        found = compare("", 1, site.run_of(folder), reference)
        assert (found.lost, found.doubled, found.identical) == (0, 0, True), (kill, codes)
        total.injected += 1
        shutil.rmtree(folder)
    tell(total)
