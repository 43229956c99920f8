"""How alike the agents answer: agents that say the same cannot correct each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from mas_batch.aggregate.chrf import chrf_matrix
from mas_batch.evaluation.libraries import library
from mas_batch.evaluation.systems import Evidence, Indices, Mask, number_texts
from mas_batch.quality import Kind

MAX_TEXTS = 1000
"""Records whose texts are compared pair by pair; of more, a random sample."""


@dataclass(frozen=True, slots=True)
class AgentPair:
    """Two agents' first answers to the records that both answered."""

    agent_a: str
    agent_b: str
    num_records: int
    equal: float | None
    """Share of equal answers in normalised form; None: no record has answers of both."""
    kappa: float | None = None
    """Labels: Cohen's kappa; None where both always say one and the same label."""
    same_error: float | None = None
    """Labels: of the records where both are wrong, the share where they say the same."""
    utility: float | None = None
    """Texts: mean symmetrised chrF, in [0, 1]."""
    mean_difference: float | None = None
    """Numbers: mean absolute difference."""


def pairwise_agreement(evidence: Evidence, answer_kind: str, seed: int) -> tuple[AgentPair, ...]:
    """Compare every two agents; a record that one of them did not answer is left out.

    Source of kappa: Cohen, "A coefficient of agreement for nominal scales", 1960; it is
    scikit-learn's.

    Raises:
        RunError: answers are labels, and scikit-learn is not installed.
    """
    answered = _answered(evidence)
    _, codes = number_texts([*evidence.references, *(answer or "" for answer in evidence.answers)])
    references, said = codes[: evidence.num_records], codes[evidence.num_records :]
    utilities = _utilities(evidence, answered, seed) if answer_kind == "text" else {}
    pairs = []
    for a, b in combinations(answered, 2):
        both = (answered[a] >= 0) & (answered[b] >= 0)
        left, right = answered[a][both], answered[b][both]
        equal = _mean(said[left] == said[right])
        pair = AgentPair(a, b, len(left), equal, utility=utilities.get((a, b)))
        if answer_kind == "label":
            kappa = _kappa(said[left], said[right])
            same = _same_error(said[left], said[right], references[both])
            pair = AgentPair(a, b, len(left), equal, kappa, same)
        elif answer_kind == "value":
            difference = _mean_difference(evidence.answers, left, right)
            pair = AgentPair(a, b, len(left), equal, mean_difference=difference)
        pairs.append(pair)
    return tuple(pairs)


def _answered(evidence: Evidence) -> dict[str, Indices]:
    """Agent → record → candidate, -1 where there is no answer, whatever the cause."""
    missing = np.array([*(answer is None for answer in evidence.answers), True], np.bool_)
    agents = {agent.name: agent.first_answers for agent in evidence.of(Kind.AGENT)}
    # -1, not asked, reads the True at the end.
    return {name: np.where(missing[first], -1, first) for name, first in agents.items()}


def _mean(values: Mask) -> float | None:
    return float(values.mean()) if len(values) else None


def _kappa(left: Indices, right: Indices) -> float | None:
    if len(np.union1d(left, right)) < 2:
        return None
    return float(library("sklearn.metrics").cohen_kappa_score(left, right))


def _same_error(left: Indices, right: Indices, references: Indices) -> float | None:
    wrong = (left != references) & (right != references)
    return _mean(left[wrong] == right[wrong])


def _mean_difference(answers: Sequence[str | None], left: Indices, right: Indices) -> float | None:
    def numbers(side: Indices) -> list[float]:
        return [float(answers[i] or "nan") for i in side]

    return float(np.mean(np.abs(np.subtract(numbers(left), numbers(right))))) if len(left) else None


def _utilities(
    evidence: Evidence, answered: Mapping[str, Indices], seed: int
) -> dict[tuple[str, str], float]:
    """Return pair → mean symmetrised chrF; all pairs of a record are compared at once."""
    num_records = evidence.num_records
    sample = np.random.default_rng(seed).permutation(num_records)[:MAX_TEXTS]
    sums: dict[tuple[str, str], list[float]] = {}
    for record in np.sort(sample).tolist():
        there = {agent: first[record] for agent, first in answered.items() if first[record] >= 0}
        matrix = chrf_matrix([evidence.answers[i] or "" for i in there.values()])
        for (i, a), (j, b) in combinations(enumerate(there), 2):
            sums.setdefault((a, b), []).append((matrix[i, j] + matrix[j, i]) / 2)
    return {pair: float(np.mean(values)) for pair, values in sums.items()}
