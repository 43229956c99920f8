"""Builds a merge's `MergeSpec` and `StoppingRule` from the sections of a job."""

from __future__ import annotations

from mas_batch.aggregate.escalation import check_method
from mas_batch.aggregate.method import MergeSpec
from mas_batch.aggregate.stopping import StoppingRule, check_rule
from mas_batch.job import Job
from mas_batch.tasks import make_task


def check_merging(job: Job) -> tuple[MergeSpec, StoppingRule | None]:
    """Return how the job merges and when it stops asking, all of it checked.

    Raises:
        JobError: the method, the answers' kind, early stopping and escalation do not go together.
    """
    merge = merge_spec(job)
    if job.routing.escalate is not None:
        check_method(merge.method, compares=job.routing.escalate.target is not None)
    return merge, stopping_rule(job)


def merge_spec(job: Job) -> MergeSpec:
    """Fill the job's merge section with the task's defaults."""
    task, escalate = make_task(job.task), job.routing.escalate
    return MergeSpec(
        method=job.merge.method or _default_method(job, task.default_merge),
        utility=job.merge.utility or task.default_utility,
        accuracies=job.merge.accuracies,
        weights=job.merge.weights,
        abstain_below=job.merge.abstain_below,
        answer_kind=task.answer_kind,
        num_labels=len(job.task.labels) if job.task.labels else None,
        labels=job.task.labels,
        agents=tuple(agent.name for agent in job.agents),
        encoder=job.merge.encoder,
        covers_text=task.covers_text,
        last_word=escalate.agent if escalate is not None and escalate.target is not None else None,
    )


def _default_method(job: Job, default: str) -> str:
    """Return the task's default: where that is `auto`, `mbr` for a single answer per record, and
    for weights that are given."""
    merge = job.merge
    is_clear = job.answers_per_record < 2 or merge.weights or merge.accuracies
    return "mbr" if default == "auto" and is_clear else default


def stopping_rule(job: Job) -> StoppingRule | None:
    """Return when a record needs no further answer; None: asking does not stop early.

    Raises:
        JobError: the job's merge method cannot be stopped early that way.
    """
    if job.routing.adaptive is None:
        return None
    # The samples of the last agent may make more answers than are wanted.
    most = job.answers_per_record + max(agent.samples for agent in job.first_agents) - 1
    rule = StoppingRule(job.routing.adaptive.confidence, most)
    check_rule(merge_spec(job).first_pass, rule)
    return rule
