"""What runs have learned about their agents, kept for the next run of the same task.

    <merge.history>/<task>/<run>.json

One file per run, so that a run which is resumed or repeated is counted once. The task's folder is
named by a hash of all that an agent's reliability depends on: the kind, the languages, the labels,
the prompts. An agent is identified by its model, its prompts, sampling and options, and the
examples that it learned from, not by its name: agents that differ only in their names count as one
agent, and what is learned of them is added up.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict
from typing import Any

from mas_batch.aggregate.method import MergeSpec
from mas_batch.aggregate.reliability import AgentHistory, History, Reliability
from mas_batch.engines.classical import examples
from mas_batch.errors import RunError
from mas_batch.job import Agent, Job, fingerprint
from mas_batch.run_folder.storage import Store


class Memory:
    """Reads what earlier runs have learned, and writes what this run has learned.

    Args:
        job: with `merge.history`.
        spec: how the job merges.

    Raises:
        JobError: an agent's examples are not there.
        RunError: a file there cannot be read, or was not written by this class.
    """

    def __init__(self, job: Job, spec: MergeSpec) -> None:
        assert job.merge.history is not None
        self._labels = spec.labels
        self._identities = {agent.name: _identity(job, agent) for agent in job.agents}
        self._store = Store(job.merge.history, job.output.storage_options).child(_task_folder(job))

    def prior(self, besides: str = "") -> History | None:
        """Add up the earlier runs; None if there are none.

        Args:
            besides: a run to leave out: this run itself, when it is repeated.
        """
        runs = [
            self._read(name)
            for name in sorted(self._store.list(""))
            if name.endswith(".json") and name != f"{besides}.json"
        ]
        found = {
            name: _add_up([run[identity] for run in runs if identity in run])
            for name, identity in self._identities.items()
            if any(identity in run for run in runs)
        }
        return History(found, self._labels) if found else None

    def accuracies(self) -> dict[str, float]:
        """Return agent → how often it was right, for the agents that earlier runs know."""
        prior = self.prior()
        if prior is None:
            return {}
        return {
            name: agent.correct / agent.total for name, agent in prior.agents.items() if agent.total
        }

    def keep(self, run: str, reliability: Reliability) -> None:
        """Write what the run has learned; nothing if it has learned nothing."""
        learned = reliability.history()
        alike: defaultdict[str, list[AgentHistory]] = defaultdict(list)
        for name, agent in learned.agents.items():
            alike[self._identities[name]].append(agent)
        agents = {identity: asdict(_add_up(parts)) for identity, parts in alike.items()}
        if agents:
            content = {"labels": learned.labels, "agents": agents}
            encoded = json.dumps(content, ensure_ascii=False, indent=1).encode()
            self._store.replace(f"{run}.json", encoded)

    def _read(self, name: str) -> dict[str, AgentHistory]:
        """Return agent's identity → what one run has learned of it."""
        try:
            raw: dict[str, Any] = json.loads(self._store.read_bytes(name))
            return {identity: _history_of(value) for identity, value in raw["agents"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(
                f"{self._store.location(name)} is not what a run has learned: "
                f"{type(error).__name__}: {error}; remove it, or set merge.history elsewhere"
            ) from error


def _task_folder(job: Job) -> str:
    task = job.task
    return f"{task.kind}-{fingerprint(task.model_dump(mode='json'))}"


def _identity(job: Job, agent: Agent) -> str:
    """Return what makes two agents of two jobs the same voter."""
    own = {"model", "engine", "prompt", "system", "sampling", "options", "dtype"}
    asked = agent.model_dump(mode="json", include={*own, "quantize", "adapter"})
    if agent.reads_labels(job.task):
        asked["reads"] = "labels"  # runs of earlier versions read replies
    if taught := examples.fingerprint(agent.options):
        asked["options"]["examples"] = taught  # what is in the files, not where they are
    return fingerprint(asked)


def _history_of(value: dict[str, Any]) -> AgentHistory:
    confusion = value["confusion"]
    rows = None if confusion is None else tuple(tuple(map(float, row)) for row in confusion)
    return AgentHistory(float(value["correct"]), float(value["total"]), rows)


def _add_up(parts: list[AgentHistory]) -> AgentHistory:
    known = [part.confusion for part in parts if part.confusion is not None]
    confusion = tuple(
        tuple(sum(cells) for cells in zip(*rows, strict=True)) for rows in zip(*known, strict=True)
    )
    return AgentHistory(
        sum(part.correct for part in parts), sum(part.total for part in parts), confusion or None
    )
