"""Tasks by kind, each in one file."""

from __future__ import annotations

from collections.abc import Mapping

from mas_batch import job
from mas_batch.errors import JobError
from mas_batch.tasks.base import Fitted, Task
from mas_batch.tasks.classify import Classify
from mas_batch.tasks.reply import Reply
from mas_batch.tasks.score import Score
from mas_batch.tasks.summarize import Summarize
from mas_batch.tasks.translate import Translate

__all__ = ["TASKS", "Fitted", "Task", "make_task"]

TASKS: Mapping[str, type[Summarize | Translate | Classify | Score | Reply]] = {
    Summarize.kind: Summarize,
    Translate.kind: Translate,
    Classify.kind: Classify,
    Score.kind: Score,
    Reply.kind: Reply,
}


def make_task(spec: job.Task) -> Task:
    """Make the task that the job describes.

    Raises:
        JobError: the task's labels cannot be told apart in a reply, or its kind does not allow
            such `long_documents`.
    """
    kind = TASKS[spec.kind]
    if spec.long_documents is not None and spec.long_documents not in kind.long_documents:
        allowed = ", ".join(kind.long_documents) or "nothing, leave it out"
        raise JobError(
            f"{spec.long_documents!r} is not allowed for `kind: {spec.kind}`; allowed: {allowed}",
            key="task.long_documents",
        )
    return kind(spec)
