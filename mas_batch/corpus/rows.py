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
    """In its file, from 0, skipped blank lines included; messages count from 1."""
    values: Mapping[str, Any]
    """By column; of a hidden row only its id, where that could be read."""
    problem: str = ""
    """Why the row cannot be read; empty for a good one."""
    passthrough: Mapping[str, Any] | None = None
    """Set where the format has typed columns of its own."""


def roles_of(spec: job.Corpus) -> dict[str, str]:
    """Return job key → column of the columns that mean something."""
    roles = {key: getattr(spec, key) for key in ("text", "id", "reference", "context")}
    return {key: column for key, column in roles.items() if column is not None}


def require(spec: job.Corpus, names: Sequence[str], where: str) -> None:
    """Raise JobError for the first column that the job names and `names` lacks."""
    wanted = [*roles_of(spec).items(), *(("keep", column) for column in spec.keep or ())]
    for key, column in wanted:
        if column not in names:
            there = ", ".join(map(repr, names))
            raise JobError(
                f"no column {column!r} in {where}; columns there: {there}", key=f"corpus.{key}"
            )


def require_distinct(names: Sequence[str], where: str) -> None:
    """Raise JobError for a name that occurs twice."""
    doubled = [name for name, times in Counter(names).items() if times > 1]
    if doubled:
        raise JobError(f"{where} has more than one column {doubled[0]!r}", key="corpus.path")
