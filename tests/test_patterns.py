from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mas_batch.aggregate.ballots import Ballot
from mas_batch.aggregate.normalise import deduplicate, normalise_text
from mas_batch.aggregate.patterns import (
    MISSING,
    add_patterns,
    candidates_of,
    count_answers,
    parse_patterns,
    pattern_of,
)
from mas_batch.errors import Reason, RunError
from mas_batch.records import ANSWERS

AGENTS = ("a", "b", "c")
LABELS = ("no", "yes", "maybe")


def count_patterns(
    replies: Mapping[str, Sequence[Ballot]], agents: Sequence[str], labels: Sequence[str] | None
) -> dict[str, int]:
    """Count record by record: what `count_answers` must come to."""
    return dict(Counter(pattern_of(each, agents, labels) for each in replies.values() if each))


def ballot(agent: str, key: str, sample: int = 0) -> Ballot:
    return Ballot(agent, agent, sample, key, key)


def row(record: str, agent: str, label: str | None, sample: int = 0, attempt: int = 1) -> Any:
    return {
        "record_id": record,
        "agent_id": agent,
        "family_id": agent,
        "sample_id": sample,
        "attempt": attempt,
        "text": label,
        "label": label,
        "reason": None if label is not None else Reason.UNPARSABLE_ANSWER,
    }


def table(rows: Sequence[Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=ANSWERS)


def replies(rows: Sequence[Any]) -> dict[str, list[Ballot]]:
    """Group deduplicated rows by record, failed answers left out."""
    found: dict[str, list[Ballot]] = {r["record_id"]: [] for r in rows}
    for r in deduplicate(table(rows)).to_pylist():
        if r["reason"] is None:
            found[r["record_id"]].append(ballot(r["agent_id"], r["label"], r["sample_id"]))
    return found


ROWS = st.lists(
    st.builds(
        row,
        record=st.sampled_from("rstuv"),
        agent=st.sampled_from(AGENTS),
        label=st.sampled_from([*LABELS, None]),
        sample=st.integers(0, 2),
        attempt=st.integers(1, 2),
    ),
    max_size=20,
)


def test_closed_pattern_by_hand() -> None:
    ballots = [ballot("c", "no"), ballot("a", "maybe", 1), ballot("a", "no", 0)]
    assert pattern_of(ballots, ["c", "b", "a"], LABELS) == "0,2;;0"
    assert candidates_of(ballots, LABELS) == LABELS


def test_open_pattern_numbers_answers_as_they_first_appear() -> None:
    ballots = [ballot("c", "x"), ballot("b", "y", 1), ballot("b", "z", 0), ballot("a", "x")]
    assert pattern_of(ballots, AGENTS, None) == "0;1,2;0"
    assert candidates_of(ballots, None) == ("x", "z", "y")


def test_samples_of_a_closed_set_have_no_order() -> None:
    given = [ballot("a", label, sample) for sample, label in enumerate(["yes", "no", "yes"])]
    other = [ballot("a", label, sample) for sample, label in enumerate(["yes", "yes", "no"])]
    assert pattern_of(given, ["a"], LABELS) == pattern_of(other, ["a"], LABELS) == "0,1,1"


@pytest.mark.parametrize("labels", [LABELS, None])
@given(rows=ROWS, data=st.data())
def test_arrow_and_python_count_the_same_in_any_order(
    labels: Sequence[str] | None, rows: list[Any], data: st.DataObject
) -> None:
    expected = count_patterns(replies(rows), AGENTS, labels)
    shuffled = data.draw(st.permutations(rows))
    answers = deduplicate(table([*shuffled, *rows]))
    assert count_answers(answers, data.draw(st.permutations(AGENTS)), labels) == expected
    backwards = answers.take(pa.array(range(answers.num_rows - 1, -1, -1), pa.int64()))
    assert count_answers(backwards, AGENTS, labels) == expected


@pytest.mark.parametrize("labels", [LABELS, None])
@given(rows=ROWS, data=st.data())
def test_counts_do_not_depend_on_partitions_or_grouping(
    labels: Sequence[str] | None, rows: list[Any], data: st.DataObject
) -> None:
    parts: dict[int, list[Any]] = {0: [], 1: [], 2: []}
    place = {record: data.draw(st.integers(0, 2)) for record in "rstuv"}
    for each in rows:
        parts[place[each["record_id"]]].append(each)
    a, b, c = (count_answers(deduplicate(table(p)), AGENTS, labels) for p in parts.values())
    whole = count_answers(deduplicate(table(rows)), AGENTS, labels)
    trees = [
        add_patterns([a, b, c]),
        add_patterns([add_patterns([c, b]), a]),
        add_patterns([c, add_patterns([]), add_patterns([a, b])]),
    ]
    assert [list(tree.items()) for tree in trees] == [list(whole.items())] * 3


@given(rows=ROWS)
def test_every_answered_record_is_counted_once(rows: list[Any]) -> None:
    answered = [ballots for ballots in replies(rows).values() if ballots]
    counts = count_patterns(replies(rows), AGENTS, LABELS)
    assert sum(counts.values()) == len(answered)
    parsed = parse_patterns(counts, len(AGENTS), len(LABELS))
    assert parsed.num_records == len(answered)
    expected = [sum(b.agent_id == agent for bs in answered for b in bs) for agent in AGENTS]
    assert parsed.count_answers(len(AGENTS)).tolist() == expected


def test_what_python_code_makes_equal_agrees() -> None:
    answers = table([row("r", "a", "Paris."), row("r", "b", "paris"), row("r", "c", "Rome")])
    assert count_answers(answers, AGENTS, None, "text", normalise_text) == {"0;0;1": 1}
    assert count_answers(answers, AGENTS, None, "text") == {"0;1;2": 1}


def test_many_agents_do_not_overflow() -> None:
    agents = [f"a{number:02}" for number in range(80)]
    rng = np.random.default_rng(0)
    rows = [row(f"r{n}", agent, LABELS[rng.integers(3)]) for n in range(6) for agent in agents]
    rows += [{**each, "record_id": "like r0"} for each in rows[: len(agents)]]
    counted = count_answers(table(rows), agents, LABELS)
    assert counted == count_patterns(replies(rows), agents, LABELS)
    assert sorted(counted.values()) == [1, 1, 1, 1, 1, 2]


def test_parsed_patterns_by_hand() -> None:
    parsed = parse_patterns({"1;;0,2": 3, "0;1;": 4}, 3, 3)
    assert parsed.patterns == ("0;1;", "1;;0,2")
    assert parsed.agent_of.tolist() == [0, 1, 2, 2]
    assert parsed.codes.tolist() == [[0, 1, MISSING, MISSING], [1, MISSING, 0, 2]]
    assert parsed.counts.tolist() == [4, 3]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("0;1", 1), ("0;1;3", 1), ("0;1;-1", 1), ("0;1;x", 1), ("0;1;1", 0), (";;", 1)],
)
def test_patterns_of_something_else_are_refused(pattern: str, count: int) -> None:
    with pytest.raises(
        ValueError, match=f"pattern '{pattern}' with count {count} is not of 3 agents"
    ):
        parse_patterns({pattern: count}, 3, 3)


def test_unknown_agents_and_labels_are_named() -> None:
    with pytest.raises(RunError, match="answers: label 'nope' is unknown; allowed: 'no', "):
        pattern_of([ballot("a", "nope")], AGENTS, LABELS)
    with pytest.raises(RunError, match="label 'nope' is unknown"):
        count_answers(table([row("r", "a", "nope")]), AGENTS, LABELS)
    with pytest.raises(RunError, match="agent 'z' is unknown; allowed: 'a', 'b', 'c'"):
        count_answers(table([row("r", "z", "no")]), AGENTS, LABELS)
    with pytest.raises(RunError, match="agent 'z' is unknown"):
        pattern_of([ballot("z", "no")], AGENTS, LABELS)
    with pytest.raises(RunError, match="a row without a reason has no answer"):
        count_answers(table([{**row("r", "a", None), "reason": None}]), AGENTS, LABELS)
