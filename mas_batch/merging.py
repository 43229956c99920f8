"""Builds a merge's `MergeSpec` and `StoppingRule` from the sections of a job."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from mas_batch.aggregate.calibration import MIN_LABELS
from mas_batch.aggregate.escalation import check_method
from mas_batch.aggregate.method import MergeSpec
from mas_batch.aggregate.stopping import StoppingRule, check_rule
from mas_batch.aggregate.verdicts import key_of
from mas_batch.corpus import CorpusReader
from mas_batch.errors import JobError
from mas_batch.job import Corpus, Job
from mas_batch.partition import Partition
from mas_batch.tasks import make_task


def check_merging(job: Job) -> tuple[MergeSpec, StoppingRule | None]:
    """Return how the job merges and when it stops asking, all of it checked.

    Raises:
        JobError: the method, the answers' kind, early stopping and escalation do not go together.
    """
    merge = merge_spec(job)
    if job.routing.escalate is not None:
        check_method(merge, compares=job.routing.escalate.target is not None)
    if merge.calibrate is not None:
        read_labels(merge)
    return merge, stopping_rule(job)


def merge_spec(job: Job) -> MergeSpec:
    """Fill the job's merge section with the task's defaults."""
    task, calibrate = make_task(job.task), job.merge.calibrate
    escalate = job.routing.escalate
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
        calibrate=calibrate.labels if calibrate else None,
        last_word=escalate.agent if escalate is not None and escalate.target is not None else None,
    )


def labels_version(job: Job) -> str | None:
    """Return what changes when the file of `merge.calibrate` does; None: there is none.

    Raises:
        JobError: no such file.
    """
    calibrate = job.merge.calibrate
    if calibrate is None:
        return None
    with _as_labels():
        return CorpusReader(_labels_corpus(calibrate.labels)).fingerprint


def read_labels(spec: MergeSpec) -> dict[str, str]:
    """Read the right answers that `merge.calibrate` names: record → key of its answer.

    Raises:
        JobError: no such file or column, a label that is none of the task's, or too few rows.
        RunError: the disk or the network fails.
    """
    assert spec.calibrate is not None
    key, found = key_of(spec), dict[str, str]()
    allowed = {key(label) for label in spec.labels or ()}
    with _as_labels():
        for record in CorpusReader(_labels_corpus(spec.calibrate)):
            label = (record.reference or "").strip()
            if not label:
                continue  # not labelled yet
            if allowed and key(label) not in allowed:
                raise JobError(
                    f"{spec.calibrate}: record {record.record_id!r} is labelled {label!r}; "
                    f"allowed: {', '.join(spec.labels or ())}"
                )
            found[record.record_id] = key(label)
    if len(found) < MIN_LABELS:
        raise JobError(
            f"{spec.calibrate} has {len(found)} rows with a label; {MIN_LABELS} are needed",
            key=_LABELS_KEY,
        )
    return found


def labels_met(spec: MergeSpec, partitions: Iterator[Partition]) -> Iterator[Partition]:
    """Yield the partitions; at the end, make sure that enough of their records are labelled.

    Raises:
        JobError: they are not. What `read_labels` raises.
    """
    labels, num_met = read_labels(spec), 0
    for part in partitions:
        num_met += sum(record.record_id in labels for record in part.records)
        yield part
    check_enough_labels(spec, labels, num_met, "records")


def check_enough_labels(spec: MergeSpec, labels: Collection[str], num_met: int, what: str) -> None:
    """Make sure that enough labelled records are such ones of the corpus.

    Raises:
        JobError: they are not.
    """
    if num_met < MIN_LABELS:
        raise JobError(
            f"{spec.calibrate}: {num_met or 'none'} of its {len(labels)} labelled records are "
            f"{what} of this corpus; {MIN_LABELS} are needed",
            key=_LABELS_KEY,
        )


_LABELS_KEY = "merge.calibrate.labels"


def _labels_corpus(path: str) -> Corpus:
    return Corpus(path=(path,), text="record_id", id="record_id", reference="label", keep=())


@contextmanager
def _as_labels() -> Iterator[None]:
    """Name the key of the labels in place of the corpus' key."""
    try:
        yield
    except JobError as error:
        raise JobError(error.message, key=_LABELS_KEY) from error


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
