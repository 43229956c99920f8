"""From the job and the hardware to workers: threads, memory, devices, and what is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from mas_batch.agents.devices import assign_devices
from mas_batch.agents.spec import AgentSpec, agent_specs, worker_options
from mas_batch.engine_info import EngineInfo
from mas_batch.errors import JobError
from mas_batch.incremental import asked_as
from mas_batch.job import Agent, Job, Parallel, fingerprint
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


LANGUAGE_MODEL = {"model": "org/model", "engine": "transformers"}


def test_embedded_workers_declare_what_their_agents_need_and_share_the_memory() -> None:
    the_job = job(
        {"name": "a", "count": 2, "resources": {"GPU": 1}},
        {"name": "b", "threads": 3, "capabilities": ["translate", "long"]},
    )
    specs = agent_specs(the_job, embedded=True, num_cores=8)
    devices = assign_devices(the_job, ["0", "1"])
    options = worker_options(the_job, specs, memory_bytes=9000, devices=devices)
    assert list(options) == ["a-0", "a-1", "b-0"]
    assert options["a-1"]["resources"] == {"translate": 1.0, "GPU": 1}
    assert options["a-1"]["env"]["CUDA_VISIBLE_DEVICES"] == "1"
    assert options["b-0"]["resources"] == {"translate": 1.0, "long": 1.0}
    assert {each["memory_limit"] for each in options.values()} == {3000}
    assert options["b-0"]["env"]["MKL_NUM_THREADS"] == "3"
    assert "CUDA_VISIBLE_DEVICES" not in options["b-0"]["env"]


def test_cores_go_to_engines_that_use_threads() -> None:
    the_job = job(
        {"name": "large", **LANGUAGE_MODEL},
        {"name": "unknown", "model": "org/other"},  # only the files will tell
        {"name": "words", "model": "echo"},
        {"name": "fixed", "model": "echo", "threads": 3},
    )
    specs = agent_specs(the_job, embedded=True, num_cores=8)
    assert [spec.threads for spec in specs.values()] == [4, 4, 1, 3]
    light = job({"name": "a"}, {"name": "b", "share": False})
    specs = agent_specs(light, embedded=True, num_cores=8)
    assert [spec.threads for spec in specs.values()] == [1, 1]


def test_agents_that_share_hosts_count_once() -> None:
    the_job = job(
        {"name": "a", **LANGUAGE_MODEL}, {"name": "b", **LANGUAGE_MODEL, "count": 2}, {"name": "c"}
    )
    specs = agent_specs(the_job, embedded=True, num_cores=8)
    assert [(spec.threads, spec.post) for spec in specs.values()] == [
        (4, "a+b"), (4, "a+b"), (1, "c")
    ]  # fmt: skip
    options = worker_options(the_job, specs, memory_bytes=9000, devices={})
    assert {name: each["memory_limit"] for name, each in options.items()} == {
        "a+b-0": 3000, "a+b-1": 3000, "c-0": 3000
    }  # fmt: skip


@pytest.mark.parametrize(
    ("window", "agent", "slots"),
    [
        ({}, {}, 3),
        ({"window": 5}, {}, 6),
        ({}, {"options": {"concurrent": 3}}, 5),
        ({}, {"model": "org/model"}, 6),  # only the files will tell: perhaps `transformers`
        ({}, {"model": "openai:m", "options": {"concurrency": 64}}, 20),
    ],
)
def test_a_worker_has_slots_for_its_partitions_and_for_a_merge(
    window: dict[str, int], agent: dict[str, Any], slots: int
) -> None:
    the_job = job({"name": "a", **agent})
    the_job = the_job.with_changes(routing=the_job.routing.with_changes(**window))
    specs = agent_specs(the_job, embedded=True, num_cores=8)
    workers = worker_options(the_job, specs, memory_bytes=9000, devices={})
    assert workers["a-0"]["nthreads"] == slots


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


@pytest.mark.parametrize(
    ("own", "of_agent", "same_engine"),
    [((), [], False), (("delay_s",), ["delay_s"], True), (("*",), ["delay_s", "fail_on"], True)],
)
def test_an_agents_own_options_are_not_the_engines(
    own: tuple[str, ...], of_agent: list[str], same_engine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = EngineInfo("some.module", agent_options=own)
    monkeypatch.setattr(Agent, "engine_info", property(lambda self: info))
    held = {"fail_on": "x"} if "*" not in own else {}
    specs = [
        AgentSpec(Agent(name="a", model="echo", options={"fail_on": "x", "delay_s": delay_s}), 1)
        for delay_s in (1, 2)
    ]
    assert sorted(specs[0].agent.agent_options) == of_agent
    assert specs[0].engine_config.options == (held if own else {"fail_on": "x", "delay_s": 1})
    assert (specs[0].engine_key == specs[1].engine_key) == same_engine


def test_sharing_is_no_part_of_what_a_run_is() -> None:
    shared, alone = job({"name": "a"}), job({"name": "a", "share": False})
    assert shared.identity() == alone.identity()
    assert "share" not in shared.identity()["agents"][0]
    assert asked_as(shared, shared.agents[0]) == asked_as(alone, alone.agents[0])
