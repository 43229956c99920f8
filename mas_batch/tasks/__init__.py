"""Tasks by kind, each in one file."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mas_batch import job
from mas_batch.tasks.base import Fitted, Rewrite, Task
from mas_batch.tasks.classify import Classify
from mas_batch.tasks.reply import Reply
from mas_batch.tasks.score import Score
from mas_batch.tasks.summarize import Summarize
from mas_batch.tasks.translate import Translate

__all__ = ["TASKS", "Fitted", "Rewrite", "Task", "make_task"]

TASKS: Mapping[str, Callable[[job.Task], Task]] = {
    Summarize.kind: Summarize,
    Translate.kind: Translate,
    Classify.kind: Classify,
    Score.kind: Score,
    Reply.kind: Reply,
}


def make_task(spec: job.Task) -> Task:
    """Make the task that the job describes.

    Raises:
        JobError: its labels cannot be told apart in a reply.
    """
    return TASKS[spec.kind](spec)
