"""Which agents an engine is refused for."""

from __future__ import annotations

from typing import Any

import pytest

from mas_batch import job
from mas_batch.agents.checks import check_engine
from mas_batch.engines import load_engine
from mas_batch.engines.base import Engine, EngineConfig
from mas_batch.errors import JobError
from mas_batch.models import fetch
from mas_batch.tasks import Task, make_task
from tests.test_answering import Recorder


def task_of(kind: str, **keys: Any) -> Task:
    labels = {"labels": ("A", "B")} if kind == "classify" else {}
    return make_task(job.Task(kind=kind, **labels, **keys))  # type: ignore[arg-type]


def agent_of(**keys: Any) -> job.Agent:
    return job.Agent(name="a", model="keywords", **keys)


@pytest.fixture
def keywords() -> Engine:
    options = {"labels": {"A": "apple", "B": "bee"}}
    return load_engine("auto", fetch("keywords"), EngineConfig(options=options))


def refused(engine: Engine, task: Task, agent: job.Agent) -> tuple[str | None, str]:
    with pytest.raises(JobError) as caught:
        check_engine(task, engine, agent)
    return caught.value.key, caught.value.message


def test_translation_models_only_translate() -> None:
    engine = Recorder(takes_messages=False, only_translates=True)
    check_engine(task_of("translate"), engine, agent_of())
    check_engine(task_of("reply"), Recorder(), agent_of())
    for kind in ("summarize", "classify", "score", "reply"):
        key, message = refused(engine, task_of(kind), agent_of())
        assert key == "task.kind"
        assert f"{kind!r} is not allowed for an agent on the engine 'recorder'" in message


@pytest.mark.parametrize("key", ["prompt", "system"])
def test_a_prompt_that_nobody_reads_is_refused(keywords: Engine, key: str) -> None:
    agent = agent_of(**{key: "Be brief: {text}"})
    assert refused(keywords, task_of("classify"), agent) == (
        f"agents.a.{key}",
        "the engine 'keywords' reads the text alone and would ignore it; remove it",
    )
    check_engine(task_of("classify"), Recorder(), agent)


def test_the_jobs_own_prompt_is_for_whoever_reads_it(keywords: Engine) -> None:
    check_engine(task_of("classify", prompt="Say: {text}", system="Be brief"), keywords, agent_of())


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"samples": 2, "sampling": {"temperature": 0.5}}, "samples"),
        ({"sampling": {"temperature": 0.5}}, "sampling.temperature"),
        ({"sampling": {"num_beams": 3}}, "sampling.num_beams"),
    ],
)
def test_an_engine_of_one_answer_samples_none(
    keywords: Engine, keys: dict[str, Any], key: str
) -> None:
    agent = agent_of(**keys)
    found, message = refused(keywords, task_of("classify"), agent)
    assert found == f"agents.a.{key}"
    assert "has one answer to a text and samples none; allowed: " in message
    check_engine(task_of("classify"), Recorder(), agent)
