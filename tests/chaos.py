"""Runs a job in real processes, does something terrible to it, and compares what came out."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

import mas_batch
from mas_batch.run_folder.names import JOURNAL
from mas_batch.run_folder.read import Run
from mas_batch.run_folder.storage import Store
from tests.waiting import PATIENCE_S, wait_until

NUM_RECORDS = 60
PRELOAD = Path(__file__).with_name("chaos_preload.py")
JOB: dict[str, Any] = {
    "name": "chaos",
    "corpus": {"path": "corpus.jsonl", "id": "id"},
    "task": {"kind": "summarize", "max_new_tokens": 4},
    "agents": [
        {"name": "a", "model": "echo:a", "count": 2, "options": {"seconds_per_batch": 0.15}},
        {"name": "b", "model": "echo:b", "options": {"seconds_per_batch": 0.08}},
    ],
    "merge": {"method": "vote"},
    "routing": {"timeout_s": 3.0},
    "partition": {"max_records": 3},
    "output": {"path": "runs"},
    "cluster": {"dashboard_address": None},
}


@dataclass(frozen=True)
class Layout:
    """How a run's agents are held."""

    name: str
    concurrent: int = 1
    """Partitions that a host works on at once."""
    shared: bool = False
    """The two agents are of one engine, and its three hosts answer for both."""

    @property
    def job(self) -> dict[str, Any]:
        """The job; as many partitions at once make a batch, so that it takes as much longer."""
        slower = {**JOB, "agents": [dict(agent) for agent in JOB["agents"]]}
        for agent in slower["agents"]:
            agent["options"] = self.options(agent["options"]["seconds_per_batch"])
        if self.shared:
            first, other = slower["agents"]
            first["count"] = 3
            slower["agents"] = [first, {**first, "name": other["name"]}]
        return slower

    def options(self, seconds_per_batch: float, **others: Any) -> dict[str, Any]:
        """Options of an agent whose batch would take so long if it were of one partition."""
        seconds = round(seconds_per_batch * self.concurrent, 3)
        return {"seconds_per_batch": seconds, "concurrent": self.concurrent, **others}

    def worker(self, name: str) -> str:
        """Return what a worker is called that is `name` where agents are alone at their hosts."""
        return name.replace("a-", "a+b-") if self.shared else name

    def set(self, agents: str, seconds_per_batch: float, **others: Any) -> list[str]:
        """Return arguments that give these agents (letters), or all that share, other options."""
        options = yaml.safe_dump(
            self.options(seconds_per_batch, **others), default_flow_style=True, width=10**6
        ).strip()
        named = "ab" if self.shared else agents
        return [part for a in named for part in ("--set", f"agents.{a}.options={options}")]


LAYOUTS = {
    layout.name: layout
    for layout in (Layout("one"), Layout("three", 3), Layout("shared", 3, shared=True))
}
"""By how many partitions a host works on at once."""


@dataclass
class Outcome:
    """What a fault did to the run's output."""

    fault: str
    injected: int
    lost: int
    doubled: int
    identical: bool
    note: str = ""
    layout: str = "one"


CHAOS = "chaos"
"""Name of the property of a test's report that holds its outcome, as a dict."""


def as_table(outcomes: Sequence[Outcome]) -> str:
    """Return one line per kind of fault, added up over the rounds; times injected by layout."""
    columns = [name for name in LAYOUTS if any(outcome.layout == name for outcome in outcomes)]
    titles = ["times injected"] if columns == ["one"] else columns
    lines = [
        f"| fault | {' | '.join(titles)} | lost | doubled | identical |",
        "|---" * (4 + len(columns)) + "|",
    ]
    for fault in dict.fromkeys(outcome.fault for outcome in outcomes):
        these = [outcome for outcome in outcomes if outcome.fault == fault]
        lost, doubled = (
            sum(getattr(outcome, name) for outcome in these) for name in ("lost", "doubled")
        )
        of_layout = (sum(o.injected for o in these if o.layout == name) for name in columns)
        injected = " | ".join(str(number or "") for number in of_layout)
        same = "yes" if all(outcome.identical for outcome in these) else "NO"
        notes = {outcome.note for outcome in these if outcome.note}
        lines.append(
            f"| {fault} | {injected} | {lost} | {doubled} | {same}{''.join(sorted(notes))} |"
        )
    return "\n".join(lines)


class Arena:
    """A corpus, a job and processes at their mercy; one folder per run."""

    def __init__(self, folder: Path, seed: int = 0, layout: Layout = LAYOUTS["one"]) -> None:
        self.folder = folder
        self.layout = layout
        self.rng = random.Random(seed)
        self.log = folder / "log"
        rows = [
            {"id": f"r{i:02d}", "text": f"record {i} has a few words"} for i in range(NUM_RECORDS)
        ]
        (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "job.yaml").write_text(yaml.safe_dump(layout.job))

    @property
    def slow(self) -> list[str]:
        """Options without which the run would be over too soon."""
        return self.layout.set("b", 0.4)

    @contextmanager
    def submitted(
        self, *options: str, plan: Mapping[str, Any] | None = None
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Submit the job in a session of its own; at the end end it and all its children."""
        environ = dict(os.environ)
        if plan is not None:
            environ["MAS_BATCH_CHAOS"] = json.dumps({"folder": str(self.folder), **plan})
            environ["DASK_DISTRIBUTED__WORKER__PRELOAD"] = str(PRELOAD)
            environ["DASK_DISTRIBUTED__SCHEDULER__PRELOAD"] = str(PRELOAD)
        with started(
            ["-m", "mas_batch.submit", "job.yaml", "--json", *options],
            self.log,
            cwd=self.folder,
            env=environ,
        ) as child:
            yield child

    def submit(self, *options: str, plan: Mapping[str, Any] | None = None) -> Run:
        """Submit the job and wait for its end; it must succeed."""
        with self.submitted(*options, plan=plan) as child:
            assert child.wait(PATIENCE_S) == 0, self.log.read_text()
        return self.opened()

    def opened(self) -> Run:
        """Open the only run there is."""
        (folder,) = (path.parent for path in self.folder.glob("runs/*/job.yaml"))
        return mas_batch.open_run(str(folder))

    def num_merged(self) -> int:
        """Partitions whose results are committed."""
        return len(list(self.folder.glob("runs/*/results/part-*.parquet")))

    def wait_until(self, condition: Callable[[], object], child: subprocess.Popen[bytes]) -> bool:
        """Wait for the condition; False if the process ended before."""
        wait_until(lambda: child.poll() is not None or condition(), self.log.read_text)
        return bool(condition())

    def wait_for_merges(self, count: int, child: subprocess.Popen[bytes]) -> None:
        """Wait until so many partitions are merged; the run must still be going on."""
        assert self.wait_until(lambda: self.num_merged() >= count, child), "it was over too soon"

    def fired(self) -> int:
        """Whether the planned fault has happened."""
        return int((self.folder / "fired").exists())

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """Events of these kinds that the run's executions have logged."""
        lines = [
            json.loads(line)
            for file in sorted(self.folder.glob("runs/*/events/*.jsonl"))
            for line in file.read_text().splitlines()
        ]
        return [line for line in lines if not kinds or line["event"] in kinds]


@contextmanager
def started(command: list[str], log: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start a Python process in a session of its own; at the end kill what is left of it."""
    with log.open("ab") as file:
        child = subprocess.Popen(
            [sys.executable, *command],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **options,
        )
    try:
        yield child
    finally:
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def workers_of(parent: int) -> list[int]:
    """List the worker processes below an embedded cluster's process, spawned or forked."""
    servers = children_named(parent, "multiprocessing.forkserver")
    forked = (children_named(server, "multiprocessing.forkserver") for server in servers)
    return [*children_named(parent, "spawn_main"), *chain.from_iterable(forked)]


def children_named(parent: int, words: str) -> list[int]:
    """List the processes below `parent` whose command line has `words`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            command = (stat.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if int(fields[1]) == parent and words in command:
            found.append(int(stat.parent.name))
    return found


def compare(fault: str, injected: int, run: Run, reference: Run, *, but: str = "") -> Outcome:
    """Compare a run with the undisturbed one, file by file, byte by byte.

    Args:
        but: a record that is expected in the failures; its partition's files then differ, and
            are compared row by row.
    """
    expected = reference.arrow()["record_id"].to_pylist()
    ids = run.arrow()["record_id"].to_pylist() + run.arrow("failures")["record_id"].to_pylist()
    answers = run.arrow("answers").select(["record_id", "agent_id", "sample_id"]).to_pylist()
    doubled = sum(n - 1 for n in Counter(ids).values())
    doubled += sum(n - 1 for n in Counter(tuple(row.values()) for row in answers).values())
    if but:
        rows = [row for row in reference.arrow().to_pylist() if row["record_id"] != but]
        identical = run.arrow().to_pylist() == rows
        identical = identical and run.arrow("failures")["record_id"].to_pylist() == [but]
    else:
        identical = _contents(run) == _contents(reference)
    assert not list(Path(run.store.url).rglob(".tmp-*")), "temporary files were left behind"
    assert not list(Path(run.store.url).glob(f"{JOURNAL}/*/*")), "a journal was left behind"
    return Outcome(fault, injected, len(set(expected) - set(ids)), doubled, identical)


def _contents(run: Run) -> dict[str, bytes]:
    store: Store = run.store
    return {name: store.read_bytes(name) for t in ("results", "failures") for name in run.files(t)}
