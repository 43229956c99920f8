"""How alike the agents answer: agents that say the same cannot correct each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pkgutil import resolve_name

import numpy as np

from mas_batch.aggregate.answer_kinds import ANSWER_KINDS
from mas_batch.aggregate.chrf import chrf_matrix
from mas_batch.evaluation.libraries import library
from mas_batch.evaluation.systems import Evidence, Indices, Mask, Vector, number_texts
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


@dataclass(frozen=True, slots=True, eq=False)
class FirstAnswers:
    """Every agent's first answers, to compare."""

    evidence: Evidence
    answered: Mapping[str, Indices]
    """Agent → record → candidate, -1 where there is no answer."""
    said: Indices
    """Number of each candidate's answer in normalised form, the same for equal ones."""
    references: Indices
    """The same of each record's reference."""
    seed: int
    """Of samples."""

    def pairs(self) -> Iterator[tuple[tuple[str, str], Indices, Indices]]:
        """Yield every two agents, and the candidates of each for the records that both answered."""
        for a, b in combinations(self.answered, 2):
            both = (self.answered[a] >= 0) & (self.answered[b] >= 0)
            yield (a, b), self.answered[a][both], self.answered[b][both]


PairFacts = Callable[[FirstAnswers], Mapping[tuple[str, str], Mapping[str, float | None]]]
"""Pair → further fields of its `AgentPair`; pairs that nothing is known of may be left out."""


def pairwise_agreement(evidence: Evidence, answer_kind: str, seed: int) -> tuple[AgentPair, ...]:
    """Compare every two agents; a record that one of them did not answer is left out.

    Raises:
        RunError: answers are labels, and scikit-learn is not installed.
    """
    answered = _answered(evidence)
    _, codes = number_texts([*evidence.references, *(answer or "" for answer in evidence.answers)])
    references, said = codes[: evidence.num_records], codes[evidence.num_records :]
    first = FirstAnswers(evidence, answered, said, references, seed)
    facts: PairFacts = resolve_name(ANSWER_KINDS[answer_kind].agreement)
    further = facts(first)
    return tuple(
        AgentPair(a, b, len(left), _mean(said[left] == said[right]), **further.get((a, b), {}))
        for (a, b), left, right in first.pairs()
    )


def label_agreement(first: FirstAnswers) -> dict[tuple[str, str], dict[str, float | None]]:
    """Return kappa, and how often the same error is made; `PairFacts`.

    Source of kappa: Cohen, "A coefficient of agreement for nominal scales", 1960; it is
    scikit-learn's.
    """
    facts: dict[tuple[str, str], dict[str, float | None]] = {}
    for pair, left, right in first.pairs():
        right_label = first.references[first.evidence.record_of[left]]
        a, b = first.said[left], first.said[right]
        wrong = (a != right_label) & (b != right_label)
        facts[pair] = {"kappa": _kappa(a, b), "same_error": _mean(a[wrong] == b[wrong])}
    return facts


def value_agreement(first: FirstAnswers) -> dict[tuple[str, str], dict[str, float | None]]:
    """Return the mean difference of numbers; `PairFacts`."""
    values = np.array([float(answer or "nan") for answer in first.evidence.answers])
    return {
        pair: {"mean_difference": _mean(np.abs(values[left] - values[right]))}
        for pair, left, right in first.pairs()
    }


def text_agreement(first: FirstAnswers) -> dict[tuple[str, str], dict[str, float]]:
    """Return the mean symmetrised chrF; `PairFacts`. All pairs of a record are compared at once."""
    evidence = first.evidence
    sample = np.random.default_rng(first.seed).permutation(evidence.num_records)[:MAX_TEXTS]
    found: dict[tuple[str, str], list[float]] = {}
    for record in np.sort(sample).tolist():
        there = {agent: own[record] for agent, own in first.answered.items() if own[record] >= 0}
        matrix = chrf_matrix([evidence.answers[i] or "" for i in there.values()])
        for (i, a), (j, b) in combinations(enumerate(there), 2):
            found.setdefault((a, b), []).append((matrix[i, j] + matrix[j, i]) / 2)
    return {pair: {"utility": float(np.mean(utilities))} for pair, utilities in found.items()}


def _answered(evidence: Evidence) -> dict[str, Indices]:
    """Agent → record → candidate, -1 where there is no answer, whatever the cause."""
    missing = np.array([*(answer is None for answer in evidence.answers), True], np.bool_)
    agents = {agent.name: agent.first_answers for agent in evidence.of(Kind.AGENT)}
    # -1, not asked, reads the True at the end.
    return {name: np.where(missing[first], -1, first) for name, first in agents.items()}


def _mean(values: Mask | Vector) -> float | None:
    return float(values.mean()) if len(values) else None


def _kappa(left: Indices, right: Indices) -> float | None:
    if len(np.union1d(left, right)) < 2:
        return None
    return float(library("sklearn.metrics").cohen_kappa_score(left, right))
