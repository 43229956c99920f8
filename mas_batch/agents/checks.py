"""Checks, once its model is loaded, that an engine can do what its agent is asked for."""

from __future__ import annotations

from mas_batch.engines.base import Engine
from mas_batch.errors import JobError
from mas_batch.job import Agent
from mas_batch.tasks.base import Task


def check_engine(task: Task, engine: Engine, agent: Agent) -> None:
    """Refuse an engine that cannot do the task, or would ignore a setting of the agent.

    The job's own prompt is no reason to refuse: it may be meant for other agents.

    Raises:
        JobError: a translation model is asked to do anything but translate; the agent has a
            prompt that its engine would not read, a sampling that it would not follow, or labels to
            read of which its engine gives no probabilities.
    """
    name = engine.describe().get("engine", type(engine).__name__)
    if engine.only_translates and not task.is_translation:
        raise JobError(
            f"{task.spec.kind!r} is not allowed for an agent on the engine {name!r}: its model "
            "reads no prompt, it only translates; allowed: translate",
            key="task.kind",
        )
    if not engine.takes_messages:
        for key, given in (("prompt", agent.prompt), ("system", agent.system)):
            if given is not None:
                message = f"the engine {name!r} reads the text alone and would ignore it; remove it"
                raise JobError(message, key=f"agents.{agent.name}.{key}")
    if agent.reads == "labels" and not getattr(engine, "scores_choices", False):
        raise JobError(
            f"`labels` is not allowed: the engine {name!r} gives no probabilities of given words; "
            "allowed: reply",
            key=f"agents.{agent.name}.reads",
        )
    if not engine.samples:
        _check_one_answer(name, agent)


def _check_one_answer(engine: str, agent: Agent) -> None:
    sampling = agent.sampling
    given = {
        "samples": (agent.samples, 1),
        "sampling.temperature": (sampling.temperature, 0),
        "sampling.num_beams": (sampling.num_beams, 1),
    }
    for key, (value, allowed) in given.items():
        if value != allowed:
            raise JobError(
                f"{value} is not allowed: the engine {engine!r} has one answer to a text and "
                f"samples none; allowed: {allowed}",
                key=f"agents.{agent.name}.{key}",
            )
