from __future__ import annotations

import json
import random
from fractions import Fraction
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mas_batch.aggregate.ballots import Ballot
from mas_batch.aggregate.chrf import chrf_matrix
from mas_batch.aggregate.consensus import SUPPORT, UtilitySums, add, loo_partial, weights
from mas_batch.aggregate.mbr import minimum_bayes_risk

TEXTS = st.text(alphabet="ab ", max_size=8)
RECORDS = st.lists(
    st.lists(st.tuples(st.sampled_from("xyz"), TEXTS), max_size=6), min_size=1, max_size=5
)


def ballots(*answers: tuple[str, str]) -> list[Ballot]:
    return [Ballot(agent, "f", i, text, text) for i, (agent, text) in enumerate(answers)]


def test_a_partial_is_its_definition() -> None:
    answers = [("x", "ab cd"), ("x", "ab ce"), ("y", "ab cd"), ("z", "zzzz")]
    chrf = chrf_matrix([text for _, text in answers])
    u = (chrf + chrf.T) / 2
    partial = loo_partial(ballots(*answers), chrf_matrix)
    x_y, x_z, y_z = mean([u[0, 2], u[1, 2]]), mean([u[0, 3], u[1, 3]]), u[2, 3]
    for agent, expected in {
        "x": (x_y + x_z) / 2,
        "y": (x_y + y_z) / 2,
        "z": (x_z + y_z) / 2,
    }.items():
        assert partial[agent] == (pytest.approx(1e6 * expected, abs=1), 1)


def test_samples_of_one_agent_do_not_support_each_other() -> None:
    echo = [("x", "the same words"), ("x", "the same words"), ("x", "the same words")]
    partial = loo_partial(ballots(*echo, ("y", "zzzz"), ("z", "zzzz")), chrf_matrix)
    assert partial["x"] == (0, 1)
    assert partial["y"] == (500_000, 1)  # x is one of two others, with however many samples


@pytest.mark.parametrize("answers", [[], [("x", "a")], [("x", "a"), ("x", "b")]])
def test_a_record_of_a_single_agent_says_nothing(answers: list[tuple[str, str]]) -> None:
    assert loo_partial(ballots(*answers), chrf_matrix) == {}


@given(RECORDS, st.randoms(use_true_random=False))
def test_order_and_grouping_change_nothing(
    records: list[list[tuple[str, str]]], shuffle: random.Random
) -> None:
    votes = [ballots(*answers) for answers in records]
    whole = add([loo_partial(record, chrf_matrix) for record in votes])
    shuffled = [shuffle.sample(record, len(record)) for record in shuffle.sample(votes, len(votes))]
    cut = shuffle.randrange(len(votes) + 1)
    halves = [
        add([loo_partial(record, chrf_matrix) for record in half])
        for half in (shuffled[:cut], shuffled[cut:])
    ]
    again: UtilitySums = json.loads(json.dumps(add(halves)))  # partials travel as JSON
    assert json.dumps(whole) == json.dumps(again)
    assert weights(whole) == weights(again)
    assert all(0.01 <= weight <= 1 for weight in weights(whole).values())


def test_weights_are_squares_of_shrunk_means() -> None:
    partial = {"x": (95 * 800_000, 95), "y": (95 * 400_000, 95), "z": (5 * 1_000_000, 5)}
    average = Fraction(76 + 38 + 5, 195)
    x, y, z = (76 + 5 * average) / 100, (38 + 5 * average) / 100, (5 + 5 * average) / 10
    best = max(x, y, z)
    expected = {name: float((u / best) ** 2) for name, u in [("x", x), ("y", y), ("z", z)]}
    assert weights(partial) == pytest.approx(expected, abs=1e-12)


def test_one_lucky_record_does_not_make_the_best_agent() -> None:
    learned = weights({"x": (700 * 10**6, 1000), "y": (690 * 10**6, 1000), "lucky": (10**6, 1)})
    assert min(learned.values()) > 0.85  # of one record alone, x would weigh 0.49


@pytest.mark.parametrize(
    ("partial", "expected"),
    [({}, {}), ({"x": (0, 3), "y": (0, 3)}, {"x": 1.0, "y": 1.0})],
)
def test_where_nothing_is_known_nobody_is_better(
    partial: UtilitySums, expected: dict[str, float]
) -> None:
    assert weights(partial) == expected


def test_nobody_weighs_nothing() -> None:
    assert weights({"x": (10**9, 1000), "y": (0, 10**6)})["y"] == 0.01


def sentence(rng: random.Random) -> str:
    return " ".join("".join(rng.choices("abcdefghij", k=5)) for _ in range(8))


def simulated(wrong: dict[str, float], num_records: int) -> list[tuple[str, list[Ballot]]]:
    """Return (right answer, ballots) per record; wrong answers are all different."""
    rng = random.Random(11)
    records = []
    for _ in range(num_records):
        right = sentence(rng)
        answers = [(a, sentence(rng) if rng.random() < p else right) for a, p in wrong.items()]
        records.append((right, ballots(*answers)))
    return records


def accuracy(records: list[tuple[str, list[Ballot]]], weight: dict[str, float]) -> float:
    def merged(votes: list[Ballot]) -> str:
        return minimum_bayes_risk(votes, [weight[b.agent_id] for b in votes], chrf_matrix).answer

    return mean(merged(votes) == right for right, votes in records)


def test_learned_weights_restore_the_best_agent_where_equal_votes_hurt() -> None:
    records = simulated({"worse": 0.6, "good": 0.0, "worst": 0.7}, 120)
    learned = SUPPORT.finalize(SUPPORT.combine([SUPPORT.chunk(b, chrf_matrix) for _, b in records]))
    assert max(learned, key=learned.__getitem__) == "good"
    assert accuracy(records, dict.fromkeys(learned, 1.0)) < 0.9
    assert accuracy(records, learned) == 1.0


def test_equal_agents_weigh_nearly_the_same() -> None:
    records = simulated(dict.fromkeys("vwxyz", 0.3), 300)
    learned = weights(add([loo_partial(votes, chrf_matrix) for _, votes in records]))
    assert min(learned.values()) > 0.85
