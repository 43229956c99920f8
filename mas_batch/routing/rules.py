"""What a dispatcher keeps to, as the job says it."""

from __future__ import annotations

from collections.abc import Mapping

from mas_batch.job import Job
from mas_batch.routing.instructions import Rules


def rules_of(job: Job, known: Mapping[str, float], *, reuses: bool = False) -> Rules:
    """Return what the dispatcher keeps to.

    Args:
        known: agent → accuracy that earlier runs have learned.
        reuses: whether answers of an earlier run are reused: these count whoever gave them, as
            asking others in their stead would cost what reusing saves.
    """
    routing = job.routing
    return Rules(
        answers_per_record=job.answers_per_record,
        first=routing.adaptive.first if routing.adaptive else None,
        window=routing.window,
        max_attempts=routing.max_attempts,
        weights=routing.weights,
        accuracies={**known, **job.merge.accuracies},
        ordered=not reuses,
        speculate=routing.speculate,
        timeout_s=routing.timeout_s,
    )
