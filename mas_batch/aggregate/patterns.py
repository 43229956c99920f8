"""Who agreed with whom, record by record: patterns of answers, counted in integers.

A record's *pattern* says what each agent answered, and no more. It is a string with one field
per agent, agents sorted by name and fields separated by ";". A field holds the codes of the
agent's answers separated by ",", and is empty for an agent without a valid answer:
"0;0,0,2;;1" is four agents, of which the second gave three samples and the third none.

- Closed set (`labels` given): a code is the label's position in `labels`. The samples of an
  agent have no order: their codes are sorted.
- Open set (`labels` is None): only which answers agree is kept. Codes number the distinct
  answers in order of first appearance, over agents by name and samples by number.

Records with equal patterns are alike to a method that learns from agreement, so a corpus is summed
up by how often each pattern occurs. Such counts add up in any order and grouping. A record
without a valid answer has no pattern and is not counted.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mas_batch.aggregate.ballots import Ballot
from mas_batch.errors import RunError

MISSING = -1
"""In arrays of codes: no answer."""

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Codes = npt.NDArray[np.int32]

_MAX_KEY = 2**62


@dataclass(frozen=True, slots=True, eq=False)
class PatternTable:
    """Counted patterns as arrays: P patterns in string order, S slots.

    A slot is one answer that an agent may give: an agent with up to three samples has three.
    """

    patterns: tuple[str, ...]
    counts: Floats
    """[P], records with the pattern; exact below 2^53."""
    codes: Codes
    """[P, S], `MISSING` where the slot is empty."""
    agent_of: Integers
    """[S], position of the slot's agent in the sorted agents; ascending."""

    @property
    def num_records(self) -> int:
        """Records with at least one valid answer."""
        return int(self.counts.sum())

    def sums_by_code(self, values: Floats, num_codes: int | None = None) -> Floats:
        """Add the slots' values up by their code; [P, S] → [P, C], C by default all there are."""
        if num_codes is None:
            num_codes = int(self.codes.max(initial=MISSING)) + 1
        sums = np.zeros((len(values), num_codes + 1))  # column 0: no answer
        rows = np.arange(len(values))
        for slot in range(values.shape[1]):
            sums[rows, self.codes[:, slot] + 1] += values[:, slot]
        return sums[:, 1:]

    def count_answers(self, num_agents: int) -> Integers:
        """Return the number of valid answers of each agent, all samples counted; [A]."""
        per_slot = self.counts @ (self.codes != MISSING)
        return np.bincount(self.agent_of, per_slot, num_agents).astype(np.int64)


def candidates_of(ballots: Iterable[Ballot], labels: Sequence[str] | None) -> tuple[str, ...]:
    """Return the keys that the codes of the ballots' pattern stand for; code i is the i-th."""
    if labels is not None:
        return tuple(labels)
    ordered = sorted(ballots, key=lambda ballot: ballot.order)
    return tuple(dict.fromkeys(ballot.key for ballot in ordered))


def pattern_of(
    ballots: Sequence[Ballot], agents: Sequence[str], labels: Sequence[str] | None
) -> str:
    """Return the pattern of one record's ballots, at most one per agent and sample.

    Raises:
        RunError: a ballot is of an unknown agent or of none of the labels.
    """
    codes = {key: code for code, key in enumerate(candidates_of(ballots, labels))}
    fields: dict[str, list[int]] = {agent: [] for agent in sorted(agents)}
    for ballot in sorted(ballots, key=lambda ballot: ballot.order):
        if ballot.agent_id not in fields:
            raise _unknown("agent", ballot.agent_id, agents)
        if ballot.key not in codes:
            raise _unknown("label", ballot.key, codes)
        fields[ballot.agent_id].append(codes[ballot.key])
    if labels is not None:
        fields = {agent: sorted(given) for agent, given in fields.items()}
    return ";".join(",".join(map(str, given)) for given in fields.values())


def count_answers(
    answers: pa.Table,
    agents: Sequence[str],
    labels: Sequence[str] | None,
    column: str = "label",
    key_of: Callable[[Any], str] = str,
) -> dict[str, int]:
    """Count the patterns of an answers table (`pattern_of`), without a loop over its records.

    Python code runs once per distinct answer and once per distinct pattern.

    Args:
        answers: deduplicated `ANSWERS`, rows in any order; those with a reason are skipped.
        column: what is compared: `label`, `text` or `value`.
        key_of: answers agree when their keys are equal.

    Raises:
        RunError: an answer is empty, of an unknown agent, or of none of the labels.
    """
    used = answers.select(["record_id", "agent_id", "sample_id", column, "reason"])
    valid = used.filter(pc.is_null(used["reason"])) if _has_reasons(used) else used
    names = sorted(agents)
    agent, agent_names = _factorize(valid["agent_id"])
    agent = _positions(agent_names.to_pylist(), names, "agent")[agent]
    answer, distinct = _factorize(valid[column])
    keys = [key_of(value) for value in distinct.to_pylist()]
    choices = labels if labels is not None else list(dict.fromkeys(keys))
    codes = _positions(keys, choices, "label")[answer]
    record, record_ids = _factorize(valid["record_id"])
    order = codes if labels is not None else valid["sample_id"].to_numpy()
    slots, agent_of = _slots(record * len(names) + agent, order, codes, len(record_ids), len(names))
    rows, counts = _distinct_rows(slots if labels is not None else _renumber(slots))
    bounds = np.searchsorted(agent_of, np.arange(len(names) + 1)).tolist()
    patterns = [_written(row, bounds) for row in rows.tolist()]
    return dict(sorted(zip(patterns, counts.tolist(), strict=True)))


def add_patterns(partials: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Add counts up; associative and commutative, to the byte."""
    total: Counter[str] = Counter()
    for partial in partials:
        total.update(partial)
    return dict(sorted(total.items()))


def parse_patterns(
    patterns: Mapping[str, int], num_agents: int, num_labels: int | None
) -> PatternTable:
    """Turn counted patterns into arrays.

    Raises:
        ValueError: a pattern is not of so many agents or labels, or its count is below 1.
    """
    ordered = sorted(patterns)
    parsed = [_parse(pattern, patterns[pattern], num_agents, num_labels) for pattern in ordered]
    widths = [max((len(row[agent]) for row in parsed), default=0) for agent in range(num_agents)]
    agent_of = np.repeat(np.arange(num_agents), widths)
    padded = [
        [*given, *[MISSING] * (width - len(given))]
        for row in parsed
        for given, width in zip(row, widths, strict=True)
    ]
    flat = [code for given in padded for code in given]
    return PatternTable(
        tuple(ordered),
        np.array([patterns[pattern] for pattern in ordered], dtype=np.float64),
        np.array(flat, dtype=np.int32).reshape(len(ordered), len(agent_of)),
        agent_of,
    )


def _parse(pattern: str, count: int, num_agents: int, num_labels: int | None) -> list[list[int]]:
    try:
        fields = [[int(code) for code in f.split(",")] if f else [] for f in pattern.split(";")]
    except ValueError:
        fields = []
    num_answers = sum(map(len, fields))
    limit = num_labels if num_labels is not None else num_answers
    in_range = all(0 <= code < limit for field in fields for code in field)
    if len(fields) != num_agents or not num_answers or not in_range or count < 1:
        what = "an open set" if num_labels is None else f"{num_labels} labels"
        raise ValueError(
            f"pattern {pattern!r} with count {count} is not of {num_agents} agents and {what}; "
            "allowed: one field per agent, at least one code, codes below the number of labels, "
            "counts from 1"
        )
    return fields


def _unknown(what: str, value: str, allowed: Iterable[str]) -> RunError:
    known = ", ".join(map(repr, allowed)) or "none"
    return RunError(f"answers: {what} {value!r} is unknown; allowed: {known}")


def _has_reasons(answers: pa.Table) -> bool:
    return bool(answers["reason"].null_count < answers.num_rows)


def _factorize(column: pa.ChunkedArray) -> tuple[Integers, pa.Array]:
    """Number the distinct values: (number of each row, values by number).

    Raises:
        RunError: a value is null.
    """
    if column.null_count:
        raise RunError("answers: a row without a reason has no answer; allowed: one of the two")
    encoded = column.combine_chunks().dictionary_encode()
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary


def _positions(values: Sequence[Hashable], allowed: Sequence[str], what: str) -> Integers:
    """Return the place of each value among the allowed ones."""
    place = {value: position for position, value in enumerate(allowed)}
    for value in values:
        if value not in place:
            raise _unknown(what, str(value), allowed)
    return np.array([place[str(value)] for value in values], dtype=np.int64)


def _slots(
    group: Integers,
    order: npt.NDArray[np.integer[Any]],
    codes: Integers,
    num_records: int,
    num_agents: int,
) -> tuple[Codes, Integers]:
    """Lay the answers out: ([R, S] codes, [S] agent of each slot).

    Args:
        group: per answer, record * num_agents + agent.
        order: per answer, its order among those of the group.
    """
    sizes = np.bincount(group, minlength=num_records * num_agents)
    position: Integers | int = 0
    if sizes.max(initial=0) > 1:
        sorting = np.lexsort((order, group))
        group, codes = group[sorting], codes[sorting]
        position = np.arange(len(group)) - (np.cumsum(sizes) - sizes)[group]
    widths = sizes.reshape(num_records, num_agents).max(axis=0, initial=0)
    first = np.cumsum(widths) - widths
    slots = np.full((num_records, int(widths.sum())), MISSING, dtype=np.int32)
    slots[group // num_agents, first[group % num_agents] + position] = codes
    return slots, np.repeat(np.arange(num_agents), widths)


def _renumber(slots: Codes) -> Codes:
    """Number each row's distinct codes in order of first appearance."""
    num_slots = slots.shape[1]
    first = np.tile(np.arange(num_slots), (len(slots), 1))
    for late in range(num_slots - 1, -1, -1):  # downwards: the earliest equal one stays
        for early in range(late - 1, -1, -1):
            same = slots[:, late] == slots[:, early]
            first[same, late] = early
    present = slots != MISSING
    is_new = present & (first == np.arange(num_slots))
    numbers = np.take_along_axis(np.cumsum(is_new, axis=1) - 1, first, axis=1)
    return np.where(present, numbers, MISSING).astype(np.int32)


def _distinct_rows(rows: Codes) -> tuple[Codes, Integers]:
    """Return the distinct rows and how often each occurs.

    A row becomes one integer, a digit per column; where those would overflow, the integers so
    far are numbered anew from 0.
    """
    keys, size = np.zeros(len(rows), dtype=np.int64), 1
    for column in rows.T:
        base = int(column.max(initial=MISSING)) + 2
        if size * base > _MAX_KEY:
            distinct, keys = np.unique(keys, return_inverse=True)
            size = len(distinct)
        keys = keys * base + (column + 1)
        size *= base
    _, index, counts = np.unique(keys, return_index=True, return_counts=True)
    return rows[index], counts


def _written(row: Sequence[int], bounds: Sequence[int]) -> str:
    fields = (row[start:stop] for start, stop in itertools.pairwise(bounds))
    return ";".join(",".join(str(code) for code in f if code != MISSING) for f in fields)
