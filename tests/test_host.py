"""A host: one engine for several agents, and several partitions at once. One worker, no run."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import dask
import psutil
import pyarrow as pa
import pytest
from distributed import Client, Future, Worker

from mas_batch import cluster
from mas_batch.agents import host as host_module
from mas_batch.agents.host import EngineHost, Report
from mas_batch.agents.spec import AgentSpec
from mas_batch.agents.texts import TextHost, texts_op
from mas_batch.agents.work import answer_partition, load_agents
from mas_batch.corpus import CorpusReader
from mas_batch.dask_compat import call_worker
from mas_batch.engine_info import EngineInfo
from mas_batch.engines.base import Completion, Engine, EngineConfig, Request, Sampling
from mas_batch.engines.base import TokenizedPrompt as Prompt
from mas_batch.errors import EngineLostError, RunError
from mas_batch.job import Job
from mas_batch.latency.times import TaskTimes
from mas_batch.merging import merge_spec
from mas_batch.models import ModelFiles
from mas_batch.partition import partition
from mas_batch.registries import ENGINES
from mas_batch.run_folder.names import JOURNAL, answers_name
from mas_batch.run_folder.plan import stage
from mas_batch.run_folder.ref import RunRef
from mas_batch.run_folder.storage import Store
from tests.clusters import cluster_of
from tests.loop_engines import Capitals
from tests.waiting import PATIENCE_S, wait_until

PER_PARTITION = 2


@dataclass(eq=False)
class Counting(Capitals):
    """Capitals that keep what was tokenised, and can have views."""

    concurrent: int = 2
    tokenized: list[str] = field(default_factory=list)
    views: list[Mapping[str, Any]] = field(default_factory=list)

    def tokenize(self, request: Request) -> Prompt:
        self.tokenized.append(request.text)
        return super().tokenize(request)

    def for_agent(self, options: Mapping[str, Any]) -> Engine:
        self.threads.add(threading.get_ident())
        self.views.append(options)
        return Counting(batches=self.batches, threads=self.threads)


@dataclass(eq=False)
class Slow(Counting):
    """Takes its time, and shares it among the requests of a batch."""

    seconds: float = 0.2
    busy_s: float = 0.0

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        start = time.perf_counter()
        rows = super().generate(requests, sampling)
        time.sleep(self.seconds)
        took_s = time.perf_counter() - start
        self.busy_s += took_s
        return [[replace(c, compute_s=took_s / len(rows)) for c in row] for row in rows]


@dataclass
class Bench:
    """A run's host on the one worker, and what a dispatcher would do with it."""

    client: Client
    worker: Worker
    run: RunRef
    specs: dict[str, AgentSpec]
    reports: list[dict[str, Any]] = field(default_factory=list)
    loaded: list[EngineConfig] = field(default_factory=list)
    """How engines were loaded."""

    @property
    def host(self) -> EngineHost:
        host: EngineHost = self.worker.plugins[self.run.topic]
        return host

    def load(self, *agents: str) -> dict[str, Any]:
        self._submit(load_agents, self.run, [self.specs[name] for name in agents]).result(
            PATIENCE_S
        )
        return self.facts(Report.LOADED)[-1]

    def ask(self, agent_id: str, number: int, **options: Any) -> Future:
        return self._submit(_timed, self.run, self.specs[agent_id], number, 1, **options)

    def _submit(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Future:
        with dask.annotate(executor=self.run.topic):
            return self.client.submit(call, *args, pure=False, **kwargs)

    def facts(self, what: Report, num: int = 1) -> list[dict[str, Any]]:
        def found() -> list[dict[str, Any]]:
            return [json.loads(r["facts"]) for r in self.reports if r["task"] == what]

        wait_until(lambda: len(found()) >= num)
        return found()

    def answers(self, agent_id: str, number: int) -> list[str]:
        table: pa.Table = self.run.store.read_table(answers_name(number, agent_id))
        return table["text"].to_pylist()


def _timed(*args: Any, **options: Any) -> float:
    start = time.perf_counter()
    answer_partition(*args, **options)
    return time.perf_counter() - start


@pytest.fixture(scope="module")
def one_worker() -> Iterator[tuple[Client, Worker]]:
    options = {"name": "w", "nthreads": 4}
    with cluster_of({"w": {"cls": Worker, "options": options}}) as spec, Client(spec) as client:
        client.wait_for_workers(1)
        yield client, spec.workers["w"]


@pytest.fixture
def bench(
    one_worker: tuple[Client, Worker],
    make_job: Callable[..., Job],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., Bench]]:
    """Return a function that hosts an engine; its texts are the run's records, two a partition."""
    client, worker = one_worker
    topic = f"test-{uuid.uuid4().hex}"

    def make(engine: Capitals, *texts: str, agents: Sequence[Mapping[str, Any]] = ()) -> Bench:
        named = [{"name": "a"}, {"name": "b", "sampling": {"seed": 1}}]
        job = make_job(
            [{"id": f"r{i}", "text": text} for i, text in enumerate(texts or ("one", "two"))],
            agents=[{"model": "echo:x", **each} for each in agents or named],
        )
        store = Store(job.output.path)
        reader = CorpusReader(job.corpus)
        budget = {"max_tokens": 10**6, "max_records": PER_PARTITION, "tokens_per_record": 0}
        plan = stage(store, reader, partition(reader, **budget))
        run = RunRef(store, topic, job.task, merge_spec(job), None, plan.passthrough, True)
        specs = {agent.name: AgentSpec(agent, 1) for agent in job.agents}
        found = Bench(client, worker, run, specs)

        def load_engine(name: str, model: ModelFiles, config: EngineConfig) -> Engine:
            found.loaded.append(config)
            return engine

        monkeypatch.setattr(host_module, "load_engine", load_engine)
        cluster.register(client, EngineHost(topic))
        client.subscribe_topic(topic, lambda event: found.reports.append(event[1]))
        return found

    yield make
    cluster.unregister(client, topic)
    client.unsubscribe_topic(topic)


def test_one_load_is_for_all_agents_of_the_engine(bench: Callable[..., Bench]) -> None:
    at = bench(engine := Counting())
    facts = at.load("a", "b")
    assert facts["concurrent"] == 2
    assert facts["load_s"] > 0
    assert {name: each["engine"] for name, each in facts["agents"].items()} == {
        name: {"engine": "capitals"} for name in "ab"
    }
    assert facts["agents"]["a"]["family_id"] == facts["agents"]["b"]["family_id"]
    assert at.load("b")["load_s"] == 0.0
    at.ask("a", 0).result(PATIENCE_S)
    assert len(at.loaded) == 1
    assert len(engine.threads) == 1
    assert threading.get_ident() not in engine.threads


@pytest.mark.parametrize(("wish", "concurrent"), [(1, 1), (2, 2), (9, 3)])
def test_as_many_partitions_at_once_as_the_engine_wants_and_the_worker_has_threads(
    bench: Callable[..., Bench], wish: int, concurrent: int
) -> None:
    at = bench(engine := Counting(concurrent=wish), *(f"held {i}" for i in range(8)))
    assert at.load("a")["concurrent"] == concurrent
    futures = [at.ask("a", number) for number in range(4)]
    wait_until(lambda: at.host._resident and at.host._resident.loop.num_callers == concurrent)
    engine.go_on.set()
    assert all(future.result(PATIENCE_S) > 0 for future in futures)


def test_partitions_and_agents_share_batches(bench: Callable[..., Bench]) -> None:
    at = bench(engine := Counting(concurrent=3), "held 0", "held 1", "x 2", "x 3")
    at.load("a", "b")
    first = at.ask("a", 0)
    engine.holding.wait(PATIENCE_S)
    others = [at.ask("a", 1), at.ask("b", 1)]
    wait_until(lambda: at.host._resident and at.host._resident.loop.num_callers == 3)
    engine.go_on.set()
    for future in (first, *others):
        future.result(PATIENCE_S)
    assert engine.batches[0] == ["held 0", "held 1"]
    assert list(map(sorted, engine.batches[1:])) == [["x 2", "x 2", "x 3", "x 3"]]
    assert at.answers("a", 0) == ["HELD 0", "HELD 1"]
    assert at.answers("a", 1) == at.answers("b", 1) == ["X 2", "X 3"]


def test_a_partition_is_read_and_tokenized_once_for_all_agents_of_a_host(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    read = Store.read_table

    def read_table(store: Store, name: str, *args: Any) -> pa.Table:
        names.append(name)
        return read(store, name, *args)

    monkeypatch.setattr(Store, "read_table", read_table)
    at = bench(engine := Counting(), "one", "two", "three", "four")
    at.load("a", "b")
    for future in [at.ask(agent_id, number) for number in (0, 1) for agent_id in "ab"]:
        future.result(PATIENCE_S)
    staged = [name for name in names if name.startswith("partitions/")]
    assert len(staged) == len(set(staged)) == 2
    assert sorted(engine.tokenized) == ["four", "one", "three", "two"]


def test_agents_that_differ_in_their_own_options_have_views(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    info = EngineInfo("views", holds="nothing", agent_options=("words",))
    monkeypatch.setattr(ENGINES, "_built_in", {**ENGINES._built_in, "views": info})
    monkeypatch.setattr(ENGINES, "_loaded", {})
    agents = [
        {"name": name, "model": "views", "options": {"words": words, "reply": "x"}}
        for name, words in (("a", 1), ("b", 1), ("c", 2))
    ]
    at = bench(engine := Counting(), agents=agents)
    at.load("a", "b", "c")
    assert [config.options for config in at.loaded] == [{"reply": "x"}]
    assert engine.views == [{"words": 1}, {"words": 2}]
    at.ask("c", 0).result(PATIENCE_S)
    assert len(engine.threads) == 1


def test_the_ledger_of_partitions_that_share_an_engine_adds_up(
    bench: Callable[..., Bench],
) -> None:
    at = bench(engine := Slow(max_batch_tokens=27), *(f"text {i}" for i in range(8)))
    at.load("a")
    start = time.perf_counter()
    walls_s = [future.result(PATIENCE_S) for future in [at.ask("a", i) for i in range(4)]]
    whole_s = time.perf_counter() - start
    reports = {each["partition"]: each for each in at.facts(Report.ANSWERED, num=4)}
    times = [TaskTimes(**reports[number]["times"]) for number in range(4)]
    assert sum(each.compute_s for each in times) == pytest.approx(engine.busy_s)
    for own, wall_s in zip(times, walls_s, strict=True):
        # What is outside of the two is a report, and who else has the cores meanwhile.
        assert 0.98 * wall_s - 0.05 <= own.own_s <= wall_s
    assert all(each.wait_s >= 0 for each in times)
    assert max(each.wait_s for each in times) > engine.seconds / 2, "the other was served"
    # What the engine did and the pauses are the host's time.
    idle_s = sum(each.idle_s for each in times)
    assert engine.busy_s + idle_s - times[0].idle_s <= whole_s


def test_a_careful_task_asks_one_record_at_a_time_and_leaves_no_journal(
    bench: Callable[..., Bench],
) -> None:
    at = bench(engine := Counting(), "one", "two")
    at.load("a", "b")
    at.ask("a", 0, careful=True).result(PATIENCE_S)
    assert engine.batches == [["one"], ["two"]]
    assert at.answers("a", 0) == ["ONE", "TWO"]
    assert not at.run.store.list(f"{JOURNAL}/agent=a")
    assert len(at.facts(Report.ANSWERING, num=2)) == 2


def test_partitions_whose_server_is_away_are_put_off_each(bench: Callable[..., Bench]) -> None:
    at = bench(Counting(), "away 0", "1", "2", "away 3")
    at.load("a")
    for future in [at.ask("a", 0), at.ask("a", 1)]:
        future.result(PATIENCE_S)
    reports = at.facts(Report.AWAY, num=2)
    assert {each["partition"] for each in reports} == {0, 1}
    assert {(each["message"], each["retry_after_s"]) for each in reports} == {("gone", 7.0)}
    assert not any(at.run.store.exists(answers_name(number, "a")) for number in (0, 1))


def test_texts_of_a_pool_join_what_is_in_flight(bench: Callable[..., Bench]) -> None:
    at = bench(engine := Counting(concurrent=3))
    at.load("a")
    cluster.register(at.client, TextHost(at.run.topic, at.run.task, at.specs))

    def ask(text: str) -> Any:
        records = [("r", text, None)]
        call = (call_worker, at.client, at.worker.address, texts_op(at.run.topic))
        return at.client.sync(*call, agent_id="a", records=records)

    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(ask, "held")
        engine.holding.wait(PATIENCE_S)
        others = [threads.submit(ask, text) for text in ("x", "y")]
        wait_until(lambda: at.host._resident and at.host._resident.loop.num_callers == 3)
        engine.go_on.set()
        found = [future.result(PATIENCE_S) for future in (first, *others)]
    assert [reply.answers[0].text for reply in found] == ["HELD", "X", "Y"]
    assert sorted(engine.batches[1]) == ["x", "y"]
    assert all(reply.times.wait_s > 0 for reply in found)
    cluster.unregister(at.client, at.run.topic)
    assert ask("x") is None, "it no longer hosts the agent"
    cluster.unregister(at.client, texts_op(at.run.topic))
    cluster.register(at.client, EngineHost(at.run.topic))  # for the fixture


def test_a_host_that_is_closed_lets_all_go_and_commits_nothing(
    bench: Callable[..., Bench], one_worker: tuple[Client, Worker]
) -> None:
    at = bench(engine := Counting(), "held 0", "held 1", "x", "y")
    at.load("a")
    futures = [at.ask("a", 0)]
    engine.holding.wait(PATIENCE_S)  # before the other is asked, which nothing would hold
    futures.append(at.ask("a", 1))
    wait_until(lambda: at.host._resident and at.host._resident.loop.num_callers == 2)
    cluster.unregister(at.client, at.run.topic)
    for future in futures:
        assert isinstance(future.exception(PATIENCE_S), RunError)
    assert not engine.closed, "it is generating"
    engine.go_on.set()
    wait_until(lambda: engine.closed)
    assert not any(at.run.store.exists(answers_name(number, "a")) for number in (0, 1))
    cluster.register(at.client, EngineHost(at.run.topic))  # for the fixture


def test_another_engine_takes_the_place_when_the_first_has_answered(
    bench: Callable[..., Bench],
) -> None:
    at = bench(engine := Counting(), "held 0", "held 1")
    at.specs["b"] = replace(at.specs["b"], threads=2)
    at.load("a")
    first = at.ask("a", 0)
    engine.holding.wait(PATIENCE_S)
    loop = at.host._resident and at.host._resident.loop
    other = at._submit(load_agents, at.run, [at.specs["b"]])
    wait_until(lambda: loop is not None and loop.closed)
    engine.go_on.set()
    first.result(PATIENCE_S)
    other.result(PATIENCE_S)
    assert engine.closed
    assert at.answers("a", 0) == ["HELD 0", "HELD 1"]
    assert at.host._resident is not None
    assert at.host._resident.loop is not loop


def test_a_dead_engine_does_not_end_a_process_that_is_not_the_workers_own(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    @dataclass(eq=False)
    class Dead(Counting):
        def generate(self, *_: Any) -> list[list[Completion]]:
            raise EngineLostError("CUDA error: an illegal access")

    at = bench(Dead(), "one", "two")
    at.load("a")
    error = at.ask("a", 0).exception(PATIENCE_S)
    assert isinstance(error, RunError)
    assert "EngineLostError: CUDA error: an illegal access" in str(error)
    assert "start that process anew" in caplog.text


DEAD = """
import subprocess, sys
from types import SimpleNamespace
from mas_batch.agents.host import _end_process
from mas_batch.errors import EngineLostError
child = subprocess.Popen(["sleep", "600"])
print(child.pid, flush=True)
_end_process(SimpleNamespace(nanny="tcp://127.0.0.1:1", name="w"), EngineLostError("dead"))
"""


def test_a_worker_that_ends_itself_ends_what_its_engine_has_started() -> None:
    done = subprocess.run([sys.executable, "-c", DEAD], capture_output=True, text=True, check=False)
    assert done.returncode == 70
    child = int(done.stdout)
    wait_until(
        lambda: (
            not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
        )
    )
