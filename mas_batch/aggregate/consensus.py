"""How much each agent's free texts are worth, learned without references from the whole corpus."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from mas_batch.aggregate.ballots import ACCURACY_RANGE, UNITS, Ballot
from mas_batch.aggregate.reductions import Reduction
from mas_batch.aggregate.utilities import Utility, symmetric_units

MICRO_UNITS = 10**6
"""A utility of 1 in the integers that a corpus adds up."""

SHARPNESS = 2
"""Exponent of the mean utility in an agent's weight."""

PRIOR_RECORDS = 5
"""An agent starts as if it had been as good as all are on average on so many records."""

UtilitySums = dict[str, tuple[int, int]]
"""Agent → (sum of its mean utilities in `MICRO_UNITS`, number of records)."""


def loo_partial(ballots: Sequence[Ballot], utility: Utility) -> UtilitySums:
    """Return how well each agent's answers to one record agree with the other agents'.

    An agent's figure is the mean over the other agents of the mean symmetrised utility
    between its samples and theirs: its own samples never support each other, and an agent
    with many samples is one voice. A record with a single agent says nothing: {}.

    The idea of a reliability from the similarity to the others' texts: Li and Fukumoto, "A
    dataset of crowdsourced word sequences", AnnoNLP 2019. Cost: one call of the utility on
    the distinct texts.
    """
    texts = sorted({ballot.key for ballot in ballots})
    place = {text: i for i, text in enumerate(texts)}
    places: dict[str, list[int]] = {}
    for ballot in ballots:
        places.setdefault(ballot.agent_id, []).append(place[ballot.key])
    if len(places) < 2:
        return {}
    units = symmetric_units(utility(texts))
    sums: UtilitySums = {}
    for agent_id, own in sorted(places.items()):
        means = [_mean(units, own, other) for name, other in places.items() if name != agent_id]
        sums[agent_id] = (round(MICRO_UNITS * math.fsum(means) / (len(means) * UNITS)), 1)
    return sums


def add(partials: Iterable[Mapping[str, Sequence[int]]]) -> UtilitySums:
    """Add partials up, agent by agent; associative and commutative. Of none: {}."""
    totals: UtilitySums = {}
    for partial in partials:
        for agent_id, (micro_units, num_records) in partial.items():
            so_far = totals.get(agent_id, (0, 0))
            totals[agent_id] = (so_far[0] + micro_units, so_far[1] + num_records)
    return dict(sorted(totals.items()))


def weights(partial: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Return every agent's weight in minimum Bayes risk, the best one's being 1.

    The weight is (u / the best u)^`SHARPNESS`, at least 0.01, where u is the agent's mean
    utility, drawn towards that of all by `PRIOR_RECORDS`. Agents that shared no record with
    another are not in the partial and get no weight. Two limits: u also tells how hard an
    agent's records were, so all should have answered much the same ones; and agents that make
    the same mistakes, such as two decodings of one bad model, praise each other.

    Why squared (`benchmarks/mbr_quality.py`: 100 translations, chrF; exponents 1, 2, 3). Of
    agents that are wrong in 0, 60 and 60 % the best alone has 77.6 and equal weights give 63.1;
    wrong answers seldom agree, so any lead of the best breaks the ties: 77.2, 77.3, 77.6. To
    ignore a model that cannot translate beside two decodings of one that can takes more (best
    alone 77.6, equal 76.3): 76.4, 77.3, 77.4. With errors of 10, 45, 50, 55 and 60 % too much
    silences the weak, whose agreement is evidence (71.2, 72.2): 75.3, 74.6, 72.6. Equal agents
    stay within some 2 % of each other. A prior of 3 to 10 records changes 0.3 at most.
    """
    num_records = sum(number for _, number in partial.values())
    if not num_records:
        return {}
    average = sum(micro_units for micro_units, _ in partial.values()) / num_records
    utilities = {
        agent_id: (micro_units + PRIOR_RECORDS * average) / (number + PRIOR_RECORDS)
        for agent_id, (micro_units, number) in partial.items()
    }
    best = max(utilities.values())
    if best == 0:  # all utilities are 0: no agent is better
        return dict.fromkeys(utilities, 1.0)
    # Above 0, so that a record which only the worst agent answered still has an answer.
    return {
        agent_id: max((utility / best) ** SHARPNESS, ACCURACY_RANGE[0])
        for agent_id, utility in utilities.items()
    }


SUPPORT = Reduction("support", loo_partial, add, weights)
"""Of one record's ballots and a utility; the figures are the weights."""


def _mean(units: Sequence[Sequence[int]], rows: Sequence[int], columns: Sequence[int]) -> float:
    return sum(units[i][j] for i in rows for j in columns) / (len(rows) * len(columns))
