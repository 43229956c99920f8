"""`submit --retry-failed`: ask again about what failed in a published run, as a run of its own."""

from __future__ import annotations

from dataclasses import dataclass

from mas_batch.errors import JobError, Reason
from mas_batch.incremental.earlier import EarlierRun, last_published, to_retry
from mas_batch.run_folder.names import retries, retry_name
from mas_batch.run_folder.read import Run
from mas_batch.run_folder.storage import Store

_WORTH_RETRYING = frozenset(str(reason) for reason in Reason if reason.worth_retrying)


@dataclass(frozen=True, slots=True)
class Retry:
    """A retry that is begun, or is to be resumed."""

    name: str
    """Of the run that it makes."""
    earlier: EarlierRun
    """The published run whose failed answers are asked for again."""

    @property
    def is_in_vain(self) -> bool:
        """Whether nothing failed there for a reason for which asking again may help."""
        return not _failed_worth_retrying(self.earlier.run)


def latest_version(output: Store, name: str) -> str:
    """Return the name of the run's last published retry, else its own."""
    published = _published(output, name)
    return retry_name(name, published[-1]) if published else name


def begin_retry(output: Store, job_name: str, name: str) -> Retry:
    """Find what to retry: the run's last published version; an unfinished retry is resumed.

    If the run is not published, the last published run of the job is retried as this one: what has
    changed since may be the time-out or the limit for which its answers failed.

    Args:
        name: of the job's run, as `run_name` makes it.

    Raises:
        JobError: no run of the job is published.
        RunError: the run cannot be read.
    """
    published = _published(output, name)
    if not published:
        last = last_published(output, job_name, name)
        if last is None:
            raise JobError(
                f"--retry-failed: no run of the job {job_name!r} is published in "
                f"{output.location('')}; submit it without --retry-failed"
            )
        return Retry(name, to_retry(output, last.name))
    begun = retries(output, name)
    number = begun[-1] if begun and begun[-1] > published[-1] else published[-1] + 1
    return Retry(retry_name(name, number), to_retry(output, retry_name(name, published[-1])))


def _published(output: Store, name: str) -> list[int]:
    numbers = [0, *retries(output, name)]
    return [n for n in numbers if output.child(retry_name(name, n)).exists("manifest.json")]


def _failed_worth_retrying(run: Run) -> bool:
    """Say whether a failed answer, or a record that no agent gave an answer to, is worth it."""
    return any(
        not _WORTH_RETRYING.isdisjoint(run.store.read_table(name, ["reason"])["reason"].to_pylist())
        for table in ("failures", "answers")
        for name in run.files(table)
    )
