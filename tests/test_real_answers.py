"""Merges of real answers (benchmarks/answers): yes-men, spammers and shared errors among them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from benchmarks.real_answers import (
    AnswerSet,
    Judged,
    degenerate_sets,
    gap,
    judge,
    read_sets,
    with_labels,
)
from mas_batch.aggregate.calibration import calibration_error
from mas_batch.aggregate.learning import learn
from mas_batch.aggregate.reliability import Reliability

CHOSEN = ("dialogue", "editorials", "fit", "help", "movies", "sections", "tweets-150")
"""Those of fewer patterns; `python benchmarks/real_answers.py` takes them all."""
SMALL = [each for each in read_sets() if each.name in CHOSEN]
SETS = {each.name: each for each in [*SMALL, *degenerate_sets(SMALL)]}
ALL = SETS | {each.name: each for each in read_sets()}


@cache
def judged(name: str) -> Judged:
    return judge(ALL[name])


@pytest.mark.parametrize("name", SETS)
def test_learned_reliability_is_not_worse_than_the_vote(name: str) -> None:
    correct = judged(name).correct
    two = replace(judged(name), correct={k: correct[k] for k in ("vote", "reliability")})
    _, _, high = gap(two, num_resamples=400)
    assert high >= 0


@pytest.mark.parametrize("name", SETS)
def test_no_class_vanishes(name: str) -> None:
    prior = judged(name).learned.class_prior
    truth = np.bincount([int(code) for code in SETS[name].truth]) / len(SETS[name].truth)
    assert prior is None or (np.array(prior) > truth / 4).all()


@pytest.mark.parametrize("name", [each.name for each in SMALL])
def test_published_confidences_are_as_honest_as_the_share_of_agreement(name: str) -> None:
    """Where the posterior is off by up to .32; the noise of so few records is about .05."""
    found = judged(name)
    published, votes = (
        calibration_error(found.confidence[c], found.correct[m])
        for c, m in (("published", "reliability"), ("vote", "vote"))
    )
    assert published <= votes + 0.06


@pytest.mark.parametrize("name", ["movies", "dialogue"])
def test_a_hundred_labels_calibrate(name: str) -> None:
    after, noise = with_labels(judged(name), 100, 8, 10).errors.mean(axis=0)
    assert np.sqrt(max(0.0, after**2 - noise**2)) <= 0.08


@pytest.mark.parametrize("name", ["dialogue", "synopses-strong"])
def test_labels_find_an_agent_that_is_much_better_than_all_others(name: str) -> None:
    """Which agreement alone does not: the merge loses 3 points to it."""
    assert gap(judged(name), 400)[2] < 0
    gaps = with_labels(judged(name), 100, draws=6, num_resamples=200).gaps
    assert gaps[:, 0].mean() > -0.007
    assert np.median(gaps[:, 2]) >= 0, "not worse by more than noise"


def learned(each: AnswerSet) -> Reliability:
    return judge(each).learned


def test_what_cannot_be_learned_is_said() -> None:
    three = learned(SETS["tweets-150: bayes, centroid, smollm2"])
    assert three.method == "vote"
    (warning,) = three.warnings
    assert warning.startswith("The vote is published, since only 'bayes', 'centroid' agree")
    (warning,) = learned(SETS["dialogue"]).warnings
    assert "the label 'literature' would be right for 0.7% of the records" in warning
    assert Reliability.from_json(three.to_json()) == three


def test_agents_that_say_nothing_are_named() -> None:
    found = judged("sections + yes0, spam1, spam2")
    (warning,) = found.learned.warnings
    assert "these agents agree with others: spam1, spam2, yes0; look at" in warning
    assert found.learned.method == "dawid-skene"


def test_what_is_learned_against_all_sense_is_not_published() -> None:
    """Three agents that name the next label, and two that are right: the crowd is believed."""
    rng = np.random.default_rng(0)
    truth = rng.integers(3, size=600)
    right = [np.where(rng.random(600) < 0.9, truth, rng.integers(3, size=600)) for _ in range(3)]
    against = [(each + 1) % 3 for each in right[:1]]
    rows = zip(*(each.tolist() for each in [*right, *against]), strict=True)
    patterns: dict[str, int] = {}
    for row in rows:
        key = ";".join(map(str, row))
        patterns[key] = patterns.get(key, 0) + 1
    agents = ["a", "b", "c", "next"]
    found = learn(patterns, agents, {agent: agent for agent in agents}, ["x", "y", "z"])
    assert found.method == "vote"
    assert "agent 'next' would be right " in found.warnings[0]
    assert "and by chance 33%" in found.warnings[0]
