from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mas_batch.aggregate.ballots import UNITS, Ballot, Verdict, log_odds
from mas_batch.aggregate.normalise import nfc, normalise_text
from mas_batch.aggregate.vote import mean, vote, weighted_linear, weighted_log_odds

# crowd-kit's own test table: worker → answers to t1…t5 ("-": none).
TOY = {"w1": "nyyyy", "w2": "yynyn", "w3": "-ynyn", "w4": "ynyyn", "w5": "nnnyn"}


def ballot(agent: str, answer: str, *, family: str | None = None, sample: int = 0) -> Ballot:
    return Ballot(agent, family or agent, sample, normalise_text(answer), answer)


def ballots(*answers: str) -> list[Ballot]:
    return [ballot(f"a{i}", answer) for i, answer in enumerate(answers)]


def numbers(*values: float) -> list[Ballot]:
    return [Ballot(f"a{i}", "f", 0, repr(x), repr(x), x) for i, x in enumerate(values)]


def toy_ballots(task: int) -> list[Ballot]:
    words = {"y": "yes", "n": "no"}
    return [ballot(w, words[row[task]]) for w, row in TOY.items() if row[task] != "-"]


def weight_of(verdict: Verdict, answer: str) -> float:
    return sum(candidate.weight for candidate in verdict.support if candidate.answer == answer)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("Paris", " paris.\n"),
        ('"Paris."', "“Paris”."),
        ("New   York", "new\tyork!"),
        ("Straße", "STRASSE"),
        ("café", "cafe\u0301"),
        ("«Oui»", "oui"),
        ("是。", "是"),
        ("'yes'", "`Yes`"),
    ],
)
def test_answers_that_say_the_same(left: str, right: str) -> None:
    assert normalise_text(left) == normalise_text(right)


@pytest.mark.parametrize(
    ("left", "right"),
    [("1.5", "15"), ("?", "!"), ("-1", "1"), ("don't", "dont"), ('5"', "5"), ("a, b", "a b")],
)
def test_answers_that_differ(left: str, right: str) -> None:
    assert normalise_text(left) != normalise_text(right)


@given(
    st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from("\"'“”.!? İßé\u0345")))
)
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalise_text(text)
    assert normalise_text(once) == once == nfc(once)


def test_vote_gives_crowd_kits_probabilities() -> None:
    verdicts = [vote(toy_ballots(task)) for task in range(5)]
    shares = [weight_of(v, "yes") / sum(c.weight for c in v.support) for v in verdicts]
    assert shares == [0.5, 0.6, 0.4, 1.0, 0.2]
    assert [v.answer for v in verdicts] == ["no", "yes", "no", "yes", "no"]
    assert [v.tie for v in verdicts] == [True, False, False, False, False]


def test_linear_weights_give_crowd_kits_wawa_probabilities() -> None:
    # Wawa weighs by agreement with the majority. Ours clips w3's 1.0 to .99: hence 1e-3.
    skills = {"w1": 0.6, "w2": 0.8, "w3": 1.0, "w4": 0.4, "w5": 0.8}
    verdicts = [weighted_linear(toy_ballots(task), skills) for task in range(5)]
    shares = [weight_of(v, "yes") / sum(c.weight for c in v.support) for v in verdicts]
    assert shares[0] == pytest.approx(0.461538, abs=1e-6)  # w3 gave no answer to t1
    assert shares == pytest.approx([0.461538, 0.666667, 0.277778, 1, 0.166667], abs=1.1e-3)


def test_vote_reports_agreement_margin_and_entropy() -> None:
    verdict = vote(ballots("cat", "Cat.", "dog", "cat", "eel"))
    assert (verdict.answer, verdict.confidence, verdict.confidence_kind) == (
        "cat",
        0.6,
        "agreement",
    )
    assert verdict.margin == 0.4
    assert verdict.entropy == pytest.approx(-0.6 * math.log(0.6) - 0.4 * math.log(0.2))
    assert not verdict.tie


def test_one_answer_is_certain_agreement() -> None:
    verdict = vote(ballots("cat"))
    assert (verdict.confidence, verdict.margin, verdict.entropy) == (1.0, 1.0, 0.0)


def test_the_shown_form_is_the_most_frequent_then_the_smallest() -> None:
    assert vote(ballots("cat.", "Cat", "Cat", "CAT")).answer == "Cat"
    assert vote(ballots("cat", "Cat")).answer == "Cat"


def test_the_chosen_answer_is_one_that_reads_as_shown() -> None:
    # a0 agrees, but its own words were not published: neither is its finish_reason.
    first = Ballot("a0", "f", 0, "yes", "Yes.", finish_reason="length")
    others = [Ballot(a, "f", 0, "yes", "yes", finish_reason="stop") for a in ("a2", "a1")]
    assert vote([first, *others]).chosen == others[1]


def test_a_tie_goes_to_more_families_then_smaller_bytes() -> None:
    same = [ballot("a1", "x", family="f1"), ballot("a2", "x", family="f1")]
    mixed = [ballot("a3", "y", family="f2"), ballot("a4", "y", family="f3")]
    verdict = vote([*same, *mixed])
    assert (verdict.answer, verdict.tie, verdict.margin) == ("y", True, 0.0)
    assert vote(ballots("é", "z")).answer == "z"  # bytes, not an alphabet


def test_a_tie_goes_to_the_higher_single_weight() -> None:
    accuracies = {"a": 0.4, "b": 0.4, "c": 0.6, "d": 0.2}
    votes = [ballot("a", "x"), ballot("b", "x"), ballot("c", "y"), ballot("d", "y")]
    verdict = weighted_linear(votes, accuracies)
    assert (verdict.answer, verdict.tie) == ("y", True)


def test_sums_that_are_equal_on_paper_tie() -> None:
    # In floats .1 + .2 + .3 differs from .3 + .3; families decide here, not the last bit.
    accuracies = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.3, "e": 0.3}
    x = [ballot(a, "x") for a in "abc"]
    y = [ballot(a, "y") for a in "de"]
    verdict = weighted_linear([*y, *x], accuracies)
    assert (verdict.answer, verdict.tie) == ("x", True)


def test_log_odds_confidence_is_the_posterior_of_independent_agents() -> None:
    accuracies = {"a": 0.9, "b": 0.6, "c": 0.7}
    votes = [ballot("a", "x"), ballot("b", "y"), ballot("c", "z")]
    verdict = weighted_log_odds(votes, accuracies, num_wrong=2)
    likelihood = {
        label: math.prod(
            accuracies[b.agent_id] if b.key == label else (1 - accuracies[b.agent_id]) / 2
            for b in votes
        )
        for label in "xyz"
    }
    assert verdict.answer == "x"
    assert verdict.confidence == pytest.approx(likelihood["x"] / sum(likelihood.values()), abs=1e-8)
    assert verdict.margin == pytest.approx(
        (likelihood["x"] - likelihood["z"]) / sum(likelihood.values()), abs=1e-8
    )


def test_a_single_answer_is_as_sure_as_its_agent() -> None:
    for num_wrong in (1, 2, 7, None):
        verdict = weighted_log_odds([ballot("a", "x")], {"a": 0.8}, num_wrong)
        assert (verdict.confidence, verdict.margin) == (pytest.approx(0.8), pytest.approx(0.8))
        assert verdict.entropy == 0.0


def test_an_agent_below_chance_speaks_against_its_answer() -> None:
    verdict = weighted_log_odds(
        [ballot("bad", "x"), ballot("bad", "x", sample=1), ballot("so-so", "y")],
        {"bad": 0.2, "so-so": 0.45},
        num_wrong=1,
    )
    assert verdict.answer == "y"
    assert weight_of(verdict, "x") == pytest.approx(2 * math.log(0.25))


def test_open_answers_take_their_number_of_wrong_ones_from_the_candidates() -> None:
    accuracies = dict.fromkeys(("a0", "a1", "a2", "a3"), 0.6)
    four = weighted_log_odds(ballots("w", "x", "y", "z"), accuracies, num_wrong=None)
    assert four.support[0].weight == pytest.approx(math.log(3 * 0.6 / 0.4))
    one = weighted_log_odds(ballots("w"), accuracies, num_wrong=None)
    assert one.support[0].weight == pytest.approx(math.log(0.6 / 0.4))


def test_accuracies_are_clipped() -> None:
    assert log_odds(1.0, 1) == log_odds(0.99, 1)
    assert log_odds(0.0, 3) == log_odds(0.01, 3)


def test_mean_and_its_standard_error() -> None:
    values = [3.0, 4.5, 4.0, 9.25]
    verdict = mean(numbers(*values), [1.0] * 4)
    assert verdict.value == np.mean(values)
    assert verdict.answer == repr(verdict.value)
    assert verdict.confidence == pytest.approx(np.std(values, ddof=1) / 2, rel=1e-14)
    assert (verdict.confidence_kind, verdict.margin, verdict.tie) == ("standard_error", None, False)
    assert verdict.chosen.value == 4.5


def test_weighted_mean() -> None:
    verdict = mean(numbers(1.0, 5.0), [0.9, 0.3])
    assert verdict.value == pytest.approx((0.9 * 1 + 0.3 * 5) / 1.2)
    # By the definition: two values, so Σw(x-μ)² / (Σw - Σw²/Σw) · Σw² / (Σw)².
    variance = (0.9 * 1 + 0.3 * 9) / (1.2 - 0.9 / 1.2) * 0.9 / 1.44
    assert verdict.confidence == pytest.approx(math.sqrt(variance))
    assert [c.weight for c in verdict.support] == [0.9, 0.3]


def test_mean_of_one_answer_has_no_standard_error() -> None:
    assert mean(numbers(7.0), [0.8]).confidence is None


@given(
    st.floats(-1e6, 1e6).map(lambda x: x + 0.0),
    st.lists(st.floats(0.01, 0.99), min_size=1, max_size=9),
)
def test_mean_of_equal_values_is_that_value(value: float, weights: list[float]) -> None:
    verdict = mean(numbers(*[value] * len(weights)), weights)
    assert verdict.value == value
    assert verdict.confidence in (None, 0.0)


def test_mean_needs_a_value_of_every_ballot() -> None:
    with pytest.raises(ValueError):
        mean(ballots("many", "few"), [1.0, 1.0])


VOTERS = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.integers(0, 3),
        st.sampled_from(["Yes", "yes", "no", "né", "ne\u0301"]),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda v: v[:2],
)


@given(VOTERS, st.randoms(use_true_random=False))
def test_the_order_of_ballots_changes_nothing(
    voters: list[tuple[str, int, str]], shuffle: random.Random
) -> None:
    accuracies = {"a": 0.7, "b": 0.35, "c": 0.9}
    given_order = [
        ballot(a, text, sample=s, family=a if a == "a" else "g") for a, s, text in voters
    ]
    other_order = shuffle.sample(given_order, len(given_order))
    for merge in (
        vote,
        lambda b: weighted_linear(b, accuracies),
        lambda b: weighted_log_odds(b, accuracies, None),
    ):
        assert merge(given_order) == merge(other_order)


def _simulated_accuracy(
    merge: Callable[[Sequence[Ballot]], Verdict], accuracies: Sequence[float]
) -> float:
    """Accuracy over 10 seeds × 2,000 items × 4 classes; wrong answers uniform.

    There are only 4^5 ways in which the agents can answer: each is merged once.
    """
    classes, num_agents = "0123", len(accuracies)
    winners = np.array(
        [
            int(merge(ballots(*pattern)).answer)
            for pattern in itertools.product(classes, repeat=num_agents)
        ]
    )
    places = len(classes) ** np.arange(num_agents)[::-1]
    hits = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        truth = rng.integers(4, size=2000)
        right = rng.random((2000, num_agents)) < np.array(accuracies)
        wrong = (truth[:, None] + rng.integers(1, 4, size=right.shape)) % 4
        answers = np.where(right, truth[:, None], wrong)
        hits.append(winners[answers @ places] == truth)
    return float(np.mean(hits))


@pytest.mark.parametrize(
    ("accuracies", "majority", "linear", "optimal"),
    [
        ((0.90, 0.75, 0.65, 0.60, 0.50), 0.902, 0.935, 0.940),
        ((0.85, 0.80, 0.80, 0.75, 0.75), 0.967, 0.970, 0.970),
        ((0.90, 0.55, 0.50, 0.45, 0.40), 0.775, 0.863, 0.903),
    ],
)
def test_published_simulation(
    accuracies: Sequence[float], majority: float, linear: float, optimal: float
) -> None:
    by_agent: Mapping[str, float] = {f"a{i}": p for i, p in enumerate(accuracies)}
    assert _simulated_accuracy(vote, accuracies) == pytest.approx(majority, abs=0.01)
    assert _simulated_accuracy(lambda b: weighted_linear(b, by_agent), accuracies) == pytest.approx(
        linear, abs=0.01
    )
    assert _simulated_accuracy(
        lambda b: weighted_log_odds(b, by_agent, num_wrong=3), accuracies
    ) == pytest.approx(optimal, abs=0.01)


def test_scores_are_whole_units() -> None:
    assert [c.score for c in vote(ballots("x", "x", "y")).support] == [2 * UNITS, UNITS]
