"""What is kept of agents between runs, and what makes two agents the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mas_batch.aggregate.reliability import AgentReliability, Reliability
from mas_batch.job import Job
from mas_batch.merging import merge_spec
from mas_batch.stages.memory import Memory

MakeJob = Callable[..., Job]
LABELS = ("x", "y")


def memory_of(make_job: MakeJob, folder: Path, agents: list[dict[str, Any]]) -> Memory:
    merge = {"method": "reliability", "history": str(folder / "history")}
    task = {"kind": "classify", "labels": list(LABELS)}
    job = make_job(agents=agents, task=task, merge=merge)
    return Memory(job, merge_spec(job))


def learned(**accuracies: float) -> Reliability:
    """Of agents that gave 100 answers each."""
    agents = {
        name: AgentReliability("family", 100, accuracy) for name, accuracy in accuracies.items()
    }
    return Reliability("one-coin", "", 100, LABELS, (0.5, 0.5), None, agents)


def bayes(folder: Path, name: str, example: str) -> list[dict[str, Any]]:
    file = folder / name / "examples.jsonl"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"text": example, "label": "x"}) + "\n")
    return [{"name": "a", "model": "bayes", "options": {"examples": str(file)}}]


def test_an_agent_with_other_examples_is_another(make_job: MakeJob, tmp_path: Path) -> None:
    first = memory_of(make_job, tmp_path, bayes(tmp_path, "one", "some words"))
    first.keep("run-1", learned(a=0.9))
    assert first.accuracies() == {"a": 0.9}
    same_path = memory_of(make_job, tmp_path, bayes(tmp_path, "one", "these are other words"))
    assert same_path.accuracies() == {}


def test_examples_that_were_moved_make_no_other_agent(make_job: MakeJob, tmp_path: Path) -> None:
    agents = bayes(tmp_path, "one", "some words")
    memory_of(make_job, tmp_path, agents).keep("run-1", learned(a=0.9))
    (tmp_path / "one").rename(tmp_path / "two")
    moved = {"examples": str(tmp_path / "two" / "examples.jsonl")}
    memory = memory_of(make_job, tmp_path, [{**agents[0], "options": moved}])
    assert memory.accuracies() == {"a": 0.9}


def test_what_is_learned_of_agents_alike_is_added_up(make_job: MakeJob, tmp_path: Path) -> None:
    """They are one voter by all that is known of them, whatever they are called."""
    agents = [{"name": name, "model": "echo:same"} for name in ("a", "b")]
    memory = memory_of(make_job, tmp_path, agents)
    memory.keep("run-1", learned(a=0.9, b=0.7))
    renamed = memory_of(make_job, tmp_path, [{"name": "c", "model": "echo:same"}])
    prior = renamed.prior()
    assert prior is not None
    assert prior.agents["c"].total == 200
    assert renamed.accuracies() == {"c": 0.8}
