"""Labels counted: by agent, and published against the references."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from mas_batch.aggregate.reductions import add_up
from mas_batch.run_folder.kept_job import job_facts
from mas_batch.run_folder.read import Run
from mas_batch.safe_text import clip

MAX_LABELS = 12
LABEL_CHARS = 40
PUBLISHED = "published"


@dataclass(frozen=True, slots=True)
class LabelCounts:
    """How often each agent said each label."""

    labels: tuple[str, ...]
    rows: tuple[tuple[str, tuple[int, ...]], ...]
    """(Agent, or `PUBLISHED` for the merge; counts in the labels' order)."""
    num_left_out: int
    """Labels beyond `MAX_LABELS`."""


@dataclass(frozen=True, slots=True)
class Confusion:
    """Published answers by the label that is right."""

    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    """A row per right label, a column per published one."""
    num_records: int


def label_counts(run: Run) -> LabelCounts | None:
    """Read the manifest's counts; None: the answers are no labels, or the version counted none.

    Labels come in the job's order, the most frequent ones if there are too many.
    """
    found = run.manifest["counts"].get("labels") or {}
    agents, published = found.get("agents") or {}, found.get("published") or {}
    if not agents:
        return None
    totals = add_up([published, *agents.values()])
    order = job_facts(run)["task"].get("labels") or sorted(totals)
    names = sorted(totals.keys() | {*order}, key=lambda label: (-totals.get(label, 0), label))
    shown = sorted(names[:MAX_LABELS], key=[*order, *names].index)
    rows = [*sorted(agents.items()), (PUBLISHED, published)]
    return LabelCounts(
        labels=tuple(clip(label, LABEL_CHARS) for label in shown),
        rows=tuple((name, tuple(said.get(label, 0) for label in shown)) for name, said in rows),
        num_left_out=len(names) - len(shown),
    )


def count_confusion(results: pa.Table) -> Counter[tuple[str, str]]:
    """Count (reference, published answer) of a partition; records without a reference are left
    out."""
    known = results.filter(pc.is_valid(results["reference"]))
    columns = (known[name].to_pylist() for name in ("reference", "answer"))
    return Counter(zip(*columns, strict=True))


def confusion(counts: Mapping[tuple[str, str], int], labels: Sequence[str]) -> Confusion | None:
    """Arrange counts as a matrix; None: no record has one of the labels as its reference, or there
    are too many labels for one."""
    judged = sum(n for (right, _), n in counts.items() if right in labels)
    if not judged or len(labels) > MAX_LABELS:
        return None
    matrix = tuple(tuple(counts.get((right, said), 0) for said in labels) for right in labels)
    return Confusion(tuple(clip(label, LABEL_CHARS) for label in labels), matrix, judged)
