"""What decides an agent's answer to a record, besides the record: in sections, each hashed.

Two runs that agree in all sections, and in the model's files, ask the same. Settings that only
change how fast or where an agent answers are left out: threads, batches, hosts, workers. So are
the versions of the engine's libraries, which as a rule change digits, not answers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
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
"""Version of how completions become answers. Raise it when a parser changes, or how long texts are
split and merged: earlier answers are then not reused."""

_COMMIT = re.compile(r"[0-9a-f]{40}")


def asked_as(job: Job, agent: Agent) -> dict[str, str]:
    """Return section → hash: if all are equal, the agent is asked the same.

    Raises:
        JobError: the agent's examples are not there.
    """
    task = job.task.model_dump(mode="json", exclude={"prompt", "system"})
    prompts = (job.task.prompt, job.task.system, agent.prompt, agent.system)
    engine = agent.engine_info
    operational, limits = (engine.operational, engine.limits) if engine else ((), ())
    left_out = ("examples", *operational, *limits)
    options = {key: value for key, value in agent.options.items() if key not in left_out}
    sections: dict[str, Any] = {
        "model": agent.loaded_as,
        "prompt": [hash_of_prompt(job, agent), *prompts],
        "sampling": [agent.samples, agent.sampling.model_dump(mode="json")],
        "task": [VERSION, task],
        "options": options,
        "limits": {key: agent.options[key] for key in limits if key in agent.options},
        "examples": examples.fingerprint(agent.options),
        "adapter": {} if agent.adapter is None else agent.adapter,
        "reads": {"reads": "labels"} if agent.reads_labels(job.task) else {},
    }
    return {name: fingerprint(value) for name, value in sections.items()}


def hash_of_prompt(job: Job, agent: Agent) -> str:
    """Return the agent's `prompt_hash` as the answers table has it."""
    sampling = Sampling(job.task.max_new_tokens)
    profile = AgentProfile(agent.name, "", agent.prompt, agent.system, sampling)
    return prompt_hash(make_task(job.task), profile)


def is_random(agent: Agent) -> bool:
    """Say whether the agent's answers are random.

    The random seed depends on the record's id, so such an answer belongs to an id, not only to a
    text.
    """
    engine = agent.engine_info
    by_option = any(agent.options.get(name) for name in (engine.random_options if engine else ()))
    return agent.sampling.temperature > 0 or by_option


def changed_sections(job: Job, agent: Agent, earlier: Mapping[str, Any]) -> list[str] | None:
    """Name the sections in which the agent was asked otherwise; None: it is not known how it was.

    Args:
        earlier: the manifest of the run that asked the agent.
    """
    then = earlier.get("asked_as", {}).get(agent.name)
    if then is None:
        return None
    now = asked_as(job, agent)
    unset = fingerprint({})  # an earlier version's run has no section of its own for what is new
    return [section for section in now if now[section] != then.get(section, unset)]


def why_not_reusable(
    job: Job,
    agent: Agent,
    earlier: Mapping[str, Any],
    *,
    is_embedded: bool,
    may_change: Collection[str] = (),
) -> str | None:
    """Say why the agent's earlier answers cannot be reused; None: they can.

    Args:
        earlier: the manifest of the run that asked the agent.
        may_change: sections that need not be the same.
        is_embedded: the models are loaded on this machine.
    """
    sections = changed_sections(job, agent, earlier)
    if sections is None:
        return "that run did not ask it, or does not say how"
    if changed := [section for section in sections if section not in may_change]:
        return f"changed since: {', '.join(changed)}"
    engine = earlier["engines"].get(agent.name, {})
    why = _files_changed("model", agent.model, engine, is_embedded)
    if why is None and agent.adapter is not None:
        why = _files_changed("adapter", agent.adapter, engine.get("adapter", {}), is_embedded)
    return why


def _files_changed(
    what: str, source: str, facts: Mapping[str, Any], is_embedded: bool
) -> str | None:
    """Say why a model's or an adapter's files may have changed since that run; None: they have not.

    Args:
        facts: what that run says of them.
    """
    spec = parse_source(source)
    is_local = spec.scheme == "path" or Path(source).exists()
    if spec.scheme == "pypi" or not spec.has_files:
        return None  # a version's files never change; an endpoint shows no files
    if not is_local and _COMMIT.fullmatch(spec.version):
        return None
    if not is_local and not is_embedded:
        return f"its {what} may have changed: name a commit, org/name@<40 hex digits>"
    if not facts.get("sha256"):
        return f"that run does not say which files its {what} had"
    try:
        now = fetch(source).sha256
    except (ModelError, JobError) as error:
        return f"its {what}'s files cannot be compared from here: {error}"
    return None if now == facts["sha256"] else f"changed since: the {what}'s files"
