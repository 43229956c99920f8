from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mas_batch.aggregate.ballots import Ballot
from mas_batch.aggregate.best import best, mean_logprob


def ballot(
    agent: str,
    text: str,
    logprobs: tuple[float, int] | None = None,
    *,
    sample: int = 0,
    family: str = "m",
) -> Ballot:
    total, number = logprobs or (None, None)
    return Ballot(agent, family, sample, text, text, logprob_sum=total, num_logprobs=number)


def test_the_likeliest_per_token_wins_not_the_shortest() -> None:
    short, long = ballot("a", "short", (-4.0, 2)), ballot("b", "a longer one", (-6.0, 6))
    verdict = best([short, long], ["a", "b"])
    assert verdict.answer == "a longer one"
    assert verdict.confidence_kind == "sequence_probability"
    assert verdict.confidence == pytest.approx(math.exp(-1))
    assert verdict.margin == pytest.approx(math.exp(-1) - math.exp(-2))
    assert [c.weight for c in verdict.support] == pytest.approx([math.exp(-1), math.exp(-2)])
    assert verdict.chosen == long
    assert not verdict.tie


def test_a_crowd_behind_an_answer_adds_nothing() -> None:
    crowd = [ballot("a", "common", (-2.0, 1), sample=i) for i in range(3)]
    verdict = best([*crowd, ballot("a", "rare", (-1.0, 1), sample=3)], ["a"])
    assert verdict.answer == "rare"


def test_an_answer_is_as_likely_as_its_likeliest_backer() -> None:
    ballots = [
        ballot("a", "x", (-9.0, 1)),
        ballot("b", "x", (-1.0, 1)),
        ballot("c", "y", (-2.0, 1)),
    ]
    assert best(ballots, []).answer == "x"


def test_logprobs_of_different_models_do_not_compare() -> None:
    ballots = [
        ballot("a", "sure of itself", (-0.1, 10), family="m1"),
        ballot("b", "preferred", (-30.0, 10), family="m2"),
    ]
    verdict = best(ballots, ["b", "a"])
    assert verdict.answer == "preferred"
    assert (verdict.confidence, verdict.margin) == (None, None)
    assert verdict.confidence_kind == "preference"
    assert [c.weight for c in verdict.support] == [1.0, 0.0]
    assert (verdict.entropy, verdict.tie) == (0.0, False)


@pytest.mark.parametrize("unknown", [None, (-1.0, 0), (-math.inf, 3), (math.nan, 3)])
def test_one_unknown_logprob_and_the_preference_decides(unknown: tuple[float, int] | None) -> None:
    known, other = ballot("a", "known", (-1.0, 1)), ballot("b", "unknown", unknown)
    assert mean_logprob(other) is None
    assert best([known, other], ["b", "a"]).answer == "unknown"


def test_agents_without_a_preference_come_last_by_id() -> None:
    ballots = [ballot("c", "3"), ballot("b", "2"), ballot("a", "1")]
    assert best(ballots, ["c"]).answer == "3"
    assert best(ballots, ["not here"]).answer == "1"
    assert [c.answer for c in best(ballots, ["b"]).support] == ["2", "1", "3"]


def test_of_the_preferred_agent_the_likeliest_sample_is_taken() -> None:
    other = ballot("b", "other", family="m2")
    likely = [ballot("a", str(i), (-float(4 - i), 1), sample=i) for i in range(3)]
    assert best([*likely, other], ["a", "b"]).answer == "2"
    silent = [ballot("a", str(i), sample=i) for i in range(3)]
    assert best([*silent, other], ["a", "b"]).answer == "0"


def test_equally_likely_answers_tie_and_the_rule_decides() -> None:
    verdict = best([ballot("a", "b", (-1.0, 1)), ballot("b", "a", (-2.0, 2))], ["a"])
    assert (verdict.answer, verdict.tie, verdict.margin) == ("a", True, 0.0)


def test_hopeless_sequences_are_still_ranked() -> None:
    verdict = best([ballot("a", "x", (-900.0, 1)), ballot("b", "y", (-800.0, 1))], [])
    assert verdict.answer == "y"
    assert verdict.confidence == 0.0


BALLOTS = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.sampled_from(["x", "y", "z"]),
        st.none() | st.tuples(st.sampled_from([-1.0, -2.0, -4.0]), st.integers(1, 2)),
        st.sampled_from(["m1", "m2"]),
    ),
    min_size=1,
    max_size=6,
)


@given(BALLOTS, st.permutations("abc"), st.randoms(use_true_random=False))
def test_the_order_of_answers_changes_nothing(
    rows: list[tuple[str, str, tuple[float, int] | None, str]],
    preference: list[str],
    shuffle: random.Random,
) -> None:
    ballots = [ballot(a, t, p, sample=i, family=f) for i, (a, t, p, f) in enumerate(rows)]
    verdict = best(ballots, preference)
    assert verdict == best(shuffle.sample(ballots, len(ballots)), preference)
    assert {c.answer for c in verdict.support} == {b.shown for b in ballots}
    if verdict.confidence is None:
        first = min(preference.index(b.agent_id) for b in ballots)
        assert verdict.answer in {b.shown for b in ballots if b.agent_id == preference[first]}
