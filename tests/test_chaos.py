"""Whatever happens to the processes: nothing lost, nothing doubled, the same bytes.

Short by default; `make chaos` repeats every fault with other seeds. Each fault is real: signals
to real processes, memory that is really eaten, exceptions raised where a model would raise them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark import ParameterSet
from distributed import Client, Nanny

from mas_batch import pipeline
from mas_batch.events import Event, PartitionMerged
from mas_batch.job_file import load_job
from mas_batch.run_folder.read import Run
from tests.chaos import (
    CHAOS,
    JOB,
    LAYOUTS,
    NUM_RECORDS,
    Arena,
    Outcome,
    compare,
    started,
    workers_of,
)
from tests.clusters import cluster_of, run_in_process
from tests.waiting import PATIENCE_S

pytestmark = [pytest.mark.faults, pytest.mark.chaos]

Tell = Callable[[Outcome], None]


def in_layouts(*layouts: str) -> pytest.MarkDecorator:
    """Parametrise a test by layouts: in the first on every commit, in the others at night."""
    return pytest.mark.parametrize("layout", _nightly_but_the_first(layouts))


def _nightly_but_the_first(layouts: Sequence[str], *before: str) -> list[ParameterSet]:
    return [
        pytest.param(*before, name, id="-".join([*before, name]), marks=[pytest.mark.nightly][:i])
        for i, name in enumerate(layouts)
    ]


@pytest.fixture
def tell(record_property: Callable[[str, Any], None], layout: str) -> Tell:
    """Put the outcome into the table that is printed in the end, and check it."""

    def tell(outcome: Outcome) -> None:
        record_property(CHAOS, asdict(replace(outcome, layout=layout)))
        assert outcome.injected, "the fault never happened"
        assert (outcome.lost, outcome.doubled, outcome.identical) == (0, 0, True)

    return tell


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Return a function that returns the run of a layout that nothing happens to."""

    @cache
    def run(layout: str) -> Run:
        # One partition at a time: how many there are must not be seen in the results.
        undisturbed = replace(LAYOUTS[layout], concurrent=1)
        arena = Arena(tmp_path_factory.mktemp("reference"), layout=undisturbed)
        options = (f"agents.{name}.options.seconds_per_batch=0" for name in ("a", "b"))
        run_in_process(arena.folder / "job.yaml", *options)
        return arena.opened()

    return run


@pytest.fixture
def reference(references: Callable[[str], Run], layout: str) -> Run:
    return references(layout)


@pytest.fixture
def arena(tmp_path: Path, chaos_seed: int, layout: str) -> Arena:
    return Arena(tmp_path, chaos_seed, LAYOUTS[layout])


INSIDE: dict[str, dict[str, Any]] = {
    "SIGKILL during compute": {"fault": "kill-during-compute"},
    "SIGKILL between commit and report": {"fault": "kill-before-report"},
    "SIGKILL after report": {"fault": "kill-after-report"},
    "an agent that hangs": {"fault": "hang"},
    "a worker over its memory limit": {"fault": "memory"},
    "retired while busy": {"fault": "retire", "agent": "a"},
    "restarted by its nanny while busy": {"fault": "restart", "agent": ""},
    "one of two workers cannot load": {"fault": "fail-to-load"},
    "one of two workers fails fast": {"fault": "fail-fast", "times": 1000},
    "one fails fast, then recovers": {"fault": "fail-fast", "times": 4},
}


def _faults_and_layouts() -> list[ParameterSet]:
    """Each fault in each layout; on every commit the layouts take turns."""
    names = [*LAYOUTS]
    turns = [[*names[i:], *names[:i]] for i in range(len(names))]
    return [
        each
        for i, fault in enumerate(INSIDE)
        for each in _nightly_but_the_first(turns[i % len(turns)], fault)
    ]


@pytest.mark.parametrize(("fault", "layout"), _faults_and_layouts())
def test_a_fault_inside_costs_nothing(fault: str, arena: Arena, reference: Run, tell: Tell) -> None:
    broken = arena.layout.worker("a-1")
    plan = {
        **INSIDE[fault],
        "worker": broken,
        "seed": arena.rng.random(),
        "after": arena.rng.randint(2, 6),
        "delay_s": arena.rng.uniform(0.0, 1.0),
    }
    options = ("--set", "cluster.memory_limit=500MB") if plan["fault"] == "memory" else ()
    run = arena.submit(*options, plan=plan)
    tell(compare(fault, arena.fired(), run, reference))
    if fault == "one of two workers fails fast":  # it must not attract all the work
        failures = arena.events("AnswerFailed")
        assert {failure["worker"] for failure in failures} == {broken}
        asked = arena.events("PartitionAsked")
        probes = [e for e in asked if e["purpose"] == "probe" and e["worker"] == broken]
        # Three partitions open its breaker: up to two tasks each where two agents share it.
        sent = (5 if arena.layout.shared else 3) + arena.layout.concurrent - 1
        assert 3 <= len(failures) <= sent + len(probes), "the rest are probes"
        assert next(e["state"] for e in arena.events("BreakerChanged")) == "open"


@in_layouts("three", "shared", "one")
def test_a_worker_killed_at_a_random_moment(arena: Arena, reference: Run, tell: Tell) -> None:
    with arena.submitted() as child:
        arena.wait_for_merges(arena.rng.randint(1, 8), child)
        os.kill(arena.rng.choice(sorted(workers_of(child.pid))), signal.SIGKILL)
        assert child.wait(PATIENCE_S) == 0, arena.log.read_text()
    assert "event=host_lost" in arena.log.read_text()
    tell(compare("SIGKILL at a random moment", 1, arena.opened(), reference))


@in_layouts("shared", "one", "three")
def test_a_worker_stopped_and_continued(arena: Arena, reference: Run, tell: Tell) -> None:
    """A zombie: it is believed dead or slow, its work is done elsewhere, and then it goes on."""
    with arena.submitted("--set", "routing.timeout_s=60") as child:
        arena.wait_for_merges(arena.rng.randint(1, 8), child)
        zombie = arena.rng.choice(sorted(workers_of(child.pid)))
        os.kill(zombie, signal.SIGSTOP)
        time.sleep(arena.rng.uniform(1.0, 3.0))
        os.kill(zombie, signal.SIGCONT)
        assert child.wait(PATIENCE_S) == 0, arena.log.read_text()
    tell(compare("SIGSTOP, then SIGCONT", 1, arena.opened(), reference))


@in_layouts("three", "shared", "one")
def test_a_worker_stopped_for_good(arena: Arena, reference: Run, tell: Tell) -> None:
    with arena.submitted() as child:
        arena.wait_for_merges(arena.rng.randint(1, 8), child)
        os.kill(arena.rng.choice(sorted(workers_of(child.pid))), signal.SIGSTOP)
        assert child.wait(PATIENCE_S) == 0, arena.log.read_text()
    tell(compare("SIGSTOP for good", 1, arena.opened(), reference))


@in_layouts("shared", "one", "three")
def test_the_submitting_process_killed_again_and_again(
    arena: Arena, reference: Run, tell: Tell, chaos_rounds: int
) -> None:
    injected, kept = 0, dict[Path, int]()
    for number in range(20 if chaos_rounds > 1 else 3):
        with arena.submitted(*arena.slow) as child:
            done = arena.num_merged()
            if number % 2:  # at any moment: while it starts, stages, loads, answers or publishes
                time.sleep(arena.rng.uniform(0.5, 4.0))
            else:
                arena.wait_until(lambda done=done: arena.num_merged() > done, child)
            if child.poll() is not None:
                break  # the run is complete
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            injected += 1
            if not number:
                assert 1 <= arena.num_merged() < NUM_RECORDS // 3
                assert not list(arena.folder.glob("runs/*/manifest.json"))
            assert {path: path.stat().st_ino for path in kept} == kept, "work was done again"
            kept = {p: p.stat().st_ino for p in arena.folder.glob("runs/*/*/**/part-*.parquet")}
    run = arena.submit(*arena.slow)
    assert {path: path.stat().st_ino for path in kept} == kept, "committed work was done again"
    tell(compare("submitting process killed", injected, run, reference))
    assert injected >= 3


@in_layouts("shared", "one", "three")
@pytest.mark.parametrize("fault", ["kill", "allocate"])
def test_a_record_that_kills_its_worker_every_time_is_alone_in_the_failures(
    fault: str, arena: Arena, reference: Run, tell: Tell
) -> None:
    poison = arena.rng.randint(10, NUM_RECORDS - 1)
    run = arena.submit(
        *arena.layout.set("ab", 0.1, faults={f"record {poison} has": fault}),
        "--set", "cluster.memory_limit=600MB", "--set", "routing.timeout_s=20",
    )  # fmt: skip
    name = {"kill": "a record that kills", "allocate": "a record that eats memory"}[fault]
    outcome = compare(name, 1, run, reference, but=f"r{poison:02d}")
    tell(replace(outcome, note=", but for the record"))
    (failure,) = run.arrow("failures").to_pylist()
    assert failure["reason"] == "worker_died"
    asked = {
        (e["partition"], e["agent_id"])
        for e in arena.events("PartitionAsked")
        if e["purpose"] == "careful"
    }
    assert {(poison // 3, "a"), (poison // 3, "b")} <= asked
    if fault == "kill":  # what takes long to kill may have been copied to a second host by then
        assert len(asked) <= 2 * arena.layout.concurrent, "what only waited is not blamed"
        # For each agent twice alone, before once among others, which may be both agents' death.
        assert 5 <= len(arena.events("HostLost")) <= 6


@in_layouts("three", "shared", "one")
def test_the_scheduler_killed_and_started_again(arena: Arena, reference: Run, tell: Tell) -> None:
    file = arena.folder / "scheduler.json"
    options = ("--scheduler-file", str(file))
    for attempt in ("killed", "whole"):
        file.unlink(missing_ok=True)
        with UsersCluster(arena, file) as scheduler, arena.submitted(*options) as child:
            if attempt == "killed":
                arena.wait_for_merges(arena.rng.randint(1, 8), child)
                os.kill(scheduler.pid, signal.SIGKILL)
                assert child.wait(PATIENCE_S) == 1, arena.log.read_text()
                assert "run the same command again to resume" in arena.log.read_text()
            else:
                assert child.wait(PATIENCE_S) == 0, arena.log.read_text()
    tell(compare("scheduler killed, started again", 1, arena.opened(), reference))


class UsersCluster:
    """A scheduler and three workers in processes of their own."""

    def __init__(self, arena: Arena, file: Path) -> None:
        self._arena, self._file = arena, file

    def __enter__(self) -> subprocess.Popen[bytes]:
        self._stack = ExitStack()
        common = ["--scheduler-file", str(self._file), "--no-dashboard"]
        options = {"cwd": self._arena.folder}
        scheduler = self._stack.enter_context(
            started(
                ["-m", "dask", "scheduler", "--host", "127.0.0.1", "--port", "0", *common],
                self._arena.log, **options,
            )
        )  # fmt: skip
        self._arena.wait_until(self._file.exists, scheduler)
        nthreads = str(self._arena.layout.concurrent + 2)
        for name in ("a-0", "a-1", "b-0"):
            command = ["-m", "dask", "worker", *common, "--name", name, "--nthreads", nthreads]
            self._stack.enter_context(
                started(
                    [*command, "--resources", "summarize=1", "--death-timeout", "5"],
                    self._arena.log, **options,
                )
            )  # fmt: skip
        return scheduler

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()


@in_layouts("one", "three", "shared")
def test_two_submitters_of_one_run(arena: Arena, reference: Run, tell: Tell) -> None:
    with arena.submitted(*arena.slow) as first:
        arena.wait_for_merges(1, first)
        with arena.submitted(*arena.slow) as second:
            assert second.wait(PATIENCE_S) == 4
        assert first.wait(PATIENCE_S) == 0, arena.log.read_text()
    tell(compare("two submitters at once", 1, arena.opened(), reference))


@in_layouts("shared", "one", "three")
def test_the_cluster_scaled_down_with_work_in_flight(
    arena: Arena, reference: Run, tell: Tell
) -> None:
    """Dask's own scaling asks nobody: it retires the workers that it likes."""
    nthreads = arena.layout.concurrent + 2
    workers = {
        name: {
            "cls": Nanny,
            "options": {"name": name, "nthreads": nthreads, "resources": {"summarize": 1}},
        }
        for name in ("a-0", "b-0", "a-1")  # the last ones go first
    }
    count = arena.rng.randint(1, 8)

    def emit(event: Event) -> None:
        if isinstance(event, PartitionMerged) and event.partition == count:
            cluster.scale(2)

    with cluster_of(workers) as cluster, Client(cluster) as client:
        client.wait_for_workers(3)
        pipeline.run(load_job(str(arena.folder / "job.yaml")), client=client, emit=emit)
        assert len(client.scheduler_info()["workers"]) == 2
    tell(compare("scaled down while busy", 1, arena.opened(), reference))
    assert {event["purpose"] for event in arena.events("PartitionAsked")} <= {"answer", "copy"}


@in_layouts("one", "three")
def test_workers_come_and_go_with_the_backlog(arena: Arena, reference: Run, tell: Tell) -> None:
    run = arena.submit(
        "--set", "agents.a.count=1", "--set", "agents.a.max_count=3",
        *arena.layout.set("a", 0.6), *arena.layout.set("b", 0.5),  # a is done while b goes on
    )  # fmt: skip
    tell(compare("scaled up and down under work", 1, run, reference))
    wanted = [event["wanted"]["a"] for event in arena.events("HostsScaled")]
    assert max(wanted) == 3
    assert wanted[-1] < 3, "it gives workers back when less is left"
    assert {e["worker"] for e in arena.events("PartitionAnswered") if e["agent_id"] == "a"} >= {
        "a-0",
        "a-1",
    }


def test_the_job_of_this_suite_is_deterministic() -> None:
    assert all(agent["model"].startswith("echo") for agent in JOB["agents"])
