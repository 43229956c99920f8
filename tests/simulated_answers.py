"""Answers of simulated agents: who is right how often, and who errs with whom, is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

NUM_LABELS = 4


@dataclass(frozen=True)
class Simulation:
    """N records, A agents; records that nobody answered are left out."""

    truth: Integers
    """[N]"""
    answers: Integers
    """[N, A]; -1: none."""

    @property
    def agents(self) -> list[str]:
        return [f"a{number}" for number in range(self.answers.shape[1])]

    def patterns(self) -> tuple[dict[str, int], list[str]]:
        """Return (pattern → records, pattern of each record)."""
        distinct, inverse = np.unique(self.answers, axis=0, return_inverse=True)
        keys = [";".join(str(c) if c >= 0 else "" for c in row) for row in distinct.tolist()]
        return dict(Counter(keys[i] for i in inverse)), [keys[i] for i in inverse]


def even_errors(accuracies: Sequence[float], num_labels: int = NUM_LABELS) -> Floats:
    """Return confusions [A, K, K] of agents that err evenly over the wrong labels."""
    return directed_errors(accuracies, [1] * len(accuracies), 1 / (num_labels - 1), num_labels)


def directed_errors(
    accuracies: Sequence[float],
    directions: Sequence[int],
    share: float,
    num_labels: int = NUM_LABELS,
) -> Floats:
    """Return confusions of agents that mistake label k mostly for label k + direction.

    Args:
        share: of an agent's errors that go in its direction; the others are even.
    """
    confusion = np.empty((len(accuracies), num_labels, num_labels))
    for agent, (p, direction) in enumerate(zip(accuracies, directions, strict=True)):
        for k in range(num_labels):
            confusion[agent, k] = (1 - p) * (1 - share) / (num_labels - 2)
            confusion[agent, k, (k + direction) % num_labels] = (1 - p) * share
            confusion[agent, k, k] = p
    return confusion


def independent(confusion: Floats, num_records: int, seed: int) -> Simulation:
    """Draw answers that are independent given the truth."""
    rng = np.random.default_rng(seed)
    num_labels = confusion.shape[1]
    truth = rng.integers(num_labels, size=num_records)
    bounds = np.cumsum(confusion[:, truth], axis=2)[:, :, :-1]
    answers = (rng.random((len(confusion), num_records, 1)) > bounds).sum(axis=2)
    return Simulation(truth, answers.T)


def with_missing(simulation: Simulation, share: float, seed: int) -> Simulation:
    """Remove each answer with that probability."""
    gone = np.random.default_rng(seed).random(simulation.answers.shape) < share
    answers = np.where(gone, -1, simulation.answers)
    answered = (answers >= 0).any(axis=1)
    return Simulation(simulation.truth[answered], answers[answered])


def shared_errors(
    accuracies: Sequence[float], sharing: Sequence[float], num_records: int, seed: int
) -> Simulation:
    """Draw answers of agents that, when wrong, may give the record's one tempting wrong label.

    Args:
        sharing: per agent, the share of its errors that are the tempting one.
    """
    rng = np.random.default_rng(seed)
    shape = (num_records, len(accuracies))
    truth = rng.integers(NUM_LABELS, size=num_records)
    tempting = (truth + rng.integers(1, NUM_LABELS, size=num_records)) % NUM_LABELS
    own = (truth[:, None] + rng.integers(1, NUM_LABELS, size=shape)) % NUM_LABELS
    wrong = np.where(rng.random(shape) < np.array(sharing), tempting[:, None], own)
    right = rng.random(shape) < np.array(accuracies)
    return Simulation(truth, np.where(right, truth[:, None], wrong))


def copied(
    accuracies: Sequence[float], copies: Sequence[int], share: float, num_records: int, seed: int
) -> Simulation:
    """Draw independent answers; then let some agents copy the first one's, now and then."""
    simulation = independent(even_errors(accuracies), num_records, seed)
    rng = np.random.default_rng([seed, 1])
    answers = simulation.answers.copy()
    for agent in copies:
        copies_it = rng.random(num_records) < share
        answers[copies_it, agent] = answers[copies_it, 0]
    return Simulation(simulation.truth, answers)


def with_degenerate(simulation: Simulation, num_yes: int, num_spam: int, seed: int) -> Simulation:
    """Add agents that say one label in 93 % of all cases, and agents that guess."""
    rng = np.random.default_rng([seed, 2])
    shape = (len(simulation.truth), num_yes + num_spam)
    added = rng.integers(NUM_LABELS, size=shape)
    said = np.arange(num_yes) % NUM_LABELS
    added[:, :num_yes] = np.where(
        rng.random((len(added), num_yes)) < 0.93, said, added[:, :num_yes]
    )
    return Simulation(simulation.truth, np.column_stack([simulation.answers, added]))


def free_answers(
    accuracies: Sequence[float], num_wrong: int, num_records: int, seed: int
) -> Simulation:
    """Draw answers from an open set: 0 is right, 1 … num_wrong are wrong, evenly."""
    rng = np.random.default_rng(seed)
    shape = (num_records, len(accuracies))
    right = rng.random(shape) < np.array(accuracies)
    wrong = rng.integers(1, num_wrong + 1, size=shape)
    return Simulation(np.zeros(num_records, np.int64), np.where(right, 0, wrong))


def calibration_error(confidence: Floats, correct: npt.NDArray[np.bool_]) -> float:
    """Return the expected calibration error over ten equal bins."""
    bins = np.minimum((confidence * 10).astype(int), 9)
    gaps = [abs((confidence - correct)[bins == each].sum()) for each in range(10)]
    return float(sum(gaps) / len(correct))
