from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mas_batch.aggregate.merge import merge_answers
from mas_batch.aggregate.method import MergeSpec
from mas_batch.aggregate.stopping import StoppingRule, check_rule, undecided
from mas_batch.errors import JobError, Reason, RunError
from mas_batch.records import ANSWERS, RECORD_FIELDS

LABELS = "xyz"
FAILED = "-"  # a failed answer, where answers are written as a word: one letter each
CERTAIN = StoppingRule(confidence=None, max_answers=5)


def spec(method: str = "vote", kind: str = "label", **changes: Any) -> MergeSpec:
    defaults: dict[str, Any] = {
        "utility": "chrf" if method == "mbr" else None,
        "accuracies": {},
        "weights": "log-odds",
        "abstain_below": 0.0,
        "num_labels": None,
    }
    return MergeSpec(method=method, answer_kind=kind, **{**defaults, **changes})


def records(*ids: str, reasons: Mapping[str, Reason] | None = None) -> pa.Table:
    broken = reasons or {}
    rows = [{"record_id": i, "text": i, "reason": broken.get(i), "message": ""} for i in ids]
    return pa.Table.from_pylist(rows, pa.schema(RECORD_FIELDS))


def rows(record: str, given: Sequence[str], kind: str = "label") -> list[dict[str, Any]]:
    """One row per answer: agent a0 gave the first one, a1 the second."""
    return [
        {
            "record_id": record,
            "agent_id": f"a{number}",
            "family_id": f"family{number % 2}",
            "sample_id": 0,
            "attempt": 1,
            "text": None if answer == FAILED else answer,
            kind: None if answer == FAILED else answer,
            "reason": Reason.EMPTY_ANSWER if answer == FAILED else None,
        }
        for number, answer in enumerate(given)
    ]


def table(*groups: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist([row for group in groups for row in group], schema=ANSWERS)


def is_decided(given: Sequence[str], how: MergeSpec, rule: StoppingRule) -> bool:
    answers = table(rows("r", given, how.answer_kind))
    return undecided(records("r"), answers, how, rule) == []


def outcomes(all_given: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Vote about each list of answers; one with a valid answer at least."""
    ids = [f"r{number}" for number in range(len(all_given))]
    groups = [rows(i, given) for i, given in zip(ids, all_given, strict=True)]
    results, _ = merge_answers(records(*ids), table(*groups), spec())
    return list(results.to_pylist())


@pytest.mark.parametrize(
    ("given", "decided"),
    [
        ("", False),
        ("x", False),
        ("xx", False),  # a lead of 2 and 3 to come
        ("xxx", True),  # 3, and 2 to come
        ("xxy", False),
        ("xxyx", True),  # 2, and 1 to come
        ("xxyy", False),
        ("xxyz", False),  # 1 and 1: the last answer could draw level, and the tie rule turn it
        ("xx-", False),  # a failed answer uses up its agent: a lead of 2 and 2 to come
        ("xx--", True),
        ("----", False),  # the last one may still answer
        ("-----", True),  # nobody is left to ask
        ("xyxyz", True),
    ],
)
def test_vote_is_decided_when_the_lead_is_more_than_what_may_come(
    given: str, decided: bool
) -> None:
    assert is_decided(given, spec(), CERTAIN) is decided


@given(st.text(alphabet=LABELS + FAILED, max_size=4), st.integers(1, 5))
def test_vote_is_decided_exactly_when_no_completion_changes_or_ties_it(
    given: str, max_answers: int
) -> None:
    """Brute force over all that may come: labels seen and unseen, and failures."""
    assume(len(given) < max_answers and set(given) - {FAILED})
    [now] = outcomes([given])
    num_open = max_answers - len(given)
    tails = itertools.product(LABELS + FAILED, repeat=num_open)
    later = outcomes([[*given, *tail] for tail in tails])
    settled = all(each["answer"] == now["answer"] and not each["tie"] for each in later)
    assert is_decided(given, spec(), StoppingRule(None, max_answers)) is settled


@given(st.text(alphabet=LABELS + FAILED, min_size=5, max_size=5))
def test_a_decided_vote_stays_decided_when_more_answers_come(given: str) -> None:
    decided = [is_decided(given[:number], spec(), CERTAIN) for number in range(6)]
    assert decided == sorted(decided)
    assert decided[-1]


UNLIKE = {f"a{number}": 0.9 - number / 10 for number in range(5)}
METHODS = [
    (spec(), CERTAIN),
    (spec("vote", "text"), StoppingRule(0.7, 5)),
    (spec("mbr", "text"), StoppingRule(0.8, 5)),
    (spec("weighted", accuracies=UNLIKE, num_labels=3), StoppingRule(0.9, 5)),
    (spec("weighted", accuracies=UNLIKE), StoppingRule(0.9, 5)),
    (spec("weighted", accuracies=UNLIKE, weights="linear"), StoppingRule(0.7, 5)),
]


@pytest.mark.parametrize(("how", "rule"), METHODS)
@given(given=st.lists(st.text(alphabet=LABELS + FAILED, max_size=5), max_size=4), data=st.data())
def test_order_and_repeats_of_rows_do_not_matter(
    how: MergeSpec, rule: StoppingRule, given: list[str], data: st.DataObject
) -> None:
    ids = [f"r{number}" for number in range(len(given))]
    groups = [rows(i, word, how.answer_kind) for i, word in zip(ids, given, strict=True)]
    in_order = [row for group in groups for row in group]
    retries = [{**row, "attempt": 2} for row in in_order]
    shuffled = data.draw(st.permutations([*in_order, *retries]))
    expected = [i for i, word in zip(ids, given, strict=True) if not is_decided(word, how, rule)]
    assert undecided(records(*ids), table(shuffled), how, rule) == expected


def test_ids_come_in_record_order_without_those_that_cannot_be_asked_about() -> None:
    staged = records("r3", "r1", "r2", "r0", reasons={"r1": Reason.EMPTY})
    answers = table(rows("r2", "xy"), rows("r0", "xxx"))
    assert undecided(staged, answers, spec(), CERTAIN) == ["r3", "r2"]


def test_samples_count_as_answers() -> None:
    samples = [{**row, "agent_id": "a", "sample_id": n} for n, row in enumerate(rows("r", "xxx"))]
    assert undecided(records("r"), table(samples), spec(), CERTAIN) == []
    assert undecided(records("r"), table(samples[:2]), spec(), CERTAIN) == ["r"]


@pytest.mark.parametrize(
    ("given", "confidence", "decided"),
    [
        ("x", 0.1, False),  # one answer agrees with itself
        ("x-", 0.1, False),
        ("xx", 1.0, True),
        ("xxy", 0.66, True),
        ("xxy", 0.67, False),
        ("xy", 0.5, False),  # half of the answers, and so has the other
        ("xyz", 0.3, False),
        ("xxyz", 0.5, True),
        ("xyzxy", 1.0, True),  # exhausted
    ],
)
@pytest.mark.parametrize("method", ["vote", "weighted"])
def test_a_share_decides_from_two_answers_on(
    method: str, given: str, confidence: float, decided: bool
) -> None:
    equal = {f"a{number}": 0.8 for number in range(5)}
    how = spec(method, accuracies=equal, weights="linear")
    assert is_decided(given, how, StoppingRule(confidence, 5)) is decided


@pytest.mark.parametrize(
    ("given", "confidence", "decided"),
    [
        (["a plain text"], 0.1, False),
        (["a plain text", "a plain text"], 1.0, True),
        # Apart from its own, a text has no support: half of the utility is its own.
        (["aaaa", "bbbb"], 0.5, True),  # two texts always tie
        (["aaaa", "bbbb"], 0.51, False),
        (["aaaa", "bbbb", "aaaa"], 0.66, True),
        (["aaaa", "bbbb", "aaaa"], 0.67, False),
    ],
)
def test_expected_utility_decides_from_two_answers_on(
    given: list[str], confidence: float, decided: bool
) -> None:
    assert is_decided(given, spec("mbr", "text"), StoppingRule(confidence, 5)) is decided


def posterior(given: str, accuracies: Sequence[float], labels: str) -> dict[str, float]:
    """Enumerate the truths: all labels equally likely, errors even over the wrong ones."""
    joint = {}
    for truth in labels:
        chances = (
            p if answer == truth else (1 - p) / (len(labels) - 1)
            for answer, p in zip(given, accuracies, strict=True)
            if answer != FAILED
        )
        joint[truth] = math.prod(chances) / len(labels)
    total = sum(joint.values())
    return {truth: chance / total for truth, chance in joint.items()}


@given(
    votes=st.lists(
        st.tuples(st.sampled_from("vwxyz" + FAILED), st.floats(0.05, 0.95)), min_size=1, max_size=4
    ),
    num_labels=st.integers(2, 5),
)
def test_log_odds_decide_by_the_posterior_over_all_labels(
    votes: list[tuple[str, float]], num_labels: int
) -> None:
    labels = "zyxwv"[:num_labels]
    given = "".join(answer for answer, _ in votes)
    assume(set(given) <= set(labels + FAILED) and set(given) - {FAILED})
    chances = posterior(given, [accuracy for _, accuracy in votes], labels)
    first, *others = sorted((chances[label] for label in set(given) - {FAILED}), reverse=True)
    assume(all(first - other > 1e-6 for other in others) and 1e-5 < first < 1 - 1e-5)
    named = {f"a{number}": accuracy for number, (_, accuracy) in enumerate(votes)}
    how = spec("weighted", accuracies=named, num_labels=num_labels)
    assert is_decided(given, how, StoppingRule(first - 1e-6, 5))
    assert not is_decided(given, how, StoppingRule(first + 1e-6, 5))


@pytest.mark.parametrize("num_labels", [2, 3, 4, 7, 100, None])
@pytest.mark.parametrize("accuracy", [0.1, 0.6, 0.9, 0.99, 1.0])
def test_one_answer_is_as_sure_as_its_agent(accuracy: float, num_labels: int | None) -> None:
    """No accuracy is over .99, and the answers of an open set have one unseen alternative."""
    how = spec("weighted", accuracies={"a0": accuracy}, num_labels=num_labels)
    assert is_decided("x", how, StoppingRule(min(accuracy, 0.99), 5))
    assert not is_decided("x", how, StoppingRule(min(accuracy, 0.99) + 1e-3, 5))


def test_equal_posteriors_are_not_decided() -> None:
    how = spec("weighted", accuracies={"a0": 0.8, "a1": 0.8}, num_labels=2)
    assert not is_decided("xy", how, StoppingRule(0.5, 5))


@pytest.mark.parametrize(("accuracy", "decided"), [(0.01, False), (0.99, True)])
def test_many_answers_do_not_overflow(accuracy: float, decided: bool) -> None:
    named = {f"a{number}": accuracy for number in range(400)}
    how = spec("weighted", accuracies=named, num_labels=2)
    assert is_decided("x" * 400, how, StoppingRule(0.5, 500)) is decided


@pytest.mark.parametrize(
    ("method", "kind", "confidence", "key", "words"),
    [
        ("mean", "value", 0.9, "routing.adaptive", "allowed with merge.method: vote, weighted"),
        ("weighted", "label", None, "routing.adaptive.confidence", "'weighted' needs one"),
        ("mbr", "text", None, "routing.adaptive.confidence", "'mbr' needs one"),
    ],
)
def test_rules_that_a_method_cannot_follow_are_refused(
    method: str, kind: str, confidence: float | None, key: str, words: str
) -> None:
    how, rule = spec(method, kind), StoppingRule(confidence, 5)
    with pytest.raises(JobError, match=words) as refused:
        check_rule(how, rule)
    assert refused.value.key == key
    with pytest.raises(JobError, match=words):
        undecided(records("r"), table(), how, rule)


@pytest.mark.parametrize(
    ("confidence", "max_answers", "key"),
    [
        (0.0, 5, "routing.adaptive.confidence"),
        (1.01, 5, "routing.adaptive.confidence"),
        (math.nan, 5, "routing.adaptive.confidence"),
        (None, 0, "routing.answers_per_record"),
    ],
)
def test_values_out_of_range_are_refused(
    confidence: float | None, max_answers: int, key: str
) -> None:
    with pytest.raises(JobError, match="is not allowed; allowed: ") as refused:
        StoppingRule(confidence, max_answers)
    assert refused.value.key == key


def test_an_agent_without_an_accuracy_is_refused() -> None:
    how = spec("weighted", accuracies={"a0": 0.9})
    with pytest.raises(JobError, match="'a1' has none"):
        is_decided("xx", how, StoppingRule(0.9, 5))


def test_answers_of_a_record_of_another_partition_are_refused() -> None:
    with pytest.raises(RunError, match="'elsewhere'"):
        undecided(records("r"), table(rows("elsewhere", "x")), spec(), CERTAIN)


@pytest.mark.parametrize(
    ("method", "kind", "why", "others"),
    [
        ("mean", "value", "its confidence is a standard error", "vote, weighted"),
        ("best", "label", "its confidence is of one model's text", "vote, mean, weighted"),
        ("rover", "text", "its text is made of all answers word by word", "vote, weighted, mbr"),
        ("reliability", "label", "it learns from all answers", "vote, mean, weighted"),
    ],
)
def test_why_a_method_cannot_stop_early_is_true_of_that_method(
    method: str, kind: str, why: str, others: str
) -> None:
    with pytest.raises(JobError, match=f"'{method}' cannot stop early: {why}.*{others}"):
        check_rule(spec(method, kind), StoppingRule(0.9, 5))
