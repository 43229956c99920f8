"""The published figures of aggregation, and crowd-kit as an oracle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import pytest

from mas_batch.aggregate.ballots import Ballot, Verdict
from mas_batch.aggregate.dawid_skene import (
    ClosedSetModel,
    PseudoCounts,
    competence,
    fit_dawid_skene,
    one_coin_of,
)
from mas_batch.aggregate.learning import learn
from mas_batch.aggregate.patterns import parse_patterns
from mas_batch.aggregate.reliability import posteriors
from mas_batch.aggregate.vote import vote, weighted_log_odds
from tests.simulated_answers import (
    NUM_LABELS,
    Simulation,
    calibration_error,
    directed_errors,
    even_errors,
    independent,
    shared_errors,
    with_degenerate,
    with_missing,
)

fit_one_coin = partial(fit_dawid_skene, strength=1e15, shape=one_coin_of)
fit_confusions = partial(fit_dawid_skene, strength=0.0, shape=competence)

MIXED = (0.90, 0.75, 0.65, 0.60, 0.50)
STRONG = (0.85, 0.80, 0.80, 0.75, 0.75)
ONE_GOOD = (0.90, 0.55, 0.50, 0.45, 0.40)
WEAK = (0.60, 0.50, 0.45, 0.40, 0.35)
DIRECTED = (0.81, 0.65, 0.60, 0.60, 0.55)
CLONES = (0.60, 0.60, 0.60, 0.85, 0.80)

LABELS = [str(code) for code in range(NUM_LABELS)]


@dataclass(frozen=True)
class Scenario:
    accuracies: tuple[float, ...]
    draw: Callable[[int, int], Simulation]
    """(number of records, seed) → answers."""
    published: tuple[float, float, float, float]
    """Accuracy of majority, log-odds of the true accuracies, Dawid–Skene, one-coin."""


def even(accuracies: tuple[float, ...]) -> Callable[[int, int], Simulation]:
    return lambda num_records, seed: independent(even_errors(accuracies), num_records, seed)


# The generators of the last four are not published in detail: these are the natural ones. How
# errors are directed and how many the clones share (0.9) is chosen to match MV's figure.
SCENARIOS = {
    "mixed": Scenario(MIXED, even(MIXED), (0.902, 0.940, 0.938, 0.940)),
    "strong": Scenario(STRONG, even(STRONG), (0.967, 0.970, 0.969, 0.970)),
    "one good": Scenario(ONE_GOOD, even(ONE_GOOD), (0.775, 0.903, 0.897, 0.902)),
    "structured confusions": Scenario(
        DIRECTED,
        lambda n, seed: independent(directed_errors(DIRECTED, (1, 2, 3, 1, 2), 0.8), n, seed),
        (0.874, 0.905, 0.965, 0.898),
    ),
    "shared errors": Scenario(
        MIXED,
        lambda n, seed: shared_errors(MIXED, (0.6,) * 5, n, seed),
        (0.873, 0.922, 0.913, 0.915),
    ),
    "three clones": Scenario(
        CLONES,
        lambda n, seed: shared_errors(CLONES, (0.9, 0.9, 0.9, 0, 0), n, seed),
        (0.876, 0.933, 0.911, 0.914),
    ),
    "40 % missing": Scenario(
        MIXED,
        lambda n, seed: with_missing(independent(even_errors(MIXED), n, seed), 0.4, seed),
        (0.796, 0.840, 0.833, 0.839),
    ),
}


@cache
def ballots_of(pattern: str) -> tuple[Ballot, ...]:
    answers = enumerate(pattern.split(";"))
    return tuple(Ballot(f"a{agent}", f"a{agent}", 0, code, code) for agent, code in answers if code)


def by_pattern(merge: Callable[[tuple[Ballot, ...]], Verdict], found: Mapping[str, int]) -> Any:
    return {pattern: int(merge(ballots_of(pattern)).answer) for pattern in found}


def by_model(fit: Callable[..., ClosedSetModel], found: Mapping[str, int]) -> Any:
    """Label the patterns by a model that believes nothing beforehand."""
    num_agents = next(iter(found)).count(";") + 1
    table = parse_patterns(found, num_agents, NUM_LABELS)
    independent_voters = np.ones(table.codes.shape)
    nothing = PseudoCounts.none(num_agents, NUM_LABELS)
    model = fit(table, independent_voters, nothing, max_iterations=100, tolerance=1e-5)
    best = model.posteriors(table, independent_voters).argmax(axis=1)
    return dict(zip(table.patterns, best.tolist(), strict=True))


def accuracy(labels: Mapping[str, int], given: list[str], truth: Any) -> float:
    return float(np.mean([labels[pattern] for pattern in given] == truth))


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_published_simulation(name: str) -> None:
    scenario = SCENARIOS[name]
    skills = {f"a{agent}": p for agent, p in enumerate(scenario.accuracies)}
    merge_by_log_odds = cache(lambda ballots: weighted_log_odds(ballots, skills, NUM_LABELS - 1))
    merge_by_vote = cache(vote)
    rows = []
    for seed in range(10):
        simulation = scenario.draw(2000, seed)
        found, given = simulation.patterns()
        columns = (
            by_pattern(merge_by_vote, found),
            by_pattern(merge_by_log_odds, found),
            by_model(fit_confusions, found),
            by_model(fit_one_coin, found),
        )
        rows.append([accuracy(labels, given, simulation.truth) for labels in columns])
    assert np.mean(rows, axis=0) == pytest.approx(scenario.published, abs=0.01)


@pytest.mark.parametrize("name", SCENARIOS)
def test_what_is_learned_is_accurate_and_calibrated(name: str) -> None:
    scenario = SCENARIOS[name]
    correct, errors = [], []
    for seed in range(5):
        simulation = scenario.draw(2000, seed)
        found, given = simulation.patterns()
        agents = simulation.agents
        reliability = learn(found, agents, {agent: agent for agent in agents}, LABELS)
        assert reliability.method == "dawid-skene"
        by_key = posteriors(reliability, found)
        shares = np.array([by_key[pattern].shares for pattern in given])
        right = shares.argmax(axis=1) == simulation.truth
        correct.append(right.mean())
        errors.append(calibration_error(shares.max(axis=1), right))
    majority, _, dawid_skene, _ = scenario.published
    assert np.mean(correct) >= dawid_skene - 0.01
    # Strong agents leave .002 to gain, within the noise of five seeds; all others clearly more.
    assert np.mean(correct) > majority + (0.02 if name != "strong" else -0.005)
    assert np.mean(errors) <= 0.04


@pytest.mark.parametrize(("num_yes", "num_spam"), [(1, 0), (2, 2)])
@pytest.mark.parametrize("num_records", [150, 1000])
@pytest.mark.parametrize("sharing", [0.0, 0.6])
def test_agents_that_know_nothing_and_errors_that_are_shared(
    num_yes: int, num_spam: int, num_records: int, sharing: float
) -> None:
    """Four that share errors, yes-men and spammers: never under the vote or the best agent."""
    lead, most = [], 0.0
    for seed in range(3):
        simulation = shared_errors((0.8, 0.7, 0.65, 0.6), (sharing,) * 4, num_records, seed)
        simulation = with_degenerate(simulation, num_yes, num_spam, seed)
        found, given = simulation.patterns()
        names = simulation.agents
        learned = learn(found, names, {name: name for name in names}, LABELS)
        by_key = posteriors(learned, found)
        shares = np.array([by_key[pattern].shares for pattern in given])
        right = (shares.argmax(axis=1) == simulation.truth).mean()
        alone = (simulation.answers == simulation.truth[:, None]).mean(axis=0).max()
        voted = accuracy(by_pattern(cache(vote), found), given, simulation.truth)
        lead.append(right - max(alone, voted))
        most = max(most, *(learned.class_prior or [0.0]))
    assert np.mean(lead) > -0.02
    assert most < 0.45, "four even classes"


def mean_accuracies(
    accuracies: tuple[float, ...], num_seeds: int, *methods: Callable[[Mapping[str, int]], Any]
) -> Any:
    """Return each method's accuracy on 100 records of 4 even classes, over the seeds."""
    rows = []
    for seed in range(num_seeds):
        simulation = independent(even_errors(accuracies), 100, seed)
        found, given = simulation.patterns()
        rows.append([accuracy(method(found), given, simulation.truth) for method in methods])
    return np.mean(rows, axis=0)


def test_a_hundred_records() -> None:
    """One-coin gains on the majority; Dawid–Skene without a prior loses what it gains later."""
    figures = mean_accuracies(
        MIXED,
        60,
        partial(by_pattern, vote),
        partial(by_model, fit_one_coin),
        partial(by_model, fit_confusions),
    )
    assert figures == pytest.approx((0.906, 0.936, 0.907), abs=0.01)


def test_a_hundred_records_by_weak_agents() -> None:
    """Where Dawid–Skene would overfit most, the prior keeps it near the majority."""
    figures = mean_accuracies(
        WEAK,
        60,
        partial(by_pattern, vote),
        partial(by_model, fit_confusions),
        partial(by_model, partial(fit_dawid_skene, strength=20.0, shape=one_coin_of)),
    )
    assert figures == pytest.approx((0.614, 0.505, 0.598), abs=0.01)


# crowd-kit's own test table: worker → answers to t1…t5 ("-": none).
TOY = {"w1": "nyyyy", "w2": "yynyn", "w3": "-ynyn", "w4": "ynyyn", "w5": "nnnyn"}
TOY_CODES = {"n": "0", "y": "1", "-": ""}


@pytest.mark.parametrize("fit", [fit_confusions, fit_one_coin])
def test_crowd_kits_toy_answers(fit: Callable[..., ClosedSetModel]) -> None:
    given = [";".join(TOY_CODES[row[task]] for row in TOY.values()) for task in range(5)]
    table = parse_patterns(dict.fromkeys(given, 1), len(TOY), 2)
    voters = np.ones(table.codes.shape)
    model = fit(table, voters, PseudoCounts.none(len(TOY), 2))
    best = model.posteriors(table, voters).argmax(axis=1)
    labels = dict(zip(table.patterns, best.tolist(), strict=True))
    assert [labels[pattern] for pattern in given] == [1, 1, 0, 1, 0]


def test_five_records_are_too_few_to_learn_from() -> None:
    given = [";".join(TOY_CODES[row[task]] for row in TOY.values()) for task in range(5)]
    reliability = learn(dict.fromkeys(given, 1), list(TOY), {w: w for w in TOY}, ["no", "yes"])
    assert reliability.method == "vote"
    assert [posteriors(reliability, given)[pattern].shares[1] for pattern in given] == [
        *(0.5, 0.6, 0.4, 1.0, 0.2)  # crowd-kit's majority vote; the first is a tie
    ]


NUM_ITERATIONS = 7


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["DawidSkene", "OneCoinDawidSkene"])
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_equal_to_crowd_kit_at_equal_iterations(name: str, missing: float) -> None:
    crowdkit = pytest.importorskip("crowdkit.aggregation")
    pandas = pytest.importorskip("pandas")
    simulation = with_missing(independent(even_errors(MIXED), 400, 3), missing, 3)
    task, agent = np.nonzero(simulation.answers >= 0)
    label = simulation.answers[task, agent]
    frame = pandas.DataFrame({"task": task, "worker": agent, "label": label})
    oracle = getattr(crowdkit, name)(n_iter=NUM_ITERATIONS, tol=-1.0).fit(frame)

    found, given = simulation.patterns()
    table = parse_patterns(found, len(MIXED), NUM_LABELS)
    voters, nothing = np.ones(table.codes.shape), PseudoCounts.none(len(MIXED), NUM_LABELS)

    def fit(num_iterations: int) -> ClosedSetModel:
        if name == "DawidSkene":
            return fit_confusions(
                table, voters, nothing, max_iterations=num_iterations, tolerance=-1.0
            )
        return fit_one_coin(table, voters, nothing, max_iterations=num_iterations, tolerance=-1.0)

    # crowd-kit's posteriors are those that its last M-step was made from.
    ours = fit(NUM_ITERATIONS - 1).posteriors(table, voters)
    row_of = {pattern: row for row, pattern in enumerate(table.patterns)}
    theirs = oracle.probas_.sort_index(axis=0).sort_index(axis=1).to_numpy()
    assert np.abs(ours[[row_of[pattern] for pattern in given]] - theirs).max() < 1e-12

    model = fit(NUM_ITERATIONS)
    errors = oracle.errors_.sort_index(axis=0).sort_index(axis=1).to_numpy()
    theirs = errors.reshape(len(MIXED), NUM_LABELS, NUM_LABELS).transpose(0, 2, 1)
    assert np.abs(model.confusion - theirs).max() < 1e-12
    assert np.abs(model.class_prior - oracle.priors_.sort_index().to_numpy()).max() < 1e-12
