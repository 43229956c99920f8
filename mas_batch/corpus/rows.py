"""A row as the formats' readers yield it, and the columns that it must have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mas_batch import job
from mas_batch.errors import JobError


class Row(NamedTuple):
    """A row as read, or the problem that hides it."""

    position: int
    """Number of the row in its file, from 0, with blank lines counted; messages count from 1."""
    values: Mapping[str, Any]
    """Column → value; of a row that cannot be read only its id, where that can be read."""
    problem: str = ""
    """Why the row cannot be read; empty for a good one."""
    passthrough: Mapping[str, Any] | None = None
    """Set where the format has typed columns of its own."""


def roles_of(spec: job.Corpus) -> dict[str, str]:
    """Return key of the job → column, for the columns to which the job gives a meaning."""
    roles = {key: getattr(spec, key) for key in ("text", "id", "reference", "context")}
    return {key: column for key, column in roles.items() if column is not None}


def require_columns(spec: job.Corpus, names: Sequence[str], where: str) -> None:
    """Raise JobError for the first column that the job names and `names` lacks."""
    wanted = [*roles_of(spec).items(), *(("keep", column) for column in spec.keep or ())]
    for key, column in wanted:
        if column not in names:
            there = ", ".join(map(repr, names))
            raise JobError(
                f"no column {column!r} in {where}; columns there: {there}", key=f"corpus.{key}"
            )


def require_distinct_columns(names: Sequence[str], where: str) -> None:
    """Raise JobError for a name that occurs twice."""
    doubled = [name for name, times in Counter(names).items() if times > 1]
    if doubled:
        raise JobError(f"{where} has more than one column {doubled[0]!r}", key="corpus.path")
