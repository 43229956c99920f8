"""A run's folder as a value: what is there, what is valid, and readers that scale."""

from __future__ import annotations

import json
import os
import random
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pyarrow as pa
import pytest
from distributed import Client, LocalCluster
from hypothesis import given
from hypothesis import strategies as st

from mas_batch.aggregate.reductions import Reduction
from mas_batch.aggregate.tree import tree_reduce
from mas_batch.errors import OutputError, RunError
from mas_batch.incremental.taking import read_since
from mas_batch.records import FAILURES, PLAN
from mas_batch.run_folder.commits import commit_results, committed, merged_agents, read_results
from mas_batch.run_folder.manifest import (
    manifest_files,
    read_engines,
    read_job_mapping,
    write_manifest,
)
from mas_batch.run_folder.names import (
    FORMAT,
    answers_name,
    partition_stem,
    results_name,
    review_name,
)
from mas_batch.run_folder.plan import Plan
from mas_batch.run_folder.ranges import from_ranges, join_ranges, to_ranges
from mas_batch.run_folder.read import Run, open_run
from mas_batch.run_folder.storage import Store
from mas_batch.stages.publishing import _escalation_facts
from tests.waiting import wait_until

NAMES = ("results", "answers/agent=b", "answers/agent=a")
FOREIGN = (
    *(".tmp-0123", "part-3.parquet", "part-0000003.parquet", "part-٠٠٠٠٠٣.parquet"),
    *("part-000003.parquet.bak", "_SUCCESS", "part-000099.parquet"),
)


def plan_of(num_partitions: int, records: int = 10) -> Plan:
    columns = [
        range(num_partitions),
        range(0, num_partitions * records, records),
        [records + i % 7 for i in range(num_partitions)],
        [100 * i for i in range(num_partitions)],
    ]
    arrays = [pa.array(c, f.type) for c, f in zip(columns, PLAN, strict=True)]
    return Plan(pa.table(arrays, schema=PLAN), pa.schema([]))


def one_row(record_id: str) -> pa.Table:
    return pa.table({"record_id": [record_id], "answer": ["yes"]})


def failure(record_id: str) -> pa.Table:
    row = {"record_id": record_id, "stage": "answer", "reason": "too_long", "message": ""}
    return pa.Table.from_pylist([row], schema=FAILURES)


def published(folder: Path, **files: Any) -> Run:
    """A run whose manifest holds these files and else nothing."""
    none: dict[str, Any] = {"results": [], "failures": [], "answers": {}}
    manifest = {"format": FORMAT, "run": "x", "files": none | files, "versions": {}}
    write_manifest(Store(str(folder)), manifest)
    return open_run(str(folder))


# Ranges and bitmaps


@given(st.lists(st.booleans(), max_size=60))
def test_ranges_are_the_members_and_as_few_as_can_be(members: list[bool]) -> None:
    ranges = to_ranges(np.array(members, np.bool_))
    assert list(from_ranges(ranges)) == [i for i, there in enumerate(members) if there]
    assert all(first < stop for first, stop in ranges)
    assert all(stop < first for (_, stop), (first, _) in pairwise(ranges)), "two ranges touch"
    assert json.loads(json.dumps(ranges)) == ranges


@given(st.lists(st.sets(st.integers(0, 19)), min_size=3, max_size=3), st.booleans())
def test_what_is_committed_is_what_the_folders_hold(
    tmp_path_factory: pytest.TempPathFactory, parts: list[set[int]], local: bool
) -> None:
    folder = tmp_path_factory.mktemp("run")
    run = Store(str(folder) if local else f"memory://{folder.name}")
    for name, numbers in zip(NAMES, parts, strict=True):
        theirs = FOREIGN if numbers else ()
        for file in (*(f"{partition_stem(n)}.parquet" for n in numbers), *theirs):
            run.replace(f"{name}/{file}", b"")
    merged, answered = parts[0], {"b": parts[1], "a": parts[2]}

    done = committed(run, plan_of(20), ["b", "a"])

    assert set(np.flatnonzero(done.is_merged)) == merged
    assert {a: set(np.flatnonzero(bits)) for a, bits in done.is_answered.items()} == answered
    assert done.num_merged == len(merged)
    assert done.num_answers_to_open == sum(len(have - merged) for have in answered.values())
    assert [done.agents(n) for n in range(20)] == [
        frozenset(agent for agent, have in answered.items() if n in have) for n in range(20)
    ]


def test_a_file_where_a_folder_must_be_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "results").write_bytes(b"")
    with pytest.raises(RunError, match=r"results"):
        committed(Store(str(tmp_path)), plan_of(3), [])


def test_the_plan_is_streamed_in_order_whatever_its_length() -> None:
    plan = plan_of(10_001)
    sizes = list(plan.sizes())
    assert sizes == [(i, 10 + i % 7, 100 * i) for i in range(10_001)]
    assert plan.num_records == sum(records for _, records, _ in sizes)
    some = np.zeros(10_001, np.bool_)
    some[[3, 4, 10_000]] = True
    assert plan.num_records_in(some) == sum(sizes[i][1] for i in (3, 4, 10_000))
    assert plan_of(0).num_records == 0
    assert list(plan_of(0).sizes()) == []


# The manifest and its readers


def test_the_manifest_names_what_is_there_in_corpus_order(tmp_path: Path) -> None:
    run, plan = Store(str(tmp_path)), plan_of(12)
    for p in range(12):
        run.replace(results_name(p), b"")
    asked = {"z": [0, 1, 2, 3, 7, 11], "a": [1, 2, 10, 11], "idle": []}
    for agent, partitions in asked.items():
        for p in partitions:
            run.replace(answers_name(p, agent), b"")
    failures = {10: "failures/part-000010-beef.parquet", 2: "failures/part-000002-cafe.parquet"}

    found = {agent: [[p, p + 1] for p in partitions] for agent, partitions in asked.items()}
    answers = {agent: join_ranges([parts]) for agent, parts in found.items()}
    files = manifest_files(plan, answers, failures, [1])

    assert files["results"] == [[0, 12]]
    assert files["answers"] == {
        "z": [[0, 4], [7, 8], [11, 12]],
        "a": [[1, 3], [10, 12]],
        "idle": [],
    }
    opened = published(tmp_path, **files)
    assert list(opened.files("results")) == [results_name(p) for p in range(12)]
    assert list(opened.files("failures")) == [failures[2], failures[10]]
    assert list(opened.files("review")) == [review_name(1)]
    assert list(opened.files("answers")) == [
        answers_name(p, agent) for p in range(12) for agent in asked if p in asked[agent]
    ]
    with pytest.raises(RunError, match="no table 'plan'; allowed: results"):
        opened.files("plan")


def test_the_manifest_of_a_large_run_is_small() -> None:
    nothing: list[str] = []
    answers = {"a": [[0, 100_000]], "b": nothing}
    files = manifest_files(plan_of(100_000), answers, {}, [])
    assert files == {
        "results": [[0, 100_000]], "review": [], "failures": nothing, "answers": answers,
    }  # fmt: skip


@given(st.sets(st.integers(0, 60)), st.integers(1, 5), st.randoms())
def test_ranges_are_joined_as_if_they_were_made_at_once(
    members: set[int], num_parts: int, rng: random.Random
) -> None:
    """As a tree does: leaf by leaf, in any order and grouping."""
    bitmap = np.zeros(61, np.bool_)
    bitmap[list(members)] = True
    parts: list[Any] = [[] for _ in range(num_parts)]
    for member in members:
        parts[rng.randrange(num_parts)].append([member, member + 1])
    leaves = [join_ranges([part]) for part in parts]
    rng.shuffle(leaves)
    half = [join_ranges(leaves[::2]), join_ranges(leaves[1::2])]
    assert join_ranges(half) == join_ranges(leaves) == to_ranges(bitmap)


def test_a_manifest_of_the_first_format_is_still_read(tmp_path: Path) -> None:
    run = Store(str(tmp_path))
    for p in range(2):
        run.commit_table(results_name(p), one_row(f"r{p}"))
    names = [results_name(p) for p in range(2)]
    old = {"results": names, "failures": [], "answers": []}
    write_manifest(run, {"format": 1, "run": "x", "files": old})
    opened = open_run(str(tmp_path))
    assert opened.arrow()["record_id"].to_pylist() == ["r0", "r1"]
    assert list(opened.files("answers")) == []


def test_a_manifest_of_a_later_format_is_refused(tmp_path: Path) -> None:
    later = {"format": FORMAT + 1, "versions": {"mas_batch": "9.0"}}
    write_manifest(Store(str(tmp_path)), later)
    with pytest.raises(RunError, match=r"format 4, .* reads 1 to 3; .*'mas_batch': '9\.0'"):
        open_run(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("manifest.json", lambda store: open_run(store.url)),
        ("engines.json", read_engines),
        ("since.json", read_since),
        ("job.yaml", read_job_mapping),
        ("escalation.json", _escalation_facts),
    ],
)
@pytest.mark.parametrize("content", [b'{"format": 3, "run": "x', b"", b"\xff\xfe", b"[]"])
def test_a_file_that_is_cut_is_named(
    tmp_path: Path, name: str, read: Callable[[Store], Any], content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RunError, match=rf"{name} is damaged: [^\n]+; restore it, or remove"):
        read(Store(str(tmp_path)))


def test_a_table_of_many_files_is_read_with_few_open_and_in_few_chunks(tmp_path: Path) -> None:
    run = Store(str(tmp_path))
    for p in range(130):
        run.commit_table(results_name(p), one_row(f"r{p}"))
    opened = published(tmp_path, results=[[0, 130]])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_open = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + 8, hard))
    try:
        table = opened.arrow()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert table["record_id"].to_pylist() == [f"r{p}" for p in range(130)]
    assert table["record_id"].num_chunks == 3


@pytest.mark.parametrize(("num_files", "num_partitions"), [(3, 3), (1000, 1000), (1001, 501)])
def test_dask_partitions_are_files_until_there_are_many(
    tmp_path: Path, num_files: int, num_partitions: int
) -> None:
    run = Store(str(tmp_path))
    run.commit_table(results_name(0), one_row("r"))
    first = Path(run.path(results_name(0)))
    for p in range(1, num_files):
        Path(run.path(results_name(p))).hardlink_to(first)
    frame = published(tmp_path, results=[[0, num_files]]).dask()
    assert frame.npartitions == num_partitions
    ends = [len(frame.get_partition(i).compute(scheduler="sync")) for i in (0, num_partitions - 1)]
    assert ends == ([2, 1] if num_files > 1000 else [1, 1])


def test_results_and_their_failures_file_stay_together(tmp_path: Path) -> None:
    """Of two copies of a merge that saw different answers the first wins, failures included."""
    run = Store(str(tmp_path))
    assert commit_results(run, 4, one_row("a"), failure("b"), ["y", "x"]) == (1, 1)
    assert commit_results(run, 4, one_row("b"), failure("x"), ["x", "y", "z"]) == (1, 1)
    merged = read_results(run, 4)
    assert merged.results["record_id"].to_pylist() == ["a"]
    assert merged.failures["record_id"].to_pylist() == ["b"]
    assert merged.failures_name in {f"failures/{file}" for file in run.list("failures")}
    assert merged.agents == merged_agents(run, 4) == ("x", "y")
    commit_results(run, 5, one_row("c"), FAILURES.empty_table(), [])
    assert read_results(run, 5).failures_name is None
    assert merged_agents(run, 5) == ()
    run.commit_table(results_name(6), one_row("of an earlier version"))
    assert merged_agents(run, 6) is None


# The statistics tree, when things go wrong

SUM = Reduction("sum", lambda: {}, lambda parts: {"n": sum(p["n"] for p in parts)}, dict)


def leaf(number: int) -> dict[str, int]:
    return {"n": number}


@pytest.fixture
def own_cluster() -> Iterator[Callable[..., tuple[LocalCluster, Client]]]:
    """Start clusters that a test may break."""
    open_ones: list[Any] = []

    def start(**options: Any) -> tuple[LocalCluster, Client]:
        quiet = {"dashboard_address": "127.0.0.1:0", "silence_logs": 60, "protocol": "tcp"}
        cluster = LocalCluster(**{"threads_per_worker": 1, "processes": False, **quiet, **options})
        client = Client(cluster, set_as_default=False)
        open_ones.extend((cluster, client))
        return cluster, client

    yield start
    for each in reversed(open_ones):
        each.close()


leaves: Counter[str] = Counter()


def counted_leaf(number: int) -> dict[str, int]:
    time.sleep(0.01)
    leaves["ended"] += 1
    return leaf(number)


def test_groups_are_read_as_tasks_end(cluster_client: Client) -> None:
    leaves.clear()

    def groups() -> Iterator[tuple[int]]:
        for number in range(40):
            assert leaves["given out"] - leaves["ended"] < 4
            leaves["given out"] += 1
            yield (number,)

    # The workers are threads of this process and count in the same place.
    assert tree_reduce(cluster_client, counted_leaf, groups(), SUM, max_in_flight=4, wait_s=60) == {
        "n": 780
    }
    assert leaves["ended"] == 40


def test_workers_that_are_all_gone_and_stay_away_end_the_tree(own_cluster: Any) -> None:
    cluster, client = own_cluster(n_workers=2)

    def groups() -> Iterator[tuple[int]]:
        yield from ((number,) for number in range(20))
        cluster.scale(0)
        wait_until(lambda: not client.scheduler_info(n_workers=-1)["workers"])
        yield (20,)

    with pytest.raises(RunError, match=r"no worker for 0\.5 s to count sum; .* start a worker"):
        tree_reduce(client, leaf, groups(), SUM, max_in_flight=4, wait_s=0.5)


def test_partials_that_are_lost_with_their_workers_are_computed_again(own_cluster: Any) -> None:
    cluster, client = own_cluster(n_workers=2)

    def groups() -> Iterator[tuple[int]]:
        yield from ((number,) for number in range(30))
        cluster.scale(0)
        wait_until(lambda: not client.scheduler_info(n_workers=-1)["workers"])
        cluster.scale(1)
        yield (30,)

    assert tree_reduce(client, leaf, groups(), SUM, max_in_flight=4, wait_s=60) == {"n": 465}


def test_a_lost_scheduler_ends_the_tree(own_cluster: Any) -> None:
    cluster, _ = own_cluster(n_workers=1)
    client = Client(cluster.scheduler_address, set_as_default=False)

    def groups() -> Iterator[tuple[int]]:
        yield (1,)
        cluster.close()
        wait_until(lambda: client.status != "running")
        yield (2,)

    try:
        with pytest.raises(RunError, match="the scheduler was lost"):
            tree_reduce(client, leaf, groups(), SUM, wait_s=60)
    finally:
        client.close()


def test_a_leaf_that_kills_its_workers_is_given_up(own_cluster: Any) -> None:
    with dask.config.set({"distributed.scheduler.allowed-failures": 0}):
        _, client = own_cluster(n_workers=1, processes=True)
    with pytest.raises(RunError, match=r"sum: a task killed the workers .* logs"):
        tree_reduce(client, os._exit, [(1,)], SUM, wait_s=60)


def test_a_leafs_error_says_what_it_is(cluster_client: Client) -> None:
    def fail(error: Exception) -> None:
        raise error

    with pytest.raises(RunError, match="sum: a task failed: KeyError: 'tie'"):
        tree_reduce(cluster_client, fail, [(KeyError("tie"),)], SUM, wait_s=60)
    with pytest.raises(OutputError, match="disk full"):
        tree_reduce(cluster_client, fail, [(OutputError("disk full"),)], SUM, wait_s=60)
