"""Puts together what a run's files tell of one partition.

A run that is at work or was killed can be explained as well as a published one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from datetime import datetime

import pyarrow.compute as pc

from mas_batch import incremental
from mas_batch.errors import RunError
from mas_batch.explain.story import Decision, OutcomeKind, Step, Story
from mas_batch.monitor.event_log import FOLDER, read_events
from mas_batch.run_folder.names import answers_name, results_name, staged_name
from mas_batch.run_folder.plan import Plan, read_plan
from mas_batch.run_folder.storage import Store
from mas_batch.safe_text import without_credentials


@dataclass(frozen=True, slots=True)
class ExplainedExecution:
    """What one process did about the partition."""

    name: str
    """When the process began, as its event files are named."""
    started: datetime
    """Time of its first event, in UTC."""
    steps: tuple[Step, ...]
    """In order; how a try ended stands with the decision that began it."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """All that a run's files tell of a partition's way through the router."""

    run: str
    partition: int
    num_partitions: int
    first_record: int
    """Position of its first record in the corpus, from 0."""
    num_records: int
    estimated_tokens: int
    """Text, context, prompt and new tokens of the usable records."""
    answered_by: tuple[str, ...]
    """Agents whose answers are committed."""
    is_merged: bool
    """Its results are committed."""
    executions: tuple[ExplainedExecution, ...]
    """Those that had to do with it."""
    num_executions: int
    """All that left events."""
    problems: tuple[str, ...]
    """What is committed though no event tells of it, and event files that are cut short."""
    reused: dict[str, str]
    """Agent → the run that it answered all of the partition in, if it was not asked in this one."""


def explain(store: Store, partition: int) -> Explanation:
    """Tell the story of a partition. All events of the run are read, one file at a time.

    Raises:
        RunError: this is no run folder, there is no such partition, or no events are kept.
    """
    plan = _plan(store)
    if not 0 <= partition < plan.num_partitions:
        allowed = f"0 to {plan.num_partitions - 1}" if plan.num_partitions else "none, it is empty"
        raise RunError(f"{store.url}: no partition {partition}; allowed: {allowed}")
    problems: list[str] = []
    stories = _stories(store, partition, problems.append)
    answered_by = _answered_by(store, partition)
    reused = _reused(store, partition, answered_by)
    is_merged = store.exists(results_name(partition))
    asked = [agent_id for agent_id in answered_by if agent_id not in reused]
    # Only the router emits events of a merge, and a partition whose answers all come from
    # earlier runs is merged without it.
    merge_has_event = is_merged and (bool(asked) or not reused)
    problems += _without_event(stories, asked, merge_has_event)
    row = plan.table.slice(partition, 1).to_pylist()[0]
    return Explanation(
        run=without_credentials(store.url),
        partition=partition,
        num_partitions=plan.num_partitions,
        first_record=row["first_record"],
        num_records=row["num_records"],
        estimated_tokens=row["estimated_tokens"],
        answered_by=answered_by,
        is_merged=is_merged,
        executions=tuple(
            ExplainedExecution(story.execution, story.started, tuple(story.steps))
            for story in stories
            if story.steps
        ),
        num_executions=len(stories),
        problems=tuple(problems),
        reused=reused,
    )


def find_record(store: Store, record_id: str) -> int:
    """Return the partition that holds a record, by a scan.

    Nothing indexes record ids: of every staged partition, in order, the column of ids is read
    until the record is there, which takes time in proportion to the corpus.

    Raises:
        RunError: this is no run folder, or no record has that id.
    """
    plan = _plan(store)
    for partition, _, _ in plan.sizes():
        ids = store.read_column(staged_name(partition), "record_id")
        if pc.index(ids, record_id).as_py() >= 0:
            return partition
    raise RunError(
        f"{store.url}: none of its {plan.num_records:,} records has the id {record_id!r}"
    )


def _plan(store: Store) -> Plan:
    plan = read_plan(store)
    if plan is None:
        is_run = store.exists("job.yaml")
        why = "its corpus is not staged yet" if is_run else "this is not a run folder"
        raise RunError(f"{store.url}: no plan.parquet; {why}")
    return plan


def _stories(store: Store, partition: int, report: Callable[[str], None]) -> list[Story]:
    stories: list[Story] = []
    for event in read_events(store, report):
        if not stories or stories[-1].execution != event.execution:
            answered = stories[-1].answered if stories else ()
            stories.append(Story(partition, event.execution, event.time, answered))
        stories[-1].take(event)
    if not stories:
        raise RunError(
            f"{store.path(FOLDER)}: no events are kept: the run has not asked an agent yet, "
            "or an older version made it"
        )
    for story in stories:
        story.end()
    return stories


def _answered_by(store: Store, partition: int) -> tuple[str, ...]:
    folders = sorted(name for name in store.list("answers") if name.startswith("agent="))
    agents = (folder.removeprefix("agent=") for folder in folders)
    return tuple(a for a in agents if store.exists(answers_name(partition, a)))


def _reused(store: Store, partition: int, agents: Iterable[str]) -> dict[str, str]:
    if not store.exists(incremental.FILE):
        return {}
    found: dict[str, str] = {}
    for agent_id in agents:
        name = answers_name(partition, agent_id)
        runs = store.read_table(name, ["reused_from"])["reused_from"].unique().to_pylist()
        if runs and None not in runs:
            found[agent_id] = ", ".join(sorted(runs))
    return found


def _without_event(
    stories: list[Story], answered_by: Collection[str], is_merged: bool
) -> list[str]:
    """Describe what is committed though no event tells of it."""
    has_event = set(stories[-1].answered)
    overtaken = {  # an overtaken try may have committed its answers later
        step.agent_id
        for story in stories
        for step in story.steps
        if isinstance(step, Decision) and step.outcome.kind is OutcomeKind.OVERTAKEN
    }
    found = [
        f"answers of {agent_id} are committed, but no event tells of them: they came late, or "
        "the event was lost with a process that was killed"
        for agent_id in answered_by
        if agent_id not in has_event | overtaken
    ]
    if is_merged and not any(story.is_merged for story in stories):
        found.append(
            "the results are committed, but no event tells of the merge: it was lost with a "
            "process that was killed"
        )
    return found
