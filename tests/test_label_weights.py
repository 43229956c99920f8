"""What is published by the word of labelled records."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from mas_batch.aggregate.ballots import Ballot, Verdict
from mas_batch.aggregate.calibration import Calibrated, learn_from_labels
from mas_batch.aggregate.label_weights import (
    START,
    Labelled,
    LabelWeights,
    features,
    fit,
    starts_of,
    weigh,
)
from mas_batch.aggregate.vote import vote


def voted(**said: str) -> Verdict:
    return vote([Ballot(agent, agent, 0, label, label) for agent, label in said.items()])


def labelled(found: Verdict, truth: str) -> Labelled:
    answers = [candidate.answer for candidate in found.support]
    right = answers.index(truth) if truth in answers else -1
    return Labelled(found.confidence or 0.0, right, features(found))


def records(rates: dict[str, float], number: int, copies: int = 0) -> list[Labelled]:
    """Of agents that are right at these rates, the first with copies; four labels."""
    random, found = np.random.default_rng(0), []
    for _ in range(number):
        said = {
            a: "x" if random.random() < p else random.choice(list("abc")) for a, p in rates.items()
        }
        first = next(iter(said.values()))
        said |= {f"copy{place}": first for place in range(copies)}
        found.append(labelled(voted(**said), "x"))
    return found


def test_one_good_agent_among_copies_of_a_poor_one_is_found() -> None:
    known = records({"poor": 0.5, "good": 0.95}, 100, copies=2)
    found = weigh(known, "vote", {})
    assert found.weights is not None
    assert found.correct.mean() > 0.9
    assert np.mean([record.right == 0 for record in known]) < 0.6
    assert "are right by weights of the agents learned from the others" in found.why
    published = found.weights.apply(voted(poor="a", copy0="a", copy1="a", good="x"))
    assert published.answer == "x"
    assert published.support[0].weight > 0.5
    assert published.confidence == pytest.approx((published.support[0].weight / 4) ** 0.5)
    assert not published.tie


def test_labels_that_show_the_method_to_be_better_leave_it() -> None:
    """Every record's answers are of agents that no other record tells anything of."""
    before = [
        Labelled(0.9, 0, [{"": 0.0, f"p{i}": 0.0}, {"": 0.0, f"q{i}": 1.0}]) for i in range(50)
    ]
    found = weigh(before, "vote", {})
    assert found.weights is None
    assert found.correct.all()
    assert found.confidences.tolist() == [0.9] * 50
    assert found.why.startswith("published is what vote says: of 50 labelled records 0 are right")


def test_without_labels_everything_weighs_what_it_starts_with() -> None:
    starts = starts_of({"good": 4.0, "poor": 1.0, "against": -1.0})
    assert starts == {"good": START, "poor": START / 4, "against": 0.0}
    assert starts_of({"against": -1.0}) == {}
    nobody = [labelled(voted(good="a", poor="a"), "x")]
    assert fit(nobody, starts) == LabelWeights(START, {"good": START, "poor": START / 4})


def test_samples_of_an_agent_share_its_word() -> None:
    ballots = [Ballot("a", "a", n, label, label) for n, label in enumerate("xxxy")]
    (first, second) = features(vote([*ballots, Ballot("b", "b", 0, "y", "y")]))
    assert (first["a"], second["a"], second["b"]) == (0.75, 0.25, 1.0)


def test_an_agent_that_no_label_has_seen_counts_like_others_before_labels() -> None:
    weights = LabelWeights(0.0, {"a": 0.2})
    assert weights.apply(voted(a="x", new="y")).answer == "y"


def test_what_labels_teach_survives_json() -> None:
    found = learn_from_labels(records({"a": 0.9, "b": 0.5}, 60), "vote", {})
    again = Calibrated.from_json(found.to_json())
    assert again == found
    assert found.why.startswith("labels weigh the agents: of 60 labelled records ")
    facts = json.loads(found.to_json())
    del facts["weights"], facts["chosen"]
    assert Calibrated.from_json(json.dumps(facts)).weights is None, "as earlier versions wrote it"
    assert asdict(found)["weights"]["agents"].keys() == {"a", "b"}
