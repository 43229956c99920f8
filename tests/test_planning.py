"""The planner: fits that find what is there, a simulator that conserves work, and real runs."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from distributed import Client
from hypothesis import given, settings
from hypothesis import strategies as st

from mas_batch import pipeline
from mas_batch.cli import main
from mas_batch.corpus import CorpusReader
from mas_batch.engine_info import EngineInfo
from mas_batch.errors import JobError, RunError
from mas_batch.job import Job
from mas_batch.latency.phases import COUNTING, READING
from mas_batch.latency.simulate import Clock, Costs, Simulation, Worker
from mas_batch.partition import partition
from mas_batch.planning import parse_deadline, parse_hosts, plan, to_json
from mas_batch.planning import service_time as service_time_module
from mas_batch.planning.forecast import MAX_SIMULATED, Forecaster
from mas_batch.planning.measurements import AgentMeasurements, Measurements, waiting_s
from mas_batch.planning.planner import WORST_ERROR, predict
from mas_batch.planning.rates import fit_rates, other_phases
from mas_batch.planning.sampling import sizes
from mas_batch.planning.service_time import fit, nonnegative_least_squares, shares, speeds
from mas_batch.planning.survey import EvenlySpacedSample, Survey, survey
from mas_batch.registries import ENGINES
from mas_batch.routing.dispatcher import Dispatcher
from mas_batch.routing.instructions import Rules, Work
from mas_batch.routing.policies import POLICIES

MakeJob = Callable[..., Job]
SECONDS = st.floats(0.01, 100.0)


def tasks_of(rows: Any, first: int = 0) -> pd.DataFrame:
    tasks = pd.DataFrame(rows, columns=["num_records", "text_tokens", "seconds"], dtype=float)
    return tasks.assign(share=1.0, is_first=np.arange(len(tasks)) < first)


# --- Fits


@given(st.floats(0.0, 5.0), st.floats(0.01, 1.0), st.floats(0.001, 0.1), st.integers(0, 2**32 - 1))
def test_a_fit_finds_the_coefficients_under_noise(
    own: float, record: float, token: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    records = rng.integers(1, 64, 300).astype(float)
    tokens = records * rng.uniform(5, 100, 300)
    exact = own + record * records + token * tokens
    found = fit(tasks_of(np.column_stack([records, tokens, exact])), 16)
    known = (found.per_task_s, found.per_record_s, found.per_token_s)
    assert known == pytest.approx((own, record, token), rel=1e-3, abs=1e-3)
    noise = rng.uniform(0.9, 1.1, 300)
    noisy = fit(tasks_of(np.column_stack([records, tokens, exact * noise])), 16)
    for n in (8, 32, 64):
        assert noisy.seconds(n, 50 * n) == pytest.approx(
            own + record * n + token * 50 * n, rel=0.05
        )


@given(st.lists(SECONDS, min_size=1, max_size=30), st.integers(1, 64), st.floats(1.0, 1000.0))
def test_equal_tasks_take_the_ratio_of_the_sums(
    seconds: list[float], records: int, tokens: float
) -> None:
    found = fit(tasks_of([(records, tokens, spent) for spent in seconds]), 16)
    assert found.per_task_s == 0.0
    assert found.seconds(2 * records, 2 * tokens) == pytest.approx(2 * np.mean(seconds))


def test_a_workers_first_task_is_told_apart() -> None:
    rows = [(8, 80, 9.0)] + [(8, 80, 2.0)] * 4 + [(2, 20, 0.5)] * 4
    found = fit(tasks_of(rows, first=1), 16)
    assert found.seconds(8, 80) == pytest.approx(2.0)
    assert found.first_s == pytest.approx(7.0)
    # With hardly any other, the first ones are all there is.
    assert fit(tasks_of(rows[:3], first=1), 16).seconds(8, 80) == pytest.approx(13 / 3)


def test_coefficients_are_never_negative() -> None:
    columns = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    found = nonnegative_least_squares(columns, np.array([3.0, 2.0, 1.0]), np.ones(3))
    assert found.tolist() == [pytest.approx(2.0), 0.0]
    assert nonnegative_least_squares(columns, -np.ones(3), np.ones(3)).tolist() == [0.0, 0.0]


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(RunError, match=r"pip install 'mas_batch\[evaluate\]'"):
        runpy.run_path(str(service_time_module.__file__))


@given(
    st.lists(st.tuples(st.floats(0, 20), st.floats(0.1, 10)), min_size=1, max_size=12),
    st.integers(1, 4),
)
def test_sharing_cores_is_undone(tasks: list[tuple[float, float]], num_cores: int) -> None:
    """Work done on the simulator's shared machine is found again from when it began and ended."""
    clock, ends = Clock(num_cores), {}

    def begin(index: int, work_s: float) -> None:
        clock.work(work_s, 1.0, lambda: ends.update({index: clock.now}))

    for index, (start, work_s) in enumerate(tasks):
        clock.at(start, lambda i=index, w=work_s: begin(i, w))
    while clock.num_events:
        clock.step()
    starts = np.array([start for start, _ in tasks])
    stops = np.array([ends[i] for i in range(len(tasks))])
    own_hosts = range(len(tasks))
    speed = speeds(starts, stops, np.ones(len(tasks)), own_hosts, num_cores)
    known = [work_s for _, work_s in tasks]
    assert speed * (stops - starts) == pytest.approx(known, rel=1e-6, abs=1e-6)


def test_what_needs_no_core_is_not_slowed() -> None:
    found = speeds(np.zeros(3), np.full(3, 6.0), np.array([0.0, 2.0, 2.0]), [*"abc"], 2)
    assert found.tolist() == [1.0, 0.5, 0.5]


def test_tasks_at_one_host_want_its_cores_once_and_share_its_batches() -> None:
    starts, ends = np.array([0.0, 0.0, 1.0, 6.0, 4.0]), np.array([4.0, 2.0, 4.0, 8.0, 8.0])
    cores, hosts = np.ones(5), ["a", "a", "a", "a", "b"]
    assert speeds(starts, ends, cores, hosts, 1).tolist() == [1.0, 1.0, 1.0, 0.5, 0.75]
    at_a = shares(starts[:4], ends[:4])
    assert at_a == pytest.approx([(1 / 2 + 1 / 3 + 1 / 2 + 1 / 2) / 4, 5 / 12, 4 / 9, 1.0])


def test_waiting_for_a_busy_worker_is_no_lag() -> None:
    sent, heard = np.array([0.0, 0.1, 5.0, 0.0]), np.array([1.2, 2.3, 6.5, 4.0])
    answers = pd.DataFrame(
        {"at_s": sent, "end_s": heard, "begin_s": heard - 1, "worker": [*"aaab"]}
    )
    found = waiting_s(answers.assign(concurrent=1).iloc[::-1])
    assert found.sort_index().tolist() == pytest.approx([0.2, 0.1, 0.5, 3.0])
    # A host of two begins with the first two at once, and with the third when one has ended.
    begun = {"at_s": 0.0, "begin_s": [0.2, 0.3, 2.5], "end_s": [3.0, 2.0, 4.0], "worker": "a"}
    assert waiting_s(pd.DataFrame(begun).assign(concurrent=2)).tolist() == [0.2, 0.3, 0.5]


# --- The simulator


def simulate(
    seconds: list[float],
    num_workers: int,
    *,
    cores: float = 0.0,
    num_cores: float = 1e9,
    **rules: Any,
) -> Any:
    plan = [Work(i, max(1, round(100 * spent))) for i, spent in enumerate(seconds)]
    dispatcher = Dispatcher(
        {"a": 1}, Rules(1, **rules), POLICIES["least-loaded"](), plan, len(plan)
    )
    costs = Costs(
        answer_s=lambda worker, ask, share: seconds[ask.partition],
        merge_s=lambda partition: 0.0,
        num_cores=num_cores,
    )
    workers = [Worker(f"a-{i}", ("a",), cores=cores) for i in range(num_workers)]
    return Simulation(dispatcher, workers, costs, samples={"a": 1}).run()


WORK = st.lists(SECONDS, min_size=1, max_size=30)


def at_once(
    seconds: list[float],
    concurrent: int = 3,
    *,
    cores: float = 0.0,
    overlap: float = 0.0,
    batched: float = 0.0,
) -> Any:
    """Simulate one host of two agents that works on several partitions at once."""
    plan = [Work(i, max(1, round(100 * spent))) for i, spent in enumerate(seconds)]
    rules = Rules(2, window=None, speculate=False)
    agents = {"a": 1, "b": 1}
    dispatcher = Dispatcher(agents, rules, POLICIES["least-loaded"](), plan, len(plan))
    costs = Costs(
        answer_s=lambda worker, ask, share: seconds[ask.partition],
        merge_s=lambda partition: 0.0,
        num_cores=1.0,
    )
    host = Worker(
        "h", ("a", "b"), cores=cores, concurrent=concurrent, overlap=overlap, batched=batched
    )
    return Simulation(dispatcher, [host], costs, samples=agents).run()


@given(WORK, st.integers(1, 5), st.sampled_from([0.0, 1.0]))
def test_a_host_shares_its_time_among_the_partitions_it_works_on(
    seconds: list[float], concurrent: int, cores: float
) -> None:
    result = at_once(seconds, concurrent, cores=cores)
    assert result.makespan_s == pytest.approx(2 * sum(seconds))
    assert result.busy_s["h"] == pytest.approx(2 * sum(seconds))


@pytest.mark.parametrize(
    ("overlap", "batched", "expected_s"),
    [(0.0, 0.0, 12.0), (0.5, 0.0, 6.0), (1.0, 0.0, 4.0), (0.0, 0.5, 8.0), (0.25, 0.5, 5.0)],
)
def test_partitions_that_overlap_cost_a_host_less(
    overlap: float, batched: float, expected_s: float
) -> None:
    found = at_once([2.0, 2.0, 2.0], overlap=overlap, batched=batched)
    assert found.makespan_s == pytest.approx(expected_s)


def test_who_begins_later_slows_down_who_is_at_work() -> None:
    clock, ends = Clock(1.0), dict[str, float]()
    first = clock.work(3.0, 1.0, lambda: ends.update(never=clock.now))
    clock.at(1.0, lambda: ends.update(done_s=clock.cancel(first)))
    clock.work(2.0, 1.0, lambda: ends.update(other=clock.now))
    while clock.num_events:
        clock.step()
    assert ends == {"done_s": 0.5, "other": 2.5}, "it had half of the core, and then all of it"


@given(WORK, st.integers(1, 5))
def test_work_is_conserved(seconds: list[float], num_workers: int) -> None:
    result = simulate(seconds, num_workers, speculate=False)
    assert sum(result.busy_s.values()) == pytest.approx(sum(seconds))
    bound = max([sum(seconds) / num_workers, *seconds])
    assert bound * (1 - 1e-9) <= result.makespan_s <= bound + max(seconds) * (1 + 1e-9)


@given(WORK, st.integers(1, 4))
def test_more_hosts_are_not_slower_than_list_scheduling_allows(
    seconds: list[float], num_workers: int
) -> None:
    fewer, more = simulate(seconds, num_workers), simulate(seconds, num_workers + 1)
    # Graham's anomaly: a list schedule may lose at most the longest task by a further worker.
    assert more.makespan_s <= fewer.makespan_s + max(seconds)
    equal = [1.0] * len(seconds)
    assert simulate(equal, num_workers + 1).makespan_s <= simulate(equal, num_workers).makespan_s


@given(WORK, st.integers(2, 5))
def test_a_shared_core_works_no_faster_for_more_hosts(
    seconds: list[float], num_workers: int
) -> None:
    result = simulate(seconds, num_workers, cores=1.0, num_cores=1.0, speculate=False)
    assert result.makespan_s == pytest.approx(sum(seconds))


def test_a_run_without_workers_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="without workers"):
        simulate([1.0], 0)


# --- The survey


def test_a_corpus_is_cut_as_a_run_would(make_job: MakeJob) -> None:
    rows = [{"id": f"r{i}", "text": "x" * 40 * i} for i in range(12)]
    job = make_job(rows=rows, partition={"max_records": 4, "max_tokens": 200})
    found = survey(job, 3)
    parts = list(
        partition(
            CorpusReader(job.corpus),
            max_tokens=200,
            max_records=4,
            tokens_per_record=job.task.max_new_tokens,
        )
    )
    usable = [sum(record.text is not None for record in part.records) for part in parts]
    assert found.usable_records.tolist() == usable
    assert (found.text_tokens + job.task.max_new_tokens * found.usable_records).tolist() == [
        part.estimated_tokens for part in parts
    ]
    assert (found.num_records, found.num_usable, found.num_partitions) == (12, 11, len(parts))
    assert [record.record_id for record in found.sample] == ["r1", "r5", "r9"]


@given(st.integers(1, 120), st.integers(1, 20))
def test_a_sample_is_evenly_spaced(num_items: int, num_sampled: int) -> None:
    sample = EvenlySpacedSample[int](num_sampled)
    for number in range(num_items):
        sample.offer(number)
    chosen = sample.chosen()
    assert len(chosen) == min(num_sampled, num_items)
    assert sorted(set(chosen)) == list(chosen)
    gaps = np.diff(chosen)
    assert not len(gaps) or gaps.max() <= 2 * gaps.min() + 1


def test_nothing_to_ask_about_is_an_error(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(rows=[{"id": "r", "text": "   "}])
    with pytest.raises(JobError, match="none of its 1 records is usable"):
        survey(job, 4)
    (tmp_path / "corpus.jsonl").write_text("")
    with pytest.raises(JobError, match="holds no records"):
        plan(job)


def test_a_sample_has_several_partitions_in_two_sizes(make_job: MakeJob) -> None:
    job = make_job(partition={"max_records": 256})
    assert [s.max_records for s in sizes(job, 64)] == [16, 4]
    assert [s.max_records for s in sizes(job, 3)] == [1]


# --- Forecasts


def measurements_of(
    seconds_per_record: dict[str, float], cores: float = 0.0, engine: EngineInfo = ENGINES["echo"]
) -> Measurements:
    tasks = {
        name: tasks_of([(n, 10.0 * n, 0.1 + each * n) for n in (2, 4, 8) for _ in range(6)])
        for name, each in seconds_per_record.items()
    }
    agents = {
        name: AgentMeasurements(
            tasks=rows.assign(
                prompt_tokens=rows["text_tokens"] + 3 * rows["num_records"],
                completion_tokens=7 * rows["num_records"],
            ),
            parts_s={"compute": 3.0, "transfer": 1.0, "process": 0.0},
            load_s=0.5,
            threads=1,
            cores=cores,
            engine=engine,
            peak_memory_bytes=2**20,
            failed_fraction=0.0,
        )
        for name, rows in tasks.items()
    }
    phases = ((4, {READING: 0.1, COUNTING: 0.5}), (16, {READING: 0.2, COUNTING: 0.6}))
    whole = tuple(
        (p, dict.fromkeys(("starting", "learning", "publishing"), 0.0) | f) for p, f in phases
    )
    return Measurements("test", agents, tasks_of([(8, 80, 0.01)]), whole, 0.005, 2, 8)


def forecaster_of(
    job: Job,
    measurements: Measurements,
    num_partitions: int = 40,
    undecided: Any = None,
    escalated: float = 0.0,
) -> Forecaster:
    records = np.full(num_partitions, 8.0)
    seen = Survey(8 * num_partitions, 0.0, records, 10 * records, ())
    return Forecaster(job, measurements, seen, undecided or {}, escalated, embedded=False)


def test_tokens_and_time_add_up(make_job: MakeJob) -> None:
    forecaster = forecaster_of(make_job(), measurements_of({"strong": 0.2, "weak": 0.1}))
    forecast = forecaster.forecast({"strong": 1, "weak": 1})
    # 40 partitions of 8 records: 0.1 s + 8 · 0.2 s each, and the lag of asking.
    assert forecast.phases["answering"] == pytest.approx(40 * 1.7, rel=0.02)
    assert forecaster.tokens(forecast, "weak") == (320 * 13, 320 * 7)
    parts = forecaster.parts_s(forecast, "strong")
    assert parts["compute_s"] == pytest.approx(40 * 1.7 * 0.75, rel=0.01)


def test_partitions_at_one_host_share_its_batches_and_its_engine_works_on(
    make_job: MakeJob,
) -> None:
    job = make_job(agents=[{"name": "strong", "model": "echo", "options": {"concurrent": 2}}])
    measured = measurements_of({"strong": 0.2}, engine=EngineInfo(""))
    forecast = forecaster_of(job, measured).forecast({"strong": 1})
    # Of 0.1 s + 8 · 0.2 s, a quarter is not the engine's; two at once have the 0.1 s once.
    both_s = 0.75 * (0.1 + 2 * 1.6)
    assert forecast.phases["answering"] == pytest.approx(20 * both_s, rel=0.03)
    elsewhere = measurements_of({"strong": 0.2}, engine=EngineInfo("", computes_elsewhere=True))
    forecast = forecaster_of(job, elsewhere).forecast({"strong": 1})
    assert forecast.phases["answering"] == pytest.approx(20 * 1.7, rel=0.03)


def test_an_agent_with_nothing_to_compute_makes_its_host_no_faster(make_job: MakeJob) -> None:
    """As two agents of one encoder: the second finds every text encoded."""
    both = {"model": "echo:same", "options": {"concurrent": 2}}
    agents = [{"name": name, **both} for name in ("strong", "weak")]
    measured = measurements_of({"strong": 0.2, "weak": 1e-9}, engine=EngineInfo(""))
    weak = replace(measured.agents["weak"], parts_s={"compute": 0.0, "transfer": 1.0})
    measured = replace(measured, agents={**measured.agents, "weak": weak})
    forecast = forecaster_of(make_job(agents=agents), measured).forecast({"strong+weak": 1})
    assert forecast.phases["answering"] == pytest.approx(20 * 0.75 * (0.1 + 2 * 1.6), rel=0.05)


@settings(max_examples=settings.default.max_examples // 2)
@given(st.floats(0.05, 1.0), st.floats(0.05, 1.0), st.integers(1, 4))
def test_more_hosts_are_never_predicted_slower(strong: float, weak: float, count: int) -> None:
    job = base_job()
    forecaster = forecaster_of(job, measurements_of({"strong": strong, "weak": weak}))
    seconds = [forecaster.forecast({"strong": n, "weak": n}).duration_s for n in (count, count + 1)]
    assert seconds[1] <= 1.02 * seconds[0]


def test_long_runs_go_on_at_the_rate_of_their_middle(make_job: MakeJob) -> None:
    measurements, few, many = measurements_of({"strong": 0.2, "weak": 0.1}), 400, 10 * MAX_SIMULATED
    seconds = []
    for count in (few, many):
        forecaster = forecaster_of(make_job(), measurements, count)
        forecast = forecaster.forecast({"strong": 2, "weak": 2})
        seconds.append(forecast.phases["answering"] / count)
        assert forecast.totals["weak"].num_records == pytest.approx(8 * count)
    assert seconds[1] == pytest.approx(seconds[0], rel=0.02)


def test_undecided_records_go_on_in_proportion(make_job: MakeJob) -> None:
    routing = {"adaptive": {"first": 1}, "answers_per_record": 2, "policy": "capability"}
    job = make_job(routing=routing)
    forecaster = forecaster_of(
        job, measurements_of({"strong": 0.2, "weak": 0.1}), 200, undecided={1: 0.25}
    )
    forecast = forecaster.forecast({"strong": 1, "weak": 1})
    asked = sum(each.num_records for each in forecast.totals.values())
    assert asked == pytest.approx(1600 * 1.25, rel=0.05)


def test_escalated_records_come_after_all_others(make_job: MakeJob) -> None:
    job = make_job(routing={"escalate": {"agent": "strong", "fraction": 0.5}})
    measurements = measurements_of({"strong": 0.2, "weak": 0.1})
    forecaster = forecaster_of(job, measurements, escalated=0.5)
    forecast = forecaster.forecast({"strong": 1, "weak": 1})
    assert {name: asked.num_records for name, asked in forecast.totals.items()} == {
        "strong": 160, "weak": 320,
    }  # fmt: skip
    # One pass after the other, each a task of 0.1 s and more per partition.
    expected = 40 * (0.1 + 8 * 0.1) + 40 * (0.1 + 4 * 0.2)
    assert forecast.phases["answering"] == pytest.approx(expected, rel=0.03)
    assert forecast.phases["first model"] == 1.0
    busy = forecast.busy_fractions()
    assert sum(busy.values()) == pytest.approx(1.0, abs=0.05)
    whole = forecast.result.asking_s + forecast.result.loaded_s
    assert max(forecast.result.ended_s.values()) == pytest.approx(whole, rel=0.01)


def test_phases_grow_with_partitions_and_never_below_their_constant() -> None:
    measurements = measurements_of({"a": 0.1})
    found = other_phases(measurements, num_partitions=100, num_records=0, read_s=2.0, num_workers=0)
    assert found[COUNTING] == pytest.approx(0.467 + 100 / 120, rel=0.01)
    assert found[READING] > 2.0


def base_job(**sections: Any) -> Job:
    from mas_batch.job_file import check_job

    agents = [{"name": name, "model": f"echo:{name}"} for name in ("strong", "weak")]
    return check_job(
        {
            "name": "test",
            "corpus": {"path": "nowhere.jsonl"},
            "task": {"kind": "summarize", "max_new_tokens": 8},
            "agents": agents,
            "merge": {"method": "vote"},
            "output": {"path": "nowhere"},
            **sections,
        }
    )


def test_hosts_that_agents_share_are_planned_once(make_job: MakeJob) -> None:
    agents = [{"name": name, "model": "echo:same"} for name in ("strong", "weak")]
    measured = measurements_of({"strong": 0.2, "weak": 0.1})
    predicted = predict(forecaster_of(make_job(agents=agents), measured), (1, 1))
    (post,) = predicted.posts
    assert (post.agents, post.hosts) == (("strong", "weak"), 1)
    assert post.memory_bytes == to_json(predicted)["total_memory_bytes"] == 2**20
    assert predicted.phases["answering"] == pytest.approx(40 * (1.7 + 0.9), rel=0.02)


@settings(max_examples=settings.default.max_examples // 7)
@given(st.lists(st.floats(5.0, 60.0), min_size=2, max_size=3))
def test_a_later_deadline_never_needs_more_hosts(deadlines: list[float]) -> None:
    forecaster = forecaster_of(base_job(), measurements_of({"strong": 0.2, "weak": 0.1}), 12)
    found = [
        predict(forecaster, (1, 3), deadline_s=deadline).recommendation
        for deadline in sorted(deadlines)
    ]
    for sooner, later in pairwise(found):
        assert sooner.meets_deadline <= later.meets_deadline
        if sooner.meets_deadline:
            assert later.allocation.total <= sooner.allocation.total
    for deadline, each in zip(sorted(deadlines), found, strict=True):
        longest_s = (1 + WORST_ERROR) * each.allocation.duration_s
        assert each.meets_deadline == (longest_s <= deadline)


def test_a_deadline_that_is_met_by_less_than_the_error_is_told_apart() -> None:
    forecaster = forecaster_of(base_job(), measurements_of({"strong": 0.2, "weak": 0.1}), 12)
    expected_s = forecaster.forecast({"strong": 1, "weak": 1}).duration_s
    for times, words in ((1.1, "in time, but not if it takes 22% longer: "), (0.9, "no number of")):
        found = predict(forecaster, (1, 1), deadline_s=times * expected_s).recommendation
        assert found is not None
        assert not found.meets_deadline
        assert found.why.startswith(words)
    assert predict(forecaster, (1, 1)).recommendation is None


def test_the_bottleneck_is_named(make_job: MakeJob) -> None:
    job = make_job()

    def named(forecaster: Forecaster) -> tuple[str, str | None]:
        found = predict(forecaster, (1, 1)).bottleneck
        return found.kind, found.post

    slow = measurements_of({"strong": 1.0, "weak": 0.1})
    assert named(forecaster_of(job, slow)) == ("agent", "strong")
    quick = measurements_of({"strong": 1e-5, "weak": 1e-5})
    assert named(forecaster_of(job, quick, 3))[0] == "start"
    tail = make_job(agents=[{"name": "strong", "model": "echo", "count": 2}])
    assert named(forecaster_of(tail, slow, 3)) == ("tail", "strong")


# --- Real runs


def slow_agents(**more: Any) -> list[dict[str, Any]]:
    """Agents whose time is all sleep, so that a busy machine changes little."""
    return [
        {
            "name": name,
            "model": f"echo:{name}",
            "capabilities": ["summarize", name],
            "options": {"seconds_per_batch": seconds},
            **more,
        }
        for name, seconds in (("strong", 0.2), ("weak", 0.06))
    ]


def test_a_plan_is_of_what_its_sample_or_its_run_took(
    make_job: MakeJob, cluster_client: Client, tmp_path: Path
) -> None:
    rows = [{"id": f"r{i}", "text": f"text number {i}"} for i in range(60)]
    job = make_job(rows=rows, agents=slow_agents(), partition={"max_records": 3})
    planned = plan(job, num_sampled=16, client=cluster_client, hosts=(1, 2))
    assert not list((tmp_path / "runs").glob("*")), "the sample is removed"
    summary = pipeline.run(job, client=cluster_client)
    # 20 partitions of 0.2 s, and what the sample's took beside that on this machine at that time:
    # how near the plan is to the run depends on what else the machine does meanwhile.
    assert 4.0 <= planned.phases["answering"] <= planned.measuring_s * 60 / 16
    measured_s = summary.manifest["latency"]["phases"]["answering"]
    assert measured_s >= 4.0
    by_agent = {agent.agent_id: agent for agent in planned.agents}
    for told in summary.manifest["agents"]:
        assert by_agent[told["agent_id"]].answers == told["answers"] == 60
        tokens = by_agent[told["agent_id"]].completion_tokens
        assert tokens == pytest.approx(told["completion_tokens"], rel=0.1)
    assert planned.bottleneck.post == "strong"
    # A run is learned from as well, and needs no further one.
    again = plan(job, former=summary.run, client=cluster_client)
    assert again.measuring_s == 0
    assert 4.0 <= again.phases["answering"] <= measured_s * 1.3, (
        "the pauses between are not planned"
    )
    other = make_job(agents=[{"name": "strong", "model": "echo:other"}])
    with pytest.raises(
        JobError, match=r"agents\.strong: with model 'echo:other'.*weak \(echo:weak\)"
    ):
        plan(other, former=summary.run, client=cluster_client)


def test_an_adaptive_plan_counts_who_goes_on(make_job: MakeJob, cluster_client: Client) -> None:
    labels = ["red", "green"]
    agents = [
        {
            "name": name,
            "model": f"echo:{name}",
            "capabilities": ["classify", name],
            "options": {"labels": labels},
        }
        for name in ("strong", "weak")
    ]
    job = make_job(
        agents=agents,
        task={"kind": "classify", "labels": labels, "max_new_tokens": 2},
        routing={"adaptive": {"first": 1, "confidence": 0.9}, "answers_per_record": 2},
    )
    planned = plan(job, num_sampled=8, client=cluster_client)
    # One answer is never sure: every record goes on.
    assert sum(agent.answers for agent in planned.agents) == 40
    job = make_job(
        agents=agents,
        task={"kind": "classify", "labels": labels, "max_new_tokens": 2},
        merge={"method": "weighted", "accuracies": {"strong": 0.95, "weak": 0.95}},
        routing={"adaptive": {"first": 1, "confidence": 0.9}, "answers_per_record": 2},
    )
    planned = plan(job, num_sampled=8, client=cluster_client)
    assert sum(agent.answers for agent in planned.agents) == 20


def test_a_run_without_a_ledger_is_an_error(
    make_job: MakeJob, cluster_client: Client, tmp_path: Path
) -> None:
    job = make_job()
    run = pipeline.run(job, client=cluster_client).run
    for file in (Path(run) / "ledger").iterdir():
        file.unlink()
    with pytest.raises(RunError, match="has no ledger"):
        plan(job, former=run, client=cluster_client)
    result = CliRunner().invoke(main, ["plan", str(job_file(job, tmp_path)), "--from", run])
    assert (result.exit_code, result.stdout) == (1, "")


# --- The command


def job_file(job: Job, folder: Path) -> Path:
    import yaml

    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(job.model_dump(mode="json")))
    return file


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--deadline", "soon"],
            "--deadline: 'soon' is not a time; allowed: such as 2h, 90m, 3600",
        ),
        (["--deadline", "0"], "--deadline"),
        (["--hosts", "8-1"], "--hosts: '8-1' is not allowed"),
        (["--set", "corpus.path=nowhere"], "corpus.path"),
    ],
)
def test_a_wrong_option_is_one_line(
    options: list[str], words: str, make_job: MakeJob, tmp_path: Path
) -> None:
    file = job_file(make_job(), tmp_path)
    result = CliRunner().invoke(main, ["plan", str(file), *options])
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 2


def test_times_and_numbers_are_read() -> None:
    assert [parse_deadline(text) for text in ("2h", "90m", "3600", "1.5 hours")] == [
        7200.0, 5400.0, 3600.0, 5400.0,
    ]  # fmt: skip
    assert [parse_hosts(text) for text in ("4", "1-8")] == [(4, 4), (1, 8)]


@pytest.mark.processes
def test_a_sample_on_the_embedded_cluster(make_job: MakeJob, tmp_path: Path) -> None:
    rows = [{"id": f"r{i}", "text": f"text number {i}"} for i in range(64)]
    job = make_job(
        rows=rows,
        agents=[{"name": "a", "model": "echo", "options": {"seconds_per_batch": 0.25}}],
        partition={"max_records": 2},
        cluster={"dashboard_address": None},
    )
    command = [sys.executable, "-m", "mas_batch", "plan", str(job_file(job, tmp_path))]
    options = ["--sample", "8", "--hosts", "1-3", "--json"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["agents"][0]["answers"] == 64
    assert facts["measuring_s"] > 0
    # 32 partitions of a quarter of a second that wait for no core: two hosts take half as long.
    one, two, three = (option["duration_s"] for option in facts["allocations"])
    assert 8 <= facts["phases"]["answering"] <= facts["measuring_s"] * 64 / 8
    assert one - two > 2.5
    assert two > three
    assert not (tmp_path / "runs").exists()


def test_the_command_prints_a_table_and_json(
    make_job: MakeJob, cluster_client: Client, tmp_path: Path
) -> None:
    job = make_job(agents=slow_agents())
    run = pipeline.run(job, client=cluster_client).run
    command = ["plan", str(job_file(job, tmp_path)), "--from", run, "--deadline", "1h"]
    told = CliRunner().invoke(main, command)
    assert told.exit_code == 0, told.output
    for words in ("expected:", "bottleneck:", "Hosts", "recommended:", "strong"):
        assert words in told.stdout
    facts = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)
    assert facts["recommendation"]["meets_deadline"] is True
    assert facts["own"]["duration_s"] == pytest.approx(sum(facts["phases"].values()))
    (first, second), agents = facts["posts"], facts["agents"]
    assert [(each["agents"], each["hosts"]) for each in (first, second)] == [
        (["strong"], 1), (["weak"], 1),
    ]  # fmt: skip
    assert first["needs"] == {"summarize": 1, "strong": 1}
    assert facts["total_memory_bytes"] == first["memory_bytes"] + second["memory_bytes"] > 0
    assert not {"hosts", "memory_bytes", "busy_fraction"} & agents[0].keys(), "they are the hosts'"


def test_a_host_is_taken_to_do_as_many_at_once_as_its_engines_options_say(
    make_job: MakeJob,
) -> None:
    agents = [{"name": "a", "model": "echo", "options": {"concurrent": 3}}, {"name": "b"}]
    agents[1] |= {"model": "org/model"}  # `auto`: the run tells which engine it was
    job = make_job(agents=agents, routing={})
    measured = measurements_of({"a": 0.1, "b": 0.1}, engine=ENGINES["marian"])
    rates = fit_rates(job, measured, {"a": 1, "b": 1}, embedded=True)
    assert {name: each.concurrent for name, each in rates.agents.items()} == {"a": 3, "b": 2}
