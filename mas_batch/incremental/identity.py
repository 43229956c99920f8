"""What decides an agent's answer to a record, besides the record: in parts, each hashed.

Two runs that agree in all parts, and in the model's files, ask the same. What is not among them
changes how fast an agent answers, or where: threads, batches, replicas, workers. Nor are the
versions of the engine's libraries, which change digits, as a rule, not answers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mas_batch.agents.answering import AgentProfile, prompt_hash
from mas_batch.engines.base import Sampling
from mas_batch.engines.classical import examples
from mas_batch.errors import JobError, ModelError
from mas_batch.job import Agent, Job, fingerprint
from mas_batch.models import fetch, parse_source
from mas_batch.tasks import make_task

VERSION = 1
"""Of how answers are made of completions; raise it where a parser changes, or how long texts are
split and merged: then answers of before are not those of today."""

_COMMIT = re.compile(r"[0-9a-f]{40}")


def asked_as(job: Job, agent: Agent) -> dict[str, str]:
    """Return part → hash: equal ones mean equal questions.

    Raises:
        JobError: the agent's examples are not there.
    """
    task = job.task.model_dump(mode="json", exclude={"prompt", "system"})
    prompts = (job.task.prompt, job.task.system, agent.prompt, agent.system)
    engine = agent.engine_info
    left_out = ("examples", *(engine.operational if engine else ()))
    options = {key: value for key, value in agent.options.items() if key not in left_out}
    parts: dict[str, Any] = {
        "model": agent.loaded_as,
        "prompt": [hash_of_prompt(job, agent), *prompts],
        "sampling": [agent.samples, agent.sampling.model_dump(mode="json")],
        "task": [VERSION, task],
        "options": options,
        "examples": examples.fingerprint(agent.options),
    }
    return {name: fingerprint(value) for name, value in parts.items()}


def hash_of_prompt(job: Job, agent: Agent) -> str:
    """Return what the answers table has as the agent's `prompt_hash`."""
    sampling = Sampling(job.task.max_new_tokens)
    profile = AgentProfile(agent.name, "", agent.prompt, agent.system, sampling)
    return prompt_hash(make_task(job.task), profile)


def draws(agent: Agent) -> bool:
    """Tell whether its answers are drawn by lot.

    The lot's seed is made of the record's id, among others, so an answer then belongs to an id,
    not to a content.
    """
    engine = agent.engine_info
    by_option = any(agent.options.get(name) for name in (engine.random_options if engine else ()))
    return agent.sampling.temperature > 0 or by_option


def difference(
    job: Job, agent: Agent, earlier: Mapping[str, Any], *, is_embedded: bool
) -> str | None:
    """Say why the agent's earlier answers are not those that it would give now; None: they are.

    Args:
        earlier: the manifest of the run that asked it.
        is_embedded: the models are loaded on this machine.
    """
    then = earlier.get("asked_as", {}).get(agent.name)
    if then is None:
        return "that run did not ask it, or does not say how"
    now = asked_as(job, agent)
    changed = [part for part in now if now[part] != then.get(part)]
    if changed:
        return f"changed since: {', '.join(changed)}"
    return _files_changed(agent.model, earlier["engines"].get(agent.name, {}), is_embedded)


def _files_changed(source: str, engine: Mapping[str, Any], is_embedded: bool) -> str | None:
    """Say why the model's files may not be those of then; None: they are."""
    spec = parse_source(source)
    is_local = spec.scheme == "path" or Path(source).exists()
    if spec.scheme == "pypi" or not spec.has_files:
        return None  # a version's files are final; an endpoint shows none
    if not is_local and _COMMIT.fullmatch(spec.version):
        return None
    if not is_local and not is_embedded:
        return "its model may have changed: name a commit, org/name@<40 hex digits>"
    if not engine.get("sha256"):
        return "that run does not say which files its model had"
    try:
        now = fetch(source).sha256
    except (ModelError, JobError) as error:
        return f"its model's files cannot be compared from here: {error}"
    return None if now == engine["sha256"] else "changed since: the model's files"
