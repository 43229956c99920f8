"""`submit --retry-failed` on a real cluster: what failed is asked again, all else is kept."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from distributed import Client

from mas_batch import pipeline
from mas_batch.engines.echo import EchoEngine
from mas_batch.errors import JobError
from mas_batch.events import AnswersReused, Event, HostReady, PartitionMerged
from mas_batch.stages.memory import Memory
from tests.test_incremental_runs import V1, Nights, assert_same, row

Faults = dict[str, str]


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    """Text → what happens to it now; workers are in this process."""
    known: Faults = {}
    monkeypatch.setattr(EchoEngine, "_fault", lambda self, request: known.get(request.text))
    return known


@pytest.fixture
def job(tmp_path: Path, cluster_client: Client) -> Nights:
    return Nights(tmp_path, cluster_client, since=None, output={"max_failed_fraction": 1.0})


def texts(*numbers: int) -> list[str]:
    return [row(number)["text"] for number in numbers]


def test_what_failed_is_asked_again_and_nothing_else(job: Nights, faults: Faults) -> None:
    faults |= dict.fromkeys(texts(3, 4, 17), "error") | dict.fromkeys(texts(8), "unparsable")
    first = job.run(V1)
    failures = first.arrow("failures").to_pylist()
    assert {(each["reason"], each["worth_retrying"]) for each in failures} == {
        ("engine_error", True),
        ("unparsable_answer", False),
    }
    faults.clear()
    faults |= dict.fromkeys(texts(8), "unparsable")
    second = job.run(None, retry_failed=True)
    assert job.num_asked == {"strong": 3, "weak": 3}
    assert second.manifest["run"] == f"{first.manifest['run']}-retry-1"
    assert second.manifest["since"]["run"] == first.manifest["run"]
    assert_same(second, job.full(None))
    assert first.arrow("failures").num_rows == 4, "the first version is as it was"


def test_the_latest_version_is_the_run(job: Nights, faults: Faults) -> None:
    faults |= dict.fromkeys(texts(3, 4), "error")
    job.run(V1)
    del faults[texts(3)[0]]
    second = job.run(None, retry_failed=True)
    assert job.run(None).manifest == second.manifest
    faults.clear()
    third = job.run(None, retry_failed=True)
    assert job.num_asked == {"strong": 1, "weak": 1}
    assert third.manifest["run"].endswith("-retry-2")
    assert_same(third, job.full(None))
    fourth = job.run(None, retry_failed=True)
    assert fourth.manifest == third.manifest, "nothing is left that is worth it"
    assert job.events.of(HostReady) == []
    new = job.run([*V1, row(77)], since="last")
    assert new.manifest["since"]["run"] == third.manifest["run"]


@pytest.mark.parametrize("by_earlier_version", [False, True])
def test_a_retry_that_is_interrupted_is_resumed(
    job: Nights, faults: Faults, by_earlier_version: bool
) -> None:
    faults |= dict.fromkeys(texts(3, 14, 25), "error")
    job.run(V1)
    faults.clear()

    def interrupt(event: Event) -> None:
        if isinstance(event, PartitionMerged):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.run(job.job(None), client=job.client, emit=interrupt, retry_failed=True)
    if by_earlier_version:
        (run,) = (job.folder / "runs").glob("*-retry-1")
        names = {
            parent: list((run / parent).rglob("*.parquet")) for parent in ("reused", "answers")
        }
        assert all(names.values())
        for file in chain(*names.values()):
            table = pq.read_table(file, partitioning=None)
            pq.write_table(table.drop_columns(["probs", "cached_tokens"]), file)
    second = job.run(None, retry_failed=True)
    assert second.manifest["run"].endswith("-retry-1")
    assert_same(second, job.full(None))


def test_an_answer_that_failed_beside_others_is_asked_for_again(
    job: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record has a result, of fewer answers than the job asks for."""
    broken = {"echo:weak": "error"}
    monkeypatch.setattr(
        EchoEngine,
        "_fault",
        lambda self, request: broken.get(self._source) if request.text in texts(3) else None,
    )
    first = job.run(V1)
    assert first.arrow("failures").num_rows == 0
    broken.clear()
    second = job.run(None, retry_failed=True)
    assert job.num_asked == {"weak": 1}
    assert {agent for event in job.events.of(HostReady) for agent in event.agents} == {"weak"}
    assert_same(second, job.full(None))


def test_of_a_raised_limit_only_what_depends_on_it_is_asked_again(
    job: Nights, faults: Faults
) -> None:
    """The options are others, so the run is another one."""
    rows = [*V1[:8], {"id": "long", "text": "many words " * 60}]

    def at(limit: int) -> dict[str, Any]:
        agents = job.job(rows).model_dump(mode="json")["agents"]
        for agent in agents:
            agent["options"]["max_context_tokens"] = limit
        return {"agents": agents, "task": {"kind": "classify", "labels": ["x", "y", "z"]}}

    faults |= dict.fromkeys(texts(3), "error")
    first = job.run(rows, **at(150))
    assert set(first.arrow("answers")["num_parts"].to_pylist()) == {1, 2}
    faults.clear()
    second = job.run(None, **at(400), retry_failed=True)
    assert job.num_asked == {"strong": 2, "weak": 2}, "the one that failed, the one in parts"
    (reused,) = job.events.of(AnswersReused)
    assert reused.run == first.manifest["run"]
    assert_same(second, job.full(None, **at(400)))


def test_without_a_published_run_there_is_nothing_to_retry(job: Nights) -> None:
    with pytest.raises(JobError, match="no run of the job 'nightly' is published"):
        job.run(V1, retry_failed=True)


def test_a_retry_is_no_new_lesson(
    job: Nights, faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It neither learns from the run that it is a retry of, nor is kept beside it."""
    left_out: list[str] = []
    monkeypatch.setattr(Memory, "prior", lambda self, besides="": left_out.append(besides))
    job.sections |= {"merge": {"method": "reliability", "history": str(tmp_path / "history")}}
    faults |= dict.fromkeys(texts(1), "error")
    first = job.run(V1)
    faults.clear()
    job.run(None, retry_failed=True)
    assert set(left_out) == {"", first.manifest["run"]}, "one asks for the policy, before any run"
