"""Statistics that can be added up in any order and any grouping."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mas_batch.aggregate.answer_kinds import ANSWER_KINDS
from mas_batch.aggregate.normalise import deduplicate, normalise_text
from mas_batch.by_name import pickled_by_name
from mas_batch.records import ANSWERS, FAILURES, RESULT_FIELDS, STANDARD_ERROR

Partial = dict[str, Any]
"""Integers by name, nested in dicts and lists; JSON-able."""

CONFIDENCE_BINS = 20


@pickled_by_name
@dataclass(frozen=True, slots=True)
class Reduction:
    """A statistic as data. `combine` is associative and commutative, to the byte."""

    name: str
    chunk: Callable[..., Partial]
    """The tables of one partition → its partial."""
    combine: Callable[[Sequence[Partial]], Partial]
    """Partials → one partial; of none: that of an empty corpus."""
    finalize: Callable[[Partial], dict[str, Any]]
    """The last partial → figures for people."""


def count_run(
    results: pa.Table, failures: pa.Table, answers: pa.Table, answer_kind: str
) -> Partial:
    """Count a partition: its outcome, and what each agent contributed and spent.

    Args:
        results: record_id and `RESULT_FIELDS`, as `merge_answers` returns them.
        failures: `FAILURES`.
        answers: `ANSWERS`; repeated rows of retries count once.
        answer_kind: of `ANSWER_KINDS`.
    """
    answers = deduplicate(answers)
    return {
        "records": results.num_rows + failures.num_rows,
        "results": results.num_rows,
        "failures": failures.num_rows,
        "failures_by_reason": dict(sorted(Counter(failures["reason"].to_pylist()).items())),
        "ties": _num_true(results["tie"]),
        "abstained": _num_true(results["abstain"]),
        "cut": _num_true(pc.equal(results["finish_reason"], "length")),
        "split": _num_true(pc.greater(results["num_parts"], 1)),
        "confidence_histogram": _histogram(results),
        "labels": _count_labels(results, answers) if answer_kind == "label" else {},
        "agents": _count_agents(results, answers, answer_kind),
    }


def add_up(partials: Sequence[Partial]) -> Partial:
    """Add partials up, entry by entry; a missing entry is 0, and of none there is none."""
    return reduce(_add, partials, {})


def add_counts(partials: Sequence[Partial]) -> Partial:
    """Add up what `count_run` has counted; of none: all its entries, 0."""
    return add_up([_NOTHING, *partials])


def summarize_run(partial: Partial) -> dict[str, Any]:
    """Turn counts into figures; those of an agent become flat, with seconds and means."""
    agents = {agent_id: _summarize_agent(c) for agent_id, c in partial["agents"].items()}
    return {**{name: partial[name] for name in _NOTHING}, "agents": agents}


def _num_true(column: pa.ChunkedArray) -> int:
    return int(pc.sum(column).as_py() or 0)


def _histogram(results: pa.Table) -> list[int]:
    """Count confidences in equal bins over [0, 1]; standard errors are not on that scale."""
    bins = [0] * CONFIDENCE_BINS
    columns = (results[name].to_pylist() for name in ("confidence", "confidence_kind"))
    for confidence, kind in zip(*columns, strict=True):
        if confidence is not None and kind != STANDARD_ERROR:
            bins[min(int(confidence * CONFIDENCE_BINS), CONFIDENCE_BINS - 1)] += 1
    return bins


def _count_agents(
    results: pa.Table, answers: pa.Table, answer_kind: str
) -> dict[str, dict[str, int]]:
    kind = ANSWER_KINDS[answer_kind]
    merged = dict(zip(results["record_id"].to_pylist(), results["answer"].to_pylist(), strict=True))
    agents: dict[str, Counter[str]] = {}
    won: set[tuple[str, str]] = set()
    for row in answers.to_pylist():
        counts = agents.setdefault(row["agent_id"], Counter(dict.fromkeys(_AGENT_COUNTS, 0)))
        counts.update(_spent(row))
        if row["reason"] is not None:
            counts["failed_answers"] += 1
            continue
        counts["answers"] += 1
        counts["reused"] += row["reused_from"] is not None
        shown, published = kind.answer_of(row), merged.get(row["record_id"])
        if published is None:
            continue
        counts["agreements"] += normalise_text(shown) == normalise_text(published)
        if shown == published and (row["agent_id"], row["record_id"]) not in won:
            won.add((row["agent_id"], row["record_id"]))
            counts["wins"] += 1
    return {agent_id: dict(sorted(counts.items())) for agent_id, counts in sorted(agents.items())}


def _count_labels(results: pa.Table, answers: pa.Table) -> dict[str, Any]:
    """Count how often each label was published, and said by each agent."""
    said: dict[str, Counter[str]] = {}
    for row in answers.select(["agent_id", "label", "reason"]).to_pylist():
        counts = said.setdefault(row["agent_id"], Counter())
        if row["reason"] is None:
            counts[row["label"]] += 1
    published = Counter(results["answer"].to_pylist())
    return {
        "published": dict(sorted(published.items())),
        "agents": {agent: dict(sorted(counts.items())) for agent, counts in sorted(said.items())},
    }


_AGENT_COUNTS = (
    "answers",  # valid ones
    "failed_answers",  # those with a reason
    "reused",  # valid ones that an earlier run had: they took this one nothing
    "agreements",  # valid answers that say what was published, in normalised form
    "wins",  # records whose published answer is one of the agent's, word for word
    "prompt_tokens",
    "completion_tokens",
    "compute_us",  # microseconds: integers add up the same in any order
    "transfer_us",
    "processing_us",
)


def _spent(row: Mapping[str, Any]) -> dict[str, int]:
    """What an answer cost, valid or not; an unknown cost counts as 0, and an earlier run's."""
    if row["reused_from"] is not None:
        return {}
    tokens = {name: row[name] or 0 for name in ("prompt_tokens", "completion_tokens")}
    times = {
        f"{part}_us": round((row[f"t_{part}_s"] or 0.0) * 1e6)
        for part in ("compute", "transfer", "processing")
    }
    return {**tokens, **times}


def _add(left: Any, right: Any) -> Any:
    if left is None or right is None:
        return right if left is None else left
    if isinstance(left, dict):
        return {key: _add(left.get(key), right.get(key)) for key in sorted({*left, *right})}
    if isinstance(left, list):
        return [_add(a, b) for a, b in zip(left, right, strict=True)]
    return left + right


def _summarize_agent(counts: Mapping[str, int]) -> dict[str, Any]:
    """Means are per answer asked for, failed ones included; None where there was none."""
    answers = counts["answers"] + counts["failed_answers"]
    asked = answers - counts["reused"]
    seconds = {
        f"{part}_s": counts[f"{part}_us"] / 1e6 for part in ("compute", "transfer", "processing")
    }
    return {
        **{name: counts[name] for name in _AGENT_COUNTS if not name.endswith("_us")},
        **seconds,
        **{f"mean_{name}": _ratio(total, asked) for name, total in seconds.items()},
        "mean_prompt_tokens": _ratio(counts["prompt_tokens"], asked),
        "mean_completion_tokens": _ratio(counts["completion_tokens"], asked),
        "failed_fraction": _ratio(counts["failed_answers"], answers),
        "agreement": _ratio(counts["agreements"], counts["answers"]),
    }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


_NOTHING = count_run(
    pa.schema([pa.field("record_id", pa.string()), *RESULT_FIELDS]).empty_table(),
    FAILURES.empty_table(),
    ANSWERS.empty_table(),
    "text",
)

RUN_STATISTICS = Reduction("run_statistics", count_run, add_counts, summarize_run)
