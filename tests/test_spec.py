"""Which worker serves which agent, decided without a cluster."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mas_batch.agents import spec
from mas_batch.agents.devices import assign_devices
from mas_batch.agents.spec import (
    AgentSpec,
    WorkerInfo,
    agent_specs,
    can_host,
    match_workers,
    place_newcomer,
    worker_options,
)
from mas_batch.errors import JobError
from mas_batch.incremental import asked_as
from mas_batch.job import Job, Parallel, fingerprint
from mas_batch.job_file import check_job


def job(*agents: dict[str, Any]) -> Job:
    return check_job(
        {
            "name": "j",
            "corpus": {"path": "x.jsonl"},
            "task": {"kind": "translate"},
            "agents": [{"model": "echo", **agent} for agent in agents],
            "output": {"path": "out"},
        }
    )


def worker(name: str, **resources: float) -> WorkerInfo:
    return WorkerInfo(f"tcp://{name}", name, resources)


def test_unlike_workers_go_to_the_agents_they_can_host() -> None:
    the_job = job({"name": "big", "resources": {"GPU": 1}}, {"name": "small"})
    workers = [worker("w0", translate=1), worker("w1", translate=1, GPU=1)]
    assert match_workers(workers, the_job) == {"tcp://w1": "big", "tcp://w0": "small"}


def test_a_flexible_worker_gives_way_to_an_agent_that_has_no_other() -> None:
    the_job = job({"name": "any"}, {"name": "gpu", "resources": {"GPU": 1}})
    # Both agents could use w-gpu; only it can host `gpu`.
    workers = [worker("a-gpu", translate=1, GPU=1), worker("z", translate=1, extra=1, more=1)]
    assert match_workers(workers, the_job) == {"tcp://a-gpu": "gpu", "tcp://z": "any"}


def test_every_agents_first_replica_comes_before_a_second() -> None:
    the_job = job({"name": "a", "count": 3}, {"name": "b", "count": 3})
    matched = match_workers([worker(f"w{i}", translate=1) for i in range(3)], the_job)
    assert sorted(matched.values()) in (["a", "a", "b"], ["a", "b", "b"])


def test_no_more_workers_than_the_count() -> None:
    matched = match_workers(
        [worker(f"w{i}", translate=1) for i in range(5)], job({"name": "a", "count": 2})
    )
    assert list(matched.values()) == ["a", "a"]


def test_matching_a_thousand_workers_compares_kinds_not_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def counted(*args: Any) -> bool:
        calls.append(args)
        return can_host(*args)

    monkeypatch.setattr(spec, "can_host", counted)
    the_job = job(
        {"name": "any", "count": 500},
        {"name": "gpu", "count": 500, "resources": {"GPU": 1}},
        {"name": "long", "count": 500, "resources": {"long": 1}},
    )
    kinds = [{}, {"GPU": 1.0}, {"long": 1.0}, {"GPU": 1.0, "long": 1.0}]
    workers = [worker(f"w{i}", translate=1, **kinds[i % 4]) for i in range(1000)]
    matched = match_workers(workers, the_job)
    assert Counter(matched.values()) == {"any": 334, "gpu": 333, "long": 333}
    assert len(calls) == 4 * 3, "kinds × agents"


@pytest.mark.parametrize("num_there", [1, 3, 5])
def test_workers_that_come_and_go_leave_the_others_where_they_are(num_there: int) -> None:
    the_job = job({"name": "a", "count": 2}, {"name": "b", "count": 2})
    workers = [worker(f"w{i}", translate=1) for i in range(6)]
    serving = match_workers(workers[:4], the_job)
    for gone in list(serving)[:num_there]:
        del serving[gone]
    for newcomer in workers[4:]:
        agent = place_newcomer(newcomer, the_job, serving.values())
        if agent is not None:
            serving[newcomer.address] = agent
    counts = Counter(serving.values())
    assert sum(counts.values()) == min(4, 4 - min(4, num_there) + 2)
    assert max(counts.values()) <= 2


def test_a_missing_capability_lists_what_is_there() -> None:
    with pytest.raises(JobError) as caught:
        match_workers(
            [worker("w0", summarize=2), worker("w1")], job({"name": "a", "resources": {"GPU": 1}})
        )
    message = str(caught.value)
    assert "agents.0.capabilities" in message
    assert "'a' needs a worker with GPU=1,translate=1" in message
    assert "w0 (tcp://w0) declares summarize=2; w1 (tcp://w1) declares no resources" in message


@given(
    st.lists(st.sets(st.sampled_from("xyz")), min_size=1, max_size=6),
    st.lists(st.tuples(st.sets(st.sampled_from("xyz")), st.integers(1, 2)), min_size=1, max_size=4),
)
def test_matching_is_valid_and_fails_only_when_no_matching_exists(
    offers: list[set[str]], needs: list[tuple[set[str], int]]
) -> None:
    the_job = job(
        *(
            {"name": f"a{i}", "count": count, "resources": dict.fromkeys(sorted(need), 1.0)}
            for i, (need, count) in enumerate(needs)
        )
    )
    workers = [
        worker(f"w{i}", translate=1, **dict.fromkeys(offer, 1)) for i, offer in enumerate(offers)
    ]
    by_address = {w.address: w for w in workers}
    try:
        matched = match_workers(workers, the_job)
    except JobError:
        assert not _can_serve_all(
            [{w.name for w in workers if can_host(w, a, the_job)} for a in the_job.agents]
        )
        return
    agents = {a.name: a for a in the_job.agents}
    for address, name in matched.items():
        assert can_host(by_address[address], agents[name], the_job)
    for name, agent in agents.items():
        assert 1 <= list(matched.values()).count(name) <= agent.count


def _can_serve_all(choices: list[set[str]], used: frozenset[str] = frozenset()) -> bool:
    """Brute force: can every agent have a worker of its own?"""
    if not choices:
        return True
    return any(_can_serve_all(choices[1:], used | {w}) for w in choices[0] - used)


def test_a_restarted_worker_gets_its_agent_back() -> None:
    the_job = job({"name": "a"}, {"name": "b"})
    assert place_newcomer(worker("b-0", translate=1), the_job, []) == "b"
    assert place_newcomer(worker("other", translate=1), the_job, ["a"]) == "b"
    assert place_newcomer(worker("other", translate=1), the_job, ["a", "b"]) is None
    assert place_newcomer(worker("other"), the_job, []) is None


def test_embedded_workers_declare_what_their_agent_needs_and_share_the_cores() -> None:
    the_job = job(
        {"name": "a", "count": 2, "resources": {"GPU": 1}},
        {"name": "b", "threads": 3, "capabilities": ["translate", "long"]},
    )
    specs = agent_specs(the_job, embedded=True, num_cores=8)
    assert [spec.threads for spec in specs.values()] == [2, 3]
    devices = assign_devices(the_job, ["0", "1"])
    options = worker_options(the_job, specs, memory_bytes=9000, devices=devices)
    assert list(options) == ["a-0", "a-1", "b-0"]
    assert options["a-1"]["resources"] == {"translate": 1.0, "GPU": 1}
    assert options["a-1"]["env"]["CUDA_VISIBLE_DEVICES"] == "1"
    assert options["b-0"]["resources"] == {"translate": 1.0, "long": 1.0}
    assert {each["memory_limit"] for each in options.values()} == {3000}
    assert options["b-0"]["env"]["MKL_NUM_THREADS"] == "3"
    assert "CUDA_VISIBLE_DEVICES" not in options["b-0"]["env"]


def on_devices(*amounts: tuple[float, int], num_devices: int = 4) -> dict[str, str]:
    """Assign devices to agents a, b, … that ask for (GPU, replicas)."""
    agents = (
        {"name": name, "resources": {"GPU": amount} if amount else {}, "max_count": most}
        for name, (amount, most) in zip("abcd", amounts, strict=False)
    )
    return assign_devices(job(*agents), [str(i) for i in range(num_devices)])


def test_a_worker_gets_as_many_devices_as_it_asks_for() -> None:
    assert on_devices((2, 2)) == {"a-0": "0,1", "a-1": "2,3"}
    assert on_devices((1, 1), (0, 1), (3, 1)) == {"c-0": "0,1,2", "a-0": "3"}
    assert on_devices((2, 1), num_devices=0) == {}, "they are not known"
    assert on_devices((0, 9)) == {}


def test_fractions_share_a_device_up_to_a_whole() -> None:
    assert on_devices((0.5, 3)) == {"a-0": "0", "a-1": "0", "a-2": "1"}
    assert on_devices((1 / 3, 3), num_devices=1) == {"a-0": "0", "a-1": "0", "a-2": "0"}
    shared = on_devices((0.4, 2), (0.6, 2), (2, 1))
    assert shared == {"c-0": "0,1", "b-0": "2", "b-1": "3", "a-0": "2", "a-1": "3"}


@pytest.mark.parametrize(
    ("amounts", "key"),
    [
        ([(5, 1)], "agents.0.resources.GPU"),
        ([(1, 5)], "agents.0.resources.GPU"),
        ([(1, 1), (2, 2)], "agents.0.resources.GPU"),
        ([(3, 1), (0.6, 2)], "agents.1.resources.GPU"),
    ],
)
def test_more_devices_than_the_machine_has(amounts: list[tuple[float, int]], key: str) -> None:
    with pytest.raises(JobError, match="is more than this machine has: 4; allowed: ") as caught:
        on_devices(*amounts)
    assert caught.value.key == key


def test_devices_and_a_half_are_refused() -> None:
    with pytest.raises(JobError, match=r"1\.5 is not allowed; allowed: whole numbers") as caught:
        job({"name": "a", "resources": {"GPU": 1.5}})
    assert caught.value.key == "agents.0.resources.GPU"


def test_on_a_users_cluster_threads_are_the_workers_own_choice() -> None:
    assert agent_specs(job({"name": "a"}), embedded=False, num_cores=8)["a"].threads == 0


@pytest.mark.filterwarnings("ignore:Pydantic serializer")  # a version that allows 2 is to come
def test_how_a_model_is_cut_belongs_to_its_key_and_to_the_run() -> None:
    whole = job({"name": "a"})
    halves = Parallel.model_construct(tensor=2, pipeline=1)
    cut = whole.model_copy(
        update={"agents": (whole.agents[0].model_copy(update={"parallel": halves}),)}
    )
    keys = [AgentSpec(each.agents[0], threads=1).engine_key for each in (whole, cut)]
    assert keys[0] != keys[1]
    assert whole.identity() != cut.identity()
    parts = [asked_as(each, each.agents[0]) for each in (whole, cut)]
    assert [name for name in parts[0] if parts[0][name] != parts[1][name]] == ["model"]


def test_fingerprints_of_uncut_models_are_those_of_before() -> None:
    whole = job({"name": "a"})
    assert "parallel" not in whole.identity()["agents"][0]
    expected = fingerprint(["echo", "auto", "auto", "auto"])
    assert asked_as(whole, whole.agents[0])["model"] == expected


def test_agents_that_differ_only_in_prompt_share_a_model() -> None:
    the_job = job(
        {"name": "a"}, {"name": "b", "prompt": "Say {text}"}, {"name": "c", "model": "echo:c"}
    )
    keys = [s.engine_key for s in agent_specs(the_job, embedded=True, num_cores=1).values()]
    assert keys[0] == keys[1] != keys[2]
