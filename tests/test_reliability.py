from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mas_batch.aggregate import open_set
from mas_batch.aggregate.ballots import Ballot
from mas_batch.aggregate.families import exponents
from mas_batch.aggregate.intervals import wilson_interval
from mas_batch.aggregate.learning import learn
from mas_batch.aggregate.open_set import OpenSetModel
from mas_batch.aggregate.patterns import add_patterns, parse_patterns, pattern_of
from mas_batch.aggregate.reliability import (
    AgentHistory,
    History,
    Reliability,
    posterior,
    posteriors,
)
from tests.simulated_answers import (
    Simulation,
    copied,
    directed_errors,
    even_errors,
    free_answers,
    independent,
    with_missing,
)

MIXED = (0.90, 0.75, 0.65, 0.60, 0.50)
CLONES = (0.60, 0.60, 0.60, 0.85, 0.80)
LABELS = tuple("wxyz")


def learn_from(
    simulation: Simulation,
    families: Sequence[str] | None = None,
    prior: History | None = None,
) -> Reliability:
    names = simulation.agents
    family_of = dict(zip(names, families or names, strict=True))
    return learn(simulation.patterns()[0], names, family_of, LABELS, prior)


def open_patterns(simulation: Simulation) -> list[str]:
    """Return the pattern of each record, its answers taken as free texts."""
    return [
        pattern_of(
            [Ballot(a, a, 0, str(x), str(x)) for a, x in enumerate_agents(row)], "abcde", None
        )
        for row in simulation.answers
    ]


def enumerate_agents(row: Any) -> list[tuple[str, int]]:
    return list(zip("abcde", row.tolist(), strict=False))


def learn_open(given: Sequence[str], families: Mapping[str, str] | None = None) -> Reliability:
    return learn(Counter(given), "abcde", families or {a: a for a in "abcde"}, None)


def error_of(reliability: Reliability, accuracies: Sequence[float]) -> float:
    found = [agent.accuracy or 0.0 for agent in reliability.agents.values()]
    return max(abs(p - q) for p, q in zip(found, accuracies, strict=True))


def test_accuracies_and_confusions_are_found() -> None:
    confusion = directed_errors(MIXED, (1, 2, 3, 1, 2), 0.8)
    reliability = learn_from(independent(confusion, 4000, 0))
    assert reliability.method == "dawid-skene"
    assert reliability.num_records == 4000
    assert error_of(reliability, MIXED) < 0.03
    assert reliability.accuracies == {n: a.accuracy for n, a in reliability.agents.items()}
    found = np.array([agent.confusion for agent in reliability.agents.values()])
    assert np.abs(found - confusion).max() < 0.06
    assert found.sum(axis=2) == pytest.approx(np.ones((5, 4)))
    weights = [agent.weight for agent in reliability.agents.values()]
    assert weights == pytest.approx([math.log(3 * p / (1 - p)) for p in MIXED], abs=0.25)
    assert reliability.why == "4000 records, one confusion matrix per agent."


def test_few_records_show_accuracies_too() -> None:
    assert error_of(learn_from(independent(even_errors(MIXED), 299, 0)), MIXED) < 0.08


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    held = []
    for seed in range(20):
        simulation = with_missing(independent(even_errors(MIXED), 1000, seed), 0.2, seed)
        agents = learn_from(simulation).agents.values()
        for agent, p in zip(agents, MIXED, strict=True):
            assert agent.interval is not None
            held.append(agent.interval[0] <= p <= agent.interval[1])
    assert 0.88 <= np.mean(held) <= 0.99


def test_wilson_by_hand() -> None:
    # Wilson's interval for 8 of 10, as every textbook has it.
    assert wilson_interval(0.8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson_interval(0.5, 0) == (0.0, 1.0)
    assert wilson_interval(1.0, 100)[1] == 1.0


@given(data=st.data())
@settings(max_examples=settings.default.max_examples // 6)
def test_the_same_bytes_however_the_counts_were_added(data: st.DataObject) -> None:
    simulation = with_missing(independent(even_errors(MIXED), 310, 1), 0.3, 1)
    _, given_patterns = simulation.patterns()
    places = np.random.default_rng(data.draw(st.integers(0, 2**32))).integers(
        5, size=len(given_patterns)
    )
    partials = [
        Counter(
            pattern for pattern, place in zip(given_patterns, places, strict=True) if place == each
        )
        for each in range(5)
    ]
    names = simulation.agents
    family_of = dict(zip(names, "mmnop", strict=True))
    trees = [
        add_patterns(partials),
        Counter(dict(reversed(add_patterns(data.draw(st.permutations(partials))).items()))),
    ]
    first, second = (
        learn(tree, order, family_of, LABELS).to_json()
        for tree, order in zip(trees, (names, names[::-1]), strict=True)
    )
    assert first == second


@pytest.mark.parametrize("labels", [LABELS, None])
def test_json_keeps_everything(labels: Sequence[str] | None) -> None:
    found, _ = independent(even_errors(MIXED), 500, 0).patterns()
    if labels is None:
        found = Counter(open_patterns(free_answers(MIXED, 20, 500, 0)))
        reliability = learn_open(list(found.elements()))
    else:
        reliability = learn_from(independent(even_errors(MIXED), 500, 0))
    again = Reliability.from_json(reliability.to_json())
    assert again == reliability
    assert posteriors(again, found) == posteriors(reliability, found)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"agents": {"a": {}}}', '{"agents": 3}'])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a reliability that was written by to_json"):
        Reliability.from_json(text)


def test_copies_count_once() -> None:
    """Three agents of one model, .6 right, copy each other: by majority they would win."""
    simulation = copied(CLONES, (1, 2), 1.0, 2000, 0)
    strangers = learn_from(simulation)
    assert strangers.agents["a0"].accuracy == pytest.approx(1.0, abs=0.01)  # what copies look like
    family = learn_from(simulation, list("mmmop"))
    assert error_of(family, CLONES) < 0.03
    assert family.agents["a0"].correlation == pytest.approx(1.0, abs=0.01)
    assert family.agents["a0"].tempering == pytest.approx(1 / 3, abs=0.01)
    assert family.agents["a3"].tempering == 1.0
    truth = simulation.truth
    _, given_patterns = simulation.patterns()
    right = [
        np.mean([np.argmax(found[key].shares) for key in given_patterns] == truth)
        for found in (posteriors(each, given_patterns) for each in (strangers, family))
    ]
    assert right[0] < 0.62
    assert right[1] > 0.88
    three, one = posterior(family, "0;0;0;1;2"), posterior(family, "0;;;1;2")
    assert three.shares == pytest.approx(one.shares, abs=0.01)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_correlation_is_measured(share: float) -> None:
    simulation = copied(CLONES, (1, 2), share, 4000, 0)
    reliability = learn_from(simulation, list("mmmop"))
    table = parse_patterns(simulation.patterns()[0], 5, 4)
    agree = [
        np.mean(simulation.answers[:, i] == simulation.answers[:, j])
        for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    by_chance = 0.36 + 0.16 / 3
    expected = max(0.0, (np.mean(agree) - by_chance) / (1 - by_chance))
    assert reliability.agents["a0"].correlation == pytest.approx(expected, abs=0.06)
    rho = reliability.agents["a0"].correlation
    factors = exponents(table, np.array([0, 0, 0, 1, 2]), np.array([rho, 0, 0]))
    assert factors[0].tolist() == pytest.approx([1 / (1 + 2 * rho)] * 3 + [1, 1])


def test_samples_of_an_agent_are_a_family() -> None:
    """Five samples of one agent that repeat each other are no five witnesses."""
    simulation = independent(even_errors((0.6, 0.8, 0.85)), 1000, 0)
    repeated = Counter(f"{a},{a},{a},{a},{a};{b};{c}" for a, b, c in simulation.answers.tolist())
    names = {"a0": "m", "a1": "n", "a2": "o"}
    reliability = learn(repeated, list(names), names, LABELS)
    assert reliability.agents["a0"].num_answers == 5000
    assert reliability.agents["a0"].tempering == pytest.approx(0.2, abs=0.01)
    assert error_of(reliability, (0.6, 0.8, 0.85)) < 0.05


def test_a_single_family_is_learned_with_a_caveat() -> None:
    reliability = learn_from(independent(even_errors(MIXED), 500, 0), ["m"] * 5)
    assert reliability.method == "dawid-skene"
    assert "errors that a model family shares show only with 3 families or more" in reliability.why
    assert reliability.agents["a0"].correlation == 0.0


def test_guessing_agents_are_merged_by_vote() -> None:
    reliability = learn_from(independent(even_errors((0.25,) * 5), 2000, 0))
    assert reliability.method == "vote"
    assert "no agents agree with others more often than by chance" in reliability.why
    assert reliability.accuracies == {}
    assert posterior(reliability, "0;0;1;2;").shares == (0.5, 0.25, 0.25, 0.0)


def test_agents_that_always_say_the_same_teach_nothing() -> None:
    reliability = learn({"0;0;0": 500}, "abc", {a: a for a in "abc"}, LABELS)
    assert reliability.method == "vote"


def test_two_agents_are_too_few() -> None:
    simulation = independent(even_errors((0.9, 0.8)), 500, 0)
    reliability = learn_from(simulation)
    assert reliability.method == "vote"
    assert reliability.why == (
        "500 records, merged by vote: 2 agents have answered, and learning takes 3."
    )
    silent = {f"{pattern};": count for pattern, count in simulation.patterns()[0].items()}
    assert learn(silent, "abc", {a: a for a in "abc"}, LABELS).method == "vote"


def test_nothing_at_all_can_be_learned_from_nothing() -> None:
    for labels in (LABELS, None):
        reliability = learn({}, "abc", {a: a for a in "abc"}, labels)
        assert (reliability.method, reliability.num_records) == ("vote", 0)
        assert Reliability.from_json(reliability.to_json()) == reliability


def test_what_an_unknown_agent_says_changes_nothing() -> None:
    simulation = independent(even_errors(MIXED[:4]), 1000, 0)
    found = {f"{pattern};": count for pattern, count in simulation.patterns()[0].items()}
    reliability = learn(found, "abcde", {a: a for a in "abcde"}, LABELS)
    assert reliability.agents["e"].accuracy is None
    assert "e" not in reliability.accuracies
    assert posterior(reliability, "0;1;1;0;2") == posterior(reliability, "0;1;1;0;")


def past(accuracy: float, total: float) -> AgentHistory:
    return AgentHistory(accuracy * total, total)


def test_history_helps_where_data_are_few() -> None:
    """Weak agents on 100 records: with their history, accuracies are closer to the truth."""
    weak = (0.60, 0.50, 0.45, 0.45, 0.40)
    history = History({f"a{i}": past(p, 200) for i, p in enumerate(weak)}, LABELS)
    alone, helped = [], []
    for seed in range(20):
        simulation = independent(even_errors(weak), 100, seed)
        without, with_history = learn_from(simulation), learn_from(simulation, prior=history)
        if without.method != "vote":
            alone.append(error_of(without, weak))
            helped.append(error_of(with_history, weak))
    assert len(alone) > 5
    assert np.mean(helped) < 0.6 * np.mean(alone)


def test_an_old_history_cannot_drown_the_data() -> None:
    simulation = independent(even_errors(MIXED), 1000, 0)
    wrong = tuple(reversed(MIXED))
    million = History({f"a{i}": past(p, 1e6) for i, p in enumerate(wrong)}, LABELS)
    as_many = History({f"a{i}": past(p, 1000) for i, p in enumerate(wrong)}, LABELS)
    assert learn_from(simulation, prior=million) == learn_from(simulation, prior=as_many)


def test_history_without_agreement_is_all_there_is() -> None:
    history = History({"a0": past(0.9, 100)}, LABELS)
    reliability = learn_from(independent(even_errors((0.9, 0.8)), 50, 0), prior=history)
    assert reliability.method == "vote"
    assert reliability.accuracies == {"a0": 0.9}
    assert reliability.agents["a0"].interval == pytest.approx(wilson_interval(0.9, 100))
    assert reliability.history().agents == {}  # or it would grow by being used


def test_a_run_becomes_the_next_ones_history() -> None:
    reliability = learn_from(independent(even_errors(MIXED), 1000, 0))
    history = reliability.history()
    first = history.agents["a0"]
    assert history.labels == LABELS
    assert first.total == 1000
    assert first.correct == pytest.approx(1000 * (reliability.agents["a0"].accuracy or 0))
    assert first.confusion is not None
    assert sum(map(sum, first.confusion)) == pytest.approx(1000)
    small = learn_from(independent(even_errors(MIXED), 300, 1), prior=history)
    assert error_of(small, MIXED) < 0.04
    with pytest.raises(ValueError, match="the history is of labels"):
        learn({"0;0;1": 400}, ["a0", "a1", "a2"], {f"a{i}": "m" for i in range(3)}, None, history)


@given(
    pattern=st.lists(st.sampled_from(["", "0", "1", "2,3", "3"]), min_size=5, max_size=5).filter(
        any
    )
)
def test_posteriors_are_probabilities(pattern: list[str]) -> None:
    for reliability in CLOSED, GUESSING:
        found = posterior(reliability, ";".join(pattern))
        assert len(found.shares) == 4
        assert found.none == 0
        assert sum(found.shares) == pytest.approx(1)
        assert min(found.shares) >= 0


def test_a_pattern_of_something_else_has_no_posterior() -> None:
    with pytest.raises(ValueError, match="is not of 5 agents and 4 labels"):
        posterior(CLOSED, "0;1;9;;")
    with pytest.raises(ValueError, match="is not of 5 agents"):
        posterior(CLOSED, ";;;;")


def test_posterior_is_bayes_rule() -> None:
    """By hand: prior times the probability of every answer."""
    reliability = learn_from(independent(even_errors(MIXED), 250, 0))
    given_by = [agent.confusion or () for agent in reliability.agents.values()]
    assert reliability.class_prior is not None
    joint = [
        prior * math.prod(given_by[a][k][y] for a, y in ((0, 1), (1, 0), (4, 0)))
        for k, prior in enumerate(reliability.class_prior)
    ]
    expected = [each / sum(joint) for each in joint]
    assert posterior(reliability, "1;0;;;0").shares == pytest.approx(expected)


@pytest.mark.parametrize("num_wrong", [2, 3, 5])
def test_open_set_likelihood_is_that_of_all_ways_to_answer(num_wrong: int) -> None:
    """Three agents give the right answer 0 or one of m wrong ones: add up all (m + 1)³ ways."""
    accuracies = (0.7, 0.5, 0.2)
    by_pattern: Counter[str] = Counter()
    right: dict[str, Counter[int]] = {}
    for row in itertools.product(range(num_wrong + 1), repeat=3):
        factors = (
            p if x == 0 else (1 - p) / num_wrong for p, x in zip(accuracies, row, strict=True)
        )
        probability = math.prod(factors)
        distinct = list(dict.fromkeys(row))
        pattern = ";".join(str(distinct.index(x)) for x in row)
        by_pattern[pattern] += probability  # type: ignore[assignment]
        cluster = distinct.index(0) if 0 in distinct else -1
        right.setdefault(pattern, Counter())[cluster] += probability  # type: ignore[assignment]
    table = parse_patterns(dict.fromkeys(by_pattern, 1), 3, None)
    model = OpenSetModel(np.array(accuracies), num_wrong)
    ones = np.ones(table.codes.shape)
    likelihood = sum(math.log(probability) for probability in by_pattern.values())
    assert open_set.log_likelihood(model, table, ones) == pytest.approx(likelihood)
    found = model.posteriors(table, ones)
    for pattern, row in zip(table.patterns, found, strict=True):
        for cluster in range(-1, 3):
            expected = right[pattern][cluster] / by_pattern[pattern]
            assert row[cluster] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("num_wrong", [3, 20, 200])
def test_free_answers(num_wrong: int) -> None:
    simulation = free_answers(MIXED, num_wrong, 2000, 0)
    given_patterns = open_patterns(simulation)
    reliability = learn_open(given_patterns)
    assert reliability.method == "open-set"
    assert reliability.num_wrong is not None
    assert num_wrong / 3 <= reliability.num_wrong <= num_wrong * 3
    assert error_of(reliability, MIXED) < 0.04
    found = posteriors(reliability, given_patterns)
    chosen = [int(np.argmax(found[pattern].shares)) for pattern in given_patterns]
    first = [list(dict.fromkeys(row)) for row in simulation.answers.tolist()]
    right = np.mean([distinct[code] == 0 for distinct, code in zip(first, chosen, strict=True)])
    surest = np.mean([max(found[pattern].shares) for pattern in given_patterns])
    assert right == pytest.approx(surest, abs=0.02)
    nobody = np.mean([found[pattern].none for pattern in given_patterns])
    assert nobody == pytest.approx(math.prod(1 - p for p in MIXED), abs=0.01)


def test_free_answers_that_all_differ_are_doubted() -> None:
    reliability = learn_open(open_patterns(free_answers((0.7, 0.5, 0.4, 0.3, 0.3), 50, 2000, 0)))
    lonely, agreed = posterior(reliability, "0;1;2;3;4"), posterior(reliability, "0;0;1;2;3")
    assert sum(lonely.shares) + lonely.none == pytest.approx(1)
    assert len(lonely.shares) == 5
    assert lonely.none > 0.1 > agreed.none
    assert agreed.shares[0] > 0.95


def test_more_different_answers_than_there_are_wrong_ones() -> None:
    """A record that the learned m cannot explain, such as one asked again, has a posterior."""
    reliability = learn_open(open_patterns(free_answers(MIXED[:4], 2, 2000, 0)))
    assert reliability.num_wrong == 2
    found = posterior(reliability, "0,5;1,6;2,7;3;4")
    assert sum(found.shares) + found.none == pytest.approx(1)


def test_free_answers_at_random_are_merged_by_vote() -> None:
    reliability = learn_open(open_patterns(free_answers((0.0,) * 5, 20, 1000, 0)))
    assert reliability.method == "vote"
    assert reliability.why.endswith("agreement is explained as well by chance.")
    assert posterior(reliability, "0;0;1;2;").shares == (0.5, 0.25, 0.25)


def test_copies_of_free_answers_count_once() -> None:
    simulation = free_answers(CLONES, 20, 2000, 0)
    simulation.answers[:, 1] = simulation.answers[:, 2] = simulation.answers[:, 0]
    given_patterns = open_patterns(simulation)
    family = learn_open(given_patterns, dict(zip("abcde", "mmmop", strict=True)))
    assert family.agents["a"].correlation == pytest.approx(1.0, abs=0.01)
    assert error_of(family, CLONES) < 0.04


@pytest.mark.parametrize(
    ("families", "labels", "message"),
    [
        ({"a": "m"}, LABELS, "agent 'b' has no family"),
        ({"a": "m", "b": "m"}, ["x"], "two or more, distinct"),
        ({"a": "m", "b": "m"}, ["x", "x"], "two or more, distinct"),
    ],
)
def test_contradictions_are_refused(
    families: dict[str, str], labels: Sequence[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        learn({"0;0": 1}, "ab", families, labels)


def test_to_json_is_plain_json() -> None:
    fields = json.loads(CLOSED.to_json())
    assert list(fields["agents"]) == ["a0", "a1", "a2", "a3", "a4"]
    assert fields["labels"] == list(LABELS)
    assert all(x == round(x, 12) for x in fields["class_prior"])


CLOSED = learn_from(independent(even_errors(MIXED), 500, 0), list("mmnop"))
GUESSING = learn_from(independent(even_errors((0.25,) * 5), 500, 0))
