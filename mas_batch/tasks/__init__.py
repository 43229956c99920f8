"""Tasks by kind, each in one file."""

from __future__ import annotations

from mas_batch import job, registries
from mas_batch.registry import Registry
from mas_batch.tasks.base import Fitted, Task

__all__ = ["TASKS", "Fitted", "Task", "make_task"]

TASKS: Registry[type[Task]] = registries.TASKS


def make_task(spec: job.Task) -> Task:
    """Make the task that the job describes."""
    return TASKS[spec.kind](spec)
